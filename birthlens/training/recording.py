"""Training to disk: write the records of the loop as a run, and continue a run from its last kept step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from birthlens.config.run import RunConfig
from birthlens.devices import DEFAULT, Execution, chosen
from birthlens.errors import BirthlensError
from birthlens.runs.files import CONSTANTS, RESUME
from birthlens.runs.header import lengthen
from birthlens.runs.lock import only_writer
from birthlens.runs.run import Parent, Run
from birthlens.runs.writer import RunWriter, directory_of
from birthlens.tasks.kinds import chain_of
from birthlens.training.loop import DivergedError, State, StepRecord, Trainer, train

_log = logging.getLogger("birthlens")


def train_to_disk(
    config: RunConfig,
    out: str | Path,
    execution: Execution = DEFAULT,
) -> Iterator[StepRecord]:
    """Start a run in a new directory and yield its records; kept steps are on disk when they are yielded.

    The directory is locked until the last record, or until the iterator is closed.

    Raises:
        BirthlensError: if the directory holds anything already, another process writes it, or the config cannot be
            trained.
    """
    yield from begun(Trainer(config, chain_of(config), execution=execution), config, out)


def begun(trainer: Trainer, config: RunConfig, out: str | Path, parent: Parent | None = None) -> Iterator[StepRecord]:
    """Write a new run of a trainer at its first step, under a config that may name another engine."""
    path = directory_of(out)
    with only_writer(path):
        yield from _recorded(new_recorder(trainer, config, path, parent))


def new_recorder(trainer: Trainer, config: RunConfig, path: Path, parent: Parent | None = None) -> Recorder:
    """Write the header of a new run; the caller holds the lock of its directory."""
    engine = {
        "name": trainer.engine_name,
        "reason": trainer.engine_reason,
        "threads": trainer.engine.threads,
        **trainer.execution.to_data(),
    }
    lineage = None if parent is None else parent.to_data(path)
    return Recorder(RunWriter.create(path, config, trainer.task, trainer.initial, engine, lineage), trainer)


def resume(out: str | Path, steps: int | None = None, device: str | None = None) -> Iterator[StepRecord]:
    """Continue a run from its last kept step, or from the start; its weights are those of an uninterrupted run, bit for bit.

    `steps` makes the run longer than its config says, so that a finished run continues. `device` is the device to continue
    on (default: the one it started on). On a device other than the CPU, and for a run that started in an ensemble, weights
    are equal up to rounding. A warning is logged if the number of threads has changed and affects the engine's last bits.

    Raises:
        BirthlensError: if there is no run, it is damaged, another process writes it, or its engine or device is
            unavailable, and for `steps` that would change the past.
    """
    with only_writer(Run(out).path):
        if steps is not None:
            _lengthen(Run(out), steps)
        yield from _continued(Run(out), device)


def _lengthen(run: Run, steps: int) -> None:
    planned = run.config.training.steps
    if steps < planned:
        raise BirthlensError(f"training.steps = {steps}: the run has {planned} already; give that or more.")
    if run.config.optimiser.decay != "none":
        raise BirthlensError(
            f"training.steps = {steps}: the run's learning rate decays towards step {planned} (optimiser.decay = "
            f"{run.config.optimiser.decay!r}), so more steps would change those that are past; train again or fork it."
        )
    if not run.verified:
        raise BirthlensError(f"training.steps = {steps}: {run.path} has format 1, which cannot say so; fork the run.")
    if steps > planned:
        RunConfig.parse(run.config.to_data(), [f"training.steps={steps}"])
        lengthen(run.path, run.header, steps)


def _continued(run: Run, device: str | None) -> Iterator[StepRecord]:
    execution = execution_of(run, device)
    writer, config, kept = rewound(run)
    trainer = Trainer(config, run.statistics, kept, execution)
    check_constants(run, trainer)
    recorded = run.header["engine"]
    trainer.engine_reason = recorded["reason"]
    before = recorded["threads"]
    now = trainer.engine.threads
    unfinished = trainer.step < trainer.config.training.steps
    if trainer.engine.bits_depend_on_threads and before != now and unfinished:
        _log.warning(
            f"the run began with threads = {before} and continues with {now}: the weights of its {trainer.engine_name} "
            f"engine may differ in their last bits from those of an uninterrupted run; set OMP_NUM_THREADS={before}."
        )
    yield from _recorded(Recorder(writer, trainer))


def execution_of(run: Run, device: str | None = None) -> Execution:
    """Return how a run was started, on its own device or another one; runs from before devices started on the CPU."""
    recorded = run.header["engine"]
    known = {key: recorded[key] for key in ("precision", "sampler") if key in recorded}
    return Execution(**known, device=chosen(recorded.get("device", "cpu") if device is None else device)[0])


def config_begun_with(run: Run) -> RunConfig:
    """Return a run's config with the engine that it started with, because another one differs in the last bits."""
    return run.config.changed(training=run.config.training.changed(engine=run.header["engine"]["name"]))


