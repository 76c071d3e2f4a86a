"""Training to disk: the loop's records written as a run, and a run continued from its last kept step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from birthlens.config import RunConfig
from birthlens.corpus import statistics_of
from birthlens.errors import BirthlensError
from birthlens.run_writer import RunWriter
from birthlens.runs import Run
from birthlens.training.loop import DivergedError, StepRecord, Trainer, train


def train_to_disk(config: RunConfig, out: str | Path) -> Iterator[StepRecord]:
    """Start a run in a new directory and yield its records as they come; kept steps are on disk when they are yielded.

    Raises:
        BirthlensError: where the directory holds anything already, or the config cannot be trained.
    """
    statistics = statistics_of(config.corpus)
    trainer = Trainer(config, statistics)
    engine = {"name": trainer.engine_name, "reason": trainer.engine_reason, "threads": torch.get_num_threads()}
    writer = RunWriter.create(out, config, statistics, trainer.initial, engine)
    yield from _recorded(writer, trainer)


def resume(out: str | Path) -> Iterator[StepRecord]:
    """Continue a run from its last kept step, to the very weights of a run that was never stopped.

    Raises:
        BirthlensError: where there is no run, or its engine cannot be had on this machine.
    """
    run = Run(out)
    writer = RunWriter(run.path)
    tensors, state, notes = writer.rewind()
    # The engine that the run began with, whatever would be chosen today: another one differs in the last bit.
    recorded = run.header["engine"]["name"]
    config = run.config.changed(training={**run.config.training.model_dump(), "engine": recorded})
    trainer = Trainer(config, run.statistics, ({**tensors, **state}, notes))
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
