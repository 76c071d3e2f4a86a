"""Patching against TransformerLens's own functions, its laws, and what each corruption does to a sequence."""

from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens import patching as lens
from typed import present

from birthlens.analysis.interventions.corruptions import CORRUPTIONS, Pair, corrupt, pair_of
from birthlens.analysis.interventions.patching import DIRECTIONS, patching_table
from birthlens.analysis.memories.ideal import ideal_weights
from birthlens.config.model import ModelConfig
from birthlens.config.run import CorpusConfig, TaskConfig
from birthlens.errors import BirthlensError
from birthlens.model.hooked import build
from birthlens.model.initialisation import initial_weights
from birthlens.model.weights import Weights
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.corpus import markov_chain

N, T = 12, 10


@pytest.fixture(scope="module")
def task() -> BigramTask:
    statistics = markov_chain(CorpusConfig(source="markov", vocabulary=N))
    return BigramTask(TaskConfig(context=T, n_triggers=3, cycles="clean"), statistics)


@pytest.fixture(scope="module")
def pair(task: BigramTask) -> Pair:
    return corrupt("other_outputs", task.batch(12, 0), np.random.default_rng(0), N)


@pytest.fixture(scope="module", params=["simplified", "full"])
def weights(request: pytest.FixtureRequest) -> Weights:
    config = {
        "simplified": ModelConfig(d_model=16, feed_forward="linear"),
        "full": ModelConfig(family="full", d_model=16, n_heads=2, feed_forward="relu"),
    }[request.param]
    start = initial_weights(config, N, T, np.random.default_rng(3))
    return start.replaced({name: 2 * array for name, array in start.items() if name.endswith(("W_Q", "W_K", "W_V"))})


LENS = {
    "resid_pre": lens.get_act_patch_resid_pre,
    "attn_out": lens.get_act_patch_attn_out,
    "mlp_out": lens.get_act_patch_mlp_out,
    "z": lens.get_act_patch_attn_head_out_by_pos,
    "q": lens.get_act_patch_attn_head_q_by_pos,
    "k": lens.get_act_patch_attn_head_k_by_pos,
    "v": lens.get_act_patch_attn_head_v_by_pos,
    "pattern": lens.get_act_patch_attn_head_pattern_by_pos,
}


