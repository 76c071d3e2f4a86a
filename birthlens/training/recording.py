"""Training to disk: the loop's records written as a run, and a run continued from its last kept step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from birthlens.config.run import RunConfig
from birthlens.errors import BirthlensError
from birthlens.runs.files import CONSTANTS
from birthlens.runs.lock import only_writer
from birthlens.runs.run import Run
from birthlens.runs.writer import RunWriter, directory_of
from birthlens.tasks.kinds import chain_of
from birthlens.training.loop import DivergedError, StepRecord, Trainer, train

_log = logging.getLogger("birthlens")


def train_to_disk(config: RunConfig, out: str | Path) -> Iterator[StepRecord]:
    """Start a run in a new directory and yield its records as they come; kept steps are on disk when they are yielded.

    The directory is locked until the last record, or until the iterator is closed.

    Raises:
        BirthlensError: where the directory holds anything already, another process writes it, or the config cannot be
            trained.
    """
    statistics = chain_of(config)
    trainer = Trainer(config, statistics)
    engine = {"name": trainer.engine_name, "reason": trainer.engine_reason, "threads": trainer.engine.threads}
    path = directory_of(out)
    with only_writer(path):
        writer = RunWriter.create(path, config, trainer.task, trainer.initial, engine)
        yield from _recorded(writer, trainer)


def resume(out: str | Path) -> Iterator[StepRecord]:
    """Continue a run from its last kept step, or from the start, to the very weights of a run that was never stopped.

    Where the engine's bits depend on the number of threads and that is another now, it logs a warning.

    Raises:
        BirthlensError: where there is no run, it is damaged, another process writes it, or its engine is unavailable.
    """
    with only_writer(Run(out).path):
        yield from _continued(Run(out))


def _continued(run: Run) -> Iterator[StepRecord]:
    writer = RunWriter.reopen(run)
    kept = writer.rewind(run)
    # The engine that the run began with, whatever would be chosen today: another one differs in the last bit.
    recorded = run.header["engine"]
    config = run.config.changed(training=run.config.training.changed(engine=recorded["name"]))
    trainer = Trainer(config, run.statistics, kept)
    for name, constant in run.constants.items():
        if not np.array_equal(constant, trainer.initial[name]):
            raise BirthlensError(
                f"{run.path / CONSTANTS} has another {name} than seeds.init = {config.seeds.init} gives here; the file is "
                "damaged, or the run was begun with other packages: continue it with those."
            )
    trainer.engine_reason = recorded["reason"]
    before = recorded["threads"]
    now = trainer.engine.threads
    unfinished = trainer.step < config.training.steps
    if trainer.engine.bits_depend_on_threads and before != now and unfinished:
        _log.warning(
            f"the run was begun with threads = {before} and goes on with {now}: its {trainer.engine_name} engine's weights "
            f"may differ in their last bits from an uninterrupted run's; set OMP_NUM_THREADS={before} to have the same."
        )
    yield from _recorded(writer, trainer)


def _recorded(writer: RunWriter, trainer: Trainer) -> Iterator[StepRecord]:
    pending: list[dict[str, Any]] = []
    try:
        for record in train(trainer.config, trainer=trainer):
            pending += record.metrics
            if record.keep:
                state, notes = trainer.snapshot()
                writer.keep(record.step, trainer.engine.tensors(), pending, state, notes)
                pending = []
            yield record
    except DivergedError:
        writer.log(pending)  # the way there is worth seeing
        raise


def check_resumable(config: RunConfig, out: str | Path) -> None:
    """Raise BirthlensError where a run on disk was made by another config than the one given."""
    run = Run(out)
    if run.config != config:
        raise BirthlensError(
            f"out = {str(out)!r} holds a run of another config; name another directory, or continue that run "
            "with `birthlens train OUT --resume`."
        )
