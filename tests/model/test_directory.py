"""Models of other architectures from disk: the numbers are the files', every edit acts, and what cannot be is refused."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, D_VOCAB, saved

from birthlens.analysis.behaviour.head_weights import HeadWeights
from birthlens.analysis.interventions.ablation import ablation_table
from birthlens.analysis.interventions.corruptions import pair_of
from birthlens.analysis.interventions.patching import patched_table
from birthlens.analysis.interventions.spec import EdgeIntervention, Intervention
from birthlens.cli import group
from birthlens.errors import BirthlensError
from birthlens.model.components import edges_of
from birthlens.model.directory import load_causal
from birthlens.model.hooked import load_pretrained
from birthlens.model.hooks import captured, edited
from birthlens.model.sites import Head, HeadInput, Logits, Point
from birthlens.tasks.positions import repeated_tokens

SEALED_PATTERNS = {"opt", "gptj"}
"""Architectures whose code goes on with patterns that no hook sees."""
SEALED_READERS = {"opt", "gptj", "bloom"}
"""Architectures whose heads' inputs are not shown, or are not the residual stream."""
SEALED_STREAMS = {"gemma2", "olmo2", "soft caps"}
"""Architectures with a norm between what a sublayer writes and the residual stream."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "one key head": ("llama", {"num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True}),
    "soft caps": ("gemma2", {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.7}),
    "sequential blocks": ("neox", {"use_parallel_residual": False, "rotary_pct": 0.5}),
    "sliding window": ("mistral", {"sliding_window": 4}),
}
"""Other models of an architecture: its name, and what differs."""
OUTPUT = {"gpt2": "c_proj", "neox": "dense", "opt": "out_proj", "gptj": "out_proj", "bloom": "dense"}
"""The module that reads the outputs of all heads, where it is not called o_proj."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("transformers")
    made: dict[str, Any] = {}

    def model(name: str) -> Any:
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            base, changes = VARIANTS.get(name, (name, {}))
            made[name] = (saved(base, directory, **changes), load_pretrained(directory), directory)
        return made[name]

    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_patterns_are_those_of_the_library_that_saved_it(models: Any, name: str) -> None:
    theirs, ours, _ = models(name)
    tokens = repeated_tokens(3, 6, D_VOCAB, np.random.default_rng(0)).tokens
    with torch.no_grad():
        theirs.set_attn_implementation("eager")
        expected = theirs(tokens, output_attentions=True)
        torch.testing.assert_close(ours(tokens), expected.logits, atol=1e-4, rtol=1e-4)
    patterns = captured(ours, tokens, [Point("pattern", 1)])[Point("pattern", 1)]
    torch.testing.assert_close(patterns, expected.attentions[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *VARIANTS])
