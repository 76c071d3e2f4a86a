"""Exact intervals over seeds: Clopper-Pearson intervals for shares, order statistics for medians."""

from __future__ import annotations

from collections.abc import Sequence


def share_interval(successes: float | int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the Clopper-Pearson interval for a probability, from beta quantiles.

    Ties may count half. They vary less than successes and failures with the same mean, so the interval stays wide enough.

    Example:
        >>> [round(bound, 3) for bound in share_interval(12, 12)]
        [0.735, 1.0]
    """
    from scipy.stats import beta

    tail = (1 - level) / 2
    failures = n - successes
    low = float(beta.ppf(tail, successes, failures + 1)) if successes > 0 else 0.0
    high = float(beta.ppf(1 - tail, successes + 1, failures)) if failures > 0 else 1.0
    return low, high


def median_interval(values: Sequence[float | int], level: float = 0.95) -> tuple[float, float]:
    """Return the order statistics that contain the median with at least this probability; NaN with too few values.

    The number of values below the median is binomial(n, 1/2) for any distribution. A level of 95 % needs six values.

    Example:
        >>> median_interval([5, 1, 4, 2, 6, 3]), median_interval([1, 2, 3, 4, 5])
        ((1.0, 6.0), (nan, nan))
    """
    from scipy.stats import binom

    below = int(binom.ppf((1 - level) / 2, len(values), 0.5))  # P(fewer than this many) is below the tail probability
    if below == 0:
        return float("nan"), float("nan")
    ranked = sorted(map(float, values))
    return ranked[below - 1], ranked[-below]
