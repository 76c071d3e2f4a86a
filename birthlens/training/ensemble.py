"""Many runs of one shape, trained as one tensor program: each member is an ordinary trainer on a row of a stack.

Members share the model's shape, the context, the vocabulary and the kind of optimiser. Everything else may differ: seeds,
rates, momentum, decay, freezing and clamps of matrices, triggers, outputs, corpora, initialisation, and the batch size.
Each keeps its own schedule, step and state, so it stops, fails and continues independently of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from birthlens.config.model import parameter_shapes
from birthlens.config.run import OptimiserConfig, RunConfig
from birthlens.config.schedule import learning_rate
from birthlens.devices import DEFAULT, Execution, free_memory
from birthlens.errors import BirthlensError
from birthlens.model.weights import Weights
from birthlens.tasks.corpus import BigramStatistics
from birthlens.tasks.kinds import chain_of
from birthlens.training.drawing import AT_ONCE, Draws
from birthlens.training.engines import Engine, obstacle_to_stacking
from birthlens.training.footprint import sequences_that_fit
from birthlens.training.loop import DivergedError, Draw, State, StepRecord, Trainer
from birthlens.training.stack import Member, Stack
from birthlens.training.stacked_optimiser import StackedOptimiser

Array = np.ndarray
Event = tuple[int, StepRecord | DivergedError]
"""The number of a member, and its record; or the error with which it stopped."""


def shape_of(config: RunConfig, d_vocab: int) -> dict[str, object]:
    """Return what the members of an ensemble have in common, by the names that messages use."""
    model = {f"model.{name}": value for name, value in config.model.to_data().items() if name not in ("init", "zeroed")}
    return {
        **model,
        "task.context": config.task.context,
        "the size of the vocabulary": d_vocab,
        "optimiser.kind": config.optimiser.kind,
    }


def check_one_shape(configs: Sequence[RunConfig], sizes: Sequence[int]) -> None:
    """Raise BirthlensError if runs cannot be members of one ensemble; `sizes` are those of their vocabularies."""
    if not configs:
        raise BirthlensError("an ensemble needs at least one config.")
    first = shape_of(configs[0], sizes[0])
    for number, (config, size) in enumerate(zip(configs, sizes, strict=True)):
        if obstacle := obstacle_to_stacking(config):
            raise BirthlensError(f"member {number} cannot be part of an ensemble: {obstacle}.")
        for name, value in shape_of(config, size).items():
            if value != first[name]:
                raise BirthlensError(
                    f"members 0 and {number} differ in {name} ({first[name]} and {value}); members of an ensemble share "
                    "the model, the context, the vocabulary and the kind of optimiser."
                )


class Ensemble:
    """Trainers on the rows of a stack.

    `states` continue members from the result of `Trainer.snapshot`; None starts a member at step 0.

    Raises:
        BirthlensError: if the members do not share a shape, or one cannot be trained.
    """

    def __init__(
        self,
        configs: Sequence[RunConfig],
        statistics: Sequence[BigramStatistics] | None = None,
        states: Sequence[State | None] | None = None,
        execution: Execution = DEFAULT,
    ) -> None:
        chains = list(statistics) if statistics is not None else chains_of(configs)
        check_one_shape(configs, [len(chain) for chain in chains])
        shapes = parameter_shapes(configs[0].model, len(chains[0]), configs[0].task.context)
        trained = [name for name in shapes if any(name in config.trained for config in configs)]
        pieces = sequences_that_fit(configs[0], len(chains[0]), len(configs), free_memory(execution.device))
        self.stack = Stack(configs[0].model, shapes, trained, len(configs), execution, pieces)
        self.trainers = [
            Trainer(config, chain, state, execution, self._builder(number, config))
            for number, (config, chain, state) in enumerate(
                zip(configs, chains, states or [None] * len(configs), strict=True)
            )
        ]
        self.at_once = AT_ONCE if self.stack.device.type != "cpu" else 0
        self._draws = Draws(self.trainers, self.at_once)
        self._optimiser = StackedOptimiser(self.stack, configs[0].optimiser.kind)
        for number, trainer in enumerate(self.trainers):
            trainer.engine_name = Member.name
            trainer.engine_reason = f"one of {len(configs)} runs trained together"
            self._optimiser.load(number, trainer.optimiser, trainer.engine.parameters)

    def _builder(self, number: int, config: RunConfig) -> Callable[[Weights], Engine]:
        return lambda initial: Member(self.stack, number, initial, config.trained)

    def train(self) -> Iterator[Event]:
        """Train all members to their ends; yield each record, and the error of a member that diverges and stops alone."""
        alive = list(range(len(self.trainers)))
        yield from self._records({number: None for number in alive if not self.trainers[number].recorded}, alive)
        while alive := [n for n in alive if self.trainers[n].step < self.trainers[n].config.training.steps]:
            losses, failed = self.update(alive)
            for number, error in failed.items():
                alive.remove(number)
                yield number, error
            yield from self._records(losses, alive)

    def update(self, numbers: Sequence[int]) -> tuple[dict[int, float | None], dict[int, DivergedError]]:
        """Take one step of the given members; return the losses, and the errors of those that diverged."""
        draws = self._draws.of(numbers)
        # One question to the device for all members, since every answer waits for it.
        some = torch.stack([draw.mask.any() for draw in draws.values()]).tolist()
        counted = [number for number, has in zip(draws, some, strict=True) if has]
        losses: dict[int, float | None] = dict.fromkeys(numbers)
        failed: dict[int, DivergedError] = {}
        if counted:
            chosen = [draws[number] for number in counted]
            found, gradients = self.stack.gradients(
                counted, [draw.batch for draw in chosen], [draw.mask for draw in chosen]
            )
            for number, loss in zip(counted, found.tolist(), strict=True):
                losses[number] = loss
                try:
                    self.trainers[number].check_loss(loss)
                except DivergedError as error:
                    failed[number] = error
                    del losses[number]
            self._optimiser.step(counted, gradients, self._settings(counted, chosen), self._moving(counted, chosen))
        for number in losses:
            self._advance(number)
        return losses, failed

    def _settings(self, numbers: Sequence[int], draws: Sequence[Draw]) -> list[OptimiserConfig]:
        """Return the optimisers' settings at the members' steps."""
        settings = []
        for number, draw in zip(numbers, draws, strict=True):
            rate = learning_rate(draw.config, self.trainers[number].step)
            own = draw.config.optimiser
            settings.append(own if rate == own.learning_rate else own.changed(learning_rate=rate))
        return settings

    def _moving(self, numbers: Sequence[int], draws: Sequence[Draw]) -> dict[str, Array]:
        """Return, for each matrix, which members train it at their steps."""
        moving = {name: np.zeros(len(numbers), dtype=bool) for name in self.stack.trained}
        for i, (number, draw) in enumerate(zip(numbers, draws, strict=True)):
            trainer = self.trainers[number]
            for name in set(trainer.engine.parameters) - trainer.resting(draw.config):
                moving[name][i] = True
        return moving

    def _advance(self, number: int) -> None:
        """Go to the next step; if clamps may change the optimiser's state, torch's optimiser holds it in the meantime."""
        trainer = self.trainers[number]
        if not trainer.config.training.clamps:
            trainer.advance()
            return
        self.store(number)
        trainer.advance()
        self._optimiser.load(number, trainer.optimiser, trainer.engine.parameters)

    def store(self, number: int) -> None:
        """Give a member's trainer the state of its optimiser, which is in the stack, before `Trainer.snapshot`."""
        trainer = self.trainers[number]
        self._optimiser.store(number, trainer.optimiser, trainer.engine.parameters)

    def _records(self, losses: dict[int, float | None], alive: list[int]) -> Iterator[Event]:
        """Yield a record of each given member; those that are evaluated now are evaluated together."""
        due = [n for n in losses if self.trainers[n].schedule.evaluates(self.trainers[n].step)]
        if due:
            found = self.stack.evaluate(due, [self.trainers[n].held_out for n in due])
            for number, evaluation in zip(due, found, strict=True):
                engine = self.trainers[number].engine
                assert isinstance(engine, Member)
                engine.evaluation = evaluation
        for number, loss in losses.items():
            try:
                record = self.trainers[number].record(loss)
            except DivergedError as error:
                alive.remove(number)
                yield number, error
                continue
            if record.keep:
                self.store(number)
            yield number, record


def chains_of(configs: Sequence[RunConfig]) -> list[BigramStatistics]:
    """Return the chain of each config; a corpus that several share is read once."""
    read: dict[object, BigramStatistics] = {}
    for config in configs:
        key = (config.corpus, config.task)
        if key not in read:
            read[key] = chain_of(config)
    return [read[config.corpus, config.task] for config in configs]
