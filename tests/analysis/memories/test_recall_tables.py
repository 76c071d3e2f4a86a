"""The recall tables against single readings, and the ways to write them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from typed import loc

from birthlens.analysis.memories import recall_tables as recall
from birthlens.analysis.memories.circuits import feed_forward_kl, feed_forward_memory, output_memory, prev_token_memory
from birthlens.analysis.memories.layer_norms import fold_layer_norms
from birthlens.analysis.memories.memory import Circuit
from birthlens.analysis.memories.recall import READINGS, Association, readings
from birthlens.analysis.memories.recall_tables import chunks, circuit_series, memory_series
from birthlens.analysis.memories.series import COLUMNS, MetricSeries, SeriesTable
from birthlens.config.model import ModelConfig
from birthlens.errors import BirthlensError
from birthlens.model.initialisation import initial_weights
from birthlens.model.sites import Head
from birthlens.model.weights import Weights


def run(steps: int, n_ctx: int = 80, d_vocab: int = 20, **fields: Any) -> list[tuple[int, Weights]]:
    """Checkpoints whose trained matrices move and whose frozen ones do not."""
    generator = np.random.default_rng(0)
    weights = initial_weights(ModelConfig(**{"d_model": 32, **fields}), d_vocab, n_ctx, generator)
    moving = [name for name in weights if name.endswith(("W_K", "L1.W_O", "W_F"))]

    def moved() -> Weights:
        noise = {name: generator.standard_normal(weights[name].shape, dtype=np.float32) for name in moving}
        return weights.replaced({name: weights[name] + 0.1 * noise[name] for name in moving})

    return [(10 * step, moved()) for step in range(steps)]


def test_every_row_is_the_reading_of_its_own_checkpoint() -> None:
    checkpoints, bigram = run(30, feed_forward="linear"), np.full((20, 20), 0.05)
    table = memory_series(iter(checkpoints), triggers=[2, 5, 9, 11], bigram=bigram, outputs=[0, 1]).to_pandas()
    assert list(table.columns) == COLUMNS and sorted(set(table["step"])) == [10 * step for step in range(30)]
    keyed = table.set_index(["step", "memory", "basis", "metric", "candidates"])["value"]
    assert keyed.index.is_unique
    for step, weights in checkpoints[::7]:
        scale = weights.score_scale
        first = readings(prev_token_memory(weights, first=64), Association.shift(64), "dual", scale, 4)
        both = readings(output_memory(weights), Association.identity(20, [2, 5, 9, 11], [2, 5, 9, 11]), "raw", 1.0, 4)
        for metric in READINGS:
            found = keyed[step, "prev_token_memory", "dual", metric, "first 64"]
            assert found == pytest.approx(float(first[metric]), rel=2e-3, abs=1e-5), metric
            assert keyed[step, "output_memory", "raw", metric, "triggers"] == pytest.approx(
                float(both[metric]), rel=1e-3
            )
        kl = feed_forward_kl(feed_forward_memory(weights).scores(), bigram, [2, 5, 9, 11])
        assert keyed[step, "feed_forward_memory", "raw", "kl", "all but triggers"] == pytest.approx(float(kl), rel=1e-4)
        possible = readings(output_memory(weights), Association.identity(20, [0, 1]), "raw", 1.0, 4)
        for metric in READINGS:  # the outputs as queries, all tokens as candidates
            found = keyed[step, "output_memory", "raw", metric, "outputs among all"]
            assert found == pytest.approx(float(possible[metric]), rel=1e-3), metric
        rank = output_memory(weights).circuit.effective_rank()
        assert keyed[step, "output_memory", "raw", "effective_rank", "all"] == pytest.approx(float(rank), rel=1e-4)


def test_moving_codebooks_are_stated() -> None:
    (_, first), (_, second) = run(2)
    assert memory_series([(0, first), (1, second)]).to_pandas().attrs["moving_codebooks"] == []
    trained = second.replaced({"W_E": second["W_E"] + 1, "L0.W_O": 2 * second["L0.W_O"]})
    assert memory_series([(0, first), (1, trained)]).to_pandas().attrs["moving_codebooks"] == ["L0.W_O", "W_E"]


def test_every_circuit_says_which_codebooks_move() -> None:
    (_, first), (_, second) = run(2, n_ctx=12, family="full", n_heads=2, d_model=16, feed_forward="none")
    assert circuit_series([(0, first), (1, first)]).to_pandas().attrs["moving_codebooks"] == []
    # Only W_K and the last layer's W_O differ.
    assert circuit_series([(0, first), (1, second)]).to_pandas().attrs["moving_codebooks"] == []
    moved = second.replaced({"W_pos": second["W_pos"] + 1, "L0.W_V": 2 * second["L0.W_V"]})
    steps = [(i, first) for i in range(4)] + [(4, moved)]
    assert circuit_series(steps, longest_path=1).to_pandas().attrs["moving_codebooks"] == ["L0.W_V", "W_pos"]
    assert circuit_series(steps[-2:], heads=[Head(1, 0)]).to_pandas().attrs["moving_codebooks"] == ["W_pos"]


def test_chance_and_n_stand_in_every_row() -> None:
    table = memory_series(run(1), triggers=[2, 5, 9, 11], outputs=[0, 1, 7]).to_pandas()
    table = table.set_index(["memory", "metric", "candidates", "basis"])
    rows = {
        ("trigger_memory", "recall", "triggers"): (1 / 4, 4),
        ("trigger_memory", "recall", "triggers among all"): (1 / 20, 4),
        ("trigger_memory", "recall", "all"): (1 / 20, 20),
        ("prev_token_memory", "recall", "all"): (1 / 79, 79),
        ("prev_token_memory", "rank", "first 64"): (32, 63),
        ("prev_token_memory", "matched_recall", "all"): (1 / 4, 79),
        ("output_memory", "frobenius_share", "all"): (1 / 32**2, 20),
        ("output_memory", "recall", "outputs among all"): (1 / 20, 3),
        ("output_memory", "effective_rank", "all"): (16, 32**2),
    }
    for key, (chance, n) in rows.items():
        row = loc(table)[(*key, "raw")]
        assert (row["chance"], row["n"]) == (pytest.approx(chance), n)


def test_the_effective_rank_of_a_random_matrix_is_at_its_chance() -> None:
    table = memory_series(run(1, d_model=128)).to_pandas().set_index(["memory", "metric"])
    chance = loc(table)[("trigger_memory", "effective_rank"), "chance"]
    random = Circuit("W", np.random.default_rng(0).standard_normal((50, 128, 128)))
    assert float(chance) == pytest.approx(random.effective_rank().mean(), rel=0.02)


def test_circuit_table_covers_every_head_and_basis() -> None:
    checkpoints = run(2, n_ctx=12, family="full", n_heads=2, d_model=16, feed_forward="none")
    table = circuit_series(checkpoints, bases=["raw"]).to_pandas()
    assert set(table["head"]) == {"L0H0", "L0H1", "L1H0", "L1H1"} | {f"L0H{i}>L1H{j}" for i in (0, 1) for j in (0, 1)}
    one = circuit_series(checkpoints, heads=[Head(1, 1)], bases=["raw"]).to_pandas()
    assert set(one["head"]) == {"L1H1"}
    spread = table[(table["metric"] == "spread") & (table["memory"] == "L1H0.QK: W_E -> W_pos") & (table["step"] == 10)]
    weights = checkpoints[1][1]
    scores = weights["W_E"] @ weights.qk(Head(1, 0)) @ weights["W_pos"].T * weights.score_scale
    assert float(spread["value"].iloc[0]) == pytest.approx(np.sqrt(scores.var(1).mean()), rel=1e-4)
    unpaired = table[table["memory"] == "L1H0.QK: W_E -> W_pos"]
    assert set(unpaired["metric"]) == {"spread"}


def test_layer_norms_are_folded_on_request() -> None:
    (_, weights), *_ = run(1, n_ctx=12, family="full", n_heads=2, d_model=16, feed_forward="none")
    generator = np.random.default_rng(1)
    gains = {name: 1 + generator.standard_normal(weights[name].shape) for name in weights if name.endswith(".w")}
    weights = weights.replaced({name: gain.astype(np.float32) for name, gain in gains.items()})
    assert len(gains) == 3
    plain, folded = (circuit_series([(0, weights)], bases=["raw"], fold=fold).to_pandas() for fold in (False, True))
    assert (plain.attrs["folded"], folded.attrs["folded"]) == (False, True)
    for table, model in ((plain, weights), (folded, fold_layer_norms(weights))):
        scores = model["W_E"] @ model.ov(Head(1, 0)) @ model["W_U"]
        rows = table[(table["memory"] == "L1H0.OV: W_E -> W_U") & (table["metric"] == "spread")]
        assert rows["value"].iloc[0] == pytest.approx(np.sqrt(scores.var(1).mean()), rel=1e-4)
    with pytest.raises(BirthlensError, match="no layer norms to fold"):
        circuit_series(run(1), fold=True).to_pandas()


def test_two_positions_leave_nothing_to_recall() -> None:
    table = memory_series(run(2, n_ctx=2)).to_pandas()
    assert set(table["memory"]) == {"trigger_memory", "output_memory"}
    assert set(memory_series(run(2, n_ctx=3)).to_pandas()["memory"]) == {
        "prev_token_memory",
        "trigger_memory",
        "output_memory",
    }
    every = circuit_series(run(2, n_ctx=2), bases=["raw"]).to_pandas()
    assert set(every[every["memory"] == "L0H0.QK: W_pos -> W_pos"]["metric"]) == {"spread"}


def test_nothing_to_read_and_one_layer_models_are_refused() -> None:
    with pytest.raises(BirthlensError, match="no checkpoint"):
        memory_series([]).to_pandas()
    with pytest.raises(BirthlensError, match="L1H0 does not exist"):
        memory_series(run(1, n_layers=1)).to_pandas()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, bigram = run(7, feed_forward="linear"), np.full((20, 20), 0.05)
    one_by_one = sum(tensor.nbytes for tensor in checkpoints[0][1].values())
    tables = []
    for size in (1, 3 * one_by_one, 100 * one_by_one):
        monkeypatch.setattr(recall, "CHUNK_BYTES", size)
        assert [len(steps) for steps, _ in chunks(checkpoints)] == {1: [1] * 7, 3 * one_by_one: [3, 3, 1]}.get(
            size, [7]
        )
        tables.append(memory_series(iter(checkpoints), triggers=[2, 5, 9, 11], bigram=bigram).to_pandas())
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0], rtol=1e-4)
        assert table.attrs == tables[0].attrs


def test_series_are_written_as_pandas_would() -> None:
    nan, values = float("nan"), np.array([0.1, float("nan"), 1e-17])
    found = SeriesTable(
        [
            MetricSeries([0, 10, 20], 'b "x"', 0, "L0H0", "raw", "recall", "a, b", values, 1 / 3, 5),
            MetricSeries([0, 10, 20], "a", 1, "", "dual", "margin", "all", np.array([float("inf"), -2.0, 3.0]), nan, 4),
            MetricSeries([30], "a", 1, "", "dual", "margin", "all", np.array([0.25]), nan, 4),
        ],
        {"folded": False},
    )
    table = found.to_pandas()
    assert list(table.columns) == COLUMNS and len(table) == len(found) == 7 and table.attrs == {"folded": False}
    assert list(zip(table["step"], table["memory"], strict=True)) == [
        *((step, memory) for step in (0, 10, 20) for memory in ("a", 'b "x"')),
        (30, "a"),
    ]
    assert found.to_csv() == table.to_csv(index=False)
    read = memory_series(run(3), triggers=[2, 5, 9])
    assert read.to_csv() == read.to_pandas().to_csv(index=False)
    with pytest.raises(BirthlensError, match="no checkpoint"):
        SeriesTable([])
