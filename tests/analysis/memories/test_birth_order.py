"""Onsets and orders against plain loops and planted births."""

from __future__ import annotations

from math import comb

import numpy as np
import pandas as pd
import pytest
from typed import loc

from birthlens.analysis.memories import memory as memories
from birthlens.analysis.memories.birth_order import (
    birth_order_table,
    crossing_table,
    onset,
    onset_table,
    order_sensitivity_table,
    shifted_scores,
    standardised_table,
)
from birthlens.analysis.memories.circuits import output_memory
from birthlens.analysis.memories.intervals import median_interval, share_interval
from birthlens.analysis.memories.memory import AssociativeMemory, Circuit, Codebook
from birthlens.analysis.memories.recall import Association, readings
from birthlens.analysis.memories.recall_tables import memory_series
from birthlens.config.model import ModelConfig
from birthlens.errors import BirthlensError
from birthlens.model.initialisation import initial_weights
from birthlens.model.weights import Weights

BIRTHS = {"output": 20, "trigger": 50, "prev_token": 90}


def memory_of(table: np.ndarray) -> AssociativeMemory:
    book = Codebook("tok", np.eye(table.shape[-1]), tuple(map(str, range(table.shape[-1]))))
    return AssociativeMemory(Circuit("W", table), book, book)


@pytest.mark.parametrize("association", [Association.shift(9), Association.identity(9, [1, 4, 6, 7], [1, 4, 6, 7])])
@pytest.mark.parametrize("block", [10, 4_000_000])
def test_shifted_scores_against_a_plain_loop(
    association: Association, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memories, "BLOCK_ENTRIES", block)
    tables, candidates = np.random.default_rng(0).standard_normal((3, 9, 9)) + 5, association.candidates.tolist()
    found = shifted_scores(memory_of(tables), association)
    for step, table in enumerate(tables):
        for shift in range(len(candidates)):
            scores = []
            for query, right in association.pairs:
                paired = candidates[(candidates.index(right) + shift) % len(candidates)]
                others = np.array([table[query, c] for c in candidates if c != paired])
                scores.append((table[query, paired] - others.mean()) / others.std())
            assert found[step, shift] == pytest.approx(np.mean(scores))
    np.testing.assert_allclose(found[:, 0], readings(memory_of(tables), association)["standardised"])


def test_the_null_band_holds_its_level_on_random_matrices() -> None:
    tables, association = np.random.default_rng(1).standard_normal((4000, 12, 12)), Association.identity(12)
    found = shifted_scores(memory_of(tables), association)
    null = found[:, 1:]
    above = found[:, 0] > null.mean(1) + 2 * null.std(1, ddof=1)
    assert (
        0.02 < above.mean() < 0.06
    )  # a normal score is 2 standard deviations above in 2.3 %, slightly more by estimate


def test_onset_wants_the_score_to_stay() -> None:
    steps = [0, 5, 10, 15]
    assert onset(steps, np.array([True] * 4)) == 0
    assert onset(steps, np.array([True, False, True, True])) == 10
    assert np.isnan(onset(steps, np.array([True, True, True, False])))


def planted_run(seed: int) -> list[tuple[int, Weights]]:
    """A run in which the output memory, then the trigger memory, then the previous-token memory appear."""
    generator = np.random.default_rng(seed)
    weights = initial_weights(ModelConfig(d_model=64), 12, 20, generator)
    w_e, p = weights["W_E"], weights["W_pos"]
    w_1 = w_e @ weights["L0.W_V"][0] @ weights["L0.W_O"][0]
    planted = {
        "L1.W_O": ("output", np.linalg.inv(weights["L1.W_V"][0]) @ w_e.T @ weights["W_U"].T),
        "L1.W_K": ("trigger", w_1[:5].T @ w_e[:5]),
        "L0.W_K": ("prev_token", p[:-1].T @ p[1:]),
    }
    delay = int(generator.integers(3)) * 10
    return [
        (
            step,
            weights.replaced({n: weights[n] + (step >= BIRTHS[m] + delay) * v[None] for n, (m, v) in planted.items()}),
        )
        for step in range(0, 130, 10)
    ]


def test_planted_births_are_found_in_their_order() -> None:
    scores = pd.concat(
        [standardised_table(planted_run(seed), triggers=range(5)).assign(seed=seed) for seed in range(6)]
    )
    onsets = onset_table(scores)
    chosen = onsets[onsets["candidates"] == "all"]
    wide = chosen.pivot(index="seed", columns="memory", values="onset")
    delays = wide["output_memory"] - BIRTHS["output"]
    assert set(delays) <= {0, 10, 20} and (wide["prev_token_memory"] - BIRTHS["prev_token"] == delays).all()
    assert (wide["trigger_memory"] - BIRTHS["trigger"] == delays).all()
    table = birth_order_table(chosen).set_index(["kind", "what"])
    order = loc(table)[("order", "output < trigger < prev_token")]
    # Clopper and Pearson for 6 of 6: the p with p^6 = 0.025. Six seeds alike are no certainty.
    assert (order["value"], order["low"], order["high"], order["n"]) == (1, pytest.approx(0.025 ** (1 / 6)), 1, 6)
    assert table.loc[("before", "output_memory < trigger_memory"), "value"] == 1
    assert table.loc[("before", "prev_token_memory < trigger_memory"), "value"] == 0
    median = loc(table)[("onset", "output_memory")]
    assert median["low"] <= median["value"] == wide["output_memory"].median() <= median["high"]


