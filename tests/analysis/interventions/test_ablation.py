"""Ablation laws on a model whose circuit is known: the closed-form induction head."""

from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch
from typed import present

from birthlens.analysis.interventions.ablation import ABLATIONS, Ablation, ablation_table, cases_table
from birthlens.analysis.interventions.edge_tables import cut_edges, other_edges
from birthlens.analysis.interventions.head_sets import HeadSets
from birthlens.analysis.interventions.spec import EdgeIntervention, Intervention
from birthlens.analysis.memories.ideal import Strengths, ideal_weights
from birthlens.config.model import ModelConfig
from birthlens.config.run import CorpusConfig, TaskConfig
from birthlens.errors import BirthlensError
from birthlens.model.forward import logits, tensors_of
from birthlens.model.hooked import build
from birthlens.model.initialisation import initial_weights
from birthlens.model.sites import Edge, Head, Mlp
from birthlens.model.weights import Weights
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.corpus import BigramStatistics, markov_chain

N, T = 16, 32
ORTHOGONAL = ModelConfig(d_model=96, init="orthogonal")


@pytest.fixture(scope="module")
def statistics() -> BigramStatistics:
    return markov_chain(CorpusConfig(source="markov", vocabulary=N))


@pytest.fixture(scope="module")
def task(statistics: BigramStatistics) -> BigramTask:
    return BigramTask(TaskConfig(context=T, n_triggers=3, cycles="clean"), statistics)


@pytest.fixture(scope="module")
def batches(task: BigramTask) -> tuple[TokenBatch, TokenBatch]:
    return task.batch(64, 0), task.batch(64, 1)


@pytest.fixture(scope="module")
def ideal(task: BigramTask) -> Weights:
    strengths = Strengths(avoid_first=20)
    return ideal_weights(ORTHOGONAL, N, T, np.random.default_rng(0), task.fixed_triggers, strengths)


def accuracy(weights: Weights, batch: TokenBatch) -> float:
    right = logits(tensors_of(weights), weights.config, batch.tokens).argmax(-1) == batch.targets
    return float(right[batch.in_context].float().mean())


def accuracies(table: pd.DataFrame) -> "pd.Series[Any]":
    chosen = table[(table["role"] == "in_context") & (table["metric"] == "accuracy")]
    return chosen.set_index([column for column in ("ablated", "method", "case") if column in chosen])["value"]


@pytest.mark.parametrize("codebooks", ["raw", "dual"])
@pytest.mark.parametrize("random_triggers", [False, True])
def test_the_ideal_model_does_the_task(statistics: BigramStatistics, codebooks: Any, random_triggers: bool) -> None:
    kind: Literal["random", "fixed"] = "random" if random_triggers else "fixed"
    task = BigramTask(TaskConfig(context=T, n_triggers=3, triggers=kind, cycles="clean"), statistics)
    weights, guarded = (
        ideal_weights(ORTHOGONAL, N, T, np.random.default_rng(0), task.fixed_triggers, strengths, codebooks)
        for strengths in (None, Strengths(avoid_first=20))
    )
    # The first position stands in for its own predecessor; but for that, nothing is missing.
    assert 0.93 < accuracy(weights, task.batch(64, 0)) < accuracy(guarded, task.batch(64, 0))
    assert accuracy(guarded, task.batch(64, 0)) == 1


def test_duals_remove_the_interference_of_gaussian_codebooks(
    statistics: BigramStatistics, batches: tuple[TokenBatch, TokenBatch]
) -> None:
    gaussian, weak = ModelConfig(d_model=96), Strengths(10, 10, 10, 10)
    raw, dual = (
        accuracy(ideal_weights(gaussian, N, T, np.random.default_rng(0), None, weak, kind), batches[0])
        for kind in ("raw", "dual")
    )
    assert dual > 0.97 and dual > raw + 0.02


