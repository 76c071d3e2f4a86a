"""Writing a run: whole files only, in an order that lets a run be resumed after a kill at any moment."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from birthlens._version import __version__
from birthlens.config.run import RunConfig
from birthlens.errors import BirthlensError
from birthlens.model.weights import Weights, save_tensors
from birthlens.runs import metrics as lines
from birthlens.runs.files import (
    CHECKPOINTS,
    CONSTANTS,
    HEADER,
    RESUME,
    TABLES,
    checkpoint_file,
    checkpoint_name,
    commit,
    listed_steps,
    remove_temporaries,
    versions,
)
from birthlens.runs.header import FORMAT, seal_of, write_header
from birthlens.runs.lock import LOCK
from birthlens.runs.provenance import training_digest
from birthlens.runs.run import Run
from birthlens.runs.seal import BLANK, Seal, digest_of
from birthlens.runs.tables import table_fault, tables_of
from birthlens.system import is_temporary
from birthlens.tasks.task import Task

Array = np.ndarray
_log = logging.getLogger("birthlens")


def directory_of(out: str | Path) -> Path:
    """Return the directory for a new run, creating it if it does not exist.

    Raises:
        BirthlensError: if it contains anything other than a run, or it cannot be created.
    """
    if not str(out):
        raise BirthlensError("out = '' is not a name; choose a new directory.")
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise BirthlensError(f"out = {str(path)!r} is a file; choose a new directory.")
    if path.exists() and not (path / HEADER).exists() and not _is_fresh(path):
        raise BirthlensError(f"out = {str(path)!r} already holds other files; choose a new directory.")
    try:
        (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BirthlensError(f"out = {str(path)!r} cannot be made: {error.strerror}; choose another place.") from None
    return path


class RunWriter:
    """Write a run. Only complete files appear, in an order that allows a run to be resumed after a kill at any moment.

    A writer does not lock the run; the code that trains holds `lock.only_writer`.

    Raises:
        BirthlensError: if the directory already contains something, or (when resuming) no run.
    """

    def __init__(self, path: Path, seal: Seal | None) -> None:
        self.path = path
        self._seal = seal
        self._digest = ""
        remove_temporaries(path)

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: RunConfig,
        task: Task,
        weights: Weights,
        engine: Mapping[str, Any],
        parent: Mapping[str, Any] | None = None,
    ) -> Self:
        """Start a new run directory; existing files are not overwritten. `parent` is the origin of a fork."""
        path = directory_of(path)
        if (path / HEADER).exists():
            raise BirthlensError(
                f"out = {str(path)!r} already holds a run (use --resume to continue it); choose a new directory."
            )
        statistics = task.statistics
        tables = tables_of(statistics)
        if task.fixed_triggers is not None:
            tables["triggers"] = task.fixed_triggers
        if reason := table_fault(tables, statistics.vocab, config):
            raise BirthlensError(f"the statistics cannot be trained on: what they give {reason}.")
        constants = {name: weights[name] for name in weights if name not in config.moving}
        header = {
            "format": FORMAT,
            "birthlens": __version__,
            "code": training_digest(config.task.kind),
            "config": config.to_data(),
            "vocab": list(statistics.vocab),
            "engine": dict(engine),
            "versions": versions(),
            "commit": commit(),
            **({} if parent is None else {"parent": dict(parent)}),
            "files": {
                TABLES: digest_of(save_tensors(path / TABLES, tables)),
                CONSTANTS: digest_of(save_tensors(path / CONSTANTS, constants)),
            },
        }
        # The header is written last: a directory with a header is a complete run.
        return cls(path, write_header(path, header))

    @classmethod
    def reopen(cls, run: Run) -> Self:
        """Continue writing a run, in its own format."""
        return cls(run.path, seal_of(run.header))

    def keep(
        self,
        step: int,
        tensors: Mapping[str, Array],
        metrics: Iterable[Mapping[str, Any]],
        state: Mapping[str, Array],
        notes: Mapping[str, Any],
    ) -> None:
        """Save a step: its metrics so far, its weights, then the state for resuming, which names the step."""
        self.log(metrics)
        self._save(checkpoint_file(self.path, step), checkpoint_name(step), tensors, {})
        end = {} if self._seal is None else {"metrics": self._digest}
        self._save(self.path / RESUME, RESUME, state, {"notes": json.dumps({**notes, "step": step, **end})})

    def _save(self, file: Path, name: str, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
        if (seal := self._seal) is None:
            save_tensors(file, tensors, metadata)
        else:
            save_tensors(file, tensors, {**metadata, "digest": BLANK}, lambda data: seal.sealed(name, data))

    def log(self, metrics: Iterable[Mapping[str, Any]]) -> None:
        """Append measurements; a line that a kill truncates is dropped when read."""
        text, self._digest = lines.lines_of(metrics, self._seal, self._digest)
        lines.append(self.path, text)

    def rewind(self, run: Run) -> tuple[dict[str, Array], dict[str, Any]] | None:
        """Go back to the last resumable step, and discard everything after it.

        Return its tensors (weights and the optimiser's) and notes. Return None if training starts again from step 0, because
        a kill came before the first such step, or the weights of that step are missing.
        """
        if not (self.path / RESUME).exists() and not any(listed_steps(self.path)):
            self._forget_after(run, -1)
            return None
        state, notes = run.state()
        if not checkpoint_file(self.path, notes["step"]).exists():
            _log.warning(f"{checkpoint_file(self.path, notes['step'])} is missing; training starts again from step 0.")
            self._forget_after(run, -1)
            return None
        tensors = run.checkpoint(notes["step"])
        self._forget_after(run, notes["step"])
        return {**tensors, **state}, notes

    def _forget_after(self, run: Run, step: int) -> None:
        rows = [row for row in run.rows() if row["step"] <= step]
        for later in listed_steps(self.path):
            if later > step:
                checkpoint_file(self.path, later).unlink()
        self._digest = lines.rewrite(self.path, rows, self._seal)


def _is_fresh(path: Path) -> bool:
    """Return whether a directory contains only the remains of a run that was killed before its header was written."""
    ours = {CHECKPOINTS, TABLES, CONSTANTS, LOCK}
    strangers = [file for file in path.iterdir() if file.name not in ours and not is_temporary(file)]
    folder = path / CHECKPOINTS
    kept = [file for file in folder.iterdir() if not is_temporary(file)] if folder.is_dir() else []
    return not strangers and not kept
