"""Claims: verdicts follow their rule, the catalogue is sound, and each statistic agrees with a plain computation."""

import math
import pickle
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from claim_runs import run
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from birthlens.analysis.behaviour.trajectory import memories_over
from birthlens.claims.catalogue import CLAIMS, claims_named
from birthlens.claims.claim import PAPERS, Claim, Evidence, Expectation, interval, joint
from birthlens.claims.grids import grid_table, over_seeds_table
from birthlens.claims.statistics import behaviours, copying, orders
from birthlens.claims.statistics.timing import first_crossing
from birthlens.claims.tiers import TIERS, tier_named
from birthlens.config.run import RunConfig
from birthlens.errors import BirthlensError
from birthlens.model import forward
from birthlens.training.grid import Grid

finite = st.floats(-1e3, 1e3)


@given(st.lists(finite, min_size=2, max_size=8))
def test_the_interval_is_students(values: Any) -> None:
    mean, low, high = interval(values)
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    expected = stats.t.interval(0.95, len(values) - 1, np.mean(values), error) if error > 0 else (mean, mean)
    assert np.allclose((low, high), expected, atol=1e-6) and low <= mean <= high


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).standard_normal((2000, 5))
    covered = [low < 0 < high for _, low, high in map(interval, draws)]
    assert abs(np.mean(covered) - 0.95) < 0.02


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf]])
def test_too_little_has_no_interval(values: Any) -> None:
    _, low, high = interval(values)
    assert math.isnan(low) and math.isnan(high)
    assert Expectation("x", "x", above=0).verdict(low, high) == "inconclusive"


@given(finite, finite, finite, finite)
def test_a_verdict_is_a_place_of_the_interval(a: Any, b: Any, c: Any, d: Any) -> None:
    (low, high), (above, below) = sorted((a, b)), sorted((c, d))
    if above == below:
        return
    for expectation in (
        Expectation("x", "x", above),
        Expectation("x", "x", below=below),
        Expectation("x", "x", above, below),
    ):
        inside = [expectation.above < point < expectation.below for point in np.linspace(low, high, 7)]
        verdict = expectation.verdict(low, high)
        if verdict == "pass":
            assert all(inside)
        elif verdict == "fail":
            assert not any(inside)
        else:
            assert low < expectation.below and high > expectation.above


def test_a_claim_fails_with_one_expectation_and_passes_with_all() -> None:
    assert joint(["pass", "pass"]) == "pass" and joint(["pass", "fail", "inconclusive"]) == "fail"
    assert joint(["pass", "inconclusive"]) == joint([]) == "inconclusive"


def test_half_made_claims_are_refused() -> None:
    with pytest.raises(BirthlensError, match="give a bound"):
        Expectation("x", "x")
    with pytest.raises(BirthlensError, match="either a statistic or the reason"):
        Claim("x", "x")
    with pytest.raises(BirthlensError, match="needs an expectation"):
        Claim("x", "x", statistic=orders.birth_order)


def test_names_are_checked() -> None:
    assert claims_named((), "all") == CLAIMS
    assert claims_named(()) == claims_named(["all"]) == tuple(claim for claim in CLAIMS if claim.paper == "birth")
    assert {claim.paper for claim in CLAIMS} == set(PAPERS)
    with pytest.raises(BirthlensError, match="'moth' is unknown; valid are all, birth, noise"):
        claims_named((), "moth")
    assert [claim.id for claim in claims_named(["two-layers", "global-first"])] == ["global-first", "two-layers"]
    with pytest.raises(BirthlensError, match="'perpetuum' is unknown; valid are all, global-first"):
        claims_named(["perpetuum"])
    with pytest.raises(BirthlensError, match="'desk' is unknown; valid are laptop, paper"):
        tier_named("desk")


def test_the_catalogue_is_sound() -> None:
    assert len({claim.id for claim in CLAIMS}) == len(CLAIMS)
    for claim, tier in product(CLAIMS, TIERS.values()):
        configs = Grid(tier.config, claim.cases_at(tier.name), (0,)).configs()
        assert len(configs) == len(claim.cases)
        pickle.loads(pickle.dumps(claim))  # workers get claims by pickle
        speeds = claim.id.startswith(("order", "random", "rare", "global", "tokens", "steps"))
        if speeds and not claim.reason(tier.name):
            assert claim.seeds.get(tier.name, tier.seeds) >= 5, "claims about order and speed need five seeds"
    early = claims_named(["early-positions-only"])[0]
    sizes = {name: Grid(tier.config, early.cases_at(name), (0,)).configs()["run", 0] for name, tier in TIERS.items()}
    assert {name: (one.task.context, one.training.batch_size) for name, one in sizes.items()} == {
        "laptop": (256, 64), "paper": (256, 512),
    }  # fmt: skip
    assert CLAIMS[0].reason("laptop") == "" and "--tier paper" in claims_named(["reference-run"])[0].reason("laptop")