@pytest.mark.parametrize("site", LENS)
def test_equal_to_transformer_lens(weights: Weights, pair: Pair, site: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = build(weights)
    _, cache = model.run_with_cache(pair.clean.tokens)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        right = logits.gather(-1, pair.clean.targets[..., None])[..., 0]
        wrong = logits.gather(-1, pair.corrupted.targets[..., None])[..., 0]
        return (right - wrong)[pair.scored].mean()

    theirs = LENS[site](model, pair.corrupted.tokens, cache, metric)
    table = patching_table([(0, weights)], pair, [site], by=("head", "position"), draws=0)
    if site == "mlp_out" and weights.config.family == "simplified":
        theirs = theirs[1:]  # only the last layer has a feed-forward; theirs also patches the zeros of the other
    if theirs.ndim == 3 and site != "pattern":
        theirs = theirs.transpose(1, 2)  # theirs is [layer pos head]
    np.testing.assert_allclose(table["value"], theirs.reshape(-1), atol=1e-5)
    assert table["value"].std() > 1e-4


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_clean_into_clean_is_the_identity(weights: Weights, pair: Pair, direction: str) -> None:
    same = Pair(pair.clean, pair.clean, pair.scored, pair.alternatives)
    for model in (weights, build(weights)):
        table = patching_table([(0, model)], same, by=("head", "role"), directions=[direction], draws=0)
        # Without hooks, explicit patterns and the simplified model's short cuts take another order of the same products.
        reordered = (table["site"] == "pattern") | (weights.config.family == "simplified")
        exact = table if model is not weights else table[~reordered]
        assert (exact["value"] == exact["clean"]).all()
        np.testing.assert_allclose(table["value"], table["clean"], atol=1e-6)
        assert table["recovered"].isna().all()


@pytest.mark.parametrize("site", ["embed", "resid_pre", "resid_post"])
def test_patching_everything_recovers_everything(weights: Weights, pair: Pair, site: str) -> None:
    table = patching_table([(0, weights)], pair, [site], directions=DIRECTIONS, draws=20)
    wanted = np.where(table["direction"] == DIRECTIONS[0], 1.0, 0.0)
    for column in ("recovered", "recovered_low", "recovered_high"):
        np.testing.assert_allclose(table[column], wanted, atol=1e-4)


def test_roles_of_position_are_the_clean_ones(task: BigramTask) -> None:
    pair = corrupt("first_replaced", task.batch(20, 0), np.random.default_rng(0), N)
    weights = initial_weights(ModelConfig(d_model=16), N, T, np.random.default_rng(3))
    table = patching_table([(0, weights)], pair, ["embed"], by=("role",), draws=0).set_index("position")
    # The tokens that differ are the first occurrences: putting them back restores everything, the others nothing.
    assert table.loc["first_occurrence", "recovered"] == pytest.approx(1, abs=1e-4)
    others = ["first_successor", "in_context", "later_successor", "other"]
    np.testing.assert_allclose(table.loc[others, "recovered"], 0, atol=1e-4)


def test_the_ideal_models_circuit_is_found(task: BigramTask) -> None:
    statistics = markov_chain(CorpusConfig(source="markov", vocabulary=N))
    task = BigramTask(TaskConfig(context=24, n_triggers=3, cycles="clean"), statistics)
    pair = corrupt("triggers_swapped", task.batch(64, 0), np.random.default_rng(0), N)
    weights = ideal_weights(ModelConfig(d_model=64, init="orthogonal"), N, 24, np.random.default_rng(0))
    table = patching_table([(0, weights)], pair, ["z", "k", "q", "v", "pattern"], draws=0)
    found = table.set_index(["site", "layer"])["recovered"]
    # The triggers' places are swapped, the outputs stay: the news travels by layer 0's output into layer 1's keys.
    for route in (("z", 0), ("v", 0), ("k", 1), ("pattern", 1), ("z", 1)):
        assert found[route] == pytest.approx(1, abs=0.05), route
    for other in (("q", 0), ("k", 0), ("pattern", 0), ("q", 1), ("v", 1)):
        assert abs(found[other]) < 0.05, other


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("kind", [{"cycles": "clean"}, {"cycles": "published"}, {"show_latents": True}], ids=str)
def test_corruptions_change_what_they_say(name: str, kind: dict[str, Any]) -> None:
    statistics = markov_chain(CorpusConfig(source="markov", vocabulary=N))
    task = BigramTask(TaskConfig(context=40, n_triggers=3, triggers="random", **kind), statistics)
    batch = task.batch(40, 0)
    listed = 3 if "show_latents" in kind else 0
    moved = listed + (listed > 0 and name == "shifted")  # where the chain begins in the corrupted sequences
    before = batch.tokens.clone(), batch.targets.clone()
    pair = corrupt(name, batch, np.random.default_rng(0), N)
    assert torch.equal(batch.tokens, before[0]) and torch.equal(batch.targets, before[1])
    assert pair.clean is batch and (batch.in_context & ~batch.absorbed)[pair.scored].all()
    again = corrupt(name, batch, np.random.default_rng(0), N)
    assert torch.equal(again.corrupted.tokens, pair.corrupted.tokens)
    if pair.alternatives is not None:
        assert (pair.alternatives != batch.targets)[pair.scored].all()
    for b in range(40):
        triggers, tokens = batch.triggers[b].tolist(), batch.tokens[b].tolist()
        new = pair.corrupted.tokens[b].tolist()
        assert new[1:] == pair.corrupted.targets[b, :-1].tolist()
        counts = dict.fromkeys(triggers, 0)
        for t, token in enumerate(new):
            if token in counts and t >= moved:
                counts[token] += 1
            assert int(pair.corrupted.occurrence[b, t]) == (counts.get(token, 0) if t >= moved else 0)
        for t in range(40):
            first, after_trigger = int(batch.occurrence[b, t]) == 1, t > listed and tokens[t - 1] in triggers
            if name == "other_outputs":
                assert (new[t] != tokens[t]) == after_trigger
                assert not after_trigger or new[t] not in triggers
            elif name == "first_replaced":
                assert (new[t] not in triggers) if first else new[t] == tokens[t]
            elif name == "triggers_swapped":
                assert first or new[t] == tokens[t]
                assert not first or new[t] in triggers
            else:
                assert new[t] == tokens[t - 1] if t else new[t] not in triggers
    if name == "triggers_swapped":
        moved_on = 0
        for b, t in pair.scored.nonzero().tolist():
            new = pair.corrupted.tokens[b].tolist()
            # The corrupted sequence's own answer: what followed this token the first time, in that sequence.
            place = new.index(new[t], listed)
            assert place < t and new[t] == int(batch.tokens[b, t])
            assert int(present(pair.alternatives)[b, t]) == new[place + 1]
            moved_on += new[place + 1] != int(batch.tokens[b, place + 1])
        # On published data an announced output may be a first occurrence that was moved itself.
        assert (moved_on > 0) == (kind.get("cycles") != "clean")


def test_users_own_pairs_and_bad_questions(task: BigramTask, weights: Weights) -> None:
    clean, other = task.batch(6, 0), task.batch(6, 1)
    table = patching_table([(0, weights)], pair_of(clean, other), ["z"], draws=0)
    assert np.isfinite(table["recovered"]).all()
    with pytest.raises(BirthlensError, match="valid are other_outputs"):
        corrupt("everything", clean, np.random.default_rng(0), N)
    with pytest.raises(BirthlensError, match="no scored position"):
        pair_of(clean, clean)
    with pytest.raises(BirthlensError, match="must agree"):
        pair_of(clean, task.batch(5, 0), clean.in_context, two_answers=False)
    with pytest.raises(BirthlensError, match="valid are embed"):
        patching_table([(0, weights)], pair_of(clean, other), ["mind"])
    with pytest.raises(BirthlensError, match="name at least one of embed"):
        patching_table([(0, weights)], pair_of(clean, other), [])
    bare = initial_weights(ModelConfig(d_model=16), N, T, np.random.default_rng(3))
    with pytest.raises(BirthlensError, match=r"has no feed-forward; valid are embed, pos_embed, .*attn_out, z"):
        patching_table([(0, bare)], pair_of(clean, other), ["z", "mlp_out"])
    assert "mlp_out" not in set(patching_table([(0, bare)], pair_of(clean, other), draws=0)["site"])
    with pytest.raises(BirthlensError, match="valid are layer, head"):
        patching_table([(0, weights)], pair_of(clean, other), by=("colour",))
    with pytest.raises(BirthlensError, match="valid are clean_into_corrupted"):
        patching_table([(0, weights)], pair_of(clean, other), ["z"], directions=["up"])
    with pytest.raises(BirthlensError, match="give the model's vocabulary size"):
        corrupt("other_outputs", clean, np.random.default_rng(0), 3)
    statistics = markov_chain(CorpusConfig(source="markov", vocabulary=4))
    crowded = BigramTask(TaskConfig(context=T, n_triggers=3, cycles="clean"), statistics).batch(4, 0)
    with pytest.raises(BirthlensError, match="use a larger one"):
        corrupt("other_outputs", crowded, np.random.default_rng(0), 4)


def test_one_trigger_cannot_be_swapped() -> None:
    statistics = markov_chain(CorpusConfig(source="markov", vocabulary=12))
    batch = BigramTask(TaskConfig(context=24, n_triggers=1), statistics).batch(4, 0)
    with pytest.raises(BirthlensError, match="it exchanges two triggers, and each sequence has one; use other_outputs"):
        corrupt("triggers_swapped", batch, np.random.default_rng(0), 12)
