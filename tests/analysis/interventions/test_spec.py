"""Interventions as data, and edits that leave nothing behind."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from birthlens.analysis.interventions.runner import intervene
from birthlens.analysis.interventions.spec import (
    METHODS,
    PATTERNS,
    EdgeIntervention,
    Intervention,
    at_heads,
    check_cases,
    from_json,
)
from birthlens.config.model import ModelConfig
from birthlens.errors import BirthlensError
from birthlens.model.hooked import HookedTransformer, build
from birthlens.model.hooks import captured, edited
from birthlens.model.initialisation import initial_weights
from birthlens.model.sites import Edge, Head, Point
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.positions import batch_of_tokens, repeated_tokens, role_masks_with_successors

HEADED = ("q", "k", "v", "z")


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return build(initial_weights(ModelConfig(d_model=8), 6, 12, np.random.default_rng(0)))


@pytest.fixture(scope="module")
def batch() -> TokenBatch:
    return repeated_tokens(4, 6, 6, np.random.default_rng(1))


@given(
    site=st.sampled_from(HEADED),
    method=st.sampled_from([method for method in METHODS if method not in PATTERNS]),
    layer=st.integers(0, 3),
    numbers=st.none() | st.lists(st.integers(0, 5), min_size=1, max_size=3),
    positions=st.sampled_from(["all", "in_context"]) | st.lists(st.integers(0, 9), min_size=1).map(tuple),
    source=st.sampled_from(["reference", "batch"]),
)
def test_interventions_survive_json(
    site: str, method: str, layer: int, numbers: list[int] | None, positions: str | tuple[Any, ...], source: str
) -> None:
    heads = None if numbers is None else tuple(Head(layer, number) for number in numbers)
    one = Intervention(site, method, layer, heads, positions, source)
    written = json.loads(json.dumps(one.to_json()))
    assert from_json(written) == one
    assert (written["layer"], written["heads"]) == (layer, numbers)
    edge = EdgeIntervention(Edge.parse(f"L{layer}H0->L{layer + 1}H2.k"), method, positions, source)
    assert from_json(json.loads(json.dumps(edge.to_json()))) == edge


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"site": "soul", "method": "zero", "layer": 0}, "valid are embed, pos_embed"),
        ({"site": "z", "method": "delete", "layer": 0}, "valid are zero, mean"),
        ({"site": "z", "method": "mean", "layer": 0, "source": "memory"}, "valid are reference, batch"),
        ({"site": "z", "method": "zero"}, "needs a layer"),
        ({"site": "embed", "method": "zero", "layer": 1}, "has no layer"),
        ({"site": "attn_out", "method": "zero", "layer": 1, "heads": [0]}, "has no heads; z, q, k, v, pattern do"),
        ({"site": "pattern", "method": "mean", "layer": 1}, "attend to the future"),
        ({"site": "z", "method": "uniform", "layer": 1}, "needs site pattern"),
        ({"site": "z", "method": "zero", "layer": 1, "colour": "red"}, "colour"),
        ({"edge": "L0H0-L1H0.k", "method": "zero"}, "L0H0->L1H0.k"),
        ({"edge": "L0H0->L1H0.x", "method": "zero"}, "receiver = 'L1H0.x' is unknown"),
        ({"edge": "L0H0.k->logits", "method": "zero"}, "sender = 'L0H0.k' is unknown"),
        ({"edge": "L0H0->logits", "method": "uniform"}, "valid are zero"),
        ("z", "must map fields to values"),
        (5, "must map fields to values"),
        ({3: "z"}, "cannot be read"),
        ({"edge": 5, "method": "zero"}, "edge = 5 is not an edge"),
        ({"edge": "L0H0->logits", "method": "zero", "positions": 3}, "positions = 3: give 'all', a role"),
        ({"site": "z", "method": "zero", "layer": "1"}, "layer = '1': it must be a whole number"),
        ({"site": "z", "method": "zero", "layer": 0.5}, "layer = 0.5: it must be a whole number"),
        ({"site": "z", "method": "zero", "layer": True}, "layer = True: it must be a whole number"),
        ({"site": "z", "method": "zero", "layer": -1}, "layer = -1: it must be a whole number"),
        ({"site": "z", "method": "zero", "layer": 1, "heads": 0}, "heads = 0: list at least one"),
        ({"site": "z", "method": "zero", "layer": 1, "heads": []}, "list at least one head"),
        ({"site": "z", "method": "zero", "layer": 1, "heads": ["0"]}, "list at least one head"),
        ({"site": "z", "method": "zero", "layer": "1", "heads": [0]}, "layer = '1': it must be a whole number"),
        ({"site": "z", "method": "zero", "heads": [0]}, r"heads = \[0\]: heads need a layer"),
        ({"site": "z", "method": "zero", "layer": 1, "positions": 3}, "or a list of indices"),
        ({"site": "z", "method": "zero", "layer": 1, "positions": ["a"]}, "or a list of indices"),
        ({"site": "z", "method": "zero", "layer": 1, "positions": [-1]}, "or a list of indices"),
        ({"site": ["z"], "method": {}, "layer": 1}, "valid are embed"),
    ],
)
def test_nonsense_is_refused_with_what_is_valid(fields: int | str | dict[str, Any], message: str) -> None:
    with pytest.raises(BirthlensError, match=message):
        from_json(fields)


@pytest.mark.parametrize(
    ("layer", "heads", "message"),
    [
        (1, (Head(0, 0),), "heads = L0H0: an intervention acts in one layer, not in layers 0 and 1"),
        (None, (Head(0, 0), Head(2, 1)), "heads = L0H0, L2H1: an intervention acts in one layer"),
        (None, (), r"heads = \(\): list at least one Head"),
        (1, (0,), r"heads = \(0,\): list at least one Head"),
    ],
)
def test_heads_are_of_one_layer(layer: int | None, heads: tuple[Any, ...], message: str) -> None:
    with pytest.raises(BirthlensError, match=message):
        Intervention("z", "zero", layer, heads)


def test_heads_bring_their_layer() -> None:
    one = Intervention("z", "zero", heads=(Head(1, 2), Head(1, 0)))
    assert one == Intervention("z", "zero", 1, (Head(1, 2), Head(1, 0)))
    assert (one.point, one.to_json()["layer"], one.to_json()["heads"]) == (Point("z", 1), 1, [2, 0])


@pytest.mark.parametrize(
    ("edge", "message"),
    [
        ("L0.mlp->logits", "no L0.mlp; valid senders are embed, pos_embed, L0H0, L1H0"),
        ("pos_embed->L1.mlp", "no L1.mlp; valid receivers are L0H0.q, .*L1H0.v, logits"),
        ("L2.mlp->logits", "valid layers are 0 to 1"),
        ("L1H0->L1H0.k", "valid senders are embed, pos_embed, L0H0"),
    ],
)
def test_edges_that_a_model_lacks_are_refused_with_those_it_has(
    model: HookedTransformer, batch: TokenBatch, edge: str, message: str
) -> None:
    with pytest.raises(BirthlensError, match=message):
        check_cases({"case": [EdgeIntervention(Edge.parse(edge), "zero")]}, model.cfg)
    with pytest.raises(BirthlensError, match=message):
        check_cases({"case": [EdgeIntervention(Edge.parse(edge), "zero")]}, ModelConfig(d_model=8))


def test_an_edge_is_an_edge() -> None:
    with pytest.raises(BirthlensError, match=r"parse it with Edge\.parse"):
        EdgeIntervention("L0H0->logits", "zero")  # type: ignore[arg-type]


@pytest.mark.parametrize("edge", ["L1H0->L0H0.k", "L1H0->L1H0.q", "L0H0->L0H0.v"])
def test_edges_run_forward(model: HookedTransformer, batch: TokenBatch, edge: str) -> None:
    with (
        pytest.raises(BirthlensError, match="must come before"),
        intervene(model, [EdgeIntervention(Edge.parse(edge), "zero")], batch),
    ):
        pass


def hooks_left(model: HookedTransformer) -> int:
    return sum(len(point.fwd_hooks) + len(point._forward_hooks) for point in model.hook_dict.values())


CASES = [
    [Intervention("z", "zero", 1)],
    [Intervention("pattern", "uniform", 0), Intervention("embed", "mean", source="batch")],
    [EdgeIntervention(Edge.parse("L0H0->L1H0.k"), "zero"), EdgeIntervention(Edge.parse("embed->logits"), "zero")],
]


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_behind(model: HookedTransformer, batch: TokenBatch, case: list[Any]) -> None:
    before = model(batch.tokens)
    flag = model.cfg.use_split_qkv_input
    with intervene(model, case, batch):
        changed = model(batch.tokens)
        assert hooks_left(model) > 0
    with pytest.raises(RuntimeError, match="boom"), intervene(model, case, batch):
        raise RuntimeError("boom")
    assert hooks_left(model) == 0 and model.cfg.use_split_qkv_input == flag
    assert torch.equal(model(batch.tokens), before) and not torch.allclose(changed, before)


def test_other_peoples_hooks_stay(model: HookedTransformer, batch: TokenBatch) -> None:
    seen = []
    model.hook_dict["hook_embed"].add_hook(lambda value, hook: seen.append(value) or value)  # type: ignore[func-returns-value]
    try:
        with intervene(model, [Intervention("embed", "zero")], batch):
            model(batch.tokens)
        model(batch.tokens)
        assert len(seen) == 2
    finally:
        model.reset_hooks()


def test_inputs_of_edits_are_not_written_to(model: HookedTransformer, batch: TokenBatch) -> None:
    case = [
        Intervention("z", "zero", heads=(Head(0, 0),), positions=(1, 2)),
        Intervention("resid_pre", "zero", 1, positions=(3,)),
    ]
    seen = captured(model, batch.tokens, [Point("z", 0), Point("resid_pre", 1)])
    copies = {point: value.clone() for point, value in seen.items()}
    from birthlens.analysis.interventions.replacements import Sources

    for one in case:
        new = Sources(batch).edit(one)(seen[one.point], None)
        assert torch.equal(seen[one.point], copies[one.point])
        assert not new[:, list(one.positions)].any() and torch.equal(new[:, 4:], seen[one.point][:, 4:])


def test_hooks_that_never_fire_are_an_error(model: HookedTransformer, batch: TokenBatch) -> None:
    with (
        pytest.raises(BirthlensError, match=r"blocks.1.attn.hook_z.*never fired"),
        intervene(model, [Intervention("z", "zero", 1)], batch),
    ):
        model(batch.tokens, stop_at_layer=1)
    with (
        pytest.raises(BirthlensError, match=r"mlp_out.*does not exist|mlp_out.*never fired"),
        edited(model, {Point("mlp_out", 0): [lambda value, rows: value]}),
    ):
        model(batch.tokens)
    assert hooks_left(model) == 0


def test_head_sets_group_by_layer() -> None:
    sets = at_heads("z", "mean", [Head(0, 1), Head(1, 0), Head(0, 2)])
    assert [str(one) for one in sets] == ["z L0H1+2 mean", "z L1H0 mean"]


def test_roles_cover_every_position(batch: TokenBatch) -> None:
    masks = role_masks_with_successors(batch)
    covered = masks["trigger"] | masks["first_successor"] | masks["later_successor"] | masks["other"]
    assert covered.all()
    loop = [[p > 0 and batch.occurrence[b, p - 1] == 1 for p in range(11)] for b in range(4)]
    assert masks["first_successor"].tolist() == loop


def test_tokens_of_ones_own_are_scored_where_they_repeat() -> None:
    sequences = torch.randint(3, (5, 9), generator=torch.Generator().manual_seed(0))
    batch = batch_of_tokens(sequences)
    for row, sequence in enumerate(sequences.tolist()):
        for t in range(8):
            pairs = [(sequence[s], sequence[s + 1]) for s in range(t)]
            assert bool(batch.in_context[row, t]) == ((sequence[t], sequence[t + 1]) in pairs)
