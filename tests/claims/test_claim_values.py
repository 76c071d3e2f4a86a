"""Each statistic of a claim on runs made by hand, whose answer is known with its sign: metrics written, weights written."""

import math
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from claim_runs import run
from hypothesis import example, given
from hypothesis import strategies as st

from birthlens.analysis.behaviour.excess import floors_table
from birthlens.analysis.memories.ideal import Strengths, ideal_matrices
from birthlens.claims.claim import BOUND, Evidence
from birthlens.claims.statistics import behaviours, copying, orders
from birthlens.claims.statistics.timing import first_crossing, lag, slope
from birthlens.model import forward
from birthlens.runs.evaluation import evaluation_batch
from birthlens.runs.run import Run
from birthlens.tasks.predictors.reference import predict
from birthlens.tasks.roles import losses, summary
from birthlens.tasks.task import HELD_OUT

WIDE = ("model.d_model=128", "training.steps=1", "evaluation.batch_size=64", "task.n_triggers=3")
ACCURACY = f"{behaviours.IN_CONTEXT}_accuracy"
MATRIX = {"output": "L1.W_O", "trigger": "L1.W_K", "prev_token": "L0.W_K"}


class Made(Run):
    """A run whose held-out metrics and whose weights are written by hand: metric -> {step: value}, step -> weights."""

    def __init__(self, base: Any, metrics: Any = None, weights: Any = None) -> None:
        super().__init__(base.path)
        self.by_hand, self.kept = metrics or {}, weights or {}

    @property
    def steps(self) -> Any:
        return sorted(self.kept) if self.kept else super().steps

    def weights(self, step: Any) -> Any:
        return self.kept[sorted(self.kept)[step] if step < 0 else step]

    def metrics(self) -> Any:
        rows = [(s, "held_out", name, v, 1) for name, curve in self.by_hand.items() for s, v in curve.items()]
        return pd.DataFrame(rows, columns=["step", "split", "metric", "value", "n"])


def untrained(*words: Any) -> Any:
    base = run(*WIDE, *words)
    return base, Run.weights(base, 0)


def ideal(*words: Any, bigram: Any = False) -> Any:
    base, start = untrained(*words)
    table = base.statistics.bigram if bigram else None
    strengths = Strengths(60, 60, 30, avoid_first=60)
    made = ideal_matrices(start, strengths=strengths, codebooks="dual", bigram=table)
    return base, start.replaced({name: matrix.astype(np.float32) for name, matrix in made.items()})


def with_positions(weights: Any, allowed: Any) -> Any:
    """Let layer 0 look at the position before from the positions that `allowed` names, and be indifferent elsewhere."""
    p = weights["W_pos"].astype(float)
    wanted = np.zeros((len(p), len(p)))
    for t in allowed:
        if t > 0:
            wanted[t, t - 1] = 60 / weights.score_scale
    back = np.linalg.pinv(np.concatenate([p, weights["W_E"].astype(float)]))[:, : len(p)]
    return weights.replaced({"L0.W_K": (back @ wanted @ back.T).T[None].astype(np.float32)})


def curve(born: Any, *, end: Any = 100, every: Any = 10, low: Any = 0.0, high: Any = 1.0) -> Any:
    """A measurement that goes from low to high in a straight line through the half at `born`."""
    return {s: low + (high - low) * min(1.0, s / born / 2) for s in range(0, end + 1, every)}


def evidence(settings: Any = None, seed: Any = 0, **runs: Any) -> Any:
    return Evidence({name.replace("_", " "): one for name, one in runs.items()}, seed, settings or {})


# when


