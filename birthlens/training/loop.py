"""The training loop: a generator of records that the caller may stop at any step (paper section 3).

    theta <- theta - learning rate * (momentum-averaged gradient of the loss on a fresh batch + weight decay * theta)

Batch number s depends only on (config, seeds.data, s), so a run is continued bit for bit from its weights, its optimiser
state and the number of its step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from birthlens.config.run import RunConfig
from birthlens.config.schedule import Schedule
from birthlens.devices import DEFAULT, Execution
from birthlens.errors import BirthlensError
from birthlens.model.initialisation import initial_weights
from birthlens.model.weights import Weights
from birthlens.shapes import Bool
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.corpus import BigramStatistics
from birthlens.tasks.counter_sampling import check_countable, counter_batch
from birthlens.tasks.kinds import chain_of, task_of
from birthlens.tasks.roles import summary
from birthlens.tasks.task import HELD_OUT, checked_batch
from birthlens.training.clamping.clamped import Clamps
from birthlens.training.clamping.timeline import use
from birthlens.training.engines import Engine, choose, engine
from birthlens.training.optimiser import load_state, new_optimiser, saved_state
from birthlens.training.stack import lone_member

Array = np.ndarray
State = tuple[Mapping[str, Array], Mapping[str, Any]]
"""The tensors of a saved step (weights by name, the optimiser's by `quantity/name`) and its notes."""

_log = logging.getLogger("birthlens")


class DivergedError(BirthlensError):
    """The loss or a weight is no longer finite; the message names the step, the last kept step, and what to change."""


@dataclass
class StepRecord:
    """The state of training after `step` updates.

    `loss` is the training loss of the last update (None at step 0, and if the batch had no position of the loss).
    `metrics` are rows (step, split, metric, value, n), with held-out rows only where the model was evaluated.
    `keep` says that the schedule keeps this step on disk.
    """

    step: int
    loss: float | None
    metrics: list[dict[str, Any]]
    keep: bool
    trainer: Trainer = field(repr=False)

    @property
    def weights(self) -> Weights:
        """A copy of all weights now (call it before the generator is advanced)."""
        return self.trainer.weights()


@dataclass(frozen=True, eq=False)
class Draw:
    """The inputs of an update: the settings of its step, its batch, and the positions of its loss."""

    config: RunConfig
    batch: TokenBatch
    mask: Bool[Tensor, "batch pos"]


class Trainer:
    """A model in training: its data, its weights, the engine that computes gradients, the optimiser and the schedule.

    `state` is the result of `snapshot` and `weights` at the step to continue from. `last_kept` is the last step that was
    kept. `built` makes the engine if it is not the trainer's own (a member of an ensemble).

    Raises:
        BirthlensError: if the config cannot be trained, or the state does not fit it.
    """

    def __init__(
        self,
        config: RunConfig,
        statistics: BigramStatistics,
        state: State | None = None,
        execution: Execution = DEFAULT,
        built: Callable[[Weights], Engine] | None = None,
    ) -> None:
        self.config = config
        self.execution = execution
        self.task = task_of(config.task, statistics)
        self.task.check_loss(config.training.loss)
        if execution.sampler == "counter":
            check_countable(self.task)
        self.held_out = self._held_out()
        generator = np.random.default_rng(config.seeds.init)
        self.initial = initial_weights(config.model, len(statistics), config.task.context, generator)
        self.engine_name, self.engine_reason = choose(config, len(statistics), execution)
        self.clamps = Clamps(config, statistics, self.initial, None if state is None else state[0])
        if built is None and execution.on_cpu:
            self.engine: Engine = engine(self.engine_name, config, self.initial, self.clamps.passes)
        else:
            self.engine = built(self.initial) if built is not None else lone_member(config, self.initial, execution)
        self.optimiser = new_optimiser(config, self.engine.parameters)
        self.schedule = Schedule(config)
        self.step = 0
        self.last_kept: int | None = None
        self.recorded = state is not None
        """Whether the present step has had its record."""
        if state is not None:
            self._restore(*state)
        self.enter(0 if state is None else len(config.training.clamps))

    def _restore(self, tensors: Mapping[str, Array], notes: Mapping[str, Any]) -> None:
        """Go to the step of a saved state: its weights, the optimiser's tensors, and the state of the schedule."""
        saved = self.initial.replaced({name: array for name, array in tensors.items() if "/" not in name})
        with torch.no_grad():
            for name, parameter in self.engine.parameters.items():
                parameter.copy_(torch.from_numpy(np.array(saved[name])))
        load_state(self.optimiser, self.engine.parameters, tensors)
        self.schedule.last_kept_loss = notes.get("last_kept_loss")
        self.step = int(notes["step"])
        self.last_kept = self.step

    def enter(self, first: int = 0) -> None:
        """Apply the clamps from number `first` on at the current step; earlier ones were applied before it was saved."""
        if self.config.training.clamps:
            parameters = self.engine.parameters
            self.clamps.enter(self.step, parameters, self.optimiser, self.initial, self.held_out.tokens, first)

    def _held_out(self) -> TokenBatch:
        """Draw the batch that the model is evaluated on, and check that a user's own task follows the protocol."""
        n = self.config.evaluation.batch_size
        return checked_batch(self.task, self.task.batch(n, self.config.seeds.evaluation, HELD_OUT), n)

    def weights(self) -> Weights:
        """Return a copy of all weights."""
        return self.initial.replaced(self.engine.tensors())

    def moving(self) -> dict[str, Array]:
        """Return a copy of the weights that training moves, as a checkpoint holds them."""
        weights = self.weights()
        return {name: weights[name] for name in self.config.moving}

    def snapshot(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Return the optimiser's tensors and notes, from which (with the weights) training continues bit for bit."""
        notes = {"step": self.step, "last_kept_loss": self.schedule.last_kept_loss, "engine": self.engine_name}
        return {**saved_state(self.optimiser, self.engine.parameters), **self.clamps.state()}, notes

    def draw(self) -> Draw:
        """Draw the batch of the next update, under the settings of the current step."""
        settings = self.clamps.settings.at(self.step)
        training = settings.config.training
        seed = self.config.seeds.data
        if self.execution.sampler == "counter":
            batch = counter_batch(settings.task, training.batch_size, seed, self.step, self.execution.device)
        else:
            batch = settings.task.batch(training.batch_size, seed, self.step)
        return Draw(settings.config, batch, settings.task.loss_mask(batch, training.loss))

    def resting(self, config: RunConfig) -> set[str]:
        """Return the trained matrices that the next update does not change."""
        frozen = {name for name, until in config.training.freeze_until.items() if self.step < until}
        return frozen | self.clamps.matrices.skipped(self.step)

    def advance(self) -> None:
        """Go to the next step, whose updates have been applied."""
        self.step += 1
        self.recorded = True
        self.enter()

    def update(self) -> float | None:
        """Take one step on a new batch; return its loss, or None if the batch had no position of the loss."""
        draw = self.draw()
        loss = None
        if draw.mask.any():
            loss = self.engine.gradients(draw.batch, draw.mask)
            self.check_loss(loss)
            for name in self.resting(draw.config):
                self.engine.parameters[name].grad = None  # torch's optimisers skip it, with its decay and its momentum
            use(self.optimiser, draw.config, self.step)
            self.optimiser.step()
        self.advance()
        return loss

    def check_loss(self, loss: float) -> None:
        """Raise DivergedError if the loss of an update is not finite."""
        self._check(math.isfinite(loss), f"the training loss is {loss}")

    def evaluate(self) -> list[dict[str, Any]]:
        """Measure loss and accuracy by role on the held-out batch."""
        loss, prediction = self.engine.evaluate(self.held_out)
        return [
            {"step": self.step, "split": "held_out", "metric": f"{role}_{metric}", "value": value, "n": n}
            for (role, metric), (value, n) in summary(loss, prediction, self.held_out).items()
        ]

    def record(self, loss: float | None) -> StepRecord:
        """Evaluate if the schedule says so, and return whether to keep the step; kept weights must be finite."""
        metrics: list[dict[str, Any]] = []
        if loss is not None:
            n = self.config.training.batch_size
            metrics.append({"step": self.step, "split": "train", "metric": "loss", "value": loss, "n": n})
        keep = False
        if self.schedule.evaluates(self.step):
            measured = self.evaluate()
            objective = f"{self.config.training.loss}_loss"
            value = next((row["value"] for row in measured if row["metric"] == objective), None)
            self._check(value is None or math.isfinite(value), f"the held-out loss is {value}")
            keep = self.schedule.keeps(self.step, value)
            if keep:
                for name, parameter in self.engine.parameters.items():
                    self._check(bool(parameter.isfinite().all()), f"{name} holds numbers that are not finite")
                self.last_kept = self.step
            metrics += measured
        return StepRecord(self.step, loss, metrics, keep, self)

    def _check(self, finite: bool, otherwise: str) -> None:
        if not finite:
            rate = self.config.optimiser.learning_rate
            good = "no step is kept" if self.last_kept is None else f"the last kept step is {self.last_kept}"
            raise DivergedError(
                f"{otherwise} at step {self.step}; training stopped, {good}. "
                f"Lower optimiser.learning_rate = {rate} (a factor of 2 to 10), or use embeddings of smaller norm."
            )


def train(
    config: RunConfig,
    statistics: BigramStatistics | None = None,
    trainer: Trainer | None = None,
    execution: Execution = DEFAULT,
) -> Iterator[StepRecord]:
    """Train, and yield a record for step 0 (unless the run is resumed) and after each update.

    The caller may stop at any record. The engine and the reason for it are logged before the first step.

    Example:
        >>> config = RunConfig.parse({"model": {"d_model": 16}, "task": {"context": 16}}, ["training.batch_size=4"])
        >>> for record in train(config):
        ...     if record.step == 3:
        ...         break
        >>> record.weights["L1.W_O"].shape
        (1, 16, 16)
    """
    trainer = trainer or Trainer(config, statistics or chain_of(config), execution=execution)
    if trainer.step == 0 or trainer.step < config.training.steps:
        _log.info(f"engine {trainer.engine_name}: {trainer.engine_reason}")
    if not trainer.recorded:
        yield trainer.record(None)
    while trainer.step < config.training.steps:
        yield trainer.record(trainer.update())
