"""What a claim is, and its verdict.

A statistic gives one number a seed for each expectation. Their mean has the interval

    mean +- t_{0.975, n-1} * standard deviation / sqrt(n)        over n seeds

    pass            the whole interval lies on the claimed side of the bound
    fail            the whole interval lies on the other side
    inconclusive    the interval holds the bound, a seed is missing or not a number, or there are fewer than two seeds

A claim passes where all its expectations do, and fails where one does.

What never happened within a run has no step: a statistic gives NaN for a number that needs it, and the claim stays open.
Only where a difference in time has a certain sign (the one happened, the other not until later than that) is its bound
given instead, and marked: a statistic that returns `quantity + BOUND` says that `quantity` is the bound nearest to zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from birthlens.errors import BirthlensError
from birthlens.runs.run import Run
from birthlens.shapes import Float

Verdict = Literal["pass", "fail", "inconclusive", "not checked", "not yet run"]
LEVEL = 0.95
BOUND = " is a bound"
"""What is added to the name of a quantity to mark it as a bound; its value is then 1."""


PAPERS = {
    "birth": "Birth of a Transformer: A Memory Viewpoint (Bietti et al. 2023)",
    "noise": "noisy in-context recall (Chen, Bruna, Bietti 2024)",
    "sinks": "Bigram-Backcopy and attention sinks (Guo et al. 2024)",
    "markov": "in-context Markov chains (Edelman et al. 2024; Park et al. 2024)",
    "facts": "factual recall (Nichani, Lee, Bietti 2024)",
    "associative": "one associative memory (Cabannes et al. 2023, 2024)",
}
"""The papers that claims are from."""


@dataclass(frozen=True)
class Evidence:
    """What a statistic sees of one seed: a finished run for each case, the seed, and the tier's settings of the claim."""

    runs: Mapping[str, Run]
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)


Statistic = Callable[[Evidence], Mapping[str, float]]


@dataclass(frozen=True)
class Expectation:
    """A number of the statistic, what it says, and the side of a bound on which the claim puts it."""

    quantity: str
    says: str
    above: float = -math.inf
    below: float = math.inf

    def __post_init__(self) -> None:
        if not self.above < self.below or (math.isinf(self.above) and math.isinf(self.below)):
            raise BirthlensError(
                f"expectation {self.quantity}: give a bound, above = {self.above} < {self.below} = below."
            )

    @property
    def wanted(self) -> str:
        """The bound in words.

        Example:
            >>> Expectation("x", "x", above=0).wanted, Expectation("x", "x", above=0.3, below=0.7).wanted
            ('> 0', '0.3 to 0.7')
        """
        if math.isinf(self.below):
            return f"> {self.above:g}"
        return f"< {self.below:g}" if math.isinf(self.above) else f"{self.above:g} to {self.below:g}"

    def verdict(self, low: float, high: float) -> Verdict:
        """Judge an interval; one that touches NaN is inconclusive.

        Example:
            >>> expectation = Expectation("x", "x", above=0.0)
            >>> expectation.verdict(0.1, 0.3), expectation.verdict(-0.3, -0.1), expectation.verdict(-0.1, 0.1)
            ('pass', 'fail', 'inconclusive')
        """
        if self.above < low and high < self.below:
            return "pass"
        return "fail" if high <= self.above or low >= self.below else "inconclusive"


@dataclass(frozen=True)
class Claim:
    """One claim. `cases` maps names to overrides of the tier's base config; a statistic without runs has none.

    `settings` go to the statistic, `tiers` replaces some of them at a tier, `overrides` are added to every case at a tier.
    `seeds` says how many where not as many as the tier has are wanted. `unchecked` is the reason why a claim is listed and
    not checked; `only` names the one tier that can check it. `paper` is a key of `PAPERS`. A `variant` is not a
    statement of that paper: it changes a condition, a probe or a scale, to see what a claim depends on.
    """

    id: str
    sentence: str
    expectations: tuple[Expectation, ...] = ()
    statistic: Statistic | None = None
    cases: Mapping[str, Sequence[str]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    tiers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    overrides: Mapping[str, Sequence[str]] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    only: str | None = None
    paper: str = "birth"
    variant: bool = False
    unchecked: str = ""

    def __post_init__(self) -> None:
        if (self.statistic is None) != bool(self.unchecked):
            raise BirthlensError(f"claim {self.id}: give either a statistic or the reason why it is not checked.")
        if self.statistic is not None and not self.expectations:
            raise BirthlensError(f"claim {self.id}: a statistic needs an expectation.")

    def reason(self, tier: str) -> str:
        """Say why the claim cannot be checked at a tier; empty where it can."""
        if self.only not in (None, tier):
            return f"it needs the settings of --tier {self.only}"
        return self.unchecked

    def settings_at(self, tier: str) -> dict[str, Any]:
        """Return the settings that the statistic gets at a tier."""
        return {**self.settings, **self.tiers.get(tier, {})}

    def cases_at(self, tier: str) -> dict[str, tuple[str, ...]]:
        """Return the overrides of every case at a tier."""
        return {case: (*words, *self.overrides.get(tier, ())) for case, words in self.cases.items()}


def interval(values: Sequence[float] | Float[np.ndarray, "seed"]) -> tuple[float, float, float]:
    """Return mean, low and high of the t interval over seeds; NaN where there is none.

    Example:
        >>> mean, low, high = interval([1.0, 2.0, 3.0])
        >>> mean, round(low, 2), round(high, 2)
        (2.0, -0.48, 4.48)
    """
    from scipy.stats import t

    found = np.asarray(values, dtype=float)
    if not len(found):
        return math.nan, math.nan, math.nan
    mean = float(found.mean())
    if len(found) < 2 or not np.isfinite(found).all():
        return mean, math.nan, math.nan
    reach = float(t.ppf((1 + LEVEL) / 2, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found)))
    return mean, mean - reach, mean + reach


def joint(verdicts: Sequence[Verdict]) -> Verdict:
    """Join the verdicts of a claim's expectations."""
    if not verdicts:
        return "inconclusive"
    if "fail" in verdicts:
        return "fail"
    return "pass" if set(verdicts) == {"pass"} else "inconclusive"