@example(100.0, 0.0, False, True, 0.0, 0.0)
@given(st.floats(0, 100), st.floats(0, 100), st.booleans(), st.booleans(), st.floats(0, 50), st.floats(0, 50))
def test_a_lag_is_known_a_bound_of_certain_sign_or_nothing(
    first: Any, second: Any, never_first: Any, never_second: Any, more: Any, less: Any
) -> None:
    """Whatever the unknown steps are, the true difference lies beyond a bound that is given, on the same side of zero."""
    ends = (100.0, 100.0 + less)
    seen = (math.nan if never_first else first, math.nan if never_second else second)
    found = lag("x", *seen, ends)
    true = (ends[0] + more + 1 if never_first else first, ends[1] + more + 1 if never_second else second)
    if not (never_first or never_second):
        assert found == {"x": second - first}
    elif "x" + BOUND in found:
        assert found["x"] != 0 and (true[1] - true[0]) / found["x"] >= 1
    else:
        assert math.isnan(found["x"])
    if never_second and not never_first and first < ends[1]:
        assert found["x" + BOUND] == 1.0 and found["x"] == pytest.approx(ends[1] - first)


def test_a_later_end_than_the_other_ones_step_says_nothing() -> None:
    """The fast run ended at 100 without emerging, the slow one emerged at 150: who is faster is not known."""
    assert math.isnan(lag("x", math.nan, 150.0, (100.0, 200.0))["x"])
    assert lag("x", math.nan, 60.0, (100.0, 200.0)) == {"x": -40.0, "x is a bound": 1.0}


def test_crossings_and_slopes_without_a_point_are_nan() -> None:
    steps = np.array([0.0, 10.0, 20.0])
    assert math.isnan(first_crossing(steps, np.array([0.0, 0.1, 0.2]), 0.5))
    assert math.isnan(slope(steps, np.array([0.0, math.nan, 1.0])))
    assert slope(steps, -3 * steps) == pytest.approx(-3)


def test_speed_counts_steps_tokens_and_targets() -> None:
    base = run()
    found = behaviours.speed(evidence(run=Made(base, {ACCURACY: curve(40, high=0.9 * 2 / 1.8)})))
    batch, context = base.config.training.batch_size, base.config.task.context
    share = base.task.batch(256, base.config.seeds.evaluation, HELD_OUT + 1).in_context.double().mean()
    assert found["steps to half accuracy"] == pytest.approx(40) and found["accuracy at the end"] == pytest.approx(1)
    assert found["tokens to half accuracy"] == pytest.approx(40 * batch * context)
    assert found["targets to half accuracy"] == pytest.approx(40 * batch * context * float(share))
    never = behaviours.speed(evidence(run=Made(base, {ACCURACY: curve(40, high=0.3)})))
    assert never["accuracy at the end"] == pytest.approx(0.3) and math.isnan(never["tokens to half accuracy"])


def test_slower_is_the_slow_ones_step_less_the_fast_ones() -> None:
    base = run("training.steps=100")
    fast, slow, never = (Made(base, {ACCURACY: curve(20)}), Made(base, {ACCURACY: curve(50)}),
                         Made(base, {ACCURACY: curve(50, high=0.4)}))  # fmt: skip
    found = behaviours.slower(evidence(fast=fast, slow=slow))
    assert found["steps_later"] == pytest.approx(30) and found["steps_ratio"] == pytest.approx(2.5)
    assert found["targets_ratio"] == pytest.approx(2.5)
    assert behaviours.slower(evidence(fast=slow, slow=fast))["steps_later"] == pytest.approx(-30)
    bound = behaviours.slower(evidence(fast=fast, slow=never))
    assert bound["steps_later"] == pytest.approx(80) and bound["steps_later" + BOUND] == 1
    assert math.isnan(bound["steps_ratio"])
    assert math.isnan(behaviours.slower(evidence(fast=never, slow=never))["steps_later"])


