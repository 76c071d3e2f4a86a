"""Weight patching: untouched on the diagonal, exact at the ends, known circuits found, bases turned where they drift."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from typed import present

from birthlens.analysis.interventions.truncation import TRUNCATIONS
from birthlens.analysis.interventions.weight_patching import (
    by_forward,
    replacement,
    replacement_table,
    subset_table,
    weight_patching_table,
)
from birthlens.analysis.memories.ideal import Strengths, ideal_weights
from birthlens.analysis.memories.layer_norms import fold_layer_norms
from birthlens.analysis.memories.names import MEMORY_PARAMETERS, memory_named, parameters_named, trained_matrices
from birthlens.analysis.memories.paper_ledgers import paper_ledgers
from birthlens.config.model import ModelConfig
from birthlens.config.run import CorpusConfig, TaskConfig
from birthlens.errors import BirthlensError
from birthlens.model.alignment import aligned, drift, rotated_weights, rotation
from birthlens.model.forward import logits, tensors_of
from birthlens.model.initialisation import initial_weights, random_orthogonal
from birthlens.model.sites import Head
from birthlens.model.weights import Weights
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.corpus import markov_chain

N, T = 12, 24
CONFIG = ModelConfig(d_model=64, init="orthogonal")
GENERATOR = np.random.default_rng


@pytest.fixture(scope="module")
def batch() -> TokenBatch:
    statistics = markov_chain(CorpusConfig(source="markov", vocabulary=N))
    return BigramTask(TaskConfig(context=T, n_triggers=3, cycles="clean"), statistics).batch(24, 0)


@pytest.fixture(scope="module")
def random() -> Weights:
    return initial_weights(CONFIG, N, T, GENERATOR(0))


@pytest.fixture(scope="module")
def ideal() -> Weights:
    return ideal_weights(CONFIG, N, T, GENERATOR(0), strengths=Strengths(avoid_first=20))


def accuracies(table: pd.DataFrame, **where: Any) -> pd.DataFrame:
    for column, value in where.items():
        table = table[table[column] == value]
    return table[table["metric"] == "in_context_accuracy"]


def outputs(weights: Weights, batch: TokenBatch) -> torch.Tensor:
    return logits(tensors_of(weights, torch.float64), weights.config, batch.tokens)


def test_by_forward_agrees_with_whole_logits(ideal: Weights, batch: TokenBatch) -> None:
    loss, prediction = by_forward(ideal, batch, chunk=7)
    scores = logits(tensors_of(ideal), ideal.config, batch.tokens)
    right = scores.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
    torch.testing.assert_close(loss, -right)
    assert (prediction == scores.argmax(-1)).float().mean() > 0.999


def test_the_map_is_untouched_on_the_diagonal_and_full_elsewhere(
    random: Weights, ideal: Weights, batch: TokenBatch
) -> None:
    table = weight_patching_table([(0, random), (10, ideal)], batch)
    assert len(table) == 3 * 2 * 2 * table["metric"].nunique()
    diagonal = table[table["from_step"] == table["to_step"]]
    assert (diagonal["change"] == 0).all()
    assert (table["drift"] == 0).all() and table.attrs == {"moving": [], "aligned": False}
    measured = accuracies(diagonal, to_step=10)["value"]
    _, prediction = by_forward(ideal, batch)
    expected = (prediction == batch.targets)[batch.in_context].double().mean()
    np.testing.assert_allclose(measured, float(expected))


def test_each_memory_of_the_ideal_model_is_necessary_and_none_is_sufficient(
    random: Weights, ideal: Weights, batch: TokenBatch
) -> None:
    table = weight_patching_table([(0, random), (10, ideal)], batch)
    assert (accuracies(table, from_step=0, to_step=10)["change"] < -0.3).all()
    subsets = accuracies(subset_table(random, ideal, batch)).set_index("final")["value"]
    assert len(subsets) == 8
    assert subsets.iloc[-1] == 1 and (subsets.iloc[:-1] < 0.7).all()


def test_all_matrices_together_make_the_donor(random: Weights, ideal: Weights, batch: TokenBatch) -> None:
    together = "prev_token_memory+trigger_memory+output_memory"
    table = weight_patching_table([(0, random), (10, ideal)], batch, [together], from_steps=[10], to_steps=[0])
    whole = weight_patching_table([(10, ideal)], batch, [together])
    np.testing.assert_allclose(table["value"], whole["value"], rtol=1e-6)


def test_ideal_memories_heal_a_model_that_lost_one(ideal: Weights, random: Weights, batch: TokenBatch) -> None:
    broken = ideal.replaced({"L1.W_K": random["L1.W_K"]})
    for source in ("ideal", "ideal_dual"):
        table = accuracies(replacement_table([(3, broken)], batch, [source], initial=random))
        found = table.set_index(["matrix", "source"])["value"]
        assert found["trigger_memory", source] > 0.9 > 0.6 > found["trigger_memory", "none"]
        assert found["output_memory", source] < 0.6


def test_the_ledger_keeps_a_planted_memory_and_its_complement_the_rest(ideal: Weights, random: Weights) -> None:
    noise = {name: 0.1 * random[name] for name in MEMORY_PARAMETERS.values() if name in random}
    mixed = ideal.replaced({name: ideal[name] + noise[name] for name in noise})
    for name in noise:
        kept = replacement(mixed, [name], "ledger")[name]
        rest = replacement(mixed, [name], "without_ledger")[name]
        np.testing.assert_allclose(kept + rest, mixed[name], atol=1e-5)
        clean = ideal[name] if name != "L1.W_K" else None
        if clean is not None:
            assert np.linalg.norm(kept - clean) < 0.2 * np.linalg.norm(noise[name])
    # What the projection leaves, no association of the ledger can explain.
    for role, (_, ledger) in paper_ledgers(mixed, cells=False).items():
        name = MEMORY_PARAMETERS[role]
        left = mixed.replaced(replacement(mixed, [name], "without_ledger"))
        circuit = left.ov(Head(1, 0)) if name == "L1.W_O" else left.qk(Head(int(name[1]), 0))
        for values in ledger.coefficients(circuit).values():
            assert np.abs(values).max() < 1e-3


def test_a_full_rank_truncation_is_the_matrix_itself(random: Weights) -> None:
    for name in ("L1.W_O", "W_E"):
        full = min(random[name].shape[-2:])
        kept = replacement(random, [name], f"rank:{full}")[name]
        np.testing.assert_allclose(kept, random[name], atol=1e-5)
    three = replacement(random, ["L0.W_K"], "rank:3")["L0.W_K"]
    singular = np.linalg.svd(random["L0.W_K"][0].astype(float), compute_uv=False)
    lost = np.linalg.norm(random["L0.W_K"] - three)
    np.testing.assert_allclose(lost, np.sqrt((singular[3:] ** 2).sum()), rtol=1e-4)


@pytest.mark.parametrize(
    ("parameters", "source", "words"),
    [
        (["L1.W_O"], "rank:0", "rank:R with R from 1 to 64"),
        (["L1.W_O"], "rank:two", "rank:R with R"),
        (["L1.W_V"], "ideal", "L1.W_V has none"),
        (["L1.W_O"], "better", "valid are initial, ideal"),
        (["L1.W_O"], "initial", "valid are"),
    ],
)
def test_impossible_sources_are_refused(random: Weights, parameters: list[str], source: str, words: str) -> None:
    with pytest.raises(BirthlensError, match=words):
        replacement(random, parameters, source)


def test_unknown_matrices_and_steps_are_refused(random: Weights, batch: TokenBatch) -> None:
    with pytest.raises(BirthlensError, match=r"matrix = 'W_X'.* prev_token_memory, .*L1.QK.*L1.W_O"):
        weight_patching_table([(0, random)], batch, ["W_X"])
    with pytest.raises(BirthlensError, match=r"from_steps = \[7\]: the checkpoints given are 0"):
        weight_patching_table([(0, random)], batch, from_steps=[7])
    with pytest.raises(BirthlensError, match="no checkpoint"):
        weight_patching_table([], batch)


def test_an_ideal_feed_forward_needs_its_table(batch: TokenBatch) -> None:
    weights = initial_weights(CONFIG.changed(feed_forward="linear"), N, T, GENERATOR(0))
    with pytest.raises(BirthlensError, match=r"L1.W_F has none"):
        replacement(weights, ["L1.W_F"], "ideal")
    table = np.full((N, N), 1 / N)
    assert replacement(weights, ["L1.W_F"], "ideal", bigram=table)["L1.W_F"].any()
    with pytest.raises(BirthlensError, match=r"'ledger': L1.W_F has none"):
        replacement(weights, ["L1.W_F"], "ledger")
    sharp = 0.9 * np.roll(np.eye(N), 1, axis=1) + 0.1 / N
    kept, rest = (replacement(weights, ["L1.W_F"], of, bigram=sharp)["L1.W_F"] for of in ("ledger", "without_ledger"))
    np.testing.assert_allclose(kept + rest, weights["L1.W_F"], atol=1e-5)
    again = replacement(weights.replaced({"L1.W_F": kept}), ["L1.W_F"], "ledger", bigram=sharp)["L1.W_F"]
    assert 0 < np.linalg.norm(kept) < np.linalg.norm(weights["L1.W_F"])
    np.testing.assert_allclose(again, kept, atol=1e-6)


def test_vectors_are_left_as_they_are_by_a_truncation() -> None:
    weights = full_model(2)
    cut = replacement(weights, parameters_named(FULL, "L0.QK"), "rank:2")
    assert list(cut) == ["L0.W_Q", "L0.W_K", "L0.b_Q", "L0.b_K"]
    assert np.linalg.matrix_rank(cut["L0.W_Q"][1]) == 2 and (cut["L0.b_Q"] == weights["L0.b_Q"]).all()


FULL = ModelConfig(family="full", d_model=16, n_heads=2, feed_forward="relu")


def full_model(seed: int) -> Weights:
    """A full model with layer norms and biases that are not trivial, folded."""
    generator = GENERATOR(seed)
    weights = initial_weights(FULL, N, T, generator)
    noise = {name: (weights[name] + 0.3 * generator.standard_normal(weights[name].shape)).astype(np.float32)
             for name in weights if name.split(".")[-1] in ("w", "b") or ".b_" in name}  # fmt: skip
    return fold_layer_norms(weights.replaced(noise))


def simplified_model(seed: int) -> Weights:
    """As many codebook vectors as dimensions and more, so that they fix the basis."""
    return initial_weights(ModelConfig(d_model=32), N, T, GENERATOR(seed))


def basis(weights: Weights, seed: int) -> NDArray[Any]:
    """A random change of basis, which leaves the direction of the mean alone where there are layer norms."""
    d = weights.config.d_model
    if weights.config.family == "simplified":
        return random_orthogonal(d, GENERATOR(seed))
    frame = np.linalg.qr(np.column_stack([np.ones(d), GENERATOR(1).standard_normal((d, d - 1))]))[0]
    turn = np.eye(d)
    turn[1:, 1:] = random_orthogonal(d - 1, GENERATOR(seed))
    return frame @ turn @ frame.T


@pytest.mark.parametrize("make", [simplified_model, full_model])
def test_a_rotated_model_is_the_same_model_and_is_found_again(make: Callable[..., Any], batch: TokenBatch) -> None:
    weights = make(3)
    turn = basis(weights, 5)
    other = rotated_weights(weights, turn)
    torch.testing.assert_close(outputs(other, batch), outputs(weights, batch), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(rotation(weights, other), turn, atol=1e-4)
    assert drift(weights, other) > 1 > 1e-4 > drift(rotated_weights(weights, rotation(weights, other)), other)


@pytest.mark.parametrize("make", [simplified_model, full_model])
@pytest.mark.parametrize("matrix", ["L1.W_K", "L0.W_O", "L1.W_V", "L1.QK", "L0.OV"])
def test_aligned_grafts_between_two_bases_change_nothing(
    make: Callable[..., Any], matrix: str, batch: TokenBatch
) -> None:
    weights = make(3)
    other = rotated_weights(weights, basis(weights, 5))
    tables = [
        weight_patching_table([(0, weights), (1, other)], batch, [matrix], align=align) for align in (False, True)
    ]
    changes = [table.loc[table["metric"] == "all_loss", "change"].abs().max() for table in tables]
    assert changes[0] > 1e-3 > 1e-5 > changes[1]
    assert "W_E" in tables[0].attrs["moving"] and tables[1].attrs["aligned"]
    assert tables[0]["drift"].max() > 1 > 1e-4 > tables[1]["drift"].max()


@pytest.mark.parametrize("option", [{"unembedding": "tied"}, {"positions": "relative"}])
def test_models_without_an_alignment_are_refused(batch: TokenBatch, option: dict[str, Any]) -> None:
    config = ModelConfig(family="full", d_model=8, **option)
    weights = initial_weights(config, N, T, GENERATOR(0))
    name, value = next(iter(option.items()))
    with pytest.raises(BirthlensError, match=f"align: model.{name} = '{value}'"):
        weight_patching_table([(0, weights)], batch, ["W_E"], align=True)


def test_alignment_refuses_what_it_cannot_turn() -> None:
    plain, small = initial_weights(FULL, N, T, GENERATOR(0)), initial_weights(CONFIG, N, T, GENERATOR(0))
    with pytest.raises(BirthlensError, match="different models"):
        rotation(plain, small)
    gains = plain.replaced({"L0.ln1.w": 2 * plain["L0.ln1.w"]})
    with pytest.raises(BirthlensError, match="fold them first"):
        aligned(gains, gains, ["L0.W_K"])
    with pytest.raises(BirthlensError, match="direction of the mean"):
        rotated_weights(fold_layer_norms(gains), random_orthogonal(16, GENERATOR(0)))


def test_circuits_of_a_full_model_are_transplanted_with_their_biases() -> None:
    assert parameters_named(FULL, "L1.OV") == ("L1.W_V", "L1.W_O", "L1.b_V", "L1.b_O")
    assert trained_matrices(FULL) == ("L0.QK", "L0.OV", "L1.QK", "L1.OV")
    assert trained_matrices(CONFIG) == ("prev_token_memory", "trigger_memory", "output_memory")
    with pytest.raises(BirthlensError, match=r"valid are L0\.QK"):
        parameters_named(FULL, "trigger_memory")


def test_memories_have_names(ideal: Weights) -> None:
    for name in ("W_O^2", "L1.W_O", "output_memory"):
        memory, association = memory_named(ideal, name)
        assert memory.name == "L1H0.OV: W_E -> W_U" and len(present(association).queries) == N
    memory, association = memory_named(ideal, "trigger_memory", triggers=[1, 4])
    found = present(association)
    assert found.pairs == [(1, 1), (4, 4)] and len(found.candidates) == N
    assert memory_named(ideal, "L1H0.QK: W_E -> W_pos")[1] is None
    with pytest.raises(BirthlensError, match="has 9 readings"):
        memory_named(ideal, "L1H0.QK")
    with pytest.raises(BirthlensError, match="is not a memory"):
        memory_named(ideal, "feed_forward_memory")


@pytest.mark.parametrize("heads", [1, 3])
def test_truncations_are_sums_of_singular_components(heads: int) -> None:
    config = ModelConfig(family="full", d_model=12, n_heads=heads)
    first, last = (initial_weights(config, 7, 6, np.random.default_rng(seed)) for seed in (0, 1))
    name = "L1.W_O"
    for rank in (1, 2, 4):
        found = {how: replacement(last, [name], f"{how}:{rank}", first)[name] for how in TRUNCATIONS}
        for head in range(heads):
            matrix = last[name][head].astype(np.float64)
            start = first[name][head].astype(np.float64)
            outer = []
            for whole in (matrix, matrix - start):
                u, s, vt = np.linalg.svd(whole)
                outer.append(sum(s[i] * np.outer(u[:, i], vt[i]) for i in range(rank)))
            expected = {"rank": outer[0], "without_rank": matrix - outer[0], "change_rank": start + outer[1]}
            for how, array in expected.items():
                np.testing.assert_allclose(found[how][head], array, atol=1e-6)
            assert np.linalg.matrix_rank(found["change_rank"][head] - start, tol=1e-5) == rank
    whole = replacement(last, [name], "change_rank:4", first)[name]
    if heads == 3:  # every component of a head of width 4: nothing is cut
        np.testing.assert_allclose(whole, last[name], atol=1e-6)


def test_truncations_say_what_they_need() -> None:
    weights = initial_weights(ModelConfig(d_model=8), 5, 4, np.random.default_rng(0))
    with pytest.raises(BirthlensError, match="write without_rank:R with R = 1, 2"):
        replacement(weights, ["L1.W_O"], "without_rank:x")
    with pytest.raises(BirthlensError, match="write change_rank:R with R from 1 to 8"):
        replacement(weights, ["L1.W_O"], "change_rank:9", weights)
    with pytest.raises(BirthlensError, match="give the initial weights"):
        replacement(weights, ["L1.W_O"], "change_rank:2")
    broken = weights.replaced({"L1.W_O": np.full_like(weights["L1.W_O"], np.nan)})
    with pytest.raises(BirthlensError, match="values that are not finite"):
        replacement(broken, ["L1.W_O"], "rank:2")
