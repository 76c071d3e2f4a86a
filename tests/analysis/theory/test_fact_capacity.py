"""The capacity model of factual recall against softmax attention written out, and numbers of facts that are known."""

import numpy as np
import pytest

from birthlens.analysis.theory.fact_capacity import (
    FactLayer,
    LayerShape,
    Training,
    accuracies,
    capacity_of,
    fact_capacity_table,
    holds,
)
from birthlens.config.task import FactsConfig
from birthlens.errors import BirthlensError
from birthlens.tasks.facts import FactsTask

QUICK = Training(steps=100, batch=64, rates=(0.03,))


def drawn(size: int) -> FactsTask:
    config = FactsConfig(context=16, subjects=size, relations=size, noise_tokens=2 * size, structured=False)
    return FactsTask(config, FactsTask.chain(config, None))


def test_the_logits_are_those_of_softmax_attention_and_an_mlp() -> None:
    task = drawn(2)
    layer = FactLayer(LayerShape(8, heads=2, hidden=5), task, seed=3)
    tokens = task.sample(4, np.random.default_rng(0)).tokens
    found = layer.logits(tokens).detach().numpy()
    assert found.shape == (4, 2 * 8)
    book, answers, w_q, w_k, w_v, w_o, w_in, w_out = (
        matrix.detach().numpy().astype(np.float64) for matrix in (layer.embedding, layer.unembedding, *layer.trained)
    )
    for logits, sequence in zip(found, tokens.numpy(), strict=True):
        e = book[sequence]
        x = np.zeros(8)
        for head in (slice(0, 4), slice(4, 8)):
            weights = np.exp((e[-1] @ w_q[:, head]) @ (e @ w_k[:, head]).T / 2)
            x += weights / weights.sum() @ e @ w_v[:, head] @ w_o[head]
        x = x + np.maximum(x @ w_in, 0) @ w_out
        assert logits == pytest.approx(x @ answers, abs=1e-5)


def test_the_count_of_parameters_is_that_of_the_trained_matrices() -> None:
    shape = LayerShape(12, hidden=48)
    assert shape.parameters == 1728  # 4 * 4 heads * 3 * 12 + 2 * 48 * 12
    assert sum(matrix.numel() for matrix in FactLayer(shape, drawn(2), seed=0).trained) == shape.parameters
    with pytest.raises(BirthlensError, match="heads = 4: it must divide d_model = 10"):
        LayerShape(10)


def test_training_learns_few_facts_and_a_rate_of_zero_none() -> None:
    found = list(accuracies(drawn(2), LayerShape(8, hidden=32), QUICK, rate=0.03, seed=0))
    assert len(found) == 2 and found[-1] == 1.0
    assert list(accuracies(drawn(2), LayerShape(8, hidden=32), QUICK, rate=0.0, seed=0))[-1] < 0.9


def test_the_first_size_that_fails_ends_the_search() -> None:
    shape = LayerShape(8, hidden=32)
    facts = capacity_of(shape, QUICK, seed=1)
    size = int(np.sqrt(facts))
    assert size >= 2 and size**2 == facts
    assert holds(size, shape, QUICK, seed=1) and not holds(size + 1, shape, QUICK, seed=1)
    table = fact_capacity_table([8], [1], QUICK)
    assert table.to_dict("records") == [{"d_model": 8, "seed": 1, "parameters": 768, "facts": facts}]


def test_one_rate_that_is_enough_suffices() -> None:
    shape = LayerShape(8, hidden=32)
    assert not holds(2, shape, Training(steps=100, batch=64, rates=(0.0,)))
    assert holds(2, shape, Training(steps=100, batch=64, rates=(0.0, 0.03)))
