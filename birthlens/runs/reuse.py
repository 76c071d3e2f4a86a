"""Whether a run's directory may be reused or continued, or must be trained again, and why.

A run is reused only if all of this holds: its config is the requested one, its corpus tables are those of the current
text, it was made with the current packages, and nothing that the schedule keeps or measures is missing or damaged. If the
training code has another digest, the run is judged by effect: a replay of its first steps with the current code must
give its weights and measurements bit for bit. A run that fails this, or is damaged, is trained again. A run of another
config or another text is refused, because it was put there on purpose.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from birthlens._version import __version__
from birthlens.config.run import RunConfig
from birthlens.config.schedule import Schedule
from birthlens.errors import BirthlensError
from birthlens.runs.files import (
    CHECKPOINTS,
    CONSTANTS,
    COST,
    HEADER,
    METRICS,
    RESUME,
    TABLES,
    remove_temporaries,
    versions,
)
from birthlens.runs.header import read_header, seal_of
from birthlens.runs.lock import LOCK, only_writer
from birthlens.runs.provenance import corpus_digest, training_digest
from birthlens.runs.run import Run
from birthlens.runs.seal import content_digest
from birthlens.system import write_atomically
from birthlens.tasks.kinds import chain_of

Standing = Literal["trained", "continued", "reused"]
Replay = Callable[[Run], int | None]
"""Replay the first steps of a run with the current code: the last step that is equal to the bit, None if one differs."""
_OURS = {CHECKPOINTS, TABLES, CONSTANTS, METRICS, HEADER, RESUME, COST}
_DAMAGES = (BirthlensError, OSError, ValueError, TypeError, KeyError, AttributeError)
"""Errors that damaged files raise."""


def standing(config: RunConfig, path: Path, replay: Replay) -> tuple[Standing, str]:
    """Return what has to be done for a run, and why; a run that must be trained again is removed.

    Raises:
        BirthlensError: if the directory contains something else, which is not touched, or another process writes it.
    """
    if not path.exists():
        return "trained", ""
    with only_writer(path):
        reason, note = _judged(config, path, replay)
        if not reason:
            remove_temporaries(path)
            return ("reused" if _is_complete(Run(path)) else "continued"), note
        present = [file for file in path.iterdir() if file.name != LOCK]
        if strangers := {file.name for file in present if not file.name.startswith(".")} - _OURS:
            raise BirthlensError(
                f"it cannot be used ({reason}) and holds {', '.join(sorted(strangers))}; move that away."
            )
        for file in present:
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)
            else:
                file.unlink()
    return "trained", f"again, since {reason}"


def _is_complete(run: Run) -> bool:
    """Return whether a run has its last step and the state at it: a kill can come between the two."""
    return run.finished and (not (run.path / RESUME).exists() or run.state()[1]["step"] == run.steps[-1])


def _judged(config: RunConfig, path: Path, replay: Replay) -> tuple[str, str]:
    """Return why a directory cannot be used (empty if it can), and a note for one that can."""
    if not (path / HEADER).exists():
        return "it was stopped before its first checkpoint", ""
    try:
        run = Run(path)
        digest = corpus_digest(run.statistics)
    except _DAMAGES as error:
        return f"it is damaged: {error}", ""
    if run.config != config:
        raise BirthlensError(
            "the run has another config than the one asked for; delete it or choose another directory."
        )
    if digest != corpus_digest(chain_of(config)):
        raise BirthlensError(
            "the run was trained on another text than its corpus now is; delete it or restore the text."
        )
    if other := made_by_other_packages(run.header):
        return other, ""
    try:
        if damage := _damage(run):
            return damage, ""
        return _by_other_code(run, replay)
    except _DAMAGES as error:
        return f"it is damaged: {error}", ""


def _by_other_code(run: Run, replay: Replay) -> tuple[str, str]:
    """Return why a run cannot be used (empty if it can), and a note if other code made the same numbers."""
    before = (run.header["birthlens"], run.header.get("code"))
    now = (__version__, training_digest(run.config.task.kind))
    if before == now:
        return "", "" if run.verified else "unverified, since format 1 has no digests"
    last = replay(run)
    if last is None:
        return (
            f"it was made by other code (birthlens {before[0]} with training code {before[1]}, this is {now[0]} with "
            f"{now[1]}), whose first steps give other numbers",
            "",
        )
    unverified = "" if run.verified else "; unverified, since format 1 has no digests"
    return "", f"made by other code, of which {last} steps replayed here are equal to the bit{unverified}"


def made_by_other_packages(header: Mapping[str, Any]) -> str:
    """Return which other packages a run was made with; empty if it was made with these."""
    then = header["versions"]
    for package, version in versions().items():
        if package != "birthlens" and then.get(package) != version:
            return f"it was made by other code ({package} {then.get(package)}, this is {version})"
    return ""


def _damage(run: Run) -> str:
    """Look for anything that the schedule kept or measured and that is now missing; damaged files raise an error."""
    cost(run.path)
    schedule = Schedule(run.config)
    steps = run.steps
    last = steps[-1]
    if not run.finished:
        last = run.state()[1]["step"]
    expected = [step for step in range(last + 1) if schedule.planned(step)]
    if lost := sorted({*expected, last} - set(steps)):
        return f"it is damaged: step {lost[0]} is not kept"
    for _ in run.checkpoints():  # each must be whole
        pass
    measured: dict[int, set[str]] = {}
    for row in run.rows():
        if row["split"] == "held_out":
            measured.setdefault(row["step"], set()).add(row["metric"])
    every = set[str]().union(*measured.values())
    for step in range(last + 1):
        if schedule.evaluates(step) and measured.get(step) != every:
            return f"it is damaged: metrics.jsonl lacks what was measured at step {step}"
    return ""


def cost(path: Path) -> tuple[float, float]:
    """Return the seconds and CPU seconds that a run has cost so far."""
    file = path / COST
    if not file.exists():
        return 0.0, 0.0
    try:
        found = json.loads(file.read_bytes())
        spent = (float(found["seconds"]), float(found["cpu_seconds"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BirthlensError(f"{file} is damaged ({error}); delete it or train again.") from None
    seal = seal_of(read_header(path))
    if seal is not None and found.get("digest") != seal.digest(COST, content_digest(found).encode()):
        raise BirthlensError(f"{file} is damaged (its content does not match its digest); delete it or train again.")
    return spent


def write_cost(path: Path, spent: Sequence[float]) -> None:
    """Save what a run has cost."""
    report: dict[str, Any] = {"seconds": round(spent[0], 3), "cpu_seconds": round(spent[1], 3)}
    if (seal := seal_of(read_header(path))) is not None:
        report["digest"] = seal.digest(COST, content_digest(report).encode())
    write_atomically(path / COST, json.dumps(report).encode())
