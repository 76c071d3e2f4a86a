"""Scaling of one memory: explicit matrices, all samples enumerated, and slopes known by hand."""

from itertools import product

import numpy as np
import pytest

from birthlens.analysis.theory.memory_scaling import SCHEMES, Scheme, data_rate, data_term, scaling_table, slope
from birthlens.analysis.theory.outer_products import ZipfMemory
from birthlens.claims.claim import Evidence
from birthlens.claims.statistics import associative
from birthlens.errors import BirthlensError


def test_the_error_is_that_of_the_stored_matrix() -> None:
    table = scaling_table([1.5], [8, 24], seeds=[3], tokens=60).set_index(["d_model", "scheme"])
    powers = {"q = 1": 0.0, "q = p": 1.0, "q = sqrt(p)": 0.5}
    for width in (8, 24):
        memory = ZipfMemory(60, width, 1.5, 5, 3, codes="gaussian")
        weights = {name: memory.frequencies**power for name, power in powers.items()}
        weights["thresholded"] = (np.arange(60) < max(1, width // 12)).astype(float)
        for name, chosen in weights.items():
            margins = memory.margins(memory.scores(memory.stored(chosen)))
            assert table["error"][width, name] == pytest.approx(float(memory.frequencies @ ~(margins > 0)))
    assert table["error"].nunique() > 3


def test_the_data_term_is_the_mean_over_all_samples() -> None:
    memory = ZipfMemory(3, 4, 1.0, outputs=2)
    p = memory.frequencies
    unseen = sum(
        np.prod(p[list(drawn)]) * p[[x for x in range(3) if x not in drawn]].sum()
        for drawn in product(range(3), repeat=4)
    )
    assert data_term(memory, 4) == pytest.approx(unseen / 2)


def test_unseen_tokens_are_not_stored_and_the_threshold_follows_the_counts() -> None:
    counts = np.array([0.0, 4.0, 1.0, 2.0])
    np.testing.assert_array_equal(Scheme("q = 1").weights(counts, 12), [0, 1, 1, 1])
    np.testing.assert_array_equal(Scheme("root", 0.5).weights(counts, 12), [0, 1, 0.5, np.sqrt(0.5)])
    np.testing.assert_array_equal(Scheme("top", threshold=True).weights(counts, 24), [0, 1, 0, 1])
    np.testing.assert_array_equal(Scheme("top", threshold=True).weights(counts, 48), [0, 1, 1, 1])


def test_published_rates_by_hand() -> None:
    rates = {scheme.name: scheme.rate(2.0) for scheme in SCHEMES}
    assert rates.pop("q = 1") != rates.get("q = 1")  # no power law: NaN
    assert rates == {"q = p": -0.25, "q = sqrt(p)": -0.5, "thresholded": -1.0} and data_rate(2.0) == -0.5
    many = ZipfMemory(200_000, 1, 2.0, 5)
    assert slope([100, 1000], [data_term(many, 100), data_term(many, 1000)]) == pytest.approx(-0.5, abs=0.01)


def test_slopes_of_power_laws_and_of_none() -> None:
    sizes = np.array([2.0, 4.0, 16.0])
    assert slope(sizes, 3 * sizes**-0.7) == pytest.approx(-0.7)
    assert np.isnan(slope(sizes, [1.0, 0.5, 0.0]))
    with pytest.raises(BirthlensError, match="at least two"):
        slope([4], [0.1])


def test_the_statistic_reads_slopes_and_ratios_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(associative, "WIDTHS", (12, 48))
    found = associative.scaling(Evidence({}, 2, {"trials": 2, "exponents": (2.0,)}))
    means = scaling_table([2.0], [12, 48], seeds=[4, 5]).groupby(["scheme", "d_model"])["error"].mean()
    slopes = {
        name: np.log(means[name, 48] / means[name, 12]) / np.log(4) for name in ("q = p", "q = sqrt(p)", "thresholded")
    }
    assert found["slope thresholded, a = 2"] == pytest.approx(slopes["thresholded"])
    assert found["off_rate"] == pytest.approx(
        max(abs(s - r) for s, r in zip(slopes.values(), (-0.25, -0.5, -1), strict=True))
    )
    assert found["ratio_48"] == pytest.approx(means["thresholded", 48] / means["q = sqrt(p)", 48])


def test_a_wide_memory_errs_by_the_data_term() -> None:
    found = associative.plateau(Evidence({}, 0, {"trials": 10, "exponents": (2.0,), "samples": (30,)}))
    assert found["least_ratio"] == found["largest_ratio"] == pytest.approx(1, abs=0.25)


def test_orthogonal_codebooks_and_too_many_of_them() -> None:
    memory = ZipfMemory(5, 7, outputs=3, codes="orthogonal")
    for book in memory.codebooks:
        np.testing.assert_allclose(book @ book.T, np.eye(len(book)), atol=1e-12)
    with pytest.raises(BirthlensError, match="9 vectors need at least as many dimensions, not 7"):
        ZipfMemory(9, 7, codes="orthogonal")
    found = associative.logarithmic_margin(
        Evidence({}, 1, {"tokens": 5, "width": 5, "rate": 1.0, "steps": 200, "from": 50})
    )
    assert found["slope"] > 0 and found["explained"] > 0.98


def test_sampled_descent_moves_by_the_counts_of_its_samples() -> None:
    memory = ZipfMemory(6, 8, outputs=3, codes="orthogonal", seed=1)
    _, first = memory.sampled_descent(2.0, 1, 32, np.random.default_rng(5))
    counts = np.random.default_rng(5).multinomial(32, memory.frequencies)
    np.testing.assert_allclose(memory.margins(memory.scores(first)), 2 * counts / 32, atol=1e-12)
