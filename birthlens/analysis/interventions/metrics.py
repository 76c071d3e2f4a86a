"""Metrics: a quantity, read at the positions of one role.

As text, a metric is `role.quantity`, such as in_context.accuracy. Text is parsed once, at the border. Roles are those of
`tasks.positions.role_masks_with_successors`, or the role of a pair. Quantities:

    accuracy           the answer has the largest logit
    loss               cross-entropy of the answer, in nats
    logit              logit of the answer
    probability        probability of the answer
    logit_difference   logit of the answer minus that of the alternative (a corruption defines the alternative)
    kl                 KL( pi_b(. | z_t) || model ), against the table of global bigrams
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from birthlens.errors import BirthlensError

QUANTITIES = ("accuracy", "loss", "logit", "probability", "logit_difference", "kl")


@dataclass(frozen=True, order=True)
class Metric:
    """A quantity at the positions of a role.

    Raises:
        BirthlensError: for an unknown quantity; the message lists the valid ones.

    Example:
        >>> str(Metric("in_context", "loss"))
        'in_context.loss'
    """

    role: str
    quantity: str

    def __post_init__(self) -> None:
        if self.quantity not in QUANTITIES:
            raise BirthlensError(f"metric = '{self}': the quantity must be one of {', '.join(QUANTITIES)}.")

    def __str__(self) -> str:
        return f"{self.role}.{self.quantity}"

    @classmethod
    def parse(cls, text: str) -> Metric:
        """Parse `role.quantity`.

        Raises:
            BirthlensError: for text of another form, or an unknown quantity.

        Example:
            >>> Metric.parse("global.kl")
            Metric(role='global', quantity='kl')
        """
        role, dot, quantity = text.rpartition(".")
        if not (role and dot):
            raise BirthlensError(f"metric = {text!r}: write role.quantity, such as in_context.accuracy.")
        return cls(role, quantity)


def parsed(metrics: Iterable[Metric | str]) -> tuple[Metric, ...]:
    """Parse the metrics that are given as text."""
    return tuple(Metric.parse(metric) if isinstance(metric, str) else metric for metric in metrics)


DEFAULT_METRICS = parsed(
    (
        "in_context.accuracy",
        "in_context.loss",
        "in_context.logit",
        "in_context_unabsorbed.accuracy",
        "in_context_unabsorbed.loss",
        "global.loss",
        "all.loss",
    )
)
"""The metrics to read by default."""

KL_METRICS = (Metric("in_context", "kl"), Metric("global", "kl"))
"""Further default metrics if the global bigrams are known."""

IN_CONTEXT_METRICS = (Metric("in_context", "accuracy"), Metric("in_context", "loss"))
"""The two metrics of the paper's in-context task."""
