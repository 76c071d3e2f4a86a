"""One associative memory: closed forms for orthonormal codebooks, and what gradient descent must do."""

import numpy as np
import pytest
from typed import loc, present

from birthlens.analysis.theory.outer_products import ZipfMemory, capacity_table, memory_training_table
from birthlens.errors import BirthlensError


def orthonormal(memory: ZipfMemory) -> ZipfMemory:
    vars(memory)["codebooks"] = (np.eye(memory.tokens, memory.d_model), np.eye(present(memory.outputs), memory.d_model))
    return memory


def test_scores_of_orthonormal_codebooks_are_the_weights() -> None:
    memory = orthonormal(ZipfMemory(tokens=6, d_model=8, outputs=3))
    weights = np.arange(1.0, 7.0)
    scores = memory.scores(memory.stored(weights))
    np.testing.assert_array_equal(scores, weights[:, None] * np.eye(3)[memory.right])
    np.testing.assert_array_equal(memory.margins(scores), weights)


def test_first_step_stores_frequencies_and_orders_margins_by_them() -> None:
    memory = orthonormal(ZipfMemory(tokens=6, d_model=8, outputs=3, exponent=1.5))
    _, first = memory.descent(rate=1.0, steps=1)
    np.testing.assert_allclose(memory.margins(memory.scores(first)), memory.frequencies)


def test_large_steps_overshoot_and_still_recall_within_capacity() -> None:
    memory = ZipfMemory(tokens=24, d_model=12, exponent=1.0, outputs=6)
    table = memory_training_table(memory, rates=(1.0, 1000.0), steps=100)
    small, large = (table[table.rate == rate] for rate in (1.0, 1000.0))
    first = small[small.step == 0].iloc[0]
    assert first.loss == pytest.approx(np.log(6)) and first.recall == 0 and first.error == pytest.approx(1)
    assert not small.rose.any() and small.recall.iloc[-1] < 1
    assert large.rose.sum() > 3 and large.loss.max() > 10 * first.loss and large.recall.iloc[-1] == 1


def test_beyond_capacity_large_steps_oscillate_for_ever() -> None:
    table = memory_training_table(ZipfMemory(tokens=40, d_model=8, exponent=1.5, outputs=5), rates=(100.0,), steps=100)
    assert table[table.step > 50].rose.sum() > 5 and table.recall.iloc[-1] < 1


def test_error_falls_with_width_and_weights_matter() -> None:
    table = capacity_table(tokens=200, widths=(8, 32, 128), exponent=1.5, seeds=range(3))
    error = table.groupby(["storage", "d_model"]).error.mean().unstack()
    assert (error.diff(axis=1).iloc[:, 1:] < 0).all().all()
    # Uniform weights drown frequent tokens in interference at small d; frequency weights keep the few most frequent.
    assert loc(error)["frequency", 8] < loc(error)["uniform", 8]
    assert (table.capacity <= table.recall * table.n + 1e-9).all()


def test_a_memory_that_cannot_be_is_named() -> None:
    with pytest.raises(BirthlensError, match="outputs = 1"):
        ZipfMemory(tokens=4, d_model=2, outputs=1)
