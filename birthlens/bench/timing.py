"""Timing on a noisy machine: variants take turns (A B C A B C ...), and only ratios within one run can be compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant over the rounds of an interleaved run; `share` says how much of the work was timed."""

    variant: str
    seconds: tuple[float, ...]
    share: float = 1.0

    @property
    def median(self) -> float:
        """Median, in seconds."""
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float((high - low) / 2 / self.median)

    def of_share(self, share: float) -> Timing:
        """Scale the times of a variant that did a share of the work up to the whole work."""
        return Timing(self.variant, tuple(second / share for second in self.seconds), share)


def interleaved(
    variants: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1, calls: int = 1
) -> dict[str, Timing]:
    """Call every variant in turn, `rounds` times after `warm_up` rounds that are not counted; one turn is `calls` calls.

    The seconds are those of one call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warm_up + rounds):
        for name, call in variants.items():
            start = time.perf_counter()
            for _ in range(calls):
                call()
            if number >= warm_up:
                seconds[name].append((time.perf_counter() - start) / calls)
    return {name: Timing(name, tuple(values)) for name, values in seconds.items()}
