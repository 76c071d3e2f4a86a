"""Statistics of one associative memory (Cabannes et al. 2023, 2024): how its error scales, and how descent learns it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from birthlens.analysis.theory.memory_scaling import SCHEMES, scaling_table, slope
from birthlens.analysis.theory.outer_products import ZipfMemory, memory_training_table
from birthlens.claims.claim import Evidence

WIDTHS = (12, 24, 48, 96, 192, 384)


def scaling(evidence: Evidence) -> dict[str, float]:
    """Return the slopes of log(error) on log(d) minus the published ones, and whether they are in the right order.

    `off_rate` is the largest distance from a published slope over the exponents and schemes. `least_gap` is the smallest
    difference between the slopes of one scheme and the next steeper one. `ratio_D` is the error of the thresholded scheme
    over that of sqrt(p) at d = D with a = 2. The distribution is known in all cases.
    """
    trials = evidence.settings["trials"]
    exponents = evidence.settings["exponents"]
    schemes = [scheme for scheme in SCHEMES if not math.isnan(scheme.rate(2.0))]
    table = scaling_table(exponents, WIDTHS, seeds=_trials(evidence.seed, trials), schemes=schemes)
    errors = {
        (exponent, scheme.name): _errors(table, exponent, scheme.name) for exponent in exponents for scheme in schemes
    }
    found = {key: slope(WIDTHS, values) for key, values in errors.items()}
    off = {
        (exponent, scheme.name): found[exponent, scheme.name] - scheme.rate(exponent)
        for exponent in exponents
        for scheme in schemes
    }
    ordered = [[found[exponent, scheme.name] for scheme in schemes] for exponent in exponents]
    ratio = errors[2.0, "thresholded"] / errors[2.0, "q = sqrt(p)"]
    return {
        "off_rate": max(map(abs, off.values())),
        "least_gap": min(a - b for slopes in ordered for a, b in pairwise(slopes)),
        **{f"ratio_{width}": float(ratio[i]) for i, width in enumerate(WIDTHS)},
        **{f"slope {name}, a = {exponent:g}": value for (exponent, name), value in found.items()},
    }


def plateau(evidence: Evidence) -> dict[str, float]:
    """Return the smallest and largest ratio of a wide memory's error to the exact data term, over T and exponents."""
    settings = evidence.settings
    trials = _trials(evidence.seed, settings["trials"])
    table = scaling_table(settings["exponents"], WIDTHS[-1:], settings["samples"], trials, SCHEMES[:1])
    means = table.groupby(["exponent", "samples"])[["error", "data_term"]].mean()
    ratios = means["error"] / means["data_term"]
    return {"least_ratio": float(ratios.min()), "largest_ratio": float(ratios.max())}


def best_rate(evidence: Evidence) -> dict[str, float]:
    """Return the best rate of SGD over the largest rate at which the full-batch loss never rises.

    Rates are tried in factors of the square root of 10, and errors are means over trials. Of rates with equally good results
    the smallest counts. The full-batch rate is the smallest over the trials.
    """
    settings = evidence.settings
    rates = [10 ** (power / 2) for power in range(-2, 7)]
    memories = [
        ZipfMemory(100, settings["width"], 2.0, 5, seed, codes="gaussian")
        for seed in _trials(evidence.seed, settings["trials"])
    ]
    ends = np.mean([[_sampled_error(memory, rate, settings) for rate in rates] for memory in memories], axis=0)
    best = rates[int(ends.argmin())]
    largest = min(_largest_monotone(memory, rates, settings["full_batch_steps"]) for memory in memories)
    return {"times": best / largest, "best": best, "monotone": largest, "error": float(ends.min())}


def logarithmic_margin(evidence: Evidence) -> dict[str, float]:
    """Return the share of the smallest margin's variance that a line in log(step) explains, for orthogonal codebooks.

    All orthogonal codebooks are equivalent, so the seed draws the Zipf exponent instead, uniformly between 0 and 2.
    """
    settings = evidence.settings
    exponent = float(np.random.default_rng(evidence.seed).uniform(0, 2))
    memory = ZipfMemory(settings["tokens"], settings["width"], exponent, seed=evidence.seed, codes="orthogonal")
    table = memory_training_table(memory, [settings["rate"]], settings["steps"])
    late = table[table["step"] >= settings["from"]]
    logs = np.log(late["step"].to_numpy(dtype=float))
    margin = late["least_margin"].to_numpy()
    rise, start = np.polyfit(logs, margin, 1)
    rest = margin - (rise * logs + start)
    return {"slope": float(rise), "explained": float(1 - rest.var() / margin.var())}


def _sampled_error(memory: ZipfMemory, rate: float, settings: Mapping[str, Any]) -> float:
    generator = np.random.default_rng((memory.seed, 2))
    steps = settings["samples"] // settings["batch"]
    *_, matrix = memory.sampled_descent(rate, steps, settings["batch"], generator)
    return float(memory.frequencies @ ~(memory.margins(memory.scores(matrix)) > 0))


def _largest_monotone(memory: ZipfMemory, rates: Sequence[float], steps: int) -> float:
    table = memory_training_table(memory, rates, steps)
    rose = table.groupby("rate")["rose"].any()
    return max((rate for rate in rates if not rose[rate]), default=math.nan)


def _trials(seed: int, trials: int) -> range:
    return range(seed * trials, (seed + 1) * trials)


def _errors(table: pd.DataFrame, exponent: float, scheme: str) -> np.ndarray:
    rows = table[(table["exponent"] == exponent) & (table["scheme"] == scheme)]
    return rows.groupby("d_model")["error"].mean().to_numpy()
