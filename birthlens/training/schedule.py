"""Which steps are evaluated, and which are kept on disk."""

from __future__ import annotations

from birthlens.config import RunConfig


class Schedule:
    """Decide step by step what to evaluate and keep; `last_kept_loss` is all it remembers.

    Example:
        >>> config = RunConfig.parse({}, ["training.steps=30", "checkpoints.every=10", "checkpoints.steps=[7]"])
        >>> schedule = Schedule(config)
        >>> [step for step in range(31) if schedule.planned(step)]
        [0, 7, 10, 20, 30]
    """

    def __init__(self, config: RunConfig, last_kept_loss: float | None = None) -> None:
        self.config = config
        self.last_kept_loss = last_kept_loss
        last = config.training.steps
        self._planned = {0, last, *config.checkpoints.steps}
        if config.checkpoints.schedule == "linear":
            self._planned |= set(range(0, last + 1, config.checkpoints.every))
        elif config.checkpoints.schedule == "log":
            step, power = 1, 0
            while step < last:
                self._planned.add(step)
                power += 1
                step = round(10 ** (power / config.checkpoints.per_decade))

    def planned(self, step: int) -> bool:
        """Say whether a step is kept whatever the loss does."""
        return step in self._planned

    def evaluates(self, step: int) -> bool:
        """Say whether the model is evaluated at a step: every `evaluation.every` steps and wherever it is kept."""
        return step % self.config.evaluation.every == 0 or self.planned(step)

    def keeps(self, step: int, loss: float | None) -> bool:
        """Say whether an evaluated step is kept: planned, or the loss has moved by the share `sensitivity`.

        `loss` is None where the held-out batch has no target of it; then only planned steps are kept.
        """
        last, sensitivity = self.last_kept_loss, self.config.checkpoints.sensitivity
        fast = sensitivity > 0 and last is not None and loss is not None and abs(loss - last) > sensitivity * last
        if self.planned(step) or fast:
            self.last_kept_loss = loss
            return True
        return False
