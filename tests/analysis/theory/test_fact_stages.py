"""The reduced model of factual recall against autograd and its own theory; capacities that are known by hand."""

import numpy as np
import pytest
import torch

from birthlens.analysis.theory.fact_stages import Descent, counts_of, escape_times, stage_table
from birthlens.analysis.theory.memory_capacity import capacity_of, learned_accuracy, learned_capacity_table
from birthlens.analysis.theory.outer_products import ZipfMemory
from birthlens.claims.claim import Evidence
from birthlens.claims.statistics import fact_theory
from birthlens.config.task import FactsConfig
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.facts import FactsTask


@pytest.fixture(scope="module")
def task() -> FactsTask:
    config = FactsConfig(subjects=4, relations=2, answers=2, noise_tokens=3, context=6)
    return FactsTask(config, FactsTask.chain(config, None))


def test_the_descent_is_that_of_linear_attention_by_autograd(task: FactsTask) -> None:
    descent = Descent(rate=0.7, batch=16, steps=3, init=0.3)
    table = stage_table(task, descent, seed=2, every=1, evaluated=32)
    batches = np.random.default_rng(2)
    held_out = task.sample(32, np.random.default_rng((2, 1)))
    keys = torch.full((task.eos + 1,), 0.3, dtype=torch.float64, requires_grad=True)
    votes = torch.full((task.eos + 1, 4), 0.3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([keys, votes], lr=0.7)

    def loss_on(batch: TokenBatch) -> torch.Tensor:
        tokens = batch.tokens  # one query, one-hot codes: attention weights are the keys of the tokens, unnormalised
        return torch.nn.functional.cross_entropy(
            (keys[tokens][:, :, None] * votes[tokens]).sum(1), batch.targets[:, -1] - task.eos - 1
        )

    for step in range(4):
        assert table["loss"][step] == pytest.approx(loss_on(held_out).item(), abs=1e-12)
        optimiser.zero_grad()
        loss_on(task.sample(16, batches)).backward()
        optimiser.step()
    assert table["subject_key"][3] != 0.3


def test_counts_see_every_token_once(task: FactsTask) -> None:
    counts = counts_of(task, task.sample(8, np.random.default_rng(0)))
    assert (counts.sum(1) == 6).all() and (counts[:, task.eos] == 1).all() and (counts[:, :4].sum(1) == 1).all()


def test_escape_times_are_the_gradients_of_a_large_batch() -> None:
    config = FactsConfig(subjects=8, relations=2, answers=4, noise_tokens=3, context=6)
    task = FactsTask(config, FactsTask.chain(config, None))
    batch = task.sample(200_000, np.random.default_rng(0))
    wrong = np.eye(8)[batch.targets[:, -1].numpy() - task.eos - 1] - 1 / 8
    norms = np.linalg.norm(counts_of(task, batch).T @ wrong / len(wrong), axis=1)
    relation, subject = escape_times(config, Descent(rate=2.0, init=0.01))
    assert relation == pytest.approx(np.log(100) / (2 * norms[8:10].mean()), rel=0.01)
    assert subject == pytest.approx(np.log(100) / (2 * norms[:8].mean()), rel=0.02)
    assert norms[10:].max() < 0.01  # noise and <eos> say nothing


def test_the_statistic_finds_the_stage_and_its_reversal() -> None:
    found = fact_theory.stages(Evidence({}, 0, {"steps": 250, "subjects": 4, "relations": 8}))
    assert found["subject_later"] < -20 and found["subject_off"] < 0.2 and found["last_accuracy"] > 0.9
    unfinished = fact_theory.stages(Evidence({}, 0, {"steps": 10, "subjects": 16, "relations": 4}))
    assert np.isnan(unfinished["subject_later"]) and unfinished["last_accuracy"] < 0.5


def test_orthogonal_memories_are_learned_whole_and_random_ones_up_to_a_capacity() -> None:
    assert learned_accuracy(ZipfMemory(6, 6, codes="orthogonal"), steps=30) == 1.0
    assert learned_accuracy(ZipfMemory(60, 4), steps=30) < 0.9
    n = capacity_of(6, seed=1)
    assert learned_accuracy(ZipfMemory(n, 6, seed=1)) >= 0.99 > learned_accuracy(ZipfMemory(n + 1, 6, seed=1))
    table = learned_capacity_table([6], seeds=[1])
    assert table["capacity"][0] == n and table["ratio"][0] == pytest.approx(n * np.log(n) / 36)