def test_exponents_of_a_run_that_never_emerges_are_open() -> None:
    runs = {
        f"b{n}": Made(run(f"training.batch_size={n}"), {ACCURACY: curve(80 / n**0.5, end=200, every=1)})
        for n in (8, 16, 32)
    }
    found = behaviours.exponent(Evidence(runs, 0, {"over": "training.batch_size"}))
    assert found["steps_exponent"] == pytest.approx(-0.5, abs=0.02)
    assert found["tokens_exponent"] == pytest.approx(0.5, abs=0.02)
    runs["b8"] = Made(run("training.batch_size=8"), {ACCURACY: curve(40, high=0.2)})
    assert math.isnan(behaviours.exponent(Evidence(runs, 0, {"over": "training.batch_size"}))["tokens_exponent"])


def test_reached_reads_the_step_asked_for() -> None:
    made = Made(run(), {"in_context_accuracy": {0: 0.1, 10: 0.6, 20: 0.9}})
    assert behaviours.reached(evidence({"step": 10}, run=made)) == {"accuracy": 0.6}


def test_the_global_bigram_first_is_a_positive_lag() -> None:
    base, start = untrained("model.feed_forward=linear", "training.loss=all")
    _, late = ideal("model.feed_forward=linear", "training.loss=all", bigram=True)
    top, end = math.log(len(base.statistics)), float(base.config.training.steps)

    def made(global_at: Any, in_context_at: Any) -> Any:
        metrics = {f"{role}_loss": curve(at, low=top, high=0) for role, at in
                   (("global", global_at), ("in_context", in_context_at))}  # fmt: skip
        return Made(base, {**metrics, ACCURACY: curve(50)}, {0: start, 30: late})

    found, other = (behaviours.global_first(evidence(run=made(*when))) for when in ((10, 50), (50, 10)))
    # A straight line is half-way to its floor at a share of its length; the floor of in-context targets is zero.
    floors = floors_table(base.task, evaluation_batch(base)).set_index("role")["floor"]
    share = 1 - floors["global"] / top
    assert found["in_context"] == pytest.approx(50) and found["global"] == pytest.approx(10 * share)
    assert found["in_context_after_global"] == pytest.approx(50 - 10 * share) and 0 < found["kl_half"] < 30
    assert other["in_context_after_global"] == pytest.approx(10 - 50 * share) and 50 * share > 10
    stuck = made(10, 50)
    stuck.by_hand["in_context_loss"] = dict.fromkeys(range(0, 101, 10), top)
    found = behaviours.global_first(evidence(run=stuck))
    assert math.isnan(found["in_context"])
    assert found.get("in_context_after_global" + BOUND) == (1.0 if end > found["global"] else None)


# how well


def test_the_bag_is_asked_on_the_batch_that_the_runs_were_measured_on() -> None:
    base = run("task.cycles=clean")
    one = Made(base, {"in_context_accuracy": {0: 0.1, 10: 0.35, 20: 0.3}})
    two = Made(base, {"in_context_accuracy": {0: 0.1, 10: 0.99, 20: 0.97}})
    found = behaviours.against_the_bag(evidence(one_layer=one, two_layers=two, seed=3))
    batch = base.task.batch(base.config.evaluation.batch_size, base.config.seeds.evaluation, HELD_OUT)
    right = predict("bag", base.task, batch).argmax(-1) == batch.targets.numpy()
    bag = float(right[batch.in_context.numpy()].mean())
    assert found == {"one_over_bag": pytest.approx(0.35 - bag), "two_over_bag": pytest.approx(0.97 - bag), "one": 0.35,
                     "two": 0.97, "bag": pytest.approx(bag)}  # fmt: skip
    measured = base.metrics()
    n = measured[(measured["split"] == "held_out") & (measured["metric"] == "in_context_accuracy")]["n"]
    assert set(n) == {int(batch.in_context.sum())}


