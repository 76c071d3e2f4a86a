"""The bootstrap over sequences: percentile intervals of means and of differences of means.

A resample draws sequences with replacement, as many as the batch has. All interventions share the resamples, so changes are
paired. There is no interval (NaN) if the value itself is NaN, or if fewer than two sequences have a position to read: one
sequence contains no information about the spread between sequences.
"""

from __future__ import annotations

import numpy as np

from birthlens.shapes import Bool, Float

Array = np.ndarray
FEWEST = 2
"""The smallest number of sequences for an interval."""


def resample_counts(generator: np.random.Generator, sequences: int, draws: int) -> Float[Array, "draw batch"]:
    """Return how often each resample contains each sequence."""
    return generator.multinomial(sequences, np.full(sequences, 1 / sequences), size=draws).astype(float)


def percentile_interval(
    drawn: Float[Array, "draw case metric"],
    value: Float[Array, "case metric"],
    counts: Float[Array, "batch metric"],
    level: float = 0.95,
    skip_empty: bool = True,
) -> tuple[Float[Array, "case metric"], Float[Array, "case metric"]]:
    """Return the ends of the percentile interval of resampled values.

    `value` is the value over all sequences, and `counts` is the number of positions in each sequence. Resamples without a
    position of a role are skipped if `skip_empty`; otherwise a single one of them means that there is no interval.
    """
    sure = ~np.isnan(value) & ((counts > 0).sum(0) >= FEWEST)
    ends = np.full((2, *value.shape), np.nan)
    if sure.any():
        tail = (1 - level) / 2
        quantile = np.nanquantile if skip_empty else np.quantile
        ends[:, sure] = quantile(_kept(drawn, sure), [tail, 1 - tail], axis=0)
    return ends[0], ends[1]


def _kept(drawn: Float[Array, "draw case metric"], sure: Bool[Array, "case metric"]) -> Float[Array, "draw value"]:
    return np.asarray(drawn[:, sure])
