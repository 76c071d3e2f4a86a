"""What is kept of each checkpoint of a series to compare it with the others: digests, samples and files, not the weights.

Of each tensor a digest of its values in float32, and up to `SAMPLES` evenly spaced entries. One tensor is in memory at once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from birthlens.errors import BirthlensError
from birthlens.model.directory import check_directory
from birthlens.reading import read_mapping

SAMPLES = 1024
"""Entries kept of a tensor."""
IDLE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
"""Entries of config.json that say nothing about the model."""
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
"""Files that decide which ids a text becomes."""


@dataclass(frozen=True, eq=False)
class TensorPrint:
    """One tensor: its shape, a digest of its values, evenly spaced entries, and whether all its entries are equal."""

    shape: tuple[int, ...]
    digest: bytes
    sample: np.ndarray
    constant: bool

    @property
    def weight(self) -> float:
        """How many entries of the tensor each entry of the sample stands for."""
        return float(np.prod(self.shape)) / max(len(self.sample), 1)


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """One checkpoint: its floating-point tensors by name, its config, and digests of its tokenizer's files."""

    tensors: dict[str, TensorPrint]
    config: dict[str, Any]
    tokenizer: dict[str, str]


def fingerprint(directory: Path) -> Fingerprint:
    """Read one checkpoint, tensor by tensor.

    Raises:
        BirthlensError: if the directory holds no model, or its files are damaged.
    """
    check_directory(directory)
    tensors: dict[str, TensorPrint] = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(str(file), framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118  it is no mapping
                    tensor = stored.get_tensor(name)
                    if tensor.is_floating_point():
                        tensors[name] = _printed(tensor)
        except (OSError, ValueError, RuntimeError) as error:
            raise BirthlensError(f"{file} cannot be read: {error}") from None
    config = read_mapping(directory / "config.json", "model")
    files = {name: directory / name for name in TOKENIZER}
    digests = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file.is_file()}
    return Fingerprint(tensors, {key: value for key, value in config.items() if key not in IDLE}, digests)


def _printed(tensor: torch.Tensor) -> TensorPrint:
    values = tensor.float().contiguous().flatten().numpy()
    where = np.unique(np.linspace(0, max(len(values) - 1, 0), min(SAMPLES, len(values))).astype(np.int64))
    constant = len(values) > 0 and bool((values == values[0]).all())
    return TensorPrint(tuple(tensor.shape), hashlib.sha256(values.data).digest(), values[where].copy(), constant)
