"""A check of every file of a run, and of what can be saved from a damaged one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from birthlens.config.schedule import Schedule
from birthlens.errors import BirthlensError
from birthlens.runs.files import CHECKPOINTS, CONSTANTS, COST, HEADER, METRICS, RESUME, TABLES, listed_steps
from birthlens.runs.header import seal_of
from birthlens.runs.metrics import read_metrics
from birthlens.runs.reuse import cost
from birthlens.runs.run import Run


@dataclass(frozen=True)
class Verdict:
    """The result of checking a run.

    `damages` has a sentence for each damaged or missing file, with its name; `saved` says what can still be used;
    `verified` is False for runs of format 1, whose content was checked as far as possible without digests.
    """

    path: Path
    damages: tuple[str, ...]
    saved: tuple[str, ...]
    verified: bool
    checked: int

    @property
    def whole(self) -> bool:
        """Whether no file is damaged or missing."""
        return not self.damages

    def lines(self) -> list[str]:
        """Return the verdict as lines of text."""
        if self.whole and self.verified:
            return [f"{self.path}: whole, {self.checked} files match their digests"]
        if self.whole:
            return [f"{self.path}: unverified, as format 1 has no digests; {self.checked} files can be read"]
        count = f"{len(self.damages)} fault{'s' if len(self.damages) > 1 else ''}"
        return [f"{self.path}: damaged ({count})", *(f"  {text}" for text in (*self.damages, *self.saved))]


def verify(path: str | Path) -> Verdict:
    """Check every file of a run: its digest, and its content against the config.

    A run that is being trained may look unfinished, but not damaged.

    Raises:
        BirthlensError: if there is no run.json.
    """
    path = Path(path)
    if not (path / HEADER).exists():
        Run(path)
    try:
        run = Run(path)
    except BirthlensError as error:
        return Verdict(
            path, (str(error),), ("Nothing can be used without run.json; restore it or train again.",), False, 0
        )
    return _Check(run).verdict()


def runs_below(folder: str | Path) -> list[Path]:
    """List the runs in a folder and in the folders below it, sorted; the folder itself may be one.

    Raises:
        BirthlensError: if there are none.
    """
    folder = Path(folder)
    found = [folder] if (folder / HEADER).exists() else sorted(file.parent for file in folder.rglob(HEADER))
    if not found:
        Run(folder)  # its error says what is wrong with a path that is not a run
    return found


class _Check:
    """A run being checked; each step adds its findings."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.damages: list[str] = []
        self.checked = 1
        self._bad: set[str] = set()

    def _try(self, name: str, read: Callable[[], object]) -> bool:
        self.checked += 1
        try:
            read()
        except BirthlensError as error:
            self._bad.add(name)
            if str(error) not in self.damages:
                self.damages.append(str(error))
            return False
        return True

    def verdict(self) -> Verdict:
        """Check all files and find what can be saved."""
        run = self.run
        shared = self._try(TABLES, lambda: (run.statistics, run.task))
        shared = self._try(CONSTANTS, lambda: run.constants) and shared
        steps = listed_steps(run.path)
        whole = [step for step in steps if self._try(str(step), partial(run.checkpoint, step))]
        measured = self._measured(steps)
        last = self._last()
        self._find_missing(steps, last)
        if (run.path / COST).exists():
            self._try(COST, lambda: cost(run.path))
        saved: list[str] = []
        if self.damages:
            saved = self._saved(whole, len(steps), shared, measured, last if last in whole else None)
        return Verdict(run.path, tuple(self.damages), tuple(saved), run.verified, self.checked)

    def _measured(self, steps: list[int]) -> bool:
        """Check metrics.jsonl alone; whether it ends where the last checkpoint says is checked with the state."""
        run = self.run
        if (run.path / METRICS).exists():
            return self._try(METRICS, lambda: read_metrics(run.path, seal_of(run.header)))
        if steps:
            self.damages.append(
                f"{run.path / METRICS} is missing; the run is incomplete, or only a part of it was moved."
            )
        return False

    def _last(self) -> int | None:
        """Return the step that training can be resumed from, or None."""
        run = self.run
        if (run.path / RESUME).exists():
            return run.state()[1]["step"] if self._try(RESUME, run.state) else None
        if any(listed_steps(run.path)):
            self.damages.append(
                f"{run.path / RESUME} is missing; the run is incomplete, or only a part of it was moved."
            )
        return None

    def _find_missing(self, steps: list[int], last: int | None) -> None:
        """Add the planned checkpoints up to the last step that are missing."""
        run = self.run
        end = max([*steps, -1 if last is None else last], default=-1)
        first = 0 if run.parent is None else run.parent.step
        schedule = Schedule(run.config, start=first)
        missing = [step for step in range(first, end + 1) if schedule.planned(step) and step not in set(steps)]
        if last is not None and last not in steps and last not in missing:
            missing.append(last)
        if missing:
            listed = ", ".join(map(str, missing[:6])) + (f", ... ({len(missing)} in all)" if len(missing) > 6 else "")
            self.damages.append(f"{run.path / CHECKPOINTS} lacks the planned steps {listed}.")

    def _saved(self, whole: list[int], count: int, shared: bool, measured: bool, last: int | None) -> list[str]:
        run = self.run
        if not shared:
            bad = " and ".join(name for name in (TABLES, CONSTANTS) if name in self._bad)
            return [
                f"Every checkpoint needs {bad}: restore it from a copy of this run, or train again; "
                f"{len(whole)} of {count} checkpoints are whole."
            ]
        saved = [f"{len(whole)} of {count} checkpoints can be used."]
        if measured:
            saved.append("The measurements can be used.")
        if last == run.config.training.steps:
            saved.append("Training had finished.")
        elif last is not None and measured:
            saved.append(f"Training can be resumed from step {last} (`birthlens train {run.path} --resume`).")
        else:
            saved.append("Training cannot be resumed; train again with the config in run.json for the same numbers.")
        return saved
