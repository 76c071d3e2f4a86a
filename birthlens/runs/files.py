"""A run on disk: one self-describing directory, written so that a kill at any moment corrupts nothing.

    run.json                      format, versions, config, vocabulary, engine, machine
    tables.safetensors            unigram and bigram distributions of the corpus, ids of the fixed triggers
    constants.safetensors         parameters that training never moves, once
    checkpoints/step_00000120.safetensors   the trained parameters at that step (step = updates applied)
    metrics.jsonl                 one measurement per line: step, split, metric, value, n
    resume.safetensors            optimiser state at the last kept step, and the state of the schedules

docs/format.md specifies this format. Analysis never needs the corpus file again.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

from birthlens.errors import BirthlensError
from birthlens.system import is_temporary

HEADER = "run.json"
TABLES = "tables.safetensors"
CONSTANTS = "constants.safetensors"
METRICS = "metrics.jsonl"
RESUME = "resume.safetensors"
COST = "cost.json"
CHECKPOINTS = "checkpoints"


def checkpoint_file(path: Path, step: int) -> Path:
    """Return the file of a step."""
    return path / CHECKPOINTS / f"step_{step:08d}.safetensors"


def checkpoint_name(step: int) -> str:
    """Return the name of a step's file, relative to the run's directory, as used in its digest."""
    return f"{CHECKPOINTS}/step_{step:08d}.safetensors"


def temporaries(path: Path) -> list[Path]:
    """List the temporary files of killed writers; no other process writes them, because a run has one writer."""
    ours = (HEADER, TABLES, CONSTANTS, METRICS, RESUME, COST)
    found = [file for name in ours for file in path.glob(f".{name}.*.tmp")]
    found += (path / CHECKPOINTS).glob(".step_*.tmp")
    return [file for file in found if is_temporary(file)]


def remove_temporaries(path: Path) -> None:
    """Remove the temporary files of killed writers; the caller holds the run's lock."""
    for file in temporaries(path):
        file.unlink(missing_ok=True)


def listed_steps(path: Path) -> list[int]:
    """List the steps whose weights are kept, ascending; other files in the folder are ignored."""
    files = (path / CHECKPOINTS).glob("step_*.safetensors")
    numbers = (file.stem.removeprefix("step_") for file in files)
    steps = sorted(int(number) for number in numbers if number.isascii() and number.isdigit())
    return [step for step in steps if checkpoint_file(path, step).exists()]


def kept_steps(path: Path) -> list[int]:
    """List the steps whose weights are kept, ascending, or raise BirthlensError if there is none."""
    steps = listed_steps(path)
    if not steps:
        raise BirthlensError(
            f"{path / CHECKPOINTS} holds no checkpoint; the run was stopped before its first (continue it with "
            "`birthlens train OUT --resume`) or is damaged."
        )
    return steps


def versions() -> dict[str, str]:
    """Return the environment of a result: the versions of Python and of the packages that compute, and the machine."""
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
    """Return the commit of the checkout at `root`, with "-dirty" if files differ from it; None outside a checkout.

    It is for information. `provenance`, which reads the code, decides whether a result may be reused.
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