SMALL = {"from": 10, "sequences": 48, "d_model": 32, "context": 16, "widths": (16, 32), "until": 20}


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if claim.statistic], ids=lambda claim: claim.id)
def test_every_statistic_gives_what_its_claim_expects(claim: Any) -> None:
    """On models far too small to show anything: the numbers are there, and finite where a number can be had."""
    settings = {key: SMALL.get(key, value) for key, value in claim.settings.items()}
    settings |= {"step": 20} if "step" in settings else {}
    runs = {case: run(*map(small, kept(words))) for case, words in claim.cases_at("laptop").items()}
    values = claim.statistic(Evidence(runs, 0, settings))
    for expectation in claim.expectations:
        assert isinstance(values[expectation.quantity], float)


def kept(words: Any) -> Any:
    """Keep of a case what is its point, without its size."""
    return [
        w
        for w in words
        if not w.startswith(("checkpoints", "training.steps", "task.offset", "model.n_heads", "optimiser"))
    ]


def small(word: Any) -> Any:
    """Scale sizes down to the tiny base."""
    if word.startswith("training.freeze_until"):
        return word.replace("200", "20")
    if word.startswith(("task.context", "training.batch_size")):
        name, size = word.split("=")
        return f"{name}={max(8, int(size) // 8)}"
    return word


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.floats(0.01, 0.99))
def test_first_crossing_is_the_first(values: Any, level: Any) -> None:
    steps = np.arange(len(values)) * 10.0
    found = first_crossing(steps, np.array(values), level)
    fine = np.unique([*np.linspace(0, steps[-1], 4001), *steps])
    above = np.flatnonzero(np.interp(fine, steps, values) >= level)
    expected = fine[above[0]] if len(above) else math.nan
    assert found == pytest.approx(expected, abs=steps[-1] / 4000 + 1e-6, nan_ok=True)


def test_exponents_are_those_of_a_power_law() -> None:
    def made(batch: Any) -> Any:
        formed, steps = 4000 * batch**-0.5, np.arange(0, 2001, 10)
        rows = [(step, "held_out", "in_context_unabsorbed_accuracy", step / formed / 2, 1) for step in steps]
        table = pd.DataFrame(rows, columns=["step", "split", "metric", "value", "n"])
        config = RunConfig.parse({}, [f"training.batch_size={batch}"])
        return SimpleNamespace(metrics=lambda: table, config=config, path="made")

    found = behaviours.exponent(Evidence({str(n): made(n) for n in (16, 32, 64)}, 0, {"over": "training.batch_size"}))
    assert found["steps_exponent"] == pytest.approx(-0.5) and found["tokens_exponent"] == pytest.approx(0.5)


def test_half_heights_are_those_of_the_recall_table() -> None:
    one = run()
    table = memories_over(one, bases=("raw",)).to_pandas()
    rows = table[(table["metric"] == "recall") & (table["memory"] == "output_memory") & (table["candidates"] == "all")]
    values = dict(zip(rows["step"], rows["value"], strict=True))
    last = values[one.steps[-1]]
    born = next(s for s in one.steps if all(values[t] >= last / 2 for t in one.steps if t >= s))
    assert last > 0 and orders.half_heights(one)["output"] == born


def test_early_positions_reads_the_paper_s_recall() -> None:
    one = run()
    found = orders.early_positions(Evidence({"run": one}, 0))
    weights = one.weights(-1)
    scores = weights["W_pos"] @ weights["L0.W_Q"][0] @ weights["L0.W_K"][0].T @ weights["W_pos"].T
    right = [scores[t, :-1].argmax() == t - 1 for t in range(1, len(scores))]
    quarter = len(right) // 4
    assert found["early"] == pytest.approx(np.mean(right[:quarter])) and found["late"] == pytest.approx(
        np.mean(right[-quarter:])
    )


def test_early_copies_are_found_by_looking() -> None:
    batch = run().task.batch(6, 0)
    found = copying.seen_before(batch, 10)
    for row, tokens in enumerate(batch.tokens.tolist()):
        for t, token in enumerate(tokens):
            assert bool(found[row, t]) == (token in tokens[:9])


def test_attention_to_the_position_before_is_read_off_the_pattern() -> None:
    one = run()
    found = copying.early_copies(Evidence({"run": one}, 0, {"sequences": 8}))
    batch = one.task.batch(8, one.config.seeds.evaluation, 1)
    seen = forward.activations(forward.tensors_of(one.weights(-1)), one.config.model, batch.tokens)
    pattern = seen.patterns[0][:, 0].detach().numpy()
    profile = [pattern[:, t, t - 1].mean() for t in range(1, 32)]
    assert found["attention_early"] == pytest.approx(np.mean(profile[:7]), abs=1e-5)
    assert found["attention_late"] == pytest.approx(np.mean(profile[-8:]), abs=1e-5)


def test_a_grid_table_has_a_row_for_each_run_and_quantity(tmp_path: Path) -> None:
    grid = Grid(run().config, {"a": ("training.steps=2",), "b": ("training.steps=4",)}, seeds=(0, 1, 2))
    table = grid_table(grid, lambda e: {"steps": e.runs["run"].steps[-1] + e.settings["more"], "seed": e.seed}, tmp_path,
                       {"more": 10}, processes=1)  # fmt: skip
    assert len(table) == 2 * 3 * 2 and set(table.loc[table["case"] == "b", "value"]) == {14.0, 0.0, 1.0, 2.0}
    summed = over_seeds_table(table).set_index(["case", "quantity"])
    assert summed.loc[("a", "seed"), "value"] == 1 and summed.loc[("a", "steps"), "low"] == 12
