"""Forks: runs that begin at any step of another run, with changed settings or clamps, or unchanged.

Runs are deterministic, so the exact state at a step, including the optimiser's, is found by training again: from the step
whose optimiser state the run keeps, from the start of a fork, or from step 0. Kept weights on the way are compared.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from birthlens.config import clamp_text
from birthlens.config import clamps as clamping
from birthlens.config.clamps import Hold
from birthlens.config.differences import differences, overrides
from birthlens.config.run import RunConfig
from birthlens.config.schedule import Schedule
from birthlens.devices import Execution
from birthlens.errors import BirthlensError
from birthlens.runs.run import Parent, Run
from birthlens.training.clamping.timeline import changed_chain
from birthlens.training.engines import ASKED_FOR
from birthlens.training.loop import StepRecord, Trainer
from birthlens.training.recording import begun, execution_of, saved_trainer

_log = logging.getLogger("birthlens")
_FIXED = ("task.kind", "task.context", "training.trained", "optimiser.kind", "seeds.init")
_FIXED_SECTIONS = ("corpus", "model")


def fork(
    run: str | Path | Run,
    out: str | Path,
    at: int,
    changes: Sequence[str] = (),
    clamps: Sequence[Any] = (),
) -> Iterator[StepRecord]:
    """Start a run in a new directory from a step of another run, and yield its records, that of the step itself first.

    `changes` are `section.key=value` texts. `clamps` are texts, mappings or clamps, added to those of the run; without a
    `from` they act from step `at` on. The data stream goes on as in the parent unless it is changed. A fork without a change
    equals its parent bit for bit.

    Raises:
        BirthlensError: for a step outside the run, changes that a fork cannot make, and clamps that do not fit.
    """
    parent = run if isinstance(run, Run) else Run(run)
    at = _step(parent, at)
    config = _changed(parent.config, at, changes, clamps)
    trainer = _forked(parent, at, config)
    made = [word for word in overrides(parent.config, config) if not word.startswith("training.clamps=")]
    added = [str(clamp) for clamp in config.training.clamps[len(parent.config.training.clamps) :]]
    yield from begun(trainer, config, out, Parent(parent.path, at, tuple(made), tuple(added)))


def trainer_at(run: Run, step: int) -> Trainer:
    """Return a trainer of a run at one of its steps, with the exact state that it had there.

    Raises:
        BirthlensError: for a step outside the run, or a fork whose parent is gone.
    """
    step = _step(run, step)
    trainer = saved_trainer(run, step)
    if trainer is None:
        trainer = saved_trainer(run, None) if run.parent is None else _again(run, run.parent)
    assert trainer is not None
    kept = [one for one in run.steps if trainer.step <= one <= step]
    differs = None
    while True:
        if trainer.step in kept and differs is None and not _equal(trainer, run):
            differs = trainer.step
        if trainer.step == step:
            break
        loss = trainer.update()
        if run.config.checkpoints.sensitivity:
            trainer.record(loss)  # the schedule remembers the loss at the last kept step
    if differs is not None:
        used = "the kept weights" if step in kept else "those"
        _log.warning(
            f"training {run.path} again gives other weights than it kept at step {differs} (other packages, threads or "
            f"machine, or trained together with others); the fork starts from {used} at step {step}."
        )
        if step in kept:
            _write(trainer, run.checkpoint(step))
    return trainer


def _again(run: Run, parent: Parent) -> Trainer:
    """Return a trainer of a fork at the step where it began."""
    if not (parent.path / "run.json").exists():
        raise BirthlensError(
            f"{run.path} is a fork of {parent.path}, which does not exist; its states before step "
            f"{run.steps[-1]} cannot be found without it."
        )
    return _forked(Run(parent.path), parent.step, run.config, run.header["engine"]["name"], run)


def _forked(parent: Run, at: int, config: RunConfig, engine: str | None = None, run: Run | None = None) -> Trainer:
    """Return a trainer at the first step of a fork, at which its own clamps have acted.

    It computes as the parent did, or as `run` did, which is the fork. A clamp in the forward pass needs the CPU.
    """
    execution = execution_of(run or parent)
    if run is None and _edited(config):
        execution = Execution(sampler=execution.sampler)
    before = trainer_at(parent, at)
    state, notes = before.snapshot()
    inherited = len(parent.config.training.clamps)
    for number, clamp in enumerate(config.training.clamps):
        if number >= inherited and isinstance(clamp, Hold) and clamp.at == "step" and clamp.step is not None:
            state[f"clamp/{number}/matrix"] = _matrix_at(parent, clamp)
    used = config
    if config.training.engine == parent.config.training.engine:
        used = config.changed(training=config.training.changed(engine=engine or _engine(parent, config)))
    statistics = changed_chain(parent.config, config, parent.statistics)
    trainer = Trainer(used, statistics, ({**before.engine.tensors(), **state}, notes), execution)
    if trainer.engine_reason == ASKED_FOR:
        trainer.engine_reason = "that of the run it was forked from"
    trainer.schedule = Schedule(used, trainer.schedule.last_kept_loss, start=at)
    trainer.recorded = False
    trainer.enter(inherited)
    return trainer


def _engine(parent: Run, config: RunConfig) -> str:
    """Return the engine of the parent, whose bits the fork has, or auto where a clamp needs another."""
    return "auto" if _edited(config) else str(parent.header["engine"]["name"])


def _edited(config: RunConfig) -> bool:
    """Return whether a clamp acts in the forward pass."""
    return any(isinstance(clamp, clamping.FORWARD) for clamp in config.training.clamps)


def _changed(config: RunConfig, at: int, changes: Sequence[str], clamps: Sequence[Any]) -> RunConfig:
    """Return the config of a fork, checked against that of its parent."""
    added = [{"from": at, **clamp} for clamp in clamp_text.parsed_all(clamps)]
    changed = RunConfig.parse(config.to_data(), list(changes))
    if changed.training.clamps != config.training.clamps:
        raise BirthlensError("training.clamps: a fork keeps the clamps of its parent; add others with --clamp.")
    changed = changed.changed(
        training=changed.training.changed(clamps=[*changed.to_data()["training"].get("clamps", ()), *added])
    )
    for name in differences(config, changed):
        if name in _FIXED or name.partition(".")[0] in _FIXED_SECTIONS:
            raise BirthlensError(f"{name} cannot change in a fork, whose model and vocabulary are those of its parent.")
    if changed.training.steps <= at:
        raise BirthlensError(
            f"training.steps = {changed.training.steps}: a fork at step {at} needs more steps than that; set it higher."
        )
    for clamp in changed.training.clamps[len(config.training.clamps) :]:
        if clamp.start < at:
            raise BirthlensError(f"clamp '{clamp}': it starts before the fork, which begins at step {at}.")
    return changed


def _matrix_at(run: Run, clamp: Hold) -> np.ndarray:
    if run.parent is not None and clamp.step is not None and clamp.step < run.steps[0]:
        return _matrix_at(Run(run.parent.path), clamp)
    step = _step(run, clamp.step or 0)
    tensors = run.checkpoint(step) if step in run.steps else trainer_at(run, step).engine.tensors()
    return tensors[clamp.matrix]


def _step(run: Run, step: int) -> int:
    """Return a step of a run; a negative one counts kept steps from the end."""
    kept = run.steps
    if step < 0 and -step <= len(kept):
        return kept[step]
    if not kept[0] <= step <= kept[-1]:
        raise BirthlensError(f"step = {step} is outside {run.path}; it has steps {kept[0]} to {kept[-1]}.")
    return step


def _equal(trainer: Trainer, run: Run) -> bool:
    kept = run.checkpoint(trainer.step)
    return all(np.array_equal(tensor, kept[name]) for name, tensor in trainer.engine.tensors().items())


@torch.no_grad()
def _write(trainer: Trainer, tensors: dict[str, np.ndarray]) -> None:
    for name, parameter in trainer.engine.parameters.items():
        parameter.copy_(torch.from_numpy(np.array(tensors[name])))
