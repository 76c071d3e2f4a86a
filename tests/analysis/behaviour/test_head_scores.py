"""Scores and probes against plain loops, their chance levels, and what a transfer test must show."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from birthlens.analysis.behaviour.attention import attention_table, watch
from birthlens.analysis.behaviour.head_scores import in_context_learning_table, scores_table, transfer_table
from birthlens.analysis.behaviour.head_weights import composition_table, weight_scores_table
from birthlens.analysis.memories.ideal import Strengths, ideal_weights
from birthlens.config.model import ModelConfig
from birthlens.config.run import CorpusConfig, TaskConfig
from birthlens.errors import BirthlensError
from birthlens.model.hooked import build
from birthlens.model.initialisation import initial_weights
from birthlens.model.sites import Head
from birthlens.model.weights import Weights
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.corpus import markov_chain
from birthlens.tasks.positions import repeated_tokens

N, T = 12, 24
CONFIG = ModelConfig(d_model=64, init="orthogonal")


@pytest.fixture(scope="module")
def task() -> BigramTask:
    return BigramTask(TaskConfig(context=T, n_triggers=3), markov_chain(CorpusConfig(source="markov", vocabulary=N)))


@pytest.fixture(scope="module")
def batch(task: BigramTask) -> TokenBatch:
    return task.batch(20, 0)


@pytest.fixture(scope="module")
def full() -> Weights:
    config = ModelConfig(family="full", d_model=16, n_heads=2, feed_forward="relu")
    weights = initial_weights(config, N, T, np.random.default_rng(0))
    return weights.replaced({name: 4 * array for name, array in weights.items() if name.endswith(("W_Q", "W_K"))})


def ideal(triggers: list[int] | NDArray[Any] | None = None) -> Weights:
    return ideal_weights(CONFIG, N, T, np.random.default_rng(0), triggers, Strengths(avoid_first=20))


def test_weights_and_hooks_see_the_same_patterns(full: Weights, batch: TokenBatch) -> None:
    for ours, theirs in zip(watch(full, batch, 7), watch(build(full), batch, 7), strict=True):
        for left, right in zip(ours.patterns, theirs.patterns, strict=True):
            torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-4)


def test_pattern_scores_equal_plain_loops(full: Weights, batch: TokenBatch) -> None:
    table = scores_table([(3, full)], batch, chunk=6).set_index(["head", "score"])
    (seen,) = watch(full, batch, 100)
    patterns = seen.patterns
    tokens = batch.tokens.tolist()
    for layer in range(2):
        for head in range(2):
            found: dict[str, list[float]] = {"previous_token": [], "duplicate_token": [], "induction": []}
            chance: dict[str, list[float]] = {score: [] for score in found}
            for b, row in enumerate(tokens):
                for t in range(T):
                    goals = {
                        "previous_token": [t - 1] if t else [],
                        "duplicate_token": [s for s in range(t) if row[s] == row[t]],
                        "induction": [s for s in range(1, t + 1) if row[s - 1] == row[t]],
                    }
                    for score, goal in goals.items():
                        if goal:
                            found[score].append(float(patterns[layer][b, head, t, goal].sum()))
                            chance[score].append(len(goal) / (t + 1))
            for score in found:
                said: Any = table.loc[str(Head(layer, head)), score]
                assert said["value"] == pytest.approx(np.mean(found[score]), abs=1e-5)
                assert said["chance"] == pytest.approx(np.mean(chance[score]), abs=1e-6)
                assert said["n"] == len(found[score]) and said["step"] == 3


def test_even_attention_scores_at_chance(batch: TokenBatch) -> None:
    weights = initial_weights(ModelConfig(d_model=16), N, T, np.random.default_rng(0))
    flat = weights.replaced({name: 0 * array for name, array in weights.items() if name.endswith("W_K")})
    table = scores_table([(0, flat)], batch)
    np.testing.assert_allclose(table["value"], table["chance"], atol=1e-6)
    transfer = transfer_table([(0, flat)], np.random.default_rng(0), n=8, triggers=[0, 1])
    heads = transfer[transfer["head"].notna()]
    np.testing.assert_allclose(heads["value"], heads["chance"], atol=1e-6)


def test_probes_equal_plain_loops(full: Weights, batch: TokenBatch) -> None:
    table = attention_table([(0, full)], batch, chunk=6).set_index(["probe", "head", "given"])["value"].sort_index()
    (seen,) = watch(full, batch, 100)
    first, later = seen.patterns[0][:, 1].argmax(-1).tolist(), seen.patterns[1][:, 0].argmax(-1).tolist()
    predicted, tokens = seen.logits.argmax(-1).tolist(), batch.tokens.tolist()
    occurrence = batch.occurrence.tolist()
    probes: dict[str, list[Any]] = {name: [] for name in ("previous", "match", "attended", "conditional", "repeats")}
    for b in range(20):
        for t in range(T):
            if t and occurrence[b][t - 1] >= 1:
                probes["previous"].append(first[b][t] == t - 1)
            if occurrence[b][t] >= 2:
                s = later[b][t]
                probes["match"].append(s >= 1 and tokens[b][s - 1] == tokens[b][t])
                probes["attended"].append(tokens[b][s] == predicted[b][t])
                probes["conditional"].append(first[b][s] == s - 1)
                probes["repeats"].append(int(batch.targets[b, t]) == tokens[b][t])
    loops = {name: np.mean(values) for name, values in probes.items()}
    assert table["previous_token", "L0H1", np.nan] == pytest.approx(loops["previous"])
    assert table["induction_match", "L1H0", np.nan] == pytest.approx(loops["match"])
    assert table["attended_is_predicted", "L1H0", np.nan] == pytest.approx(loops["attended"])
    assert table["previous_where_attended", "L0H1", "L1H0"] == pytest.approx(loops["conditional"])
    assert table[("repeats",)].item() == pytest.approx(loops["repeats"])


def test_the_ideal_model_passes_every_probe(task: BigramTask, batch: TokenBatch) -> None:
    table = attention_table([(0, ideal(task.fixed_triggers))], batch, role="in_context_unabsorbed")
    found = table.set_index(["probe", "head"])["value"]
    assert found["previous_token", "L0H0"] == 1
    assert found["induction_match", "L1H0"] == 1
    assert found["previous_where_attended", "L0H0"] == 1
    assert (table["chance"].dropna() < 0.5).all()


def test_transfer_shows_that_only_the_triggers_are_matched(task: BigramTask) -> None:
    assert task.fixed_triggers is not None
    triggers = task.fixed_triggers.tolist()
    table = transfer_table([(0, ideal(triggers)), (1, ideal())], np.random.default_rng(0), 64, 12, triggers)
    found = table.set_index(["step", "head", "group", "score"])["value"].to_dict()
    chance = table.set_index(["step", "head", "group", "score"])["chance"].to_dict()
    assert found[0, "L1H0", "trigger", "any_successor"] > 0.97
    assert found[0, "L1H0", "other", "any_successor"] < 2 * chance[0, "L1H0", "other", "any_successor"]
    assert found[1, "L1H0", "other", "any_successor"] > 0.97
    # Rows of repeated letters: the one right position is one of several that match.
    assert found[1, "L1H0", "all", "strict"] < 0.9 * found[1, "L1H0", "all", "any_successor"]
    distinct = transfer_table([(1, ideal())], np.random.default_rng(0), 16, 12, distinct=True)
    strict = distinct[(distinct["head"] == "L1H0") & (distinct["score"] == "strict")]["value"].item()
    assert strict > 0.97
    accuracy = table[(table["score"] == "accuracy") & (table["step"] == 1) & (table["group"] == "all")]
    assert accuracy["value"].item() > 0.5 > accuracy["chance"].item()


def test_in_context_learning_score(task: BigramTask, batch: TokenBatch) -> None:
    table = in_context_learning_table([(0, ideal())], repeated_tokens(16, 12, N, np.random.default_rng(0)))
    assert table["value"].item() < -1
    (seen,) = watch(ideal(), batch, 100)
    loss = torch.nn.functional.cross_entropy(seen.logits.transpose(1, 2), batch.targets, reduction="none").double()
    table = in_context_learning_table([(0, ideal())], batch, slice(0, 5), slice(20, 24))
    assert table["value"].item() == pytest.approx(float(loss[:, 20:].mean() - loss[:, :5].mean()), abs=1e-4)


def test_weight_scores_of_ideal_and_random_heads() -> None:
    random = initial_weights(ModelConfig(d_model=64), N, T, np.random.default_rng(0))
    table = weight_scores_table([(0, random), (1, ideal())]).set_index(["step", "head", "score"])["value"]
    assert table[1, "L0H0", "previous_token"] == 1 and table[0, "L0H0", "previous_token"] < 0.6
    assert table[1, "L1H0", "induction"] == 1 and table[0, "L1H0", "induction"] < 0.5
    assert table[1, "L1H0", "copying"] == 1 and table[1, "L1H0", "copying_eigenvalues"] == pytest.approx(1, abs=1e-4)
    assert abs(table[0, "L1H0", "copying_eigenvalues"]) < 0.6


def test_weight_scores_equal_plain_products(full: Weights) -> None:
    table = (
        weight_scores_table([(0, full)], tokens=range(5)).set_index(["head", "score", "through"])["value"].sort_index()
    )
    head, states = Head(1, 1), full["W_E"][:5]
    own = (states @ full.qk(head) @ states.T).argmax(1) == np.arange(5)
    assert table[("L1H1", "duplicate_token")].item() == pytest.approx(own.mean())
    via = (states @ full.qk(head) @ (states @ full.ov(Head(0, 1))).T).argmax(1) == np.arange(5)
    assert table["L1H1", "induction", "L0H1"] == pytest.approx(via.mean())
    eigenvalues = np.linalg.eigvals((states @ full.ov(head) @ full["W_U"][:, :5]).astype(np.float64))
    expected = eigenvalues.sum().real / np.abs(eigenvalues).sum()
    assert table[("L1H1", "copying_eigenvalues")].item() == pytest.approx(expected, abs=1e-3)
    positions = [
        max(range(t + 1), key=lambda s, t=t: full["W_pos"][t] @ full.qk(head) @ full["W_pos"][s]) == t - 1  # type: ignore[misc]
        for t in range(1, T)
    ]
    assert table[("L1H1", "previous_token")].item() == pytest.approx(np.mean(positions))


def test_composition_equals_its_definition_and_random_pairs_meet_the_reference(full: Weights) -> None:
    table = composition_table([(0, full)], np.random.default_rng(0), draws=40).set_index(["sender", "receiver", "via"])
    sender, receiver = Head(0, 1), Head(1, 0)
    for via, matrix in {"q": full.qk(receiver), "k": full.qk(receiver).T, "v": full.ov(receiver)}.items():
        expected = np.linalg.norm(full.ov(sender) @ matrix) / np.linalg.norm(full.ov(sender)) / np.linalg.norm(matrix)
        assert table.loc[(str(sender), str(receiver), via), "value"] == pytest.approx(expected, rel=1e-5)
    assert len(table) == 2 * 2 * 3
    config = ModelConfig(family="full", d_model=32, n_layers=3, n_heads=4)
    models = [(seed, initial_weights(config, N, T, np.random.default_rng(seed))) for seed in range(3)]
    pairs = composition_table(models, np.random.default_rng(9), draws=400)
    # 432 random pairs of heads against the 95 % interval of random subspaces.
    inside = pairs["value"].between(pairs["reference_low"], pairs["reference_high"])
    assert len(pairs) == 3 * 144 and 0.9 < inside.mean() < 0.99
    assert pairs["value"].mean() == pytest.approx(pairs["reference"].mean(), rel=0.02)
    # A rotation composes with everything alike; a head that writes remapped tokens only composes with their readers.
    whole = ideal()
    tokens = whole["W_E"] / np.linalg.norm(whole["W_E"], axis=1, keepdims=True)
    narrow = whole.replaced({"L0.W_V": (tokens.T @ tokens @ whole["L0.W_V"][0])[None]})
    good = composition_table([(0, narrow)], np.random.default_rng(0)).set_index("via")
    assert good["value"]["k"] > 1.5 * good["reference_high"]["k"]
    assert good["value"]["q"] < good["reference_high"]["q"]


def test_bad_questions(full: Weights, batch: TokenBatch) -> None:
    with pytest.raises(BirthlensError, match="two copies must fit"):
        transfer_table([(0, full)], np.random.default_rng(0), length=20)
    with pytest.raises(BirthlensError, match="distinct tokens exist"):
        repeated_tokens(2, N + 1, N, np.random.default_rng(0), distinct=True)
    with pytest.raises(BirthlensError, match="model has 24"):
        scores_table([(0, full)], repeated_tokens(2, 20, N, np.random.default_rng(0)))


def test_a_model_with_nan_has_no_accuracy_and_no_score(full: Weights, batch: TokenBatch) -> None:
    broken = full["L1.W_O"].copy()
    broken[0, 0, 0] = np.nan
    model = full.replaced({"L1.W_O": broken})
    transfer = transfer_table([(0, model)], np.random.default_rng(0), 4)
    assert transfer[transfer["head"].isna()]["value"].isna().all()
    weights = weight_scores_table([(0, model)]).set_index(["head", "score"])["value"]
    assert np.isnan(weights["L1H0", "copying"]) and np.isfinite(weights["L1H1", "copying"])
    probes = attention_table([(0, model)], batch)
    value = probes.set_index("probe")["value"]
    assert value["attended_is_predicted"].isna().all()
    assert np.isfinite(value["previous_token"]).all()


def test_a_pattern_with_nan_attends_nothing(full: Weights, batch: TokenBatch) -> None:
    keys = full["L0.W_K"].copy()
    keys[1] = np.nan
    model = full.replaced({"L0.W_K": keys})
    probes = attention_table([(0, model)], batch).set_index(["probe", "head"])["value"]
    for probe in ("previous_token", "induction_match", "attended_is_predicted"):
        assert np.isnan(probes[probe, "L0H1"]), probe
    assert np.isfinite(probes["previous_token", "L0H0"])
    scores = scores_table([(0, model)], batch).set_index(["head", "score"])["value"]
    assert np.isnan(scores["L0H1", "induction"]) and np.isfinite(scores["L0H0", "induction"])


def test_what_a_table_cannot_say_is_said(full: Weights) -> None:
    one = initial_weights(ModelConfig(n_layers=1, d_model=8), N, T, np.random.default_rng(0))
    with pytest.raises(BirthlensError, match="composition: it needs heads in two layers"):
        composition_table([(0, one)], np.random.default_rng(0))
    short = repeated_tokens(3, 1, N, np.random.default_rng(0), repeats=3)
    assert short.tokens.shape == (3, 2)
    with pytest.raises(BirthlensError, match="context = 2 positions: an early and a late part"):
        in_context_learning_table([(0, full)], short)
