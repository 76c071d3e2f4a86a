"""Which steps are evaluated, which are kept on disk, and which of the kept ones a text chooses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from birthlens.config.run import RunConfig
from birthlens.errors import BirthlensError


class Schedule:
    """Decide for each step whether to evaluate and keep it; the only state is `last_kept_loss`.

    Example:
        >>> config = RunConfig.parse({}, ["training.steps=30", "checkpoints.every=10", "checkpoints.steps=[7]"])
        >>> schedule = Schedule(config)
        >>> [step for step in range(31) if schedule.planned(step)]
        [0, 7, 10, 20, 30]
    """

    def __init__(self, config: RunConfig, last_kept_loss: float | None = None, start: int = 0) -> None:
        self.config = config
        self.last_kept_loss = last_kept_loss
        self._named = {start, config.training.steps, *config.checkpoints.steps}

    def planned(self, step: int) -> bool:
        """Return whether a step is kept for any loss."""
        settings = self.config.checkpoints
        if step in self._named:
            return True
        if settings.schedule == "linear":
            return step % settings.every == 0
        return settings.schedule == "log" and _is_power(step, settings.per_decade)

    def evaluates(self, step: int) -> bool:
        """Return whether the model is evaluated at a step: every `evaluation.every` steps and wherever it is kept."""
        return step % self.config.evaluation.every == 0 or self.planned(step)

    def keeps(self, step: int, loss: float | None) -> bool:
        """Return whether an evaluated step is kept: planned, or the loss has changed by the share `sensitivity`.

        `loss` is None if the held-out batch has no such target; then only planned steps are kept.
        """
        last = self.last_kept_loss
        sensitivity = self.config.checkpoints.sensitivity
        fast = sensitivity > 0 and last is not None and loss is not None and abs(loss - last) > sensitivity * last
        if self.planned(step) or fast:
            self.last_kept_loss = loss
            return True
        return False


def learning_rate(config: RunConfig, step: int) -> float:
    """Return the rate of the update that follows `step`: warm-up, then the decay (`OptimiserConfig`).

    Example:
        >>> words = ["training.steps=10", "optimiser.warm_up=2", "optimiser.decay=linear", "optimiser.learning_rate=1"]
        >>> [round(learning_rate(RunConfig.parse({}, words), step), 3) for step in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.125]
    """
    settings = config.optimiser
    if step < settings.warm_up:
        return settings.learning_rate * (step + 1) / settings.warm_up
    if settings.decay == "none":
        return settings.learning_rate
    done = (step - settings.warm_up) / max(config.training.steps - settings.warm_up, 1)
    share = 1 - done if settings.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.learning_rate * share


def _is_power(step: int, per_decade: int) -> bool:
    """Return whether a step is a whole number of `per_decade`-ths of a decade, rounded."""
    below = math.floor(math.log10(step) * per_decade)
    return any(round(10 ** (power / per_decade)) == step for power in (below, below + 1))


def chosen_steps(text: str, kept: Sequence[int], path: Path) -> list[int]:
    """Parse a choice of kept steps: 'all', 'last', 'every:N' (of the kept ones), or a list such as '0,100,-1'.

    Raises:
        BirthlensError: for anything else, and for a step that is not kept in `path`.

    Example:
        >>> chosen_steps("0,-1", [0, 50, 100], Path("runs/demo")), chosen_steps("every:2", [0, 50, 100], Path("runs/demo"))
        ([0, 100], [0, 100])
    """
    steps = list(kept)
    if text == "all":
        return steps
    if text == "last":
        return steps[-1:]
    try:
        if text.startswith("every:"):
            if (every := int(text.removeprefix("every:"))) < 1:
                raise BirthlensError(f"steps = {text!r}: take every N-th kept step with N at least 1.")
            return steps[::every]
        wanted = [int(part) for part in text.split(",")]
        chosen = list(dict.fromkeys(steps[step] if step < 0 else step for step in wanted))
    except BirthlensError:
        raise
    except (ValueError, IndexError):
        raise BirthlensError(f"steps = {text!r}: write all, last, every:N, or a list such as 0,100,-1.") from None
    for step in chosen:
        if step not in steps:
            raise not_kept(step, steps, path)
    return chosen


def not_kept(step: int, kept: Sequence[int], path: Path) -> BirthlensError:
    """Return the error for a step that is not kept, which lists those that are."""
    listed = [str(each) for each in kept]
    if len(listed) > 12:
        listed = [*listed[:6], "...", *listed[-3:]]
    more = f" ({len(kept)} in all)" if len(kept) > 12 else ""
    return BirthlensError(f"step = {step} is not kept in {path}; kept steps are {', '.join(listed)}{more}.")