def test_a_copier_gains_out_of_distribution_over_one_that_cannot() -> None:
    base, copier = ideal()
    _, idle = untrained()
    good, bad = Made(base, weights={0: copier}), Made(base, weights={0: idle})
    found = behaviours.out_of_distribution(Evidence({"uniform": good, "bigram": bad}, 0))
    assert found["uniform_on_uniform"] > 0.95 and found["uniform_on_bigram"] > 0.95 and found["bigram_on_uniform"] < 0.5
    assert found["gain"] == found["uniform_on_uniform"] - found["bigram_on_uniform"] > 0.5
    assert found["gap"] == found["uniform_on_bigram"] - found["bigram_on_uniform"] > 0.5
    other = behaviours.out_of_distribution(Evidence({"uniform": bad, "bigram": good}, 0))
    assert other["gain"] < -0.5 and other["gap"] < -0.5


def test_what_is_lost_on_unseen_outputs_is_what_was_never_stored() -> None:
    base, copier = ideal("task.split=train")
    border = int(base.config.task.split_fraction * len(base.statistics))
    u = copier["W_U"].astype(float).T
    blind = np.linalg.pinv(u)[:, border:] @ u[border:]
    forgetful = copier.replaced({"L1.W_O": (copier["L1.W_O"][0] @ (np.eye(128) - blind))[None].astype(np.float32)})
    whole, part = (behaviours.unseen_outputs(evidence(run=Made(base, weights={0: w}))) for w in (copier, forgetful))
    assert abs(whole["lost"]) < 0.05 and whole["on_test"] > 0.95
    assert part["lost"] == part["on_train"] - part["on_test"] > 0.8


def test_removed_heads_lose_what_a_model_without_them_loses() -> None:
    base, weights = ideal("model.feed_forward=linear", "training.loss=all", bigram=True)
    # Let the induction head say a bit of the global bigram too, so that its removal has a price on both sides.
    weights = weights.replaced({"L1.W_F": weights["L1.W_F"] * 0.7})
    found = behaviours.heads_removed(evidence({"method": "zero"}, run=Made(base, weights={0: weights})))
    batch = base.task.batch(128, base.config.seeds.evaluation, 1)

    def measured(one: Any) -> Any:
        with torch.no_grad():
            logits = forward.logits(forward.tensors_of(one), one.config, batch.tokens)
        return {
            key: value for key, (value, _) in summary(losses(logits, batch.targets), logits.argmax(-1), batch).items()
        }

    whole = measured(weights)
    assert found["accuracy"] == pytest.approx(whole[behaviours.IN_CONTEXT, "accuracy"]) and found["accuracy"] > 0.9
    for name, matrix in (("prev_token", "L0.W_O"), ("induction", "L1.W_O")):
        left = measured(weights.replaced({matrix: np.zeros_like(weights[matrix])}))
        lost = 1 - left[behaviours.IN_CONTEXT, "accuracy"] / whole[behaviours.IN_CONTEXT, "accuracy"]
        assert found[f"share_lost_without_{name}"] == pytest.approx(lost, abs=1e-6) and lost > 0.4
        for metric, sign, key in (("loss", 1, "global_loss_without"), ("accuracy", -1, "global_accuracy_lost_without")):
            change = sign * (left["global", metric] - whole["global", metric])
            assert found[f"{key}_{name}"] == pytest.approx(change, abs=1e-4)


def test_roles_are_read_from_the_layers_that_fill_them() -> None:
    base, weights = ideal()
    found = behaviours.roles(evidence(run=Made(base, {ACCURACY: {0: 0.1, 1: 0.97}}, {0: weights})))
    assert found["accuracy"] == 0.97
    assert found["previous_token_layer_0"] > 0.95 and found["induction_layer_1"] > 0.95
    assert found["previous_token_layer_1"] < 0.5 and found["induction_layer_0"] < 0.5


# where it looks