def test_ideal_memories_read_back_their_strengths(ideal: Weights, task: BigramTask) -> None:
    scale, triggers = ideal.score_scale, task.fixed_triggers
    positions, embed = ideal["W_pos"], ideal["W_E"]
    previous = scale * positions @ ideal.qk(Head(0, 0)) @ positions.T
    np.testing.assert_allclose(previous, 20 * np.eye(T, k=-1), atol=1e-3)
    remapped = embed @ ideal.ov(Head(0, 0))
    keys = scale * embed @ ideal.qk(Head(1, 0)) @ remapped.T
    np.testing.assert_allclose(keys, 20 * np.diag(np.isin(np.arange(N), present(triggers))), atol=1e-3)
    np.testing.assert_allclose(embed @ ideal.ov(Head(1, 0)) @ ideal["W_U"], 15 * np.eye(N), atol=1e-3)


def test_global_bigrams_can_be_written_into_the_feed_forward(
    statistics: BigramStatistics, batches: tuple[TokenBatch, TokenBatch]
) -> None:
    config = ORTHOGONAL.changed(feed_forward="linear")
    weights = ideal_weights(config, N, T, np.random.default_rng(0), None, bigram=statistics.bigram)
    cut = {"cut": [Intervention("mlp_out", "zero", 1)]}
    table = cases_table([(0, weights)], cut, batches[0], metrics=("global.kl",), statistics=statistics, draws=0)
    scores = weights["W_E"] @ weights["L1.W_F"] @ weights["W_U"]
    floor = np.maximum(np.log(np.maximum(statistics.bigram, 1e-300)), np.log(1 / N) - 10)
    np.testing.assert_allclose(scores, floor, atol=1e-2)
    assert table["value"].iloc[0] < table["value"].iloc[1] - 0.5


def test_ablating_either_head_destroys_the_ideal_model(ideal: Weights, batches: tuple[TokenBatch, TokenBatch]) -> None:
    table = ablation_table([(7, ideal)], *batches, draws=50)
    found = accuracies(table)
    assert found["none", "none"] > 0.98
    assert (found[found.index != ("none", "none")] < 0.4).all()
    assert set(table["step"]) == {7} and table["n"].gt(0).all()
    inside = table["value"].between(table["low"] - 1e-12, table["high"] + 1e-12)
    assert inside.all() and (table.loc[table["ablated"] == "none", "change"] == 0).all()


def test_the_pattern_is_what_layer_0_needs_and_its_value_what_it_writes(
    ideal: Weights, batches: tuple[TokenBatch, TokenBatch]
) -> None:
    found = accuracies(ablation_table([(0, ideal)], *batches, methods=ABLATIONS, draws=0))
    assert found["L0H0", "previous_token_pattern"] > 0.98
    assert found["L0H0", "frozen_pattern"] == found["none", "none"]
    assert found["L0H0", "uniform_pattern"] < 0.5 and found["L1H0", "uniform_pattern"] < 0.5
    assert found["L0H0", "dropped_value"] < 0.35 and found["L1H0", "dropped_value"] < 0.35


def test_layer_0_acts_through_the_keys_of_layer_1_only(ideal: Weights, batches: tuple[TokenBatch, TokenBatch]) -> None:
    sizes = ideal.config
    others = other_edges(sizes, Head(0, 0), [Edge.parse("L0H0->L1H0.k")])
    cases = {
        "only keys left": cut_edges(others, "mean")(sizes),
        "keys cut": (EdgeIntervention(Edge.parse("L0H0->L1H0.k"), "mean"),),
    }
    found = accuracies(cases_table([(0, ideal)], cases, *batches, metrics=("in_context.accuracy",), draws=0))
    assert found["only keys left"] > 0.98 and found["keys cut"] < 0.35


