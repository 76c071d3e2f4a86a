"""The closed-form induction head: a working model, in any codebooks; recall is not accuracy, and what makes it so."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

from birthlens.analysis.memories.ideal import Strengths, ideal_matrices, ideal_weights
from birthlens.analysis.theory.width import width_table
from birthlens.config.model import ModelConfig
from birthlens.config.run import CorpusConfig, TaskConfig
from birthlens.errors import BirthlensError
from birthlens.model.hooked import build
from birthlens.model.initialisation import initial_weights
from birthlens.model.weights import Weights
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.corpus import markov_chain, statistics_of

N, T = 12, 24


@pytest.fixture(scope="module")
def task() -> BigramTask:
    statistics = markov_chain(CorpusConfig(source="markov", vocabulary=N))
    return BigramTask(TaskConfig(context=T, n_triggers=3, triggers="random", cycles="clean"), statistics)


@pytest.fixture(scope="module")
def paper_task() -> BigramTask:
    return BigramTask(TaskConfig(), statistics_of(CorpusConfig()))


def values(table: pd.DataFrame, metric: str) -> "pd.Series[Any]":
    return table[table["metric"] == metric].set_index(["d_model", "vectors"])["value"]


def test_it_is_a_working_hooked_transformer(task: BigramTask) -> None:
    config = ModelConfig(d_model=64, init="orthogonal")
    weights = ideal_weights(config, N, T, np.random.default_rng(0), strengths=Strengths(avoid_first=20))
    batch = task.batch(32, 0)
    predicted = build(weights, n_ctx=T)(batch.tokens).argmax(-1)
    assert (predicted == batch.targets)[batch.in_context].all()


def outer_products(lefts: NDArray[Any], rights: NDArray[Any], pairs: list[tuple[int, int]]) -> NDArray[Any]:
    total = np.zeros((lefts.shape[1], rights.shape[1]))
    for i, j in pairs:
        total += np.outer(lefts[i] / (lefts[i] @ lefts[i]), rights[j] / (rights[j] @ rights[j]))
    return total


def test_raw_memories_are_sums_of_outer_products_in_given_codebooks() -> None:
    weights = initial_weights(ModelConfig(d_model=16), N, T, np.random.default_rng(4))
    exact = {name: tensor.astype(float) for name, tensor in weights.items()}
    found = ideal_matrices(weights, triggers=[2, 7], strengths=Strengths(3, 5, 7))
    embed, position = exact["W_E"], exact["W_pos"]
    remapped = embed @ exact["L0.W_V"][0] @ exact["L0.W_O"][0]
    root = 16**0.5
    expected = {
        "L0.W_K": 3 * root * outer_products(position, position, [(t - 1, t) for t in range(1, T)]),
        "L1.W_K": 5 * root * outer_products(remapped, embed, [(2, 2), (7, 7)]),
        "L1.W_O": 7 * outer_products(embed @ exact["L1.W_V"][0], exact["W_U"].T, [(k, k) for k in range(N)]),
    }
    for name, matrix in expected.items():
        np.testing.assert_allclose(found[name][0], matrix, rtol=1e-9, atol=1e-12)


def test_ideal_weights_are_the_ideal_matrices_of_their_own_start() -> None:
    config = ModelConfig(d_model=32)
    weights = ideal_weights(config, N, T, np.random.default_rng(2), codebooks="dual")
    start = initial_weights(config, N, T, np.random.default_rng(2))
    for name, matrix in ideal_matrices(start, codebooks="dual").items():
        np.testing.assert_allclose(weights[name], matrix, atol=1e-2 * np.abs(matrix).max())
    for name in ("W_E", "W_pos", "L0.W_V", "W_U"):
        np.testing.assert_array_equal(weights[name], start[name])


def test_recall_is_one_and_accuracy_is_not_at_the_papers_width(paper_task: BigramTask) -> None:
    table = width_table(paper_task, [128], ["raw"], sequences=24)
    for memory, queries in (("prev_token", 255), ("trigger", 5), ("output", len(paper_task.statistics))):
        row = table[table["metric"] == f"{memory}_memory_recall"].iloc[0]
        assert (row["value"], row["n"]) == (1.0, queries)
    assert 0.6 < values(table, "in_context_accuracy")[128, "raw"] < 0.8


def test_raw_outer_products_do_it_at_a_width_of_a_thousand(paper_task: BigramTask) -> None:
    table = width_table(paper_task, [1024], ["raw"], sequences=6, strengths=Strengths(avoid_first=20))
    assert values(table, "in_context_accuracy")[1024, "raw"] > 0.99


def test_orthogonal_and_dual_vectors_do_it_as_soon_as_all_codebooks_fit(task: BigramTask) -> None:
    fits = 2 * N + T
    strengths = Strengths(avoid_first=20)
    accuracy = values(width_table(task, [16, fits, 2 * fits], strengths=strengths), "in_context_accuracy")
    assert accuracy[fits, "orthogonal"] == 1 and accuracy[2 * fits, "dual"] > 0.98
    for wide in (fits, 2 * fits):
        assert accuracy[wide, "raw"] < accuracy[wide, "orthogonal"] - 0.02
    assert max(accuracy[16, "raw"], accuracy[16, "dual"], accuracy[16, "orthogonal"]) < 0.9


def test_unknown_vectors_are_refused(task: BigramTask) -> None:
    with pytest.raises(BirthlensError, match="valid are raw, dual, orthogonal"):
        width_table(task, [16], ["random"])  # type: ignore[list-item]


def test_other_models_are_refused() -> None:
    weights = initial_weights(ModelConfig(d_model=16, n_layers=1), N, T, np.random.default_rng(0))
    with pytest.raises(BirthlensError, match="n_layers 1"):
        ideal_matrices(weights)


def test_the_evaluation_can_be_replaced(task: BigramTask) -> None:
    def right(weights: Weights, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(batch.tokens.shape), batch.targets

    table = width_table(task, [16], ["raw"], evaluate=right)
    assert values(table, "all_accuracy")[16, "raw"] == 1 and values(table, "in_context_loss")[16, "raw"] == 0