@pytest.mark.parametrize(("early", "sign"), [(True, 1), (False, -1)])
def test_early_copies_have_the_sign_of_where_the_head_reaches(early: Any, sign: Any) -> None:
    base, weights = ideal()
    context = base.config.task.context
    allowed = range(context // 4) if early else range(context // 4, context)
    made = Made(base, weights={0: with_positions(weights, allowed)})
    found = copying.early_copies(evidence({"sequences": 128}, run=made))
    assert sign * found["attention_drop"] > 0.6 and sign * found["accuracy_gain"] > 0.1
    assert sign * found["early_excess"] > 0.1
    assert found["early_excess"] == pytest.approx(found["used_early"] - found["used_early_by_chance"])
    assert found["accuracy_gain"] == pytest.approx(found["accuracy_with"] - found["accuracy_without"])


def test_the_share_of_early_copies_is_counted_by_looking() -> None:
    batch = run().task.batch(5, 2)
    share = copying._early_share(batch, 9)
    for row, tokens in enumerate(batch.tokens.tolist()):
        for t, token in enumerate(tokens):
            copies = [s for s in range(1, t + 1) if tokens[s - 1] == token]
            expected = np.mean([s < 9 for s in copies]) if copies else math.nan
            assert float(share[row, t]) == pytest.approx(expected, nan_ok=True)


def test_only_late_queries_count_for_where_copies_are_taken_from() -> None:
    """A head that takes a copy at random has no excess: chance is that of late queries, not of all."""
    base, weights = ideal()
    made = Made(base, weights={0: with_positions(weights, range(base.config.task.context))})
    found = copying.early_copies(evidence({"sequences": 256}, run=made))
    batch = base.task.batch(256, base.config.seeds.evaluation, 1)
    seen = forward.activations(forward.tensors_of(made.weights(0)), base.config.model, batch.tokens)
    late = (torch.arange(32) >= 16) & batch.in_context & ~batch.absorbed & (seen.logits.argmax(-1) == batch.targets)
    assert found["used_early"] == pytest.approx(float((seen.patterns[1][:, 0].argmax(-1) < 8)[late].double().mean()))
    share = copying._early_share(batch, 8)[late]
    assert found["used_early_by_chance"] == pytest.approx(float(share.mean()))


def test_the_profile_of_attention_is_that_of_the_patterns() -> None:
    base, weights = ideal()
    made = Made(base, weights={0: with_positions(weights, range(10))})
    profile = copying.attention_to_previous(made, base.task.batch(20, 0))
    assert math.isnan(profile[0]) and len(profile) == base.config.task.context
    assert (profile[1:10] > 0.95).all() and np.allclose(profile[12:], 1 / np.arange(13, 33), atol=0.05)


# which memory, when


def stages(order: Any, steps: Any = (10, 20, 30)) -> Any:
    """Weights in which the memories come in an order, one a step."""
    base, start = untrained()
    _, whole = ideal()
    kept, now = {0: start}, start
    for step, name in zip(steps, order, strict=True):
        now = now.replaced({MATRIX[name]: whole[MATRIX[name]]})
        kept[step] = now
    return Made(base, weights=kept)


@pytest.mark.parametrize("order", list(permutations(MATRIX)))
@pytest.mark.parametrize("statistic", [orders.birth_order, orders.crossing_order])
def test_lags_have_the_sign_of_the_order_of_birth(order: Any, statistic: Any) -> None:
    found = statistic(evidence(run=stages(order)))
    born = dict(zip(order, (10, 20, 30), strict=True))
    assert {name: found[name] for name in MATRIX} == born
    assert found["trigger_after_output"] == born["trigger"] - born["output"]
    assert found["prev_token_after_trigger"] == born["prev_token"] - born["trigger"]


def test_a_memory_that_is_never_born_leaves_the_order_open_or_gives_a_bound() -> None:
    made = stages(("output",), (10,))
    made.kept[40] = made.kept[10]
    found = orders.birth_order(evidence(run=made))
    assert math.isnan(found["trigger"]) and math.isnan(found["prev_token"])
    assert found["trigger_after_output"] == 30 and found["trigger_after_output" + BOUND] == 1
    assert math.isnan(found["prev_token_after_trigger"])


def test_freezing_costs_what_the_frozen_run_lacks() -> None:
    free = stages(("output", "trigger", "prev_token"))
    frozen = stages(("output",), (10,))
    frozen.kept[30] = frozen.kept[10]
    free.by_hand = {"in_context_accuracy": {0: 0.0, 30: 0.9}}
    frozen.by_hand = {"in_context_accuracy": {0: 0.0, 30: 0.2}}
    found = orders.frozen_first(evidence({"until": 30, "memory": "trigger"}, frozen=frozen, free=free))
    assert found["accuracy_lost"] == pytest.approx(0.7) and found["kept_output"] == pytest.approx(1)
    assert abs(found["kept_prev_token"]) < 0.2 and "kept_trigger" not in found and found["delay_output"] == 0
    assert math.isnan(found["delay_prev_token"]), "born at the last step here, never there: no bound above zero"
    other = orders.frozen_first(evidence({"until": 30, "memory": "trigger"}, frozen=free, free=frozen))
    assert other["accuracy_lost"] == pytest.approx(-0.7) and other["kept_output"] == pytest.approx(1)
    assert math.isnan(other["kept_prev_token"]), "a share of what the free run has not learned says nothing"


def test_what_is_given_saves_steps_and_what_is_withheld_costs_accuracy() -> None:
    def with_accuracy(made: Any, curve: Any) -> Any:
        made.by_hand = {"in_context_accuracy": curve}
        return made

    control = with_accuracy(stages(("output", "trigger", "prev_token")), {0: 0.0, 10: 0.1, 20: 0.2, 30: 0.9})
    early = {0: 0.0, 10: 0.7, 20: 0.4, 30: 0.8}  # above a half, below, and then above for good
    cases = {f"{name} given": with_accuracy(stages(("output", "trigger", "prev_token")), early) for name in MATRIX}
    cases["trigger given"] = with_accuracy(stages(("trigger", "output", "prev_token"), (0, 20, 30)), {0: 0.0, 10: 0.5})
    never = {0: 0.0, 30: 0.1}
    for name in MATRIX:
        others = [other for other in MATRIX if other != name]
        cases[f"{name} withheld"] = with_accuracy(stages(others, (20, 30)), never)
    late = with_accuracy(stages(("output", "trigger", "prev_token")), never)
    kept = orders.pinned(
        Evidence({"control": control, "pattern pinned": cases["trigger given"], "copying pinned": late}, 0)
    )
    assert kept["sooner_pattern"] == 20 and math.isnan(kept["sooner_copying"]), "never born: no bound below zero"
    found = orders.given_and_withheld(Evidence({"control": control, **cases}, 0))
    assert found["sooner_output"] == found["sooner_prev_token"] == 0
    assert found["sooner_trigger"] == 20
    assert found["output_given_trigger"] == 10 and found["prev_token_given_trigger"] == 0
    assert [found[f"lost_{name}"] for name in MATRIX] == [pytest.approx(0.8)] * 3
    born = {"output": 10, "trigger": 20, "prev_token": 30}
    for name in MATRIX:
        first, second = (other for other in MATRIX if other != name)
        assert found[f"{first}_withheld_{name}"] == 20 - born[first]
        assert found[f"{second}_withheld_{name}"] == 30 - born[second]


@pytest.mark.parametrize("sign", [1, -1])
def test_early_positions_first_has_the_sign_of_their_order(sign: Any) -> None:
    base, weights = ideal()
    context = base.config.task.context
    order = list(range(1, context))[::sign]
    kept = {10 * i: with_positions(weights, order[: 6 * i]) for i in range(5)}
    found = orders.early_positions(evidence(run=Made(base, weights=kept)))
    assert sign * found["rank_correlation"] > 0.9 and sign * found["early_minus_late"] > 0.8
    assert found["early_minus_late"] == pytest.approx(found["early"] - found["late"])