def test_pairs_sets_and_components(ideal: Weights, batches: tuple[TokenBatch, TokenBatch]) -> None:
    table = ablation_table([(0, ideal)], *batches, heads="L0H0,L0H0+L1H0", methods=("zero",), components=True, draws=0)
    assert list(dict.fromkeys(table["ablated"])) == ["none", "L0H0", "L0H0+L1H0", "embed", "pos_embed"]
    pairs = ablation_table([(0, ideal)], *batches, heads="pairs", methods=("zero",), draws=0)
    left = table[table["ablated"] == "L0H0+L1H0"].set_index(["role", "metric"])["value"]
    right = pairs[pairs["ablated"] == "L0H0+L1H0"].set_index(["role", "metric"])["value"]
    assert left.equals(right)
    given = ablation_table([(0, ideal)], *batches, heads=HeadSets("pairs"), methods=("zero",), draws=0)
    assert given.equals(pairs)
    assert len(HeadSets("pairs").of(ModelConfig(family="full", n_heads=4))) == 28


def test_zeroing_all_that_is_added_leaves_the_bare_input(
    ideal: Weights, batches: tuple[TokenBatch, TokenBatch]
) -> None:
    batch = batches[0]
    table = ablation_table([(0, ideal)], batch, heads="L0H0+L1H0", methods=("zero",), metrics=("all.loss",), draws=0)
    bare = torch.from_numpy(ideal["W_E"][batch.tokens.numpy()] + ideal["W_pos"]) @ torch.from_numpy(ideal["W_U"])
    loss = torch.nn.functional.cross_entropy(bare.transpose(1, 2), batch.targets)
    assert table.loc[table["ablated"] != "none", "value"].item() == pytest.approx(float(loss), abs=1e-5)


def test_a_live_model_gives_the_same_table(batches: tuple[TokenBatch, TokenBatch]) -> None:
    # Not the ideal model: its ties are broken by rounding.
    weights = initial_weights(ModelConfig(d_model=24), N, T, np.random.default_rng(0))
    fast, slow = (ablation_table([(0, one)], *batches, draws=20) for one in (weights, build(weights)))
    numbers = ["value", "change", "low", "high", "change_low", "change_high"]
    np.testing.assert_allclose(fast[numbers], slow[numbers], atol=1e-5)
    assert fast.drop(columns=numbers).equals(slow.drop(columns=numbers))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": "L5H0"}, "valid are L0H0, L1H0"),
        ({"metrics": ()}, "name at least one metric"),
        ({"heads": "first"}, "write it as L<layer>H<head>"),
        ({"methods": ("delete",)}, "valid are zero, mean"),
        ({"metrics": ("in_context.joy",)}, "must be one of accuracy"),
        ({"metrics": ("nowhere.loss",)}, "valid are in_context"),
        ({"metrics": ("global.kl",)}, "corpus statistics"),
        ({"metrics": ("in_context.logit_difference",)}, "corruption"),
    ],
)
def test_bad_questions_are_refused(
    ideal: Weights, batches: tuple[TokenBatch, TokenBatch], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BirthlensError, match=message):
        ablation_table([(0, ideal)], *batches, **options)


def test_heads_and_feed_forwards_are_ablated_together() -> None:
    one = Ablation((Head(1, 0), Head(1, 2), Mlp(0)), "mean")
    assert str(one) == "L1H0+L1H2+L0.mlp mean"
    assert one.interventions() == (
        Intervention("z", "mean", heads=(Head(1, 0), Head(1, 2))),
        Intervention("mlp_out", "mean", 0),
    )


def test_one_head_makes_no_pair() -> None:
    with pytest.raises(BirthlensError, match="only one head, L0H0; use all"):
        HeadSets("pairs").of(ModelConfig(n_layers=1))


def test_ideal_weights_refuse_what_they_cannot_build() -> None:
    generator = np.random.default_rng(0)
    with pytest.raises(BirthlensError, match="simplified model with 2 layers"):
        ideal_weights(ModelConfig(n_layers=1), 5, 5, generator)
    with pytest.raises(BirthlensError, match="valid are raw and dual"):
        ideal_weights(ModelConfig(), 5, 5, generator, codebooks="cooked")  # type: ignore[arg-type]
    with pytest.raises(BirthlensError, match="needs the linear W_F"):
        ideal_weights(ModelConfig(), 5, 5, generator, bigram=np.full((5, 5), 0.2))