def test_birth_order_counts_ties_and_unborn_memories() -> None:
    nan = float("nan")
    born: dict[str, list[float]] = {
        "a_memory": [10, 10, 20, 10],
        "b_memory": [20, 10, 10, nan],
        "c_memory": [nan, nan, nan, nan],
    }
    onsets = pd.DataFrame(
        [(seed, m, t) for m, times in born.items() for seed, t in enumerate(times)],
        columns=["seed", "memory", "onset"],
    )
    table = birth_order_table(onsets).set_index(["kind", "what"])
    assert table.loc[("before", "a_memory < b_memory"), "value"] == (1 + 0.5 + 0 + 1) / 4
    for order in ("a < b; never c", "a = b; never c", "b < a; never c", "a; never b, c"):
        assert table.loc[("order", order), "value"] == 0.25
    assert np.isinf(loc(table)[("onset", "c_memory"), "value"])
    with pytest.raises(BirthlensError, match="one row for each seed and memory"):
        birth_order_table(pd.concat([onsets, onsets]))


def test_what_was_not_read_is_not_called_unborn() -> None:
    nan = float("nan")
    rows = [(0, "a_memory", "all", 10.0), (0, "b_memory", "all", nan), (1, "a_memory", "all", 20.0)]
    onsets = pd.DataFrame(rows, columns=["seed", "memory", "candidates", "onset"]).assign(probe="p", threshold=1.0)
    for table in (birth_order_table, order_sensitivity_table):
        with pytest.raises(BirthlensError, match="b_memory was not read for seed 1 among all"):
            table(onsets)
    narrow = onsets[onsets["seed"] == 0].replace({"candidates": {"all": "few"}})
    with pytest.raises(BirthlensError, match="b_memory was not read for seed 1 among few"):
        order_sensitivity_table(pd.concat([onsets[onsets["memory"] == "a_memory"], narrow]))
    unborn = pd.concat([onsets, onsets.iloc[[1]].assign(seed=1)])  # read, and NaN: never born
    assert birth_order_table(unborn).set_index("what").loc["a; never b", "value"] == 1


def test_intervals_hold_their_level_whatever_the_truth() -> None:
    """Sum the binomial over every outcome: the interval holds the truth at least 95 % of the time."""
    for n in (1, 2, 6, 12, 40):
        intervals = [share_interval(k, n) for k in range(n + 1)]
        for truth in (0.02, 0.3, 0.7, 0.95, 0.995):
            chance = [comb(n, k) * truth**k * (1 - truth) ** (n - k) for k in range(n + 1)]
            covered = sum(p for p, (low, high) in zip(chance, intervals, strict=True) if low <= truth <= high)
            assert covered >= 0.95
    for k in range(13):  # the bounds are the truths that leave 2.5 % to as many successes or more, or fewer
        low, high = share_interval(k, 12)
        tails = [sum(comb(12, i) * p**i * (1 - p) ** (12 - i) for i in r) for p, r in ((low, range(k, 13)),
                                                                                     (high, range(k + 1)))]  # fmt: skip
        assert tails == pytest.approx([0.025 if k else 1, 0.025 if k < 12 else 1])


def test_the_interval_of_a_median_is_of_order_statistics() -> None:
    assert median_interval(list(range(12))) == (2, 9)  # P(at most 2 of 12 below) = 0.019, of 3 0.073
    assert all(np.isnan(median_interval([1, 2, 3, 4, 5])))
    samples = np.random.default_rng(3).exponential(size=(4000, 12))
    covered = [low <= np.log(2) <= high for low, high in map(median_interval, samples.tolist())]
    assert abs(np.mean(covered) - (1 - 2 * sum(comb(12, k) for k in range(3)) / 2**12)) < 0.015
    assert median_interval([3, np.inf, np.inf, 1, 2, np.inf]) == (1, np.inf)


def test_the_basis_asked_for_is_the_one_read() -> None:
    (_, weights), *_ = planted_run(0)
    values = {}
    for basis in ("raw", "dual"):
        table = standardised_table([(0, weights)], basis=basis).set_index(["memory", "candidates"])
        row = loc(table)[("output_memory", "all")]
        scores = shifted_scores(output_memory(weights), Association.identity(12), basis)
        expected = (scores[0], scores[1:].mean(), scores[1:].std(ddof=1))
        assert (row["value"], row["null_mean"], row["null_std"]) == pytest.approx(expected)
        values[basis] = row["value"]
    assert values["raw"] != pytest.approx(values["dual"], rel=1e-3)


