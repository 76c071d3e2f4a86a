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
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from birthlens._version import __version__
from birthlens.errors import BirthlensError
from birthlens.model.weights import load_tensors

FORMAT = 1
METRIC_COLUMNS = {"step", "split", "metric", "value", "n"}
Array = np.ndarray


def checkpoint_file(path: Path, step: int) -> Path:
    """Name the file of a step."""
    return path / "checkpoints" / f"step_{step:08d}.safetensors"


def listed_steps(path: Path) -> list[int]:
    """List the steps whose weights are kept, ascending; other files in the folder are let alone."""
    files = (path / "checkpoints").glob("step_*.safetensors")
    numbers = (file.stem.removeprefix("step_") for file in files)
    steps = sorted(int(number) for number in numbers if number.isascii() and number.isdigit())
    return [step for step in steps if checkpoint_file(path, step).exists()]


def kept_steps(path: Path) -> list[int]:
    """List the steps whose weights are kept, ascending, or raise BirthlensError where there is none."""
    steps = listed_steps(path)
    if not steps:
        raise BirthlensError(
            f"{path / 'checkpoints'} holds no checkpoint; the run was stopped before its first (go on with "
            "`birthlens train OUT --resume`) or is damaged."
        )
    return steps


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the measurements of a run; the last line may be torn by a kill, anything else that is no row means damage."""
    file = path / "metrics.jsonl"
    if not file.exists():
        return []
    lines = file.read_bytes().decode("utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        row = None
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
        if not isinstance(row, dict) or not row.keys() >= METRIC_COLUMNS or not isinstance(row["step"], int):
            raise BirthlensError(f"{file} is damaged at line {number}; delete that line or train again.")
        rows.append(row)
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


@cache
def commit(root: Path = Path(__file__).parents[2]) -> str | None:
    """Return the commit of the checkout at `root`, with "-dirty" where files differ from it; None where it is none.

    It tells people where to look. Whether a result may be used again is for `provenance` to say: it reads the code.
    """
    import subprocess

    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def read_tables(path: Path, n: int) -> dict[str, Array]:
    """Read the tables of the task, for a vocabulary of n tokens."""
    file = path / "tables.safetensors"
    tables = load_tensors(file)
    for name, shape in {"unigram": (n,), "bigram": (n, n)}.items():
        if name not in tables:
            raise BirthlensError(f"{file} lacks the corpus tables; the run is damaged.")
        if tables[name].shape != shape:
            raise BirthlensError(
                f"{file} has a {name} of shape {tables[name].shape} for {n} tokens; the run is damaged."
            )
    return tables


def read_header(path: Path) -> dict[str, Any]:
    """Read run.json; raise BirthlensError where it is missing, damaged, or of a newer format."""
    file = path / "run.json"
    if path.is_file():
        raise BirthlensError(f"run = {str(path)!r} is a file; give the directory that `birthlens train` wrote.")
    if not path.is_dir():
        raise BirthlensError(f"run = {str(path)!r} does not exist; give the directory that `birthlens train` wrote.")
    if not file.exists():
        raise BirthlensError(f"run = {str(path)!r} holds no run.json; it is no run, or its training never started.")
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BirthlensError(f"{file} is damaged ({error}); restore it or train again.") from None
    if isinstance(header, dict) and isinstance(header.get("format"), int) and header["format"] > FORMAT:
        raise BirthlensError(
            f"{file} has format {header['format']}, this birthlens {__version__} reads up to {FORMAT}; upgrade birthlens."
        )
    if reason := _fault(header):
        raise BirthlensError(f"{file} is damaged ({reason}); restore it or train again.")
    return dict(header)


def _fault(header: Any) -> str | None:
    """Say what a header lacks, or None where it is whole."""
    if not isinstance(header, dict):
        return f"it holds a {type(header).__name__}, not a mapping"
    for key, kind in {"format": int, "config": dict, "vocab": list, "engine": dict}.items():
        if not isinstance(header.get(key), kind):
            return f"its {key!r} is {'missing' if key not in header else 'no ' + kind.__name__}"
    if not all(isinstance(token, str) for token in header["vocab"]):
        return "its 'vocab' holds something else than strings"
    return None if isinstance(header["engine"].get("name"), str) else "its 'engine' has no name"


def read_notes(file: Path) -> dict[str, Any]:
    """Read the notes that ride along in resume.safetensors; they say at least which step it belongs to."""
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as opened:
        text = (opened.metadata() or {}).get("notes", "")
    try:
        notes = json.loads(text)
    except json.JSONDecodeError:
        notes = None
    if not isinstance(notes, dict) or not isinstance(notes.get("step"), int):
        raise BirthlensError(f"{file} does not say which step it belongs to; the run is damaged, train again.")
    return notes
