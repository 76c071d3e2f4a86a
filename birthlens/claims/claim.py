"""What a claim is, and its verdict.

A statistic gives one number for each seed and expectation. The mean over seeds has the interval

    mean +- t_{0.975, n-1} * standard deviation / sqrt(n)        over n seeds

    pass            the whole interval is on the claimed side of the bound
    fail            the whole interval is on the other side
    inconclusive    the interval contains the bound, a seed is missing or not a number, or there are fewer than two seeds

A claim passes if all its expectations pass, and fails if one of them fails.

An event that never happened within a run has no step. A number that needs its step is then NaN, and the claim is
inconclusive. There is one exception: if one event happened and the other did not happen until later, the sign of their
difference in time is certain. The statistic then returns the bound of the difference that is nearest to zero, and marks it:
`quantity + BOUND` says that `quantity` is a bound.
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
"""The suffix that marks the name of a quantity as a bound; its value is then 1."""


PAPERS = {
    "birth": "Birth of a Transformer: A Memory Viewpoint (Bietti et al. 2023)",
    "noise": "noisy in-context recall (Chen, Bruna, Bietti 2024)",
    "sinks": "Bigram-Backcopy and attention sinks (Guo et al. 2024)",
    "markov": "in-context Markov chains (Edelman et al. 2024; Park et al. 2024)",
    "facts": "factual recall (Nichani, Lee, Bietti 2024)",
    "associative": "one associative memory (Cabannes et al. 2023, 2024)",
}
"""The papers that the claims come from."""


@dataclass(frozen=True)
class Evidence:
    """What a statistic knows of one seed: a finished run for each case, the seed, and the tier's settings of the claim."""

    runs: Mapping[str, Run]
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)


Statistic = Callable[[Evidence], Mapping[str, float]]


@dataclass(frozen=True)
class Expectation:
    """A number of the statistic, its meaning in words, and the side of a bound on which the claim puts it."""

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

    `settings` are passed to the statistic, `tiers` replaces some of them at a tier, and `overrides` are added to every case
    at a tier. `seeds` gives the number of seeds at a tier if it differs from the tier's own. `unchecked` is the reason why a
    claim is listed and not checked; `only` names the one tier that can check it. `paper` is a key of `PAPERS`. A `variant`
    is not a statement of that paper: it changes a condition, a probe or a scale, to show what a claim depends on.
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
        """Return why the claim cannot be checked at a tier; empty if it can."""
        if self.only not in (None, tier):
            return f"it needs the settings of --tier {self.only}"
        return self.unchecked

    def settings_at(self, tier: str) -> dict[str, Any]:
        """Return the settings of the statistic at a tier."""
        return {**self.settings, **self.tiers.get(tier, {})}

    def cases_at(self, tier: str) -> dict[str, tuple[str, ...]]:
        """Return the overrides of every case at a tier."""
        return {case: (*words, *self.overrides.get(tier, ())) for case, words in self.cases.items()}


def interval(values: Sequence[float] | Float[np.ndarray, "seed"]) -> tuple[float, float, float]:
    """Return mean, low and high of the t interval over seeds; NaN if there is none.

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
    """Combine the verdicts of a claim's expectations."""
    if not verdicts:
        return "inconclusive"
    if "fail" in verdicts:
        return "fail"
    return "pass" if set(verdicts) == {"pass"} else "inconclusive"
