"""Metrics of a model's logits under interventions, kept for each sequence to allow differences and intervals.

Metrics and their quantities are defined in `metrics`. A value is the mean over all positions of the role in all sequences.
Intervals are those of `bootstrap`. NaN in the logits gives NaN: no accuracy is computed from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from birthlens.analysis.interventions.bootstrap import percentile_interval, resample_counts
from birthlens.analysis.interventions.metrics import DEFAULT_METRICS, KL_METRICS, Metric, parsed
from birthlens.errors import BirthlensError
from birthlens.model.layout import Rows
from birthlens.shapes import Bool, Float, Int
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.corpus import BigramStatistics
from birthlens.tasks.positions import role_masks_with_successors
from birthlens.tasks.roles import correct

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray
BASELINE = "none"
"""Label of the unedited model among the cases."""


def default_metrics(statistics: BigramStatistics | None) -> tuple[Metric, ...]:
    """Return the default metrics, including KL to the bigram table if there is one."""
    return DEFAULT_METRICS if statistics is None else (*DEFAULT_METRICS, *KL_METRICS)


@dataclass(frozen=True, eq=False)
class Scoring:
    """The correct answer at each position of a batch, and the metrics to read.

    Raises:
        BirthlensError: for an unknown role or quantity, or one whose inputs are missing; the message lists the valid ones.

    Example:
        >>> from birthlens.tasks.positions import batch_of_tokens
        >>> scoring = Scoring.of(batch_of_tokens(torch.tensor([[3, 1, 3, 1]])), ["in_context.accuracy"])
        >>> logits = torch.eye(4)[torch.tensor([[0, 0, 1]])]
        >>> scoring.sums(logits).tolist(), scoring.counts().tolist()
        ([[1.0]], [[1.0]])
    """

    metrics: tuple[Metric, ...]
    roles: Mapping[str, Bool[Tensor, "batch pos"]]
    answers: Int[Tensor, "batch pos"]
    alternatives: Int[Tensor, "batch pos"] | None = None
    contexts: Int[Tensor, "batch pos"] | None = None
    bigram: Float[Tensor, "d_vocab d_vocab"] | None = None

    def __post_init__(self) -> None:
        if not self.metrics:
            raise BirthlensError(
                "metrics = (): name at least one metric as role.quantity, such as in_context.accuracy."
            )
        for metric in self.metrics:
            if metric.role not in self.roles:
                raise BirthlensError(
                    f"metric = '{metric}': role {metric.role!r} is unknown; valid are {', '.join(self.roles)}."
                )
            if metric.quantity == "logit_difference" and self.alternatives is None:
                raise BirthlensError(f"metric = '{metric}': only a corruption with another right answer defines it.")
            if metric.quantity == "kl" and self.bigram is None:
                raise BirthlensError(f"metric = '{metric}': it needs the corpus statistics of the global bigrams.")

    @classmethod
    def of(
        cls,
        batch: TokenBatch,
        metrics: Sequence[Metric | str] = DEFAULT_METRICS,
        statistics: BigramStatistics | None = None,
        alternatives: Int[Tensor, "batch pos"] | None = None,
    ) -> Scoring:
        """Score the targets of a batch by role of the token.

        `statistics` allow the quantity kl, `alternatives` the quantity logit_difference.
        """
        bigram = None if statistics is None else torch.from_numpy(statistics.bigram).float().to(batch.device)
        return cls(
            parsed(metrics), role_masks_with_successors(batch), batch.targets, alternatives, batch.tokens, bigram
        ).trimmed()

    def trimmed(self) -> Scoring:
        """Return the scoring without the roles that no metric reads."""
        used = {metric.role for metric in self.metrics}
        return replace(self, roles={role: mask for role, mask in self.roles.items() if role in used})

    def __getitem__(self, index: Int[Tensor, "row"]) -> Scoring:
        return Scoring(
            self.metrics,
            {role: mask[index] for role, mask in self.roles.items()},
            self.answers[index],
            None if self.alternatives is None else self.alternatives[index],
            None if self.contexts is None else self.contexts[index],
            self.bigram,
        )

    @property
    def read(self) -> Bool[Tensor, "batch pos"]:
        """The positions that some metric reads."""
        masks = [self.roles[metric.role] for metric in self.metrics]
        return torch.stack(masks).any(0)

    def counts(self) -> Float[Tensor, "batch metric"]:
        """Return the number of positions of each metric's role in each sequence, on the CPU."""
        return torch.stack([self.roles[metric.role].sum(1) for metric in self.metrics], 1).cpu().double()

    def at(self, rows: Rows) -> Scoring:
        """Return the scoring for logits that exist only at some rows."""
        picked = rows.of_positions
        return Scoring(
            self.metrics,
            {role: picked(mask) & rows.valid for role, mask in self.roles.items()},
            picked(self.answers),
            None if self.alternatives is None else picked(self.alternatives),
            None if self.contexts is None else picked(self.contexts),
            self.bigram,
        )

    def sums(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, "batch metric"]:
        """Sum each metric over its role in each sequence, on the CPU; differentiable if the quantity is."""
        wanted = {metric.quantity for metric in self.metrics}
        total = logits.logsumexp(-1) if wanted & {"loss", "probability", "kl"} else None
        values = {quantity: self._quantity(quantity, logits, total) for quantity in wanted}
        out = [torch.where(self.roles[metric.role], values[metric.quantity], 0.0).sum(1) for metric in self.metrics]
        return torch.stack(out, 1).cpu().double()

    def _quantity(
        self, name: str, logits: Float[Tensor, "batch pos d_vocab"], total: Float[Tensor, "batch pos"] | None
    ) -> Float[Tensor, "batch pos"]:
        """Return one quantity at every position; `total` is the logsumexp of the logits, if it is needed."""
        if name == "accuracy":
            return correct(logits, self.answers)
        right = logits.gather(-1, self.answers[..., None])[..., 0]
        if name == "logit":
            return right
        if name == "loss" and total is not None:
            return total - right
        if name == "probability" and total is not None:
            return (right - total).exp()
        if name == "logit_difference" and self.alternatives is not None:
            return right - logits.gather(-1, self.alternatives[..., None])[..., 0]
        if self.bigram is None or self.contexts is None or total is None:
            raise BirthlensError("quantity kl needs the corpus statistics of the global bigrams.")
        entropies = torch.special.entr(self.bigram).sum(-1)
        crossed = total - (self.bigram[self.contexts] * logits).sum(-1)
        return crossed - entropies[self.contexts]


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Sums of each metric by case and sequence, with the number of positions in each; case 0 is the unedited model."""

    cases: tuple[str, ...]
    metrics: tuple[Metric, ...]
    sums: Float[Array, "case batch metric"]
    counts: Float[Array, "batch metric"]

    @property
    def values(self) -> Float[Array, "case metric"]:
        """The mean of each metric over positions (NaN if its role is empty)."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.sums.sum(1) / self.counts.sum(0))

    def table(
        self, generator: np.random.Generator | None = None, draws: int = 200, level: float = 0.95
    ) -> pd.DataFrame:
        """Return case, role, metric, value, change (from the unedited model), low, high, change_low, change_high, n.

        The interval columns exist if a generator is given. They are NaN if there is no interval (see `bootstrap`).
        """
        import pandas as pd

        values = self.values
        columns: dict[str, Array] = {"value": values, "change": values - values[0]}
        if generator is not None:
            weights = resample_counts(generator, len(self.counts), draws)
            with np.errstate(invalid="ignore", divide="ignore"):
                drawn = np.einsum("ds,csm->dcm", weights, self.sums) / (weights @ self.counts)[:, None]
            columns["low"], columns["high"] = percentile_interval(drawn, values, self.counts, level)
            change = (drawn - drawn[:, :1], columns["change"])
            columns["change_low"], columns["change_high"] = percentile_interval(*change, self.counts, level)
        frame = pd.DataFrame(
            [(case, metric.role, metric.quantity) for case in self.cases for metric in self.metrics],
            columns=["case", "role", "metric"],
        )
        for name, array in columns.items():
            frame[name] = array.reshape(-1)
        frame["n"] = np.tile(self.counts.sum(0).astype(int), len(self.cases))
        return frame


def merged(parts: Sequence[Outcomes], order: Sequence[str]) -> Outcomes:
    """Combine the outcomes of different cases on the same batch, in the given order; for duplicates the first wins."""
    found = {case: part.sums[row] for part in reversed(parts) for row, case in enumerate(part.cases)}
    return Outcomes(tuple(order), parts[0].metrics, np.stack([found[case] for case in order]), parts[0].counts)
