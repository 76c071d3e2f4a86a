"""The settings and the task of each step: the run's own, but for what clamps of the kind `set` change."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from birthlens.config.clamps import Set
from birthlens.config.run import RunConfig
from birthlens.config.schedule import learning_rate
from birthlens.errors import BirthlensError
from birthlens.tasks.corpus import BigramStatistics
from birthlens.tasks.kinds import task_class, task_of
from birthlens.tasks.task import Task


@dataclass(frozen=True, eq=False)
class Settings:
    """The config and the task that an update uses."""

    config: RunConfig
    task: Task


class Timeline:
    """The settings of every step of a run.

    Raises:
        BirthlensError: if a changed task or loss does not fit the corpus, or needs another vocabulary.
    """

    def __init__(self, config: RunConfig, statistics: BigramStatistics) -> None:
        self._clamps = [clamp for clamp in config.training.clamps if isinstance(clamp, Set)]
        self._statistics = statistics
        self._by_clamps: dict[tuple[int, ...], Settings] = {}
        self._base = config
        for step in {0, *(clamp.start for clamp in self._clamps)}:
            self.at(step)

    def at(self, step: int) -> Settings:
        """Return the settings of the update after a step."""
        active = tuple(number for number, clamp in enumerate(self._clamps) if clamp.acts(step))
        if active not in self._by_clamps:
            self._by_clamps[active] = self._settings(active)
        return self._by_clamps[active]

    def _settings(self, active: tuple[int, ...]) -> Settings:
        config = self._base
        try:
            for number in active:
                config = config.with_setting(self._clamps[number])
            task = task_of(config.task, changed_chain(self._base, config, self._statistics))
            task.check_loss(config.training.loss)
        except BirthlensError as error:
            if not active:
                raise
            words = ", ".join(f"'{self._clamps[number]}'" for number in active)
            raise BirthlensError(f"clamp {words}: {error}") from None
        return Settings(config, task)


def changed_chain(before: RunConfig, after: RunConfig, statistics: BigramStatistics) -> BigramStatistics:
    """Return the chain of a task that has changed in mid-run.

    Raises:
        BirthlensError: if it has another vocabulary, or reads a text, whose vocabulary and parts are made once.
    """
    task = task_class(after.task.kind)
    if task.needs_text and after.task != before.task:
        raise BirthlensError("the settings of a task that reads a text cannot change during training.")
    if after.task == before.task or task.needs_corpus:
        return statistics
    found = task.chain(after.task, None)
    if found.vocab != statistics.vocab:
        raise BirthlensError(
            f"the changed task has another vocabulary: {len(found)} tokens, the run {len(statistics)}."
        )
    return found


def use(optimiser: torch.optim.Optimizer, config: RunConfig, step: int) -> None:
    """Give the optimiser the rate of a step, and the settings that clamps can change."""
    settings = config.optimiser
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(config, step)
        group["weight_decay"] = settings.weight_decay
        if settings.kind == "sgd":
            group["momentum"] = settings.momentum
        else:
            group["betas"] = settings.betas
