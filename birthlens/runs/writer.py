"""Writing a run: whole files only, in an order that lets a run be resumed after a kill at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from birthlens._version import __version__
from birthlens.config.run import RunConfig
from birthlens.errors import BirthlensError
from birthlens.model.weights import Weights, load_tensors, save_tensors
from birthlens.runs.files import FORMAT, checkpoint_file, commit, listed_steps, read_metrics, read_notes, versions
from birthlens.runs.provenance import TRAINING, code_digest
from birthlens.system import is_temporary, write_atomically
from birthlens.tasks.task import Task

Array = np.ndarray


class RunWriter:
    """Write a run. Only whole files appear, in an order that lets a run be resumed after a kill at any moment.

    Raises:
        BirthlensError: where the directory already holds something, or (resuming) no run of this config.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: RunConfig,
        task: Task,
        weights: Weights,
        engine: Mapping[str, Any],
    ) -> Self:
        """Start a new run directory; nothing that exists is overwritten."""
        if not str(path):
            raise BirthlensError("out = '' is no name; choose a new directory.")
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise BirthlensError(f"out = {str(path)!r} is a file; choose a new directory.")
        if path.exists() and not _is_fresh(path):
            what = "a run (use --resume to continue it)" if (path / "run.json").exists() else "other files"
            raise BirthlensError(f"out = {str(path)!r} already holds {what}; choose a new directory.")
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BirthlensError(
                f"out = {str(path)!r} cannot be made: {error.strerror}; choose another place."
            ) from None
        statistics = task.statistics
        tables = {"unigram": statistics.unigram, "bigram": statistics.bigram}
        triggers = task.fixed_triggers
        if triggers is not None:
            tables["triggers"] = triggers
        save_tensors(path / "tables.safetensors", tables)
        constants = {name: weights[name] for name in weights if name not in config.trained}
        save_tensors(path / "constants.safetensors", constants)
        header = {
            "format": FORMAT,
            "birthlens": __version__,
            "code": code_digest(TRAINING),
            "config": config.to_data(),
            "vocab": list(statistics.vocab),
            "engine": dict(engine),
            "versions": versions(),
            "commit": commit(),
        }
        # The header comes last: a directory with a header is a whole run.
        write_atomically(path / "run.json", json.dumps(header, indent=1, ensure_ascii=False).encode())
        return cls(path)

    def keep(
        self,
        step: int,
        tensors: Mapping[str, Array],
        metrics: Iterable[Mapping[str, Any]],
        state: Mapping[str, Array],
        notes: Mapping[str, Any],
    ) -> None:
        """Keep a step: its metrics so far, its weights, then what resuming needs, which names the step."""
        self.log(metrics)
        save_tensors(checkpoint_file(self.path, step), tensors)
        save_tensors(self.path / "resume.safetensors", state, {"notes": json.dumps({**notes, "step": step})})

    def log(self, metrics: Iterable[Mapping[str, Any]]) -> None:
        """Append measurements; a line that a kill tears is dropped when read."""
        lines = "".join(json.dumps(row) + "\n" for row in metrics)
        if lines:
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())

    def rewind(self) -> tuple[dict[str, Array], dict[str, Any]] | None:
        """Go back to the last resumable step, and forget what came after.

        Return its tensors (weights and the optimiser's) and notes, or None where a kill came before the first such step.
        """
        file = self.path / "resume.safetensors"
        if not file.exists() and not any(listed_steps(self.path)):
            self._forget_after(-1)
            return None
        state, notes = load_tensors(file), read_notes(file)
        tensors = load_tensors(checkpoint_file(self.path, notes["step"]))
        self._forget_after(notes["step"])
        return {**tensors, **state}, notes

    def _forget_after(self, step: int) -> None:
        for later in listed_steps(self.path):
            if later > step:
                checkpoint_file(self.path, later).unlink()
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        write_atomically(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept).encode())


def _is_fresh(path: Path) -> bool:
    """Say whether a directory holds nothing but what a run leaves that is killed before its header is written."""
    ours = {"checkpoints", "tables.safetensors", "constants.safetensors"}
    strangers = [file for file in path.iterdir() if file.name not in ours and not is_temporary(file)]
    return not strangers and not any((path / "checkpoints").glob("*"))
