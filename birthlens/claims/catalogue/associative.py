"""Claims of the papers on one associative memory (Cabannes et al. 2023, 2024), as data; none needs a run.

The rates are those published in the scaling paper; the bounds are ours. The claims on descent are ours, marked as variants.
"""

from __future__ import annotations

from birthlens.claims.claim import Claim, Expectation
from birthlens.claims.statistics import associative

EXPONENTS = (1.5, 2.0)

ASSOCIATIVE: tuple[Claim, ...] = (
    Claim(
        id="associative-slopes",
        paper="associative",
        sentence="The error falls as a power of d, with the published exponents, and falls faster the more a scheme favours "
        "what fits.",
        statistic=associative.scaling,
        settings={"trials": 20, "exponents": EXPONENTS},
        expectations=(
            Expectation("off_rate", "largest distance of a slope from the published one", below=0.15),
            Expectation("least_gap", "smallest difference of slopes: q = p, q = sqrt(p), thresholded", 0),
        ),
    ),
    Claim(
        id="associative-threshold-late",
        paper="associative",
        sentence="At a = 2 the thresholded scheme beats q = sqrt(p) at d = 384, and loses up to d = 192.",
        statistic=associative.scaling,
        settings={"trials": 20, "exponents": (2.0,)},
        expectations=(
            Expectation("ratio_384", "error of the thresholded scheme over that of sqrt(p), d = 384", below=1),
            Expectation("ratio_192", "the same at d = 192", 1),
            Expectation("ratio_96", "the same at d = 96", 1),
        ),
    ),
    Claim(
        id="associative-data-plateau",
        paper="associative",
        sentence="A wide memory is wrong only on what it has not seen: its error is the exact data term.",
        statistic=associative.plateau,
        settings={"trials": 40, "exponents": EXPONENTS, "samples": (30, 100, 300)},
        expectations=(
            Expectation("least_ratio", "smallest error at d = 384 over the data term, T = 30, 100, 300", 0.85, 1.15),
            Expectation("largest_ratio", "largest error over the data term, for the same d and T", 0.85, 1.15),
        ),
    ),
    Claim(
        id="associative-large-rates",
        paper="associative",
        variant=True,
        sentence="The best rate of SGD is above the largest rate at which the full-batch loss never rises.",
        statistic=associative.best_rate,
        settings={"trials": 5, "width": 20, "full_batch_steps": 100, "samples": 10240, "batch": 16},
        expectations=(Expectation("times", "best rate of SGD over that rate", 1),),
    ),
    Claim(
        id="associative-log-margin",
        paper="associative",
        variant=True,
        sentence="With orthogonal codebooks, the smallest margin grows like the logarithm of time.",
        statistic=associative.logarithmic_margin,
        settings={"tokens": 5, "width": 5, "rate": 1.0, "steps": 1000, "from": 50},
        expectations=(
            Expectation("slope", "growth of the smallest margin for each unit of log(step)", 0),
            Expectation("explained", "share of its variance that a line in log(step) explains", 0.98),
        ),
    ),
)
