"""When an event happens in a run, and how much later than another, if either may never have happened.

A run ends: an event that has not happened by its last step happens later, or never. Its step is NaN. A difference of
two such steps is known only up to a bound. The bound is useful only if it determines the sign: one event happened
before the other could have.
"""

from __future__ import annotations

import numpy as np

from birthlens.claims.claim import BOUND
from birthlens.shapes import Float

Array = np.ndarray


def first_crossing(steps: Float[Array, "step"], values: Float[Array, "step"], level: float) -> float:
    """Return the step at which the values first exceed a level, by linear interpolation; NaN if they never do.

    Example:
        >>> first_crossing(np.array([0.0, 10.0, 20.0]), np.array([0.0, 0.2, 0.6]), 0.4)
        15.0
    """
    above = np.flatnonzero(values >= level)
    if not len(above):
        return float("nan")
    i = int(above[0])
    if i == 0:
        return float(steps[0])
    share = (level - values[i - 1]) / (values[i] - values[i - 1])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def lag(name: str, first: float, second: float, ends: tuple[float, float]) -> dict[str, float]:
    """Return `second - first` under a name; `ends` are the last steps at which each could have been observed.

    If one of them never happened, the difference is the bound from its end, marked as such, provided that the bound has the
    sign that the difference must have. Otherwise it is NaN.

    Example:
        >>> lag("later", 30.0, 50.0, (100, 100)), lag("later", 30.0, float("nan"), (100, 100))
        ({'later': 20.0}, {'later': 70.0, 'later is a bound': 1.0})
        >>> lag("later", float("nan"), float("nan"), (100, 100))
        {'later': nan}
    """
    never = np.isnan(first), np.isnan(second)
    if not any(never):
        return {name: second - first}
    bound = (ends[1] if never[1] else second) - (ends[0] if never[0] else first)
    if not all(never) and (bound > 0) == never[1] and bound != 0:
        return {name: float(bound), name + BOUND: 1.0}
    return {name: float("nan")}


def slope(x: Float[Array, "n"], y: Float[Array, "n"]) -> float:
    """Return the slope of the least-squares line; NaN if a point is missing."""
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return float("nan")
    return float(np.polyfit(x, y, 1)[0])