def test_edits_are_what_plain_pytorch_hooks_on_the_original_model_do(models: Any, name: str) -> None:
    theirs, ours, _ = models(name)
    tokens = torch.randint(D_VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    theirs.set_attn_implementation("eager")
    last = OUTPUT.get(VARIANTS.get(name, (name,))[0], "o_proj")
    named = list(theirs.named_modules())
    outputs = [module for path, module in named if path.endswith(f".{last}") and "att" in path]
    block = next(module for path, module in named if path.split(".")[-2:] in (["layers", "1"], ["h", "1"]))
    d_head = ours.cfg.d_head
    noise = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))

    def one_head(module: Any, inputs: Any) -> Any:
        return (torch.cat([inputs[0][..., :d_head], 0 * inputs[0][..., d_head:]], -1), *inputs[1:])

    def shifted(module: Any, inputs: Any, others: Any) -> Any:
        return (inputs[0] + noise, *inputs[1:]), others

    def first_head(value: torch.Tensor, rows: object) -> torch.Tensor:
        return torch.cat([value[:, :, :1], 0 * value[:, :, 1:]], 2)

    def moved(value: torch.Tensor, rows: object) -> torch.Tensor:
        return value + noise

    with torch.no_grad():
        unedited = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens), unedited, atol=1e-4, rtol=1e-4)
        for hook, point, edit in (
            (lambda: outputs[0].register_forward_pre_hook(one_head), Point("z", 0), first_head),
            (lambda: block.register_forward_pre_hook(shifted, with_kwargs=True), Point("resid_pre", 1), moved),
        ):
            with hook():
                expected = theirs(tokens).logits
            assert (expected - unedited).abs().max() > 0.01
            with edited(ours, {point: [edit]}):
                torch.testing.assert_close(ours(tokens), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_method_changes_the_output_or_is_refused_by_name(models: Any, name: str) -> None:
    _, ours, _ = models(name)
    batch = repeated_tokens(4, 6, D_VOCAB, np.random.default_rng(0))
    reference = repeated_tokens(4, 6, D_VOCAB, np.random.default_rng(2))
    for method in ("zero", "mean", "resample", "uniform_pattern", "dropped_value"):
        if method == "dropped_value" and name not in ("gpt2", "neox", "opt", "gptj", "bloom"):
            with pytest.raises(BirthlensError, match="at site v, whose heads are shared"):
                ablation_table([(0, ours)], batch, methods=(method,), metrics=("all.loss",), draws=0)
            continue
        if method == "uniform_pattern" and name in SEALED_PATTERNS:
            with pytest.raises(BirthlensError, match="site pattern of layer 0: an edit there has no effect"):
                ablation_table([(0, ours)], batch, methods=(method,), metrics=("all.loss",), draws=0)
            continue
        table = ablation_table([(0, ours)], batch, reference, methods=(method,), metrics=("all.loss",), draws=0)
        changes = table.loc[table["ablated"] != "none", "change"]
        assert len(changes) == 2 * ours.cfg.n_heads and (changes.abs() > 1e-7).all(), method


@pytest.mark.parametrize("name", [*ARCHITECTURES, *VARIANTS])
def test_all_edges_into_the_logits_recover_everything_or_are_refused(models: Any, name: str) -> None:
    _, ours, _ = models(name)
    clean, corrupted = (repeated_tokens(4, 6, D_VOCAB, np.random.default_rng(seed)) for seed in (0, 1))
    cases = {"logits": [EdgeIntervention(edge, "patch") for edge in edges_of(ours.cfg, [Logits()])]}
    if name in SEALED_STREAMS:
        with pytest.raises(BirthlensError, match=r"edges: in this model .* is not the sum"):
            patched_table(ours, pair_of(clean, corrupted), cases)
        return
    assert patched_table(ours, pair_of(clean, corrupted), cases)["recovered"].item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - SEALED_STREAMS))
def test_all_edges_into_a_head_are_its_input_or_are_refused(models: Any, name: str) -> None:
    _, ours, _ = models(name)
    clean, corrupted = (repeated_tokens(4, 6, D_VOCAB, np.random.default_rng(seed)) for seed in (0, 1))
    pair = pair_of(clean, corrupted)
    for letter in ("q", "k", "v"):
        receiver = HeadInput(Head(1, 1), letter)
        edges = {"edges": [EdgeIntervention(edge, "patch") for edge in edges_of(ours.cfg, [receiver])]}
        if name in SEALED_READERS:
            with pytest.raises(BirthlensError, match=r"edges into|cannot be edited"):
                patched_table(ours, pair, edges)
            continue
        node: Any = {"node": [Intervention(letter, "patch", heads=(Head(1, 1),))]}
        together = patched_table(ours, pair, edges | node)["value"]
        assert together[0] == pytest.approx(together[1], abs=1e-4)


