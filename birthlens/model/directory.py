"""A Hugging Face model in a local directory, checked before and after it is read; nothing is fetched.

Every tensor of the model must come from the files, and every tensor in the files must go into the model. Otherwise
Transformers would fill missing tensors with random numbers.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from birthlens.errors import BirthlensError
from birthlens.labels import shown
from birthlens.reading import read_mapping

_LFS = b"version https://git-lfs"
_COMPILED = "_orig_mod."
INDEX = "model.safetensors.index.json"


def load_causal(path: str | Path) -> Any:
    """Load a causal language model of Transformers from a local directory, in float32, for evaluation.

    Raises:
        BirthlensError: if the directory contains no such model, its files are damaged or run code, or its tensors are not
            exactly those of the model; the message names the directory or file.
    """
    directory = Path(path).absolute()  # a bare name could be looked up elsewhere
    check_directory(directory)
    transformers = _transformers()
    with quiet():
        try:
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                str(directory),
                local_files_only=True,
                output_loading_info=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                dtype=torch.float32,
                attn_implementation="eager",
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BirthlensError(f"model = {str(path)!r} cannot be loaded: {reason}") from None
    _check_tensors(directory, found)
    for name, tensor in model.named_parameters():
        if not bool(tensor.isfinite().all()):
            raise BirthlensError(f"model = {str(path)!r} has numbers in {name} that are not finite.")
    _check_causal(directory, model)
    return model.eval().requires_grad_(False)


def load_tokenizer(path: str | Path) -> Any:
    """Load the tokenizer of a directory; None if it has none, so that ids are needed."""
    directory = Path(path).absolute()
    transformers = _transformers()

    if not any(
        (directory / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    ):
        return None
    with quiet():
        try:
            return transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BirthlensError(f"tokenizer of {str(path)!r} cannot be loaded: {reason}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the output of other libraries during loading off the streams."""
    transformers = _transformers()
    level = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    nowhere = io.StringIO()
    try:
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _transformers() -> Any:
    """Import Transformers, whose functions are untyped."""
    return import_module("transformers")


def check_directory(directory: Path) -> None:
    """Raise BirthlensError if a directory contains no model, one whose loading would run code, or damaged files."""
    if not (directory / "config.json").is_file():
        raise BirthlensError(
            f"model = {str(directory)!r} is not a directory with a Hugging Face model (config.json and weights)."
        )
    if "auto_map" in read_mapping(directory / "config.json", "model"):
        raise BirthlensError(
            f"model = {str(directory)!r} has an auto_map in config.json, which runs code of the model; birthlens runs none."
        )
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for ending in ("*.bin", "*.pt", "*.pth") for file in directory.glob(ending))
        if pickles:
            raise BirthlensError(
                f"model = {str(directory)!r} holds its weights as a pickle ({pickles[0]}), which can run code when it is "
                "read; convert it to safetensors (in Transformers, save_pretrained does) and give that directory."
            )
        raise BirthlensError(f"model = {str(directory)!r} has no weights: it holds no .safetensors file.")
    if (directory / INDEX).exists():
        parts = read_mapping(directory / INDEX, "model").get("weight_map")
        named = set(parts.values()) if isinstance(parts, dict) else set()
        if lacking := sorted(str(name) for name in named if not (directory / str(name)).is_file()):
            raise BirthlensError(f"{directory / INDEX} names {shown(lacking)}, which the directory does not hold.")
    for file in files:
        check_file(file)


def check_file(file: Path) -> None:
    """Raise BirthlensError, naming the file, if a safetensors file is a pointer, is truncated, or is something else."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(max(8, len(_LFS)))
        if start.startswith(_LFS):
            raise BirthlensError(f"{file} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`.")
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > size - 8:
            raise BirthlensError(
                f"{file} is damaged: its {size:,} bytes end within its header, or it is not a safetensors file."
            )
        stream.seek(8)
        try:
            header = json.loads(stream.read(length))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, RecursionError, KeyError, TypeError, IndexError, AttributeError):
            raise BirthlensError(f"{file} is damaged: its header cannot be read.") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise BirthlensError(f"{file} is damaged: it has {size:,} bytes where its header says {expected:,}.")


def _check_tensors(directory: Path, found: dict[str, Any]) -> None:
    missing = sorted(found["missing_keys"])
    unexpected = sorted(found["unexpected_keys"])
    unlike = sorted(str(entry[0]) for entry in found["mismatched_keys"])
    if not (missing or unexpected or unlike):
        return
    parts = [
        f"lack {_listed(missing)}" if missing else "",
        f"also hold {_listed(unexpected)}" if unexpected else "",
        f"have another shape of {_listed(unlike)}" if unlike else "",
    ]
    said = " and ".join(part for part in parts if part)
    hint = ""
    if any(_COMPILED in name for name in unexpected):
        hint = " A model compiled by torch.compile names its tensors so; save the model that was compiled."
    raise BirthlensError(f"model = {str(directory)!r}: its weights {said}, so they are not this model's.{hint}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_causal(directory: Path, model: Any) -> None:
    """Check that changing the last token does not change earlier logits."""
    vocabulary = int(model.config.vocab_size)
    length = 4
    tokens = torch.arange(length)[None] % vocabulary
    other = tokens.clone()
    other[0, -1] = (tokens[0, -1] + 1) % vocabulary
    try:
        with torch.no_grad(), quiet():
            one, two = (model(ids, use_cache=False).logits[0, : length - 1] for ids in (tokens, other))
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BirthlensError(f"model = {str(directory)!r} ({type(model).__name__}) cannot be run: {reason}") from None
    if not torch.allclose(one, two, atol=1e-5 * float(one.abs().max())):
        kind = type(model).__name__
        raise BirthlensError(
            f"model = {str(directory)!r} is not a causal language model: its predictions ({kind}) depend on later tokens."
        )