def rewound(run: Run) -> tuple[RunWriter, RunConfig, State | None]:
    """Go back to a run's last kept step: return its writer, its config with its first engine, and its state.

    The caller holds the lock of its directory.
    """
    writer = RunWriter.reopen(run)
    kept = writer.rewind(run)
    if kept is None and run.parent is not None:
        raise BirthlensError(f"{run.path} was stopped before its first step was kept; delete it and fork again.")
    return writer, config_begun_with(run), kept


def check_constants(run: Run, trainer: Trainer) -> None:
    """Raise BirthlensError if a trainer that continues a run has other frozen weights than the run."""
    for name, constant in run.constants.items():
        if not np.array_equal(constant, trainer.initial[name]):
            raise BirthlensError(
                f"{run.path / CONSTANTS} has another {name} than seeds.init = {run.config.seeds.init} gives here; the file "
                "is damaged, or the run was begun with other packages: continue it with those."
            )


def saved_trainer(run: Run, up_to: int | None) -> Trainer | None:
    """Return a trainer of a run, with the engine that it started with, that is ready to continue; nothing is written.

    It is at the step whose optimiser the run keeps, or at step 0 if `up_to` is None. The result is None if that
    step lies after `up_to`, or there is none.
    """
    config = config_begun_with(run)
    if up_to is None:
        return Trainer(config, run.statistics, execution=execution_of(run))
    if not (run.path / RESUME).exists():
        return None
    tensors, notes = run.state()
    if notes["step"] > up_to:
        return None
    state = ({**run.checkpoint(notes["step"]), **tensors}, notes)
    return Trainer(config, run.statistics, state, execution_of(run))


class Recorder:
    """Write the records of one trainer: measurements are written when a step is kept."""

    def __init__(self, writer: RunWriter, trainer: Trainer) -> None:
        self.trainer = trainer
        self._writer = writer
        self._pending: list[dict[str, Any]] = []

    def take(self, record: StepRecord) -> None:
        """Process a record; afterwards, a step that the schedule keeps is on disk."""
        self._pending += record.metrics
        if record.keep:
            state, notes = self.trainer.snapshot()
            self._writer.keep(record.step, self.trainer.moving(), self._pending, state, notes)
            self._pending = []

    def diverged(self) -> None:
        """Write the measurements up to a divergence, to show what happened."""
        self._writer.log(self._pending)
        self._pending = []


def _recorded(recorder: Recorder) -> Iterator[StepRecord]:
    try:
        for record in train(recorder.trainer.config, trainer=recorder.trainer):
            recorder.take(record)
            yield record
    except DivergedError:
        recorder.diverged()
        raise


def check_resumable(config: RunConfig, out: str | Path) -> None:
    """Raise BirthlensError if a run on disk was made by another config than the one given."""
    run = Run(out)
    if run.config != config:
        raise BirthlensError(
            f"out = {str(out)!r} holds a run of another config; name another directory, or continue that run "
            "with `birthlens train OUT --resume`."
        )
