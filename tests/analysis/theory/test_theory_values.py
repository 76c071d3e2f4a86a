"""Values of the theory's and the oracles' tables, each against a plain computation beside it."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from birthlens.analysis.behaviour.excess import clustered_mean, excess_loss_table
from birthlens.analysis.theory import three_steps
from birthlens.analysis.theory.outer_products import ZipfMemory, capacity_table, memory_training_table
from birthlens.config.model import ModelConfig
from birthlens.config.run import CorpusConfig, TaskConfig
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.corpus import markov_chain
from birthlens.tasks.predictors.reference import predict

CHAIN = markov_chain(CorpusConfig(source="markov", vocabulary=8, concentration=1.0))
TASK = BigramTask(TaskConfig(context=12, n_triggers=2), CHAIN)


def test_excess_is_the_models_loss_less_the_predictors() -> None:
    """A uniform model loses to the global bigram where the chain is at work, and that is a positive excess."""
    batch = TASK.batch(32, 0)
    table = excess_loss_table(torch.zeros(32, 12, 8), TASK, batch, ["bigram", "uniform"], smoothing=0.0)
    rows = table[table["by"] == "role"].set_index(["predictor", "group"])
    mask = (batch.occurrence == 0).numpy()
    picked = CHAIN.bigram[batch.tokens.numpy()[mask], batch.targets.numpy()[mask]]
    expected = math.log(8) + float(np.log(picked).mean())
    assert expected > 0.1 and rows.loc[("bigram", "global"), "excess"] == pytest.approx(expected)
    assert rows.loc[("uniform", "global"), "excess"] == pytest.approx(0, abs=1e-12)
    better = excess_loss_table(torch.from_numpy(np.log(predict("bayes", TASK, batch) + 1e-9)), TASK, batch, ["uniform"])
    assert better[(better["by"] == "role") & (better["group"] == "all")]["excess"].iloc[0] < 0


def test_occurrences_are_groups_of_their_own_but_the_last() -> None:
    batch = TASK.batch(64, 1)
    table = excess_loss_table(torch.zeros(64, 12, 8), TASK, batch, ["uniform"], occurrences=3)
    sizes = table[table["by"] == "occurrence"].set_index("group")["n"]
    seen = batch.occurrence.numpy()
    assert [sizes[k] for k in range(4)] == [(seen == k).sum() for k in range(3)] + [(seen >= 3).sum()]


def test_the_error_of_a_mean_is_its_spread_over_draws() -> None:
    """Draw many samples of whole sequences: the stated standard error is the spread of the means."""
    generator = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(400):
        mask = generator.random((60, 5)) < 0.6
        values = generator.standard_normal((60, 1)) + 0.5 * generator.standard_normal((60, 5))
        mean, error = clustered_mean(values, mask)
        means.append(mean)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_every_batch_of_the_three_steps_is_drawn_once() -> None:
    """The bias, the three steps and the evaluation must not share sequences."""
    drawn = []

    class Spied(BigramTask):
        def batch(self, n: int, seed: int, index: int = 0) -> TokenBatch:
            drawn.append((seed, index))
            return super().batch(n, seed, index)

    three_steps.three_steps_table(
        three_steps.Recipe(sequences=8, seed=3), Spied(TASK.config, CHAIN), ModelConfig(d_model=16)
    )
    steps = {index for _, index in drawn} - set(three_steps.STREAMS.values())
    assert len(steps) == 3 and not steps & set(three_steps.STREAMS.values())
    assert {(3, index) for index in (*steps, *three_steps.STREAMS.values())} == set(drawn)
    assert len(set(three_steps.STREAMS.values())) == 2


def test_interference_is_the_spread_of_wrong_scores() -> None:
    memory = ZipfMemory(tokens=7, d_model=4, exponent=1.0, outputs=5)
    table = memory_training_table(memory, rates=(2.0,), steps=3)
    for step, matrix in enumerate(memory.descent(2.0, 3)):
        scores = memory.scores(matrix)
        spreads = [np.var([scores[x, y] for y in range(5) if y != x % 5]) for x in range(7)]
        assert table["interference"][step] == pytest.approx(math.sqrt(np.mean(spreads)), abs=1e-12)
    assert table["interference"][0] == 0 < table["interference"][3]


@pytest.mark.parametrize("storage", ["uniform", "frequency", "root", "first_d"])
def test_each_storage_is_the_sum_it_names(storage: Any) -> None:
    memory = ZipfMemory(tokens=20, d_model=6, exponent=1.2, seed=2)
    p = memory.frequencies
    q = {"uniform": np.ones(20), "frequency": p, "root": p**0.5, "first_d": np.array([1.0] * 6 + [0.0] * 14)}[storage]
    inputs, outputs = memory.codebooks
    matrix = sum(q[x] * np.outer(inputs[x], outputs[x]) for x in range(20))
    recalled = [int(np.argmax(outputs @ matrix.T @ inputs[x])) == x for x in range(20)]
    (row,) = capacity_table(20, [6], 1.2, [storage], seeds=[2]).to_dict("records")
    assert row["recall"] == pytest.approx(np.mean(recalled)) and row["error"] == pytest.approx(p @ ~np.array(recalled))
    assert row["capacity"] == ([*recalled, False].index(False))
