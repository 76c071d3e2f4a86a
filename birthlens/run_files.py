"""A run on disk: one self-describing directory, written so that a kill at any moment corrupts nothing.

    run.json                      format, versions, config, vocabulary, engine, machine
    tables.safetensors            unigram and bigram distributions of the corpus, ids of the fixed triggers
    constants.safetensors         parameters that training never moves, once
    checkpoints/step_00000120.safetensors   the trained parameters at that step (step = updates applied)
    metrics.jsonl                 one measurement a line: step, split, metric, value, n
    resume.safetensors            optimiser state at the last kept step, and what the schedules remember

docs/format.md is the written form of this. Analysis never needs the corpus file again.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np

from birthlens import __version__
from birthlens.errors import BirthlensError
from birthlens.weights import load_tensors

FORMAT = 1
Array = np.ndarray


def checkpoint_file(path: Path, step: int) -> Path:
    """Name the file of a step."""
    return path / "checkpoints" / f"step_{step:08d}.safetensors"


def kept_steps(path: Path) -> list[int]:
    """List the steps whose weights are kept, ascending."""
    folder = path / "checkpoints"
    steps = sorted(int(file.stem.removeprefix("step_")) for file in folder.glob("step_*.safetensors"))
    if not steps:
        raise BirthlensError(f"{folder} holds no checkpoint; the run was stopped before its first or is damaged.")
    return steps


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the measurements of a run; the last line may be torn by a kill, an earlier one means damage."""
    file = path / "metrics.jsonl"
    if not file.exists():
        return []
    lines = file.read_bytes().decode("utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise BirthlensError(f"{file} is damaged at line {number}; delete that line or train again.") from None
    return rows


def versions() -> dict[str, str]:
    """Say what made a result: versions of Python, the packages that compute, and the machine."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in ("birthlens", "torch", "transformer-lens", "numpy", "numba"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def read_tables(path: Path) -> dict[str, Array]:
    """Read the tables of the task."""
    tables = load_tensors(path / "tables.safetensors")
    if not {"unigram", "bigram"} <= tables.keys():
        raise BirthlensError(f"{path / 'tables.safetensors'} lacks the corpus tables; the run is damaged.")
    return tables


def read_header(path: Path) -> dict[str, Any]:
    """Read run.json; raise BirthlensError where it is missing, damaged, or of a newer format."""
    file = path / "run.json"
    if not path.is_dir():
        raise BirthlensError(f"run = {str(path)!r} does not exist; give the directory that `birthlens train` wrote.")
    if not file.exists():
        raise BirthlensError(f"run = {str(path)!r} holds no run.json; it is no run, or its training never started.")
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
        newer = header["format"] > FORMAT
        header["config"], header["vocab"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise BirthlensError(f"{file} is damaged ({error}); restore it or train again.") from None
    if newer:
        raise BirthlensError(
            f"{file} has format {header['format']}, this birthlens {__version__} reads up to {FORMAT}; upgrade birthlens."
        )
    return dict(header)


def read_metadata(file: Path) -> dict[str, str]:
    """Read the text that rides along in a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as opened:
        return dict(opened.metadata() or {})
