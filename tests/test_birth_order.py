"""Onsets and orders against plain loops and planted births."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from birthlens.analysis import memories
from birthlens.analysis.birth_order import (
    birth_order_table,
    crossing_table,
    onset,
    onset_table,
    order_sensitivity_table,
    shifted_scores,
    standardised_table,
)
from birthlens.analysis.memories import AssociativeMemory, Circuit, Codebook
from birthlens.analysis.readings import Association, readings
from birthlens.analysis.recall import memory_table
from birthlens.architecture import ModelConfig
from birthlens.errors import BirthlensError
from birthlens.initialisation import initial_weights
from birthlens.weights import Weights

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
    table = birth_order_table(chosen, np.random.default_rng(0)).set_index(["kind", "what"])
    order = table.loc[("order", "output < trigger < prev_token")]
    assert (order["value"], order["low"], order["high"], order["n"]) == (1, 1, 1, 6)
    assert table.loc[("before", "output_memory < trigger_memory"), "value"] == 1
    assert table.loc[("before", "prev_token_memory < trigger_memory"), "value"] == 0
    median = table.loc[("onset", "output_memory")]
    assert median["low"] <= median["value"] == wide["output_memory"].median() <= median["high"]


def test_birth_order_counts_ties_and_unborn_memories() -> None:
    nan = float("nan")
    born = {"a_memory": [10, 10, 20, 10], "b_memory": [20, 10, 10, nan], "c_memory": [nan, nan, nan, nan]}
    onsets = pd.DataFrame(
        [(seed, m, t) for m, times in born.items() for seed, t in enumerate(times)], columns=["seed", "memory", "onset"]
    )
    table = birth_order_table(onsets, np.random.default_rng(0)).set_index(["kind", "what"])
    assert table.loc[("before", "a_memory < b_memory"), "value"] == (1 + 0.5 + 0 + 1) / 4
    assert table.loc[("order", "a < b < c"), "value"] == 0.25 and table.loc[("order", "a = b < c"), "value"] == 0.25
    assert table.loc[("order", "a < b = c"), "value"] == 0.25  # unborn together
    assert np.isinf(table.loc[("onset", "c_memory"), "value"])
    again = birth_order_table(onsets, np.random.default_rng(0)).set_index(["kind", "what"])
    assert again.equals(table)
    with pytest.raises(BirthlensError, match="one row for each seed and memory"):
        birth_order_table(pd.concat([onsets, onsets]), np.random.default_rng(0))


def test_bootstrap_interval_covers_the_truth() -> None:
    generator, covered = np.random.default_rng(3), 0
    for _ in range(200):
        first = generator.random(40) < 0.7
        rows = [(s, m, t) for s, f in enumerate(first) for m, t in (("a", 10 + 10 * (not f)), ("b", 15))]
        table = birth_order_table(pd.DataFrame(rows, columns=["seed", "memory", "onset"]), generator, draws=300)
        row = table[table["kind"] == "before"].iloc[0]
        covered += row["low"] <= 0.7 <= row["high"]
    assert covered / 200 > 0.88


def test_the_answer_may_depend_on_the_probe_and_the_candidates() -> None:
    reads = [memory_table(planted_run(seed), range(5), bases=["raw"]).assign(seed=seed) for seed in range(2)]
    crossings = crossing_table(pd.concat(reads), ["recall", "margin"], [0.0, 0.5])
    assert {"seed", "memory", "candidates", "probe", "threshold", "basis", "onset"} <= set(crossings.columns)
    table = order_sensitivity_table(crossings)
    sets = {"trigger: triggers; output: all; prev_token: all", "trigger: all; output: all; prev_token: all"}
    labels = {"; ".join(sorted(label.split("; "))) for label in table["candidates"]}
    assert {"; ".join(sorted(label.split("; "))) for label in sets} <= labels
    assert table["share"].between(0.5, 1).all() and (table["n"] == 2).all()
    matched = table[(table["probe"] == "recall") & (table["threshold"] == 0.5)]
    triggers_only = matched[
        [{"trigger: triggers", "output: triggers"} <= set(c.split("; ")) for c in matched["candidates"]]
    ]
    assert set(triggers_only["order"]) == {"output < trigger < prev_token"}
    with pytest.raises(BirthlensError, match="fame"):
        crossing_table(pd.concat(reads), ["fame"], [0.5])


def test_too_few_candidates_leave_no_band() -> None:
    with pytest.raises(BirthlensError, match="3 candidates leave no null band"):
        shifted_scores(memory_of(np.eye(3)), Association.identity(3))
