"""The training loop: a generator of records that the caller may stop at any step (paper section 3).

    theta <- theta - learning rate * (momentum-averaged gradient of the loss on a fresh batch + weight decay * theta)

Batch number s depends only on (config, seeds.data, s), so that a run is continued from its weights, its optimiser state and
the number of its step, to the bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from birthlens.config.run import RunConfig
from birthlens.config.schedule import Schedule
from birthlens.errors import BirthlensError
from birthlens.model.initialisation import initial_weights
from birthlens.model.weights import Weights
from birthlens.tasks.bigram import HELD_OUT, BigramTask
from birthlens.tasks.corpus import BigramStatistics, statistics_of
from birthlens.tasks.roles import summary
from birthlens.training.engines import Engine, choose, engine

Array = np.ndarray
_log = logging.getLogger("birthlens")


class DivergedError(BirthlensError):
    """The loss or a weight is no longer finite; the message says at which step, which one is kept, and what to change."""


@dataclass
class StepRecord:
    """What is known after `step` updates.

    `loss` is the training loss that the last update saw (None at step 0, or where the batch held no position of the loss).
    `metrics` are rows (step, split, metric, value, n), with the held-out ones only where the model was evaluated.
    `keep` says that the schedule wants this step on disk.
    """

    step: int
    loss: float | None
    metrics: list[dict[str, Any]]
    keep: bool
    trainer: Trainer = field(repr=False)

    @property
    def weights(self) -> Weights:
        """A copy of all weights now (right until the generator is advanced)."""
        return self.trainer.weights()


class Trainer:
    """Everything that moves during training.

    `state` is what `snapshot` returned at the step to continue from; `last_kept` is the last step that a record wanted kept.
    """

    def __init__(
        self,
        config: RunConfig,
        statistics: BigramStatistics,
        state: tuple[Mapping[str, Array], Mapping[str, Any]] | None = None,
    ) -> None:
        if config.training.loss == "in_context" and config.task.n_triggers == 0:
            raise BirthlensError(
                "training.loss = 'in_context': with task.n_triggers = 0 there is no such target; use all."
            )
        self.config = config
        self.task = BigramTask(config.task, statistics)
        self.initial = initial_weights(
            config.model, len(statistics), config.task.context, np.random.default_rng(config.seeds.init)
        )
        self.engine_name, self.engine_reason = choose(config, len(statistics))
        self.step, self.resumed = 0, state is not None
        self.last_kept: int | None = None
        tensors, notes = state or ({}, {})
        start = {name: array for name, array in tensors.items() if "/" not in name}
        self.engine: Engine = engine(self.engine_name, config, self.initial.replaced(start))
        self.optimiser = _optimiser(config, self.engine)
        self.schedule = Schedule(config, notes.get("last_kept_loss"))
        if state is not None:
            self.step = self.last_kept = int(notes["step"])
            _restore(self.optimiser, self.engine, tensors)
        self.held_out = self.task.batch(config.evaluation.batch_size, config.seeds.evaluation, HELD_OUT)

    def weights(self) -> Weights:
        """Return a copy of all weights."""
        return self.initial.replaced(self.engine.tensors())

    def snapshot(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Return the optimiser's tensors and notes, from which (with the weights) training continues to the bit."""
        state: dict[str, Array] = {}
        for name, parameter in self.engine.parameters.items():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    state[f"{key}/{name}"] = value.detach().numpy().copy()
        return state, {"step": self.step, "last_kept_loss": self.schedule.last_kept_loss, "engine": self.engine_name}

    def update(self) -> float | None:
        """Take one step on a fresh batch; return its loss, or None where the batch held no position of the loss."""
        config = self.config.training
        batch = self.task.batch(config.batch_size, self.config.seeds.data, self.step)
        mask = batch.in_context if config.loss == "in_context" else torch.ones_like(batch.absorbed)
        loss = None
        if mask.any():
            loss = self.engine.gradients(batch, mask)
            self._check(math.isfinite(loss), f"the training loss is {loss}")
            for name, parameter in self.engine.parameters.items():
                if self.step < config.freeze_until.get(name, 0):
                    parameter.grad = None  # torch's optimisers skip it: no decay, no momentum
            self.optimiser.step()
        self.step += 1
        return loss

    def evaluate(self) -> list[dict[str, Any]]:
        """Measure loss and accuracy by role on the held-out batch."""
        loss, prediction = self.engine.evaluate(self.held_out)
        return [
            {"step": self.step, "split": "held_out", "metric": f"{role}_{metric}", "value": value, "n": n}
            for (role, metric), (value, n) in summary(loss, prediction, self.held_out).items()
        ]

    def record(self, loss: float | None) -> StepRecord:
        """Evaluate where the schedule says so, and say whether to keep the step, which has finite weights then."""
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
            good = "none is kept" if self.last_kept is None else f"the last good step that is kept is {self.last_kept}"
            raise DivergedError(
                f"{otherwise} at step {self.step}; training stopped, {good}. "
                f"Lower optimiser.learning_rate = {rate} (a factor of 2 to 10), or use embeddings of smaller norm."
            )


def train(
    config: RunConfig,
    statistics: BigramStatistics | None = None,
    trainer: Trainer | None = None,
) -> Iterator[StepRecord]:
    """Train and yield a record for step 0 (unless it is resumed from) and after each update; stop whenever you like.

    The engine and the reason for it are logged before the first step.

    Example:
        >>> config = RunConfig.parse({"model": {"d_model": 16}, "task": {"context": 16}}, ["training.batch_size=4"])
        >>> for record in train(config):
        ...     if record.step == 3:
        ...         break
        >>> record.weights["L1.W_O"].shape
        (1, 16, 16)
    """
    trainer = trainer or Trainer(config, statistics or statistics_of(config.corpus))
    if trainer.step == 0 or trainer.step < config.training.steps:
        _log.info(f"engine {trainer.engine_name}: {trainer.engine_reason}")
    if trainer.step == 0 and not trainer.resumed:
        yield trainer.record(None)
    while trainer.step < config.training.steps:
        yield trainer.record(trainer.update())


def _optimiser(config: RunConfig, engine: Engine) -> torch.optim.Optimizer:
    settings = config.optimiser
    parameters = list(engine.parameters.values())
    if not parameters:
        raise BirthlensError("training.trained = (): nothing would move; name at least one matrix.")
    if settings.kind == "sgd":
        return torch.optim.SGD(
            parameters, lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )


def _restore(optimiser: torch.optim.Optimizer, engine: Engine, tensors: Mapping[str, Array]) -> None:
    for name, parameter in engine.parameters.items():
        found = {key.removesuffix(f"/{name}"): value for key, value in tensors.items() if key.endswith(f"/{name}")}
        for key, value in found.items():
            if value.size != 1 and value.shape != tuple(parameter.shape):
                raise BirthlensError(
                    f"resume.safetensors has {key}/{name} of shape {value.shape}, not {tuple(parameter.shape)}; "
                    "the run is damaged, train again."
                )
        if found:
            optimiser.state[parameter] = {key: torch.from_numpy(np.array(value)) for key, value in found.items()}
