"""The batches of an ensemble: those of the counter-based sampler are drawn together, several steps ahead.

A batch of that sampler depends on nothing but its seed and its index, so one tensor program draws those of all members with
the same task and batch size, for as many steps as `AT_ONCE` sequences allow. A GPU would be idle during small programs.
"""

from __future__ import annotations

from collections.abc import Sequence

from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.counter_sampling import counter_program
from birthlens.training.loop import Draw, Trainer

AT_ONCE = 65_536
"""The most sequences in a program that draws ahead on a GPU; a program of one step may have more."""
MOST_STEPS = 16
"""How many steps ahead are drawn at most."""


class Draws:
    """What the members of an ensemble train on, step by step; equal to `Trainer.draw` of each.

    `at_once` is the most sequences in a program that draws ahead.
    """

    def __init__(self, trainers: Sequence[Trainer], at_once: int) -> None:
        self._trainers = trainers
        self._at_once = at_once
        self._ahead: dict[tuple[int, int], Draw] = {}

    def of(self, numbers: Sequence[int]) -> dict[int, Draw]:
        """Return the inputs of the next update of the given members."""
        waiting = [number for number in numbers if (number, self._trainers[number].step) not in self._ahead]
        groups: dict[object, list[int]] = {}
        found: dict[int, Draw] = {}
        for number in waiting:
            trainer = self._trainers[number]
            config = trainer.config
            if trainer.execution.sampler != "counter" or config.training.clamps:  # clamps may change the task
                found[number] = trainer.draw()
                continue
            key = (config.task, config.corpus, config.training.batch_size, config.training.loss)
            groups.setdefault(key, []).append(number)
        for members in groups.values():
            self._draw_ahead(members)
        for number in numbers:
            if number not in found:
                found[number] = self._ahead.pop((number, self._trainers[number].step))
        return found

    def _draw_ahead(self, members: Sequence[int]) -> None:
        """Draw the next steps of members that share their task and batch size."""
        first = self._trainers[members[0]]
        size = first.config.training.batch_size
        depth = max(1, min(MOST_STEPS, self._at_once // (size * len(members))))
        wanted = [
            (number, step)
            for number in members
            for step in range(self._trainers[number].step, self._trainers[number].step + depth)
            if step == self._trainers[number].step or step < self._trainers[number].config.training.steps
        ]
        seeds = [self._trainers[number].config.seeds.data for number, _ in wanted]
        indices = [step for _, step in wanted]
        whole: TokenBatch = counter_program(first.task, size, seeds, indices, first.execution.device)
        mask = first.task.loss_mask(whole, first.config.training.loss)
        for place, (number, step) in enumerate(wanted):
            rows = slice(place * size, (place + 1) * size)
            self._ahead[number, step] = Draw(self._trainers[number].config, whole[rows], mask[rows])