def test_heads_of_a_group_share_keys_and_values_in_every_score(models: Any) -> None:
    theirs, ours, directory = models("llama")
    parts = HeadWeights(ours)
    attention = theirs.model.layers[1].self_attn
    for head in range(4):
        rows = slice(4 * (head // 2), 4 * (head // 2) + 4)
        np.testing.assert_allclose(parts.matrix("W_K", Head(1, head)), attention.k_proj.weight[rows].detach().numpy().T)
        np.testing.assert_allclose(parts.matrix("W_V", Head(1, head)), attention.v_proj.weight[rows].detach().numpy().T)
    for kind in ("weights", "composition", "heads", "transfer", "sinks"):
        done = CliRunner().invoke(group, ["scores", str(directory), "--kind", kind, "--format", "csv"])
        assert done.exit_code == 0 and done.stdout.count("L1H3") >= 1, (kind, done.exception)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_disk_is_read_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = saved("neox", tmp_path, dtype=dtype)
    for (name, ours), (_, tensor) in zip(
        load_causal(tmp_path).named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert ours.dtype == torch.float32 and torch.equal(ours, tensor.float()), name


def _edited(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(change(tensors), directory / "model.safetensors", {"format": "pt"})


WEIGHTS = "model.safetensors"
DAMAGES: dict[str, tuple[Any, str]] = {
    "a lost layer": (
        lambda d: _edited(d, lambda t: {n: v for n, v in t.items() if ".h.1." not in n}),
        r"its weights lack transformer.h.1.attn.c_attn.bias, .* and 9 more",
    ),
    "names of a compiled model": (
        lambda d: _edited(d, lambda t: {f"_orig_mod.{n}": v for n, v in t.items()}),
        r"also hold _orig_mod.*torch.compile names its tensors so",
    ),
    "a tensor too many": (
        lambda d: _edited(d, lambda t: {**t, "transformer.h.2.ln_1.weight": torch.ones(16)}),
        r"also hold transformer.h.2.ln_1.weight",
    ),
    "another shape": (
        lambda d: _edited(d, lambda t: {**t, "transformer.wpe.weight": torch.ones(25, 16)}),
        r"have another shape of transformer.wpe.weight",
    ),
    "numbers that are not finite": (
        lambda d: _edited(d, lambda t: {**t, "transformer.wpe.weight": torch.full((24, 16), torch.nan)}),
        r"numbers in transformer.wpe.weight that are not finite",
    ),
    "a file that is cut": (
        lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-100]),
        r"model.safetensors is damaged: it has [\d,]+ bytes where its header says",
    ),
    "a file that is cut early": (
        lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:50]),
        r"model.safetensors is damaged: its 50 bytes end within its header",
    ),
    "an empty file": (lambda d: (d / WEIGHTS).write_bytes(b""), r"model.safetensors is damaged"),
    "a header that is none": (
        lambda d: (d / WEIGHTS).write_bytes((4).to_bytes(8, "little") + b"null"),
        r"model.safetensors is damaged: its header cannot be read",
    ),
    "a pointer": (
        lambda d: (d / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        r"model.safetensors is a Git LFS pointer",
    ),
    "a missing part": (
        lambda d: (d / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "part2.safetensors"}})
        ),
        r"names \['part2.safetensors'\], which the directory does not hold",
    ),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), r"has no weights"),
    "an unknown kind": (
        lambda d: (d / "config.json").write_text(json.dumps({"model_type": "joy"})),
        r"cannot be loaded: .*joy",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_one_sentence_that_names_it(models: Any, damage: str, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(models("gpt2")[2], directory)
    change, said = DAMAGES[damage]
    change(directory)
    with pytest.raises(BirthlensError, match=said) as error:
        load_pretrained(directory)
    assert str(directory) in str(error.value) and "\n" not in str(error.value)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=D_VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        initializer_range=0.5,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(BirthlensError, match="is not a causal language model"):
        load_pretrained(tmp_path)


def test_a_folder_named_like_a_model_of_the_hub_is_the_folder(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, _, directory = models("neox")
    shutil.copytree(directory, tmp_path / "pythia-70m")
    monkeypatch.chdir(tmp_path)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_pretrained("pythia-70m")(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)
