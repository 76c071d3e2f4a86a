"""Every score of the three memories as a tidy table, against the products of the weights themselves."""

import numpy as np
import pytest

from birthlens.analysis.memories.ideal import ideal_weights
from birthlens.analysis.memories.recall_tables import best_circuits_table, circuit_series, memory_series
from birthlens.analysis.memories.score_tables import memory_scores_table
from birthlens.config.model import ModelConfig
from birthlens.model.initialisation import initial_weights
from birthlens.model.weights import Weights

N, T = 6, 9
LABELS = list("abcdef")


@pytest.fixture(scope="module")
def ideal() -> Weights:
    return ideal_weights(ModelConfig(d_model=64, init="orthogonal"), N, T, np.random.default_rng(0))


def test_scores_are_the_products_of_the_weights(ideal: Weights) -> None:
    table = memory_scores_table(ideal, LABELS)
    one = dict(iter(table.groupby("memory", sort=False)))
    assert list(one) == ["output_memory", "trigger_memory", "prev_token_memory"]
    tokens, positions = ideal["W_E"], ideal["W_pos"]
    remapped = tokens @ ideal["L0.W_V"][0] @ ideal["L0.W_O"][0]
    expected = {
        "output_memory": tokens @ ideal["L1.W_V"][0] @ ideal["L1.W_O"][0] @ ideal["W_U"],
        "trigger_memory": tokens @ ideal["L1.W_Q"][0] @ ideal["L1.W_K"][0].T @ remapped.T,
        "prev_token_memory": positions @ ideal["L0.W_Q"][0] @ ideal["L0.W_K"][0].T @ positions.T,
    }
    for name, scores in expected.items():
        found = one[name].pivot(index="row", columns="column", values="score").to_numpy()
        np.testing.assert_allclose(found, scores, atol=1e-4 * np.abs(scores).max())
        assert one[name]["centred"].median() == pytest.approx(0, abs=1e-6 * float(np.abs(scores).max()))
        best = one[name].loc[one[name].groupby("row")["score"].idxmax()]
        assert best["right"].tolist() == [name != "prev_token_memory" or row > 0 for row in range(len(scores))]
    assert one["output_memory"].query("row == 1 and column == 4")[["input", "output"]].to_numpy().tolist() == [
        ["b", "e"]
    ]


def test_tokens_and_triggers_restrict_the_tables(ideal: Weights) -> None:
    whole = memory_scores_table(ideal, LABELS).set_index(["memory", "input", "output"])["score"]
    some = memory_scores_table(ideal, LABELS, triggers=[5, 0, 3], tokens=[0, 2, 5])
    sides = {str(name): list(dict.fromkeys(rows["input"])) for name, rows in some.groupby("memory")}
    assert sides["output_memory"] == ["a", "c", "f"] and sides["trigger_memory"] == ["f", "a"]
    assert len(sides["prev_token_memory"]) == T
    found = some.set_index(["memory", "input", "output"])["score"]
    np.testing.assert_allclose(found, whole[found.index], atol=1e-4)
    single = memory_scores_table(ideal, LABELS, triggers=[3])
    assert (single["memory"] == "trigger_memory").sum() == N * N


def test_the_best_circuits_of_an_ideal_model_are_its_memories(ideal: Weights) -> None:
    start = initial_weights(ModelConfig(d_model=64, init="orthogonal"), N, T, np.random.default_rng(0))
    readings = circuit_series([(0, start), (7, ideal)], bases=("raw",)).to_pandas()
    best = best_circuits_table(readings, most=3)
    assert list(best.columns) == ["memory", "step", "value", "chance", "n"]
    assert best["step"].tolist() == [0, 7] * 3
    assert set(best["memory"]) == {
        "L0H0.QK: W_pos -> W_pos",
        "L1H0.QK: W_E -> W_E>L0H0.OV",
        "L1H0.OV: W_E -> W_U",
    }
    last = best[best["step"] == 7]
    known = memory_series([(7, ideal)], bases=("raw",)).to_pandas().query("metric == 'recall' and candidates == 'all'")
    assert sorted(last["value"]) == sorted(known["value"]) and (last["value"] == 1).all()
    assert (last["chance"].round(6) == (1 / last["n"]).round(6)).all()
