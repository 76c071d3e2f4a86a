"""The runner against plain `run_with_hooks` loops, and its functional pass against live hooks, over kinds of models."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from typed import loc

from birthlens.analysis.interventions.backends import HookedBackend, backend_of
from birthlens.analysis.interventions.runner import evaluate
from birthlens.analysis.interventions.scoring import Scoring
from birthlens.analysis.interventions.spec import EdgeIntervention, Intervention, frozen_norms
from birthlens.config.model import ModelConfig
from birthlens.errors import BirthlensError
from birthlens.model.components import has_positions
from birthlens.model.hooked import build
from birthlens.model.incremental import Trace, causal_attention
from birthlens.model.initialisation import initial_weights
from birthlens.model.layout import PreparedWeights, Rows
from birthlens.model.sites import Edge, Head, Point, hook_name
from birthlens.model.weights import Weights
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.positions import repeated_tokens, take, token_roles

KINDS = {
    "simplified": ModelConfig(d_model=12),
    "linear": ModelConfig(d_model=12, feed_forward="linear"),
    "relu": ModelConfig(d_model=12, feed_forward="relu", d_mlp=7, scaled_scores=False),
    "one layer": ModelConfig(d_model=12, n_layers=1),
    "rotary": ModelConfig(d_model=12, n_layers=1, positions="rotary"),
    "rotary heads": ModelConfig(family="full", d_model=12, n_heads=3, positions="rotary"),
    "full": ModelConfig(family="full", d_model=12, n_layers=3, n_heads=2, feed_forward="relu"),
    "in sequence": ModelConfig(
        family="full", d_model=12, n_layers=3, feed_forward="gelu", feed_forward_layers=(0, 2), block="sequential"
    ),
    "rotary in all layers": ModelConfig(family="full", d_model=12, n_heads=2, positions="rotary"),
    "tied": ModelConfig(family="full", d_model=12, n_heads=2, unembedding="tied"),
}
METRICS = ("in_context.accuracy", "in_context.loss", "in_context.logit", "global.loss")


def weights_of_kind(kind: str) -> Weights:
    generator = np.random.default_rng(1)
    weights = initial_weights(KINDS[kind], 9, 16, generator)
    # Biases and LayerNorms start trivial; noise makes every one of them matter.
    return weights.replaced(
        {
            name: (array + 0.3 * generator.standard_normal(array.shape)).astype(np.float32)
            for name, array in weights.items()
            if ".b" in name or ".ln" in name
        }
    )


def batches(n: int = 7) -> list[TokenBatch]:
    generator = np.random.default_rng(2)
    return [take(repeated_tokens(n, 8, 9, generator), torch.arange(n)) for _ in range(2)]


def with_globals(batch: TokenBatch) -> TokenBatch:
    """Some positions count as no trigger, so that rows are few and every role is there."""
    occurrence = batch.occurrence.clone()
    occurrence[:, ::3] = 0
    return type(batch)(batch.tokens, batch.targets, batch.triggers, batch.outputs, occurrence, batch.absorbed)


def node_cases(config: ModelConfig) -> dict[str, list[Any]]:
    last = config.n_layers - 1
    early, late = ((Head(layer, config.n_heads - 1),) for layer in (0, last))
    cases = {
        "nothing": [],
        "zero z": [Intervention("z", "zero", heads=late)],
        "mean z": [Intervention("z", "mean", heads=early)],
        "mean z last": [Intervention("z", "mean", last)],
        "position z": [Intervention("z", "mean_position", heads=late)],
        "role z": [Intervention("z", "mean_role", heads=late, positions="in_context")],
        "resample z": [Intervention("z", "resample", heads=late)],
        "resample z 0": [Intervention("z", "resample", 0)],
        "resample own": [Intervention("z", "resample", last, source="batch")],
        "patch k": [Intervention("k", "patch", last, positions=(1, 5, 6))],
        "patch q": [Intervention("q", "patch", heads=late, positions="first_successor")],
        "mean v": [Intervention("v", "mean", last)],
        "patch resid": [Intervention("resid_pre", "patch", last, positions=(2, 3))],
        "patch post": [Intervention("resid_post", "patch", last, positions="first_occurrence")],
        "attn_out": [Intervention("attn_out", "resample", last)],
        "embed": [Intervention("embed", "mean_position", positions="in_context")],
        "pattern uniform": [Intervention("pattern", "uniform", heads=late)],
        "pattern previous": [Intervention("pattern", "previous_token", 0)],
        "pattern mean": [Intervention("pattern", "mean_position", last)],
        "pattern resample": [Intervention("pattern", "resample", heads=late)],
        "frozen": [Intervention("embed", "zero"), Intervention("pattern", "patch", last, source="batch")],
        "two": [Intervention("z", "mean", heads=early), Intervention("z", "zero", heads=late)],
    }
    if has_positions(config):
        cases["positions"] = [Intervention("pos_embed", "mean", positions="global")]
    if config.feed_forward != "none":
        cases["mlp"] = [Intervention("mlp_out", "mean", last)]
    return cases


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metrics", [METRICS, METRICS[:3]], ids=["all rows", "some rows"])
def test_functional_pass_equals_hooks(kind: str, metrics: tuple[Any, ...]) -> None:
    weights = weights_of_kind(kind)
    batch, reference = map(with_globals, batches())
    cases, scoring = node_cases(weights.config), Scoring.of(batch, metrics)
    fast = evaluate(weights, cases, batch, scoring, reference, seed=5, chunk=3)
    slow = evaluate(build(weights, n_ctx=16), cases, batch, scoring, reference, seed=5, chunk=4)
    assert fast.cases == slow.cases == ("none", *cases)
    np.testing.assert_allclose(fast.values, slow.values, atol=1e-5, rtol=1e-5)
    changed = np.abs(fast.values - fast.values[0]).max(1) > 1e-6
    # Position-wise means of a position embedding and frozen things aside, every case does something.
    assert changed[2:].mean() > 0.8
    assert (fast.sums[1] == fast.sums[0]).all()


@pytest.mark.parametrize("kind", ["simplified", "full"])
def test_ablations_equal_plain_hook_loops(kind: str) -> None:
    weights = weights_of_kind(kind)
    model = build(weights)
    batch, reference = batches()
    rows = torch.from_numpy(np.random.default_rng([3, 7]).permutation(7))
    cases = {
        f"{layer} {method}": [Intervention("z", method, heads=(Head(layer, 0),))]
        for layer in (0, 1)
        for method in ("zero", "mean", "mean_position", "mean_role", "resample")
    }
    outcomes = evaluate(weights, cases, batch, Scoring.of(batch, ("in_context.loss",)), reference, seed=3)
    _, cache = model.run_with_cache(reference.tokens)
    roles = token_roles(batch)
    for layer in (0, 1):
        z = cache[hook_name("z", layer)][:, :, 0]
        by_role = torch.stack(
            [
                z[token_roles(reference) == r].mean(0) if (token_roles(reference) == r).any() else z[0, 0]
                for r in range(3)
            ]
        )
        wanted = {
            "zero": torch.zeros_like(z),
            "mean": z.mean((0, 1)).expand_as(z),
            "mean_position": z.mean(0).expand_as(z),
            "mean_role": by_role[roles],
            "resample": z[rows],
        }
        for method, new in wanted.items():

            def put(value: torch.Tensor, hook: Any, new: torch.Tensor = new) -> torch.Tensor:
                value = value.clone()
                value[:, :, 0] = new
                return value

            logits = model.run_with_hooks(batch.tokens, fwd_hooks=[(hook_name("z", layer), put)])
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")
            expected = float(loss[batch.in_context].mean())
            assert outcomes.values[outcomes.cases.index(f"{layer} {method}"), 0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_trace_has_the_hooked_models_activations(kind: str) -> None:
    weights = weights_of_kind(kind)
    model = build(weights, n_ctx=16)
    batch, _ = batches()
    mask = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    rows = Rows.of(mask)
    logits, cache = model.run_with_cache(batch.tokens)
    full, some = Trace(PreparedWeights(weights), batch.tokens), Trace(PreparedWeights(weights), batch.tokens, rows)
    last = weights.n_layers - 1
    for layer in range(weights.n_layers):
        for site in ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_post"):
            expected = cache[hook_name(site, layer)]
            torch.testing.assert_close(full.value(Point(site, layer)), expected, atol=1e-5, rtol=1e-4)
            got = some.value(Point(site, layer))
            if layer == last and site not in ("resid_pre", "k", "v"):
                axis = 2 if site == "pattern" else 1
                expected, got = expected.movedim(axis, 1), got.movedim(axis, 1)
                expected, got = rows.of_positions(expected)[rows.valid], got[rows.valid]
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(full.logits(), logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(some.logits()[rows.valid], rows.of_positions(logits)[rows.valid], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"attention": "relu"}, "model.attention = 'relu': this pass has softmax attention only"),
        ({"attention": "linear"}, "model.attention = 'linear': this pass has softmax attention only"),
        ({"positions": "relative"}, "model.positions = 'relative': this pass has no relative positions"),
    ],
)
def test_attention_of_other_kinds_is_intervened_on_by_hooks(option: dict[str, str], words: str) -> None:
    config = KINDS["full"].changed(**option)
    weights = initial_weights(config, 9, 16, np.random.default_rng(1))
    batch, reference = batches()
    cases = {
        "L0H1": [Intervention("z", "zero", heads=(Head(0, 1),))],
        "pattern": [Intervention("pattern", "uniform", heads=(Head(1, 0),))],
    }
    scoring = Scoring.of(batch, METRICS[:2])
    found = evaluate(weights, cases, batch, scoring, reference)
    tensors = weights.replaced({"L0.W_O": weights["L0.W_O"] * np.array([1, 0])[:, None, None]})
    by_hand = evaluate(tensors, {}, batch, scoring, reference)
    np.testing.assert_allclose(found.values[found.cases.index("L0H1")], by_hand.values[0], atol=1e-5)
    assert np.abs(found.values - found.values[0]).max(1)[1:].min() > 1e-6
    with pytest.raises(BirthlensError, match=words):
        PreparedWeights(weights)


def test_an_edit_recomputes_only_what_lies_downstream(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of_kind("simplified")
    batch, _ = batches()
    trace = Trace(PreparedWeights(weights), batch.tokens)
    trace.logits()
    trace.value(Point("z", 1))  # what the edit is handed; folded passes go without it
    seen = []
    computed = type(trace)._computed

    def recorded(self: Trace, point: Point) -> Any:
        seen.append(point)
        return computed(self, point)

    monkeypatch.setattr(type(trace), "_computed", recorded)
    trace.logits({Point("z", 1): [lambda value, rows: value * 0]})
    assert seen == [Point("resid_post", 1), Point("attn_out", 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_intervention_at_no_position_changes_no_bit(kind: str) -> None:
    weights = weights_of_kind(kind)
    batch, reference = batches()
    cases = {
        name: [replace(one, positions=()) for one in case] for name, case in node_cases(weights.config).items() if case
    }
    # Short cuts, which an edit takes away, reorder products; hooks, and LayerNorm models but for patterns, have none.
    exact = [name for name in cases if kind == "full" and "pattern" not in name and name != "frozen"]
    for model, untouched in ((weights, exact), (build(weights, n_ctx=16), list(cases))):
        outcomes = evaluate(model, cases, batch, Scoring.of(batch, METRICS), reference)
        changes = np.abs(outcomes.sums[1:] - outcomes.sums[0]).max((1, 2))
        assert changes.max() < 1e-4
        assert all(change == 0 for name, change in zip(cases, changes, strict=True) if name in untouched)


def test_edges_and_norms_fall_back_to_hooks() -> None:
    weights = weights_of_kind("full")
    edge = EdgeIntervention(Edge.parse("L0H0->L1H1.k"), "zero")
    assert isinstance(backend_of(weights, {"edge": [edge]}), HookedBackend)
    assert isinstance(backend_of(weights, {"norms": frozen_norms(weights.config)}), HookedBackend)
    assert not isinstance(backend_of(weights, {"node": [Intervention("z", "zero", 0)]}), HookedBackend)


def test_chunks_and_order_do_not_matter() -> None:
    weights = weights_of_kind("simplified")
    batch, reference = map(with_globals, batches())
    cases = {"resample": [Intervention("z", "resample", 0)]}
    runs = [
        evaluate(weights, cases, batch, Scoring.of(batch, METRICS[:3]), reference, chunk=size).values
        for size in (1, 3, 7)
    ]
    np.testing.assert_allclose(runs[0], runs[1], atol=1e-5)
    np.testing.assert_allclose(runs[0], runs[2], atol=1e-5)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ([Intervention("z", "zero", 2)], "layers are 0 to 1"),
        ([Intervention("z", "zero", heads=(Head(0, 3),))], "valid heads are L0H0, L1H0"),
        ([Intervention("z", "mean", 0)], "need a reference batch"),
        ([Intervention("mlp_out", "zero", 0)], "no feed-forward"),
        ([Intervention("z", "zero", 0, positions="somewhere")], "valid are in_context"),
        ([Intervention("z", "zero", 0, positions=(99,))], "valid are 0 to 14"),
    ],
)
def test_bad_cases_are_refused(case: list[Intervention], message: str) -> None:
    batch, _ = batches()
    with pytest.raises(BirthlensError, match=message):
        evaluate(weights_of_kind("simplified"), {"case": case}, batch, Scoring.of(batch, METRICS))


def test_bad_batches_are_refused() -> None:
    weights = weights_of_kind("simplified")
    batch, reference = batches()
    resample = {"case": [Intervention("z", "resample", 0)]}
    scoring = Scoring.of(batch, METRICS)
    with pytest.raises(BirthlensError, match="at least as many"):
        evaluate(weights, resample, batch, scoring, reference[:3])
    with pytest.raises(BirthlensError, match="at least 2"):
        own = {"case": [Intervention("z", "resample", 0, source="batch")]}
        evaluate(weights, own, batch[:1], Scoring.of(batch[:1], METRICS))
    with pytest.raises(BirthlensError, match="vocabulary ends at 8"):
        large = repeated_tokens(2, 4, 30, np.random.default_rng(0))
        evaluate(weights, {}, large, Scoring.of(large, METRICS))
    for field, value, message in (("tokens", 9, "hold id 9"), ("tokens", -1, "hold id -1"), ("targets", 9, "targets of"),
                                  ("targets", -100, "hold id -100")):  # fmt: skip
        spoilt = getattr(batch, field).clone()
        spoilt[2, 3] = value
        wrong = replace(batch, **{field: spoilt})
        for model in (weights, build(weights)):
            with pytest.raises(BirthlensError, match=f"{message}.*vocabulary ends at 8"):
                evaluate(model, {}, wrong, scoring)
            with pytest.raises(BirthlensError, match="of the reference batch hold id"):
                evaluate(model, resample, batch, scoring, wrong)
    with pytest.raises(BirthlensError, match="holds no tokens"):
        evaluate(weights, {}, batch[:0], scoring)
    with pytest.raises(BirthlensError, match="partner of 7"):
        evaluate(weights, {"case": [Intervention("z", "patch", 0)]}, batch, scoring, reference[:3])


def test_bootstrap_intervals_cover_the_value_and_change_is_paired() -> None:
    weights = weights_of_kind("simplified")
    batch, _ = batches(60)
    outcomes = evaluate(
        weights, {"same": [], "cut": [Intervention("z", "zero", 1)]}, batch, Scoring.of(batch, METRICS[:3])
    )
    table = outcomes.table(np.random.default_rng(0), draws=2000).set_index(["case", "metric"])
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    assert (loc(table)["same"][["change", "change_low", "change_high"]] == 0).all(axis=None)
    loss = loc(table)["cut", "loss"]
    per_sequence = outcomes.sums[:, :, 1] / outcomes.counts[:, 1]  # each sequence has as many positions
    widths = 2 * 1.96 * np.array([per_sequence[2].std(), (per_sequence[2] - per_sequence[0]).std()]) / np.sqrt(60)
    assert loss["high"] - loss["low"] == pytest.approx(widths[0], rel=0.1)
    assert loss["change_high"] - loss["change_low"] == pytest.approx(widths[1], rel=0.1)
    # Had the two models been drawn apart, their difference would have another width.
    apart = 2 * 1.96 * np.hypot(per_sequence[0].std(), per_sequence[2].std()) / np.sqrt(60)
    assert abs(widths[1] / apart - 1) > 0.2


@pytest.mark.parametrize("d_head", [8, 64, 80])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_causal_attention_equals_torchs_own(d_head: int, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 3, length, d_head, generator=generator)
    v = torch.randn(2, 3, length, 5, generator=generator)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(causal_attention(q, k, v, 0.3), expected)
