"""The standing of a run's directory: may it be used again or continued, or must it be made anew, and why.

A run is used again only where all of this holds: its config is the one asked for, its corpus tables are those of the text
as it is now, the training code and the packages are those that made it, and nothing that the schedule keeps or measures is
missing or damaged. Made by something else or damaged, it is made anew; another config or another text is refused, since
somebody put it there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from birthlens._version import __version__
from birthlens.config.run import RunConfig
from birthlens.config.schedule import Schedule
from birthlens.errors import BirthlensError
from birthlens.model.weights import load_tensors
from birthlens.runs.files import read_metrics, read_notes, versions
from birthlens.runs.provenance import TRAINING, code_digest, corpus_digest
from birthlens.runs.run import Run
from birthlens.system import write_atomically
from birthlens.tasks.kinds import chain_of

Standing = Literal["trained", "continued", "reused"]
_OURS = {"checkpoints", "tables.safetensors", "constants.safetensors", "metrics.jsonl", "run.json", "resume.safetensors",
         "cost.json"}  # fmt: skip
_DAMAGES = (BirthlensError, OSError, ValueError, TypeError, KeyError, AttributeError)
"""What reading a file raises that is not what it was."""


def standing(config: RunConfig, path: Path) -> tuple[Standing, str]:
    """Say what has to be done for a run, and why where it must be made anew; what stood there is then cleared away.

    Raises:
        BirthlensError: where the directory holds something else; it is left alone.
    """
    if not path.exists():
        return "trained", ""
    reason = _reason(config, path)
    if not reason:
        return ("reused" if Run(path).finished else "continued"), ""
    if strangers := {file.name for file in path.iterdir() if not file.name.startswith(".")} - _OURS:
        raise BirthlensError(f"it cannot be used ({reason}) and holds {', '.join(sorted(strangers))}; move that away.")
    shutil.rmtree(path)
    return "trained", f"anew, since {reason}"


def _reason(config: RunConfig, path: Path) -> str:
    """Say why a directory cannot be used; empty where it can."""
    if not (path / "run.json").exists():
        return "it was stopped before its first checkpoint"
    try:
        run = Run(path)
        digest = corpus_digest(run.statistics)
    except _DAMAGES as error:
        return f"it is damaged: {error}"
    if run.config != config:
        raise BirthlensError(
            "the run has another config than the one asked for; delete it or choose another directory."
        )
    if digest != corpus_digest(chain_of(config)):
        raise BirthlensError(
            "the run was trained on another text than its corpus now is; delete it or restore the text."
        )
    if other := made_by_other(run.header):
        return other
    try:
        return _damage(run)
    except _DAMAGES as error:
        return f"it is damaged: {error}"


def made_by_other(header: Mapping[str, Any]) -> str:
    """Say by which other code or packages a run was made; empty where by these."""
    then = {**header.get("versions", {}), "birthlens": header.get("birthlens")}
    for package, version in {**versions(), "birthlens": __version__}.items():
        if then.get(package) != version:
            return f"it was made by other code ({package} {then.get(package)}, this is {version})"
    if header.get("code") != code_digest(TRAINING):
        return f"it was made by other code (its training code is {header.get('code')}, this is {code_digest(TRAINING)})"
    return ""


def _damage(run: Run) -> str:
    """Look for what the schedule kept or measured and is no longer there; files that do not open raise."""
    cost(run.path)
    schedule, steps = Schedule(run.config), run.steps
    last = steps[-1]
    if not run.finished:
        file = run.path / "resume.safetensors"
        load_tensors(file)
        last = read_notes(file)["step"]
    expected = [step for step in range(last + 1) if schedule.planned(step)]
    if lost := sorted({*expected, last} - set(steps)):
        return f"it is damaged: step {lost[0]} is not kept"
    for _ in run.checkpoints():  # each must open and be whole
        pass
    measured: dict[int, set[str]] = {}
    for row in read_metrics(run.path):
        if row["split"] == "held_out":
            measured.setdefault(row["step"], set()).add(row["metric"])
    every = set[str]().union(*measured.values())
    for step in range(last + 1):
        if schedule.evaluates(step) and measured.get(step) != every:
            return f"it is damaged: metrics.jsonl lacks what was measured at step {step}"
    return ""


def cost(path: Path) -> tuple[float, float]:
    """Return the seconds and CPU seconds that a run has cost so far."""
    file = path / "cost.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    return float(found.get("seconds", 0.0)), float(found.get("cpu_seconds", 0.0))


def write_cost(path: Path, spent: Sequence[float]) -> None:
    """Keep what a run has cost."""
    report = {"seconds": round(spent[0], 3), "cpu_seconds": round(spent[1], 3)}
    write_atomically(path / "cost.json", json.dumps(report).encode())
