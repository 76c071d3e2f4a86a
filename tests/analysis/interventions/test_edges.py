"""Edges: a micro model worked out by hand, exact laws, and attribution against what it estimates."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typed import loc

from birthlens.analysis.interventions.ablation import cases_table
from birthlens.analysis.interventions.corruptions import Pair, corrupt, pair_of
from birthlens.analysis.interventions.edge_tables import births_table, edge_table
from birthlens.analysis.interventions.patching import DIRECTIONS, patched_table, patching_table
from birthlens.analysis.interventions.spec import AnyIntervention, Cases, EdgeIntervention, Intervention, frozen_norms
from birthlens.analysis.memories.ideal import ideal_weights
from birthlens.config.model import ModelConfig
from birthlens.config.run import CorpusConfig, TaskConfig
from birthlens.errors import BirthlensError
from birthlens.model.components import edges_of
from birthlens.model.hooked import build
from birthlens.model.initialisation import initial_weights
from birthlens.model.sites import Edge, Head, HeadInput, Logits
from birthlens.model.weights import Weights
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.corpus import markov_chain
from birthlens.tasks.positions import batch_of_tokens, repeated_tokens

FULL = ModelConfig(family="full", d_model=12, n_layers=3, n_heads=2, feed_forward="relu")


def micro() -> Weights:
    """Two tokens, no positions, no keys: even attention, values times 2 in layer 0 and times 3 in layer 1."""
    config = ModelConfig(d_model=2)
    weights = initial_weights(config, 2, 2, np.random.default_rng(0))
    eye = np.eye(2, dtype=np.float32)
    zero = np.zeros_like(eye)
    return weights.replaced(
        {"W_E": eye, "W_pos": zero, "W_U": eye, "L0.W_K": zero[None], "L1.W_K": zero[None], "L0.W_V": 2 * eye[None],
         "L1.W_V": 3 * eye[None], "L0.W_O": eye[None], "L1.W_O": eye[None]}
    )  # fmt: skip


def test_micro_model_by_hand() -> None:
    # With s = +1 for token 0 and -1 for token 1, the logit difference behind the second token is 7 s_0 + 5 s_1:
    # layer 0 writes 2 s_0 | s_0 + s_1, layer 1 writes (behind the second) 3 (3 s_0 + s_0 + 2 s_1) / 2.
    clean, corrupted = (batch_of_tokens(torch.tensor([row])) for row in ([0, 0, 0], [1, 0, 1]))
    scored = torch.tensor([[False, True]])
    pair = Pair(clean, corrupted, scored, corrupted.targets)
    table = edge_table([(0, micro())], pair, attribution_steps=(0, 1, 3)).set_index("edge")
    assert table["clean"].iloc[0] == 12 and table["corrupted"].iloc[0] == -2
    by_hand = {
        "embed->L0H0.v": 11, "embed->L1H0.v": 3, "embed->logits": 0, "L0H0->L1H0.v": 9, "L0H0->logits": 2,
        "L1H0->logits": 12,
    }  # fmt: skip
    for edge, row in table.iterrows():
        assert row["recovered"] == pytest.approx(by_hand.get(str(edge), 0) / 14, abs=1e-6), edge
        for steps in (0, 1, 3):
            assert row[f"attribution_{steps}"] == pytest.approx(row["recovered"], abs=1e-6), edge
            assert row[f"attribution_{steps}_error"] == pytest.approx(0, abs=1e-6), edge


@pytest.fixture(scope="module")
def pair() -> Pair:
    generator = np.random.default_rng(0)
    return pair_of(repeated_tokens(6, 6, 9, generator), repeated_tokens(6, 6, 9, generator))


@pytest.fixture(scope="module", params=["simplified", "linear", "full"])
def weights(request: pytest.FixtureRequest) -> Weights:
    config = {
        "simplified": ModelConfig(d_model=12, n_layers=3),
        "linear": ModelConfig(d_model=12, feed_forward="linear"),
        "full": FULL,
    }[request.param]
    start = initial_weights(config, 9, 12, np.random.default_rng(1))
    gain = 1 if request.param == "full" else 2
    return start.replaced({name: array * gain for name, array in start.items() if ".W_" in name})


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_all_edges_into_a_receiver_make_it_read_the_source_run(weights: Weights, pair: Pair, direction: str) -> None:
    goal = 1 if direction == DIRECTIONS[0] else 0
    cases: Cases = {"logits": tuple(EdgeIntervention(e, "patch") for e in edges_of(weights.config, [Logits()]))}
    found = patched_table(weights, pair, cases, direction)
    assert found["recovered"].item() == pytest.approx(goal, abs=1e-4)
    for receiver in {edge.receiver for edge in edges_of(weights.config) if isinstance(edge.receiver, HeadInput)}:
        cases = {
            "edges": tuple(EdgeIntervention(edge, "patch") for edge in edges_of(weights.config, [receiver])),
            "node": (Intervention(receiver.letter, "patch", heads=(receiver.head,)),),
        }
        table = patched_table(weights, pair, cases, direction)
        assert table["value"][0] == pytest.approx(table["value"][1], abs=1e-5), receiver


@pytest.mark.parametrize("kind", ["simplified", "full"])
def test_the_sum_over_edges_into_a_linear_node_is_the_node(kind: str, pair: Pair) -> None:
    # Values of the last layer, and the logits, are linear in what is read once LayerNorm's divisor is held.
    config = ModelConfig(d_model=12) if kind == "simplified" else FULL.changed(feed_forward="none")
    weights = initial_weights(config, 9, 12, np.random.default_rng(1))
    norms, last = frozen_norms(config), config.n_layers - 1
    last_head = edges_of(config)[-1].sender
    assert isinstance(last_head, Head)
    for receiver in (HeadInput(last_head, "v"), Logits()):
        edges = edges_of(config, [receiver])
        cases: dict[str, Sequence[AnyIntervention]] = {
            str(edge): (EdgeIntervention(edge, "patch"), *norms) for edge in edges
        }
        cases["together"] = (*(EdgeIntervention(edge, "patch") for edge in edges), *norms)
        table = patched_table(weights, pair, cases)
        changes = (table["value"] - table["corrupted"]).to_numpy()
        assert changes[:-1].sum() == pytest.approx(changes[-1], abs=1e-4) and abs(changes[-1]) > 1e-3
        if kind == "simplified" and isinstance(receiver, HeadInput):
            node = patching_table([(0, weights)], pair, ["v"], draws=0)
            assert node["value"].iloc[last] == pytest.approx(table["value"].iloc[-1], abs=1e-5)


def test_one_edge_by_hand_in_a_deep_model(pair: Pair) -> None:
    """L0H1 -> L2H0.k of a LayerNorm model, by plain torch on cached activations and a hooked key."""
    start = initial_weights(FULL, 9, 12, np.random.default_rng(1))
    model = build(start.replaced({name: array * 3 for name, array in start.items() if ".W_" in name}))
    _, clean = model.run_with_cache(pair.clean.tokens)
    _, dirty = model.run_with_cache(pair.corrupted.tokens)
    delta = (clean["blocks.0.attn.hook_z"] - dirty["blocks.0.attn.hook_z"])[:, :, 1] @ model.W_O[0, 1]
    read = model.blocks[2].ln1(dirty["blocks.2.hook_resid_pre"] + delta)
    keys = read @ model.W_K[2, 0] + model.b_K[2, 0]

    def put(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value = value.clone()
        value[:, :, 0] = keys
        return value

    logits = model.run_with_hooks(pair.corrupted.tokens, fwd_hooks=[("blocks.2.attn.hook_k", put)])
    right = logits.gather(-1, pair.clean.targets[..., None]) - logits.gather(-1, pair.corrupted.targets[..., None])
    expected = float(right[..., 0][pair.scored].mean())
    table = edge_table([(0, model)], pair, ["L0H1->L2H0.k"])
    assert table["value"].item() == pytest.approx(expected, abs=1e-5)
    assert abs(table["value"].item() - table["corrupted"].item()) > 1e-4


def test_attribution_is_the_derivative_and_integrates(weights: Weights, pair: Pair) -> None:
    nearly = pair_of(pair.clean, pair.corrupted)
    edges = [
        edge for edge in edges_of(weights.config) if str(edge.sender) == "embed" or str(edge) == "pos_embed->logits"
    ]
    table = edge_table([(0, weights)], nearly, edges, attribution_steps=(0, 60), quantities=("loss",))
    from_embed = table[table["sender"] == "embed"]
    # Integrated over the embeddings' line, the edges that leave them account for the whole gap.
    assert from_embed["attribution_60"].sum() == pytest.approx(1, abs=0.02)
    into_logits = table[(table["receiver"] == "logits") & (table["sender"] == "pos_embed")]
    assert into_logits[["recovered", "attribution_0"]].abs().to_numpy().max() < 1e-6


@pytest.mark.parametrize("steps", [0, 5])
def test_one_attribution_by_hand(pair: Pair, steps: int) -> None:
    """L0H1 -> L2H0.k again: the derivative along the edge, of a share of it that is added where it is read."""
    start = initial_weights(FULL, 9, 12, np.random.default_rng(1))
    model = build(start.replaced({name: array * 3 for name, array in start.items() if ".W_" in name}))
    _, clean = model.run_with_cache(pair.clean.tokens)
    _, dirty = model.run_with_cache(pair.corrupted.tokens)
    name = "blocks.0.attn.hook_z"
    delta = (clean[name] - dirty[name])[:, :, 1] @ model.W_O[0, 1]
    positions = torch.arange(pair.clean.tokens.shape[1])

    def slope(along: float) -> float:
        """Embed `along` of the way from corrupted to clean (positions are the same), and differentiate."""
        added = torch.zeros((), requires_grad=True)
        residual = (1 - along) * dirty["hook_embed"] + along * clean["hook_embed"] + model.W_pos[positions]
        for block in model.blocks[:2]:
            residual = block(residual)
        block = model.blocks[2]
        read = block.ln1(residual)
        queries = torch.einsum("bpd,hde->bphe", read, model.W_Q[2]) + model.b_Q[2]
        values = torch.einsum("bpd,hde->bphe", read, model.W_V[2]) + model.b_V[2]
        keys = torch.einsum("bpd,hde->bphe", read, model.W_K[2]) + model.b_K[2]
        moved = block.ln1(residual + added * delta) @ model.W_K[2, 0] + model.b_K[2, 0]
        keys = torch.stack([moved, *keys.unbind(2)[1:]], 2)
        scores = torch.einsum("bqhe,bkhe->bhqk", queries, keys) / np.sqrt(model.cfg.d_head)
        scores = scores.masked_fill(positions > positions[:, None], float("-inf"))
        mixed = torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), values)
        attended = torch.einsum("bqhe,hed->bqd", mixed, model.W_O[2]) + model.b_O[2]
        out = model.unembed(model.ln_final(residual + attended + block.mlp(block.ln2(residual))))
        right = out.gather(-1, pair.clean.targets[..., None]) - out.gather(-1, pair.corrupted.targets[..., None])
        (found,) = torch.autograd.grad(right[..., 0][pair.scored].mean(), added)
        return float(found)

    along = [0.0] if steps == 0 else [(number + 0.5) / steps for number in range(steps)]
    expected = np.mean([slope(share) for share in along])
    row = edge_table([(0, model)], pair, ["L0H1->L2H0.k"], attribution_steps=(steps,)).iloc[0]
    assert row[f"attribution_{steps}"] * (row["clean"] - row["corrupted"]) == pytest.approx(expected, abs=1e-5)
    assert row[f"attribution_{steps}_error"] == row[f"attribution_{steps}"] - row["recovered"] and abs(expected) > 1e-4


def test_gradient_attribution_matches_small_finite_differences(pair: Pair) -> None:
    # A source run that hardly differs: exact patching is then linear, and attribution must agree edge by edge.
    weights = initial_weights(ModelConfig(d_model=12), 9, 12, np.random.default_rng(1))
    close = weights["W_E"].copy()
    close[1] = close[0] + 0.01 * close[1]
    weights = weights.replaced({"W_E": close})
    tokens = torch.zeros(3, 8, dtype=torch.long)
    changed = tokens.clone()
    changed[:, 2] = 1
    clean, corrupted = batch_of_tokens(tokens), batch_of_tokens(changed)
    scored = torch.zeros(3, 7, dtype=torch.bool)
    scored[:, 4:] = True
    table = edge_table([(0, weights)], Pair(clean, corrupted, scored), attribution_steps=(0,), quantities=("logit",))
    exact = (table["value"] - table["corrupted"]).to_numpy()
    estimate = (table["attribution_0"] * (table["clean"] - table["corrupted"])).to_numpy()
    np.testing.assert_allclose(estimate, exact, rtol=0.05, atol=3e-6)
    assert np.abs(exact).max() > 1e-4


def test_the_ideal_models_edge_is_found() -> None:
    statistics = markov_chain(CorpusConfig(source="markov", vocabulary=12))
    task = BigramTask(TaskConfig(context=24, n_triggers=3, cycles="clean"), statistics)
    pair = corrupt("triggers_swapped", task.batch(32, 0), np.random.default_rng(0), 12)
    config = ModelConfig(d_model=64, init="orthogonal")
    random = initial_weights(config, 12, 24, np.random.default_rng(0))
    ideal = ideal_weights(config, 12, 24, np.random.default_rng(0))
    table = edge_table([(0, random), (10, ideal), (20, ideal)], pair, ["embed->L0H0.v", "L0H0->L1H0.k", "L0H0->L1H0.q"])
    births = births_table(table).set_index("edge")
    assert births.loc["L0H0->L1H0.k", "born"] == 10 and births.loc["L0H0->L1H0.k", "last"] == pytest.approx(1, abs=0.05)
    assert np.isnan(loc(births)["L0H0->L1H0.q", "born"])


def along_a_run(recovered: list[float], gaps: list[float], **columns: Any) -> pd.DataFrame:
    steps = [20 * number for number in range(len(gaps))]
    return pd.DataFrame({"step": steps, "edge": "L0H0->L1H0.k", "metric": "logit_difference", "clean": gaps,
                         "corrupted": 0.0, "recovered": recovered} | columns)  # fmt: skip


def test_an_edge_is_born_only_where_there_is_a_gap_to_recover() -> None:
    # At step 20 clean and corrupted hardly differ: 22 times nothing is nothing. Step 80 has no gap at all.
    table = along_a_run([0.3, 22.0, 0.4, 0.9, np.nan, 0.95], [0.0, 0.001, 2.0, -9.0, 0.0, 10.0])
    row = births_table(table).iloc[0]
    assert (row["born"], row["peak"], row["peak_step"], row["last"], row["counted_from"]) == (60, 0.95, 100, 0.95, 40)
    everything = births_table(table, least_gap=0).iloc[0]
    assert everything["peak"] == 22 and everything["born"] == 60
    nothing = births_table(along_a_run([np.nan, np.nan], [0.0, 0.0])).iloc[0]
    assert nothing[["born", "peak", "peak_step", "last", "counted_from"]].isna().all()


def test_an_edge_is_born_once_its_whole_interval_says_so() -> None:
    bounds = {"recovered_low": [0.2, 0.55, 0.8], "recovered_high": [3.0, 0.9, 1.0]}
    assert births_table(along_a_run([0.7, 0.7, 0.9], [9.0, 9.0, 10.0], **bounds))["born"].item() == 20
    # An edge may carry the answer the wrong way round: what counts is the size.
    bounds = {"recovered_low": [-0.9, -0.9, -0.9], "recovered_high": [0.3, -0.6, -0.7]}
    assert births_table(along_a_run([-0.7, -0.7, -0.9], [9.0, 9.0, 10.0], **bounds))["born"].item() == 20


def test_edge_ablation_in_full_and_by_role(pair: Pair) -> None:
    weights = initial_weights(FULL, 9, 12, np.random.default_rng(1))
    edge = Edge.parse("L0H0->L2.mlp")
    cases = {
        "zero": [EdgeIntervention(edge, "zero")],
        "own": [EdgeIntervention(edge, "patch", source="batch")],
        "nowhere": [EdgeIntervention(edge, "zero", positions=())],
    }
    table = cases_table([(0, weights)], cases, pair.clean, pair.corrupted, metrics=("all.loss",), draws=0)
    change = table.set_index("case")["change"]
    assert abs(change["zero"]) > 1e-6 and change["own"] == 0 and change["nowhere"] == 0


def test_edges_replaced_by_themselves_or_nowhere_change_no_bit(pair: Pair) -> None:
    weights = initial_weights(FULL, 9, 12, np.random.default_rng(1))
    edges = edges_of(FULL)
    nowhere = {str(edge): [EdgeIntervention(edge, "zero", positions=())] for edge in edges}
    own = {str(edge): [EdgeIntervention(edge, "patch", source="batch")] for edge in edges}
    for cases in (nowhere, own):
        table = cases_table([(0, weights)], cases, pair.clean, metrics=("all.loss",), draws=0).set_index("case")
        # Heads' inputs are read apart in the edited pass only: the source's values may differ in their last bit.
        exact = [case for case in cases if cases is nowhere or not case.endswith((".q", ".k", ".v"))]
        assert (table.loc[exact, "change"] == 0).all() and table["change"].abs().max() < 1e-6


def test_bad_questions(pair: Pair) -> None:
    weights = initial_weights(ModelConfig(d_model=12), 9, 12, np.random.default_rng(1))
    with pytest.raises(BirthlensError, match="valid heads are L0H0, L1H0"):
        edge_table([(0, weights)], pair, ["L0H3->logits"])
    with pytest.raises(BirthlensError, match="must come before"):
        edge_table([(0, weights)], pair, ["L1H0->L0H0.k"])
    with pytest.raises(BirthlensError, match="no gradient"):
        edge_table([(0, weights)], pair, quantities=("accuracy",), attribution_steps=(0,))
    with pytest.raises(BirthlensError, match="at least 1 to integrate"):
        edge_table([(0, weights)], pair, ["L0H0->logits"], attribution_steps=(-1,))
    with pytest.raises(BirthlensError, match="name at least one"):
        edge_table([(0, weights)], pair, [])
    with pytest.raises(BirthlensError, match="no checkpoint"):
        edge_table([], pair)


def test_births_say_what_one_checkpoint_or_one_sequence_cannot() -> None:
    with pytest.raises(BirthlensError, match="one checkpoint does not say when"):
        births_table(along_a_run([0.9], [2.0]))
    unknown = along_a_run([0.9, 0.9], [2.0, 2.0], recovered_low=np.nan, recovered_high=np.nan)
    with pytest.raises(BirthlensError, match="fewer than two sequences are scored"):
        births_table(unknown)