def test_the_band_stands_on_the_mean_of_its_null_and_thresholds_are_left_behind() -> None:
    table = pd.DataFrame({"step": [0, 1, 2, 3], "memory": "m", "candidates": "all", "value": [0.0, 3.9, 4.0, 4.1],
                          "null_mean": 2.0, "null_std": 0.5, "n": 4, "shifts": 3})  # fmt: skip
    assert onset_table(table, width=4.0)["onset"].tolist() == [3.0]  # above 2 + 4 / 2, not on it
    read = pd.DataFrame({"step": [0, 1, 2], "memory": "m", "layer": 0, "head": "h", "basis": "raw", "metric": "recall",
                         "candidates": "all", "value": [0.0, 0.5, 0.75], "chance": 0.0, "n": 4})  # fmt: skip
    assert crossing_table(read, ["recall"], [0.5, 0.0])["onset"].tolist() == [2.0, 1.0]


@pytest.mark.parametrize("width", [float("nan"), float("inf"), -1.0])
def test_a_band_has_a_finite_width(width: float) -> None:
    with pytest.raises(BirthlensError, match=r"width = .*0 or more"):
        onset_table(standardised_table(planted_run(0)[:2]), width)


def test_moving_codebooks_are_carried_to_the_last_table() -> None:
    (_, first), *_, (_, last) = planted_run(0)
    moved = [(0, first), (1, last.replaced({"W_U": last["W_U"] + 1}))]
    scores = standardised_table(moved, range(5)).assign(seed=0)
    assert standardised_table(planted_run(0)[:2]).attrs["moving_codebooks"] == []
    onsets = onset_table(scores)
    crossings = crossing_table(memory_series(moved, range(5)).to_pandas().assign(seed=0), ["recall"], [0.5])
    tables = [scores, onsets, birth_order_table(onsets[onsets["candidates"] == "all"]), crossings,
              order_sensitivity_table(crossings)]  # fmt: skip
    assert all(table.attrs["moving_codebooks"] == ["W_U"] for table in tables)


def test_the_answer_may_depend_on_the_probe_and_the_candidates() -> None:
    reads = [
        memory_series(planted_run(seed), range(5), bases=["raw"]).to_pandas().assign(seed=seed) for seed in range(2)
    ]
    crossings = crossing_table(pd.concat(reads), ["recall", "margin"], [0.0, 0.5])
    assert {"seed", "memory", "candidates", "probe", "threshold", "basis", "onset"} <= set(crossings.columns)
    table = order_sensitivity_table(crossings)
    sets = {"trigger: triggers; output: all; prev_token: all", "trigger: all; output: all; prev_token: all"}
    labels = {"; ".join(sorted(label.split("; "))) for label in table["candidates"]}
    assert {"; ".join(sorted(label.split("; "))) for label in sets} <= labels
    assert table["share"].between(0.5, 1).all() and (table["n"] == 2).all()
    bounds = [share_interval(2 * share, 2) for share in table["share"]]
    assert list(zip(table["low"], table["high"], strict=True)) == bounds
    matched = table[(table["probe"] == "recall") & (table["threshold"] == 0.5)]
    triggers_only = matched[
        [{"trigger: triggers", "output: triggers"} <= set(c.split("; ")) for c in matched["candidates"]]
    ]
    assert set(triggers_only["order"]) == {"output < trigger < prev_token"}
    with pytest.raises(BirthlensError, match="fame"):
        crossing_table(pd.concat(reads), ["fame"], [0.5])


def test_too_few_candidates_leave_no_band() -> None:
    with pytest.raises(BirthlensError, match="3 candidates are too few for a null band"):
        shifted_scores(memory_of(np.eye(3)), Association.identity(3))
    weights = initial_weights(ModelConfig(d_model=8), 3, 20, np.random.default_rng(0))
    with pytest.raises(BirthlensError, match="trigger_memory: 3 candidates are too few for a null band"):
        standardised_table([(0, weights)])


def test_memories_that_are_never_born_have_no_order() -> None:
    inf = float("inf")
    births = {0: (10.0, inf, inf), 1: (inf, inf, inf)}
    rows = [
        (seed, f"{name}_memory", np.nan if onset == inf else onset)
        for seed, onsets in births.items()
        for name, onset in zip(("output", "trigger", "prev_token"), onsets, strict=True)
    ]
    table = birth_order_table(pd.DataFrame(rows, columns=["seed", "memory", "onset"])).set_index("what")
    numbers = dict(zip(table.index, table[["value", "low", "high", "n"]].to_numpy(dtype=float), strict=True))
    value, _, _, n = numbers["output_memory < trigger_memory"]
    assert (value, n) == (1, 1)  # seed 1 says nothing about them
    *nothing, n = numbers["prev_token_memory < trigger_memory"]
    assert np.isnan(nothing).all() and n == 0
    assert set(table.index[table["kind"] == "order"]) == {
        "output; never prev_token, trigger",
        "never output, prev_token, trigger",
    }
