"""The commands that read weights as memories: what they print agrees with the library, and what they refuse is said."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from typed import loc, present

from birthlens import load_run
from birthlens.analysis.behaviour.trajectory import memories_over
from birthlens.analysis.interventions.weight_patching import by_forward, subset_table
from birthlens.analysis.memories.birth_order import standardised_table
from birthlens.analysis.memories.circuits import output_memory
from birthlens.analysis.memories.order_tables import chosen_sets, onsets_table, standardised_scores_table
from birthlens.cli import group
from birthlens.errors import BirthlensError
from birthlens.runs.evaluation import evaluation_batch

TINY = ["corpus.source=markov", "corpus.vocabulary=12", "task.context=24", "task.n_triggers=4", "model.d_model=16",
        "training.batch_size=8", "checkpoints.every=4", "evaluation.batch_size=8", "training.steps=12"]  # fmt: skip


def trained(folder: Any, name: Any, *overrides: Any) -> Any:
    path = folder / name
    result = CliRunner().invoke(group, ["train", str(path), *TINY, *overrides])
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("memory")
    return [trained(folder, f"seed{seed}", f"seeds.init={seed}", f"seeds.data={seed}") for seed in (3, 4)]


@pytest.fixture(scope="module")
def moving_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    every = "training.trained=[W_E, W_U, L0.W_K, L1.W_K, L1.W_O]"
    return trained(tmp_path_factory.mktemp("moving"), "run", every, "optimiser.learning_rate=0.02")


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained(tmp_path_factory.mktemp("full"), "run", "model.family=full", "model.n_heads=2", "training.loss=all",
                   "optimiser.learning_rate=0.01")  # fmt: skip


def run(*arguments: Any) -> Any:
    result = CliRunner().invoke(group, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def rows(*arguments: Any) -> Any:
    return pd.DataFrame(json.loads(run(*arguments, "--format", "json").stdout))


def test_memories_are_those_of_the_library(runs: Any) -> None:
    found = rows("memories", runs[0], "--steps", "0,-1")
    expected = memories_over(load_run(runs[0]), [0, 12]).to_pandas()
    np.testing.assert_allclose(found["value"].astype(float), expected["value"], rtol=1e-6, atol=1e-9)
    text = run("memories", runs[0]).stdout
    assert "chance" in text and "output/all" in text


def test_the_ledger_books_all_of_each_matrix(runs: Any, tmp_path: Path) -> None:
    out = tmp_path / "ledger.csv"
    for flags in ([], ["--cells"], ["--whole"]):
        run("memories", runs[0], "--ledger", "--steps", "4,-1", "--out", out, *flags)
        table = pd.read_csv(out)
        assert set(table["step"]) == {4, 12}
        np.testing.assert_allclose(table.groupby(["step", "matrix", "reading"])["share"].sum(), 1, atol=1e-9)
        assert ("cell" in set(table["kind"])) == ("--cells" in flags)
    whole = rows("memories", runs[0], "--ledger", "--steps", "-1")
    bounded = rows("memories", runs[0], "--ledger", "--steps", "-1", "--draws", "0")
    assert whole["null_derangement"].notna().any() and bounded["null_derangement"].isna().all()
    pd.testing.assert_series_equal(whole["share"], bounded["share"])
    text = run("memories", runs[0], "--ledger").stdout
    assert "previous position" in text and "output_memory, L1.W_O" in text and "output_memory, circuit" in text
    start = {flags: rows("memories", runs[0], "--ledger", "--steps", "0", *flags) for flags in ((), ("--whole",))}
    assert start[()]["share"].isna().all() and start[("--whole",)]["share"].notna().all()


def test_the_ledger_books_a_linear_feed_forward_too(tmp_path: Path) -> None:
    with_it = trained(tmp_path, "run", "model.feed_forward=linear", "training.loss=all")
    found = rows("memories", with_it, "--ledger", "--steps", "-1")
    successors = found[found["family"] == "successors"].iloc[0]
    assert successors["matrix"] == "feed_forward_memory" and successors["alone"] > successors["null_derangement"]
    run("weight-patch", with_it, "--by", "ledger,without_ledger", "--to", "-1", "--sequences", "4")


def test_the_strongest_associations_carry_labels_and_scores(runs: Any) -> None:
    found = rows("associations", runs[0], "--matrix", "W_O^2", "--top", "3", "--step", "8")
    assert found["kind"].tolist() == ["right"] * 3 + ["wrong"] * 3
    loaded = load_run(runs[0])
    scores = output_memory(loaded.weights(8)).scores()
    assert np.isclose(found["score"][0], scores.diagonal().max(), rtol=1e-5)
    best = loaded.statistics.vocab[int(scores.diagonal().argmax())]
    assert found["input"][0] == found["output"][0] == best
    off = scores - np.diag(np.full(len(scores), np.inf))
    assert np.isclose(found["score"][3], off.max(), rtol=1e-5)


def test_layer_norms_are_folded_where_there_are_some(runs: Any, full_run: Any) -> None:
    table = rows("memories", full_run, "--steps", "-1", "--fold")
    expected = memories_over(load_run(full_run), [12], fold=True).to_pandas()
    np.testing.assert_allclose(table["value"].astype(float), expected["value"], rtol=1e-6, atol=1e-9)
    assert expected.attrs["folded"]
    name = ("associations", full_run, "--matrix", "L1H0.OV", "--top", "1")
    assert "raw, folded" in run(*name, "--fold").stdout and "folded" not in run(*name).stdout
    scores = [rows(*name, *flags)["score"][0] for flags in ([], ["--fold"])]
    assert scores[0] != scores[1]


def test_any_circuit_has_a_name(full_run: Any) -> None:
    found = rows("associations", full_run, "--matrix", "L1H1.OV", "--top", "2")
    assert len(found) == 4
    with pytest.raises(BirthlensError, match=r"has 16 readings; valid are 'L0H0.QK: W_E -> W_E'"):
        run("associations", full_run, "--matrix", "L1H1.QK")


@pytest.mark.parametrize(
    ("old", "new", "options"),
    [
        ("memory", "associations", ["--matrix", "W_O^2", "--top", "2"]),
        ("transplant", "weight-patch", ["--to", "-1", "--from", "0", "--sequences", "4"]),
    ],
)
def test_old_names_of_commands_work_and_say_the_new_ones(runs: Any, old: Any, new: Any, options: Any) -> None:
    before, now = (run(name, runs[0], *options) for name in (old, new))
    assert before.stdout == now.stdout != ""
    assert f"{old} is now called {new}" in before.stderr and "called" not in now.stderr
    assert old not in group.list_commands(None)


def test_a_transplant_prints_a_map_and_writes_a_table(runs: Any, tmp_path: Path) -> None:
    text = run("weight-patch", runs[0], "--from", "0,-1", "--to", "0,8,-1", "--sequences", "8").stdout
    assert text.count("to_step \\ from_step") == 3 and "output_memory replaced" in text
    out = tmp_path / "map.csv"
    run("weight-patch", runs[0], "--from", "0,-1", "--to", "0,-1", "--sequences", "8", "--out", out,
        "--matrices", "prev_token_memory+trigger_memory+output_memory")  # fmt: skip
    table = pd.read_csv(out)
    assert set(table.columns) == {"matrix", "from_step", "to_step", "metric", "value", "change", "drift", "n"}
    wide = table[table["metric"] == "all_loss"].pivot(index="to_step", columns="from_step", values="value")
    np.testing.assert_allclose(loc(wide)[0, 12], loc(wide)[12, 12], rtol=1e-5)  # all that was trained came along


def test_the_runs_engine_measures_what_the_forward_pass_does(runs: Any) -> None:
    found = rows("weight-patch", runs[0], "--from", "0", "--to", "-1", "--sequences", "8")
    loaded = load_run(runs[0])
    first, last = loaded.weights(0), loaded.weights(12)
    table = subset_table(first, last, evaluation_batch(loaded, 8), evaluate=by_forward)
    kept = table[(table["final"] == "prev_token_memory + output_memory") & (table["metric"] == "all_loss")]
    same = found[(found["matrix"] == "trigger_memory") & (found["metric"] == "all_loss")]
    np.testing.assert_allclose(same["value"], kept["value"], rtol=1e-5)


def test_replacements_by_source(runs: Any) -> None:
    found = rows("weight-patch", runs[0], "--to", "-1", "--by", "ideal,ledger,rank:16", "--sequences", "8")
    assert set(found["source"]) == {"none", "ideal", "ledger", "rank:16"}
    assert found.loc[found["source"] == "rank:16", "change"].abs().max() < 1e-4
    assert "step \\ source" in run("weight-patch", runs[0], "--by", "initial", "--sequences", "4").stdout


def test_moving_codebooks_are_said(moving_run: Any, full_run: Any) -> None:
    result = run("weight-patch", moving_run, "--from", "0", "--to", "-1", "--sequences", "4")
    assert "note: bases (W_E, W_U) differ between steps" in result.stderr and "--align" in result.stderr
    aligned = run("weight-patch", moving_run, "--from", "0", "--to", "-1", "--sequences", "4", "--align")
    assert "differ" not in aligned.stderr
    by = [
        run("weight-patch", moving_run, "--to", "0,-1", "--sequences", "4", "--by", by) for by in ("initial", "rank:2")
    ]
    assert "initial matrices are in other bases" in by[0].stderr and "differ" not in by[1].stderr
    assert "each step is read in its own" in run("memories", moving_run).stderr
    with pytest.raises(BirthlensError, match="moves between checkpoints, so one ledger cannot be used"):
        run("memories", moving_run, "--ledger")
    with pytest.raises(BirthlensError, match="leave --ledger out"):
        run("memories", full_run, "--ledger")
    run("weight-patch", full_run, "--from", "0,-1", "--to", "-1", "--sequences", "4", "--align")


def test_the_order_over_runs(runs: Any) -> None:
    found = rows("order", *runs)
    assert set(found["n"]) <= {0, 2} and set(found["kind"]) == {"onset", "before", "order"}
    loaded = [load_run(path) for path in runs]
    scores = standardised_scores_table(loaded)
    assert sorted(set(scores["seed"])) == [3, 4]
    dual = (
        standardised_scores_table(loaded, "dual")
        .query("seed == 4")
        .drop(columns=["seed", "run"])
        .reset_index(drop=True)
    )
    pd.testing.assert_frame_equal(
        dual,
        standardised_table(loaded[1].checkpoints(), present(loaded[1].trigger_ids).tolist(), basis="dual"),
    )
    assert not np.allclose(dual["value"], scores[scores["seed"] == 4]["value"])
    chosen = chosen_sets(onsets_table(scores))
    assert dict(chosen.groupby("memory")["candidates"].first()) == {
        "prev_token_memory": "all", "trigger_memory": "triggers among all", "output_memory": "triggers among all",
    }  # fmt: skip
    authors = chosen_sets(onsets_table(scores), {"trigger_memory": ("triggers",), "output_memory": ("all",)})
    assert sorted(set(authors["candidates"])) == ["all", "triggers"]
    with pytest.raises(BirthlensError, match=r"prev_token_memory: first 64 were not read; the table has all"):
        chosen_sets(onsets_table(scores), {"prev_token_memory": ("first 64",)})
    sensitivity = rows("order", *runs, "--sensitivity")
    assert {"standardised", "recall", "soft_recall", "margin"} <= set(sensitivity["probe"])


def test_an_order_takes_runs_that_differ_in_their_seeds_alone(runs: Any, tmp_path: Path) -> None:
    twin = trained(tmp_path, "twin", "seeds.init=3", "seeds.data=9")
    assert sorted(set(standardised_scores_table([load_run(path) for path in (runs[0], twin)])["seed"])) == [0, 1]
    for other in (runs[0], shutil.copytree(runs[0], tmp_path / "copy")):
        with pytest.raises(BirthlensError, match="one run twice is not two seeds"):
            run("order", runs[0], other)
    differences = {
        "task.triggers=random": r"task.triggers \('random' against 'fixed'\)",
        "model.positions=rotary": "model.positions",
        "training.steps=8": r"training.steps \(8 against 12\)",
        "optimiser.learning_rate=0.1": "optimiser.learning_rate",
    }
    for number, (override, words) in enumerate(differences.items()):
        other = trained(tmp_path, str(number), override, "seeds.init=7")
        for flags in ([], ["--sensitivity"]):
            with pytest.raises(BirthlensError, match=f"differs from .* in {words}.*nothing but seeds"):
                run("order", runs[0], other, *flags)


def test_one_candidate_set_must_serve_all_seeds(runs: Any) -> None:
    onsets = onsets_table(standardised_scores_table([load_run(path) for path in runs]))
    lacking = onsets[(onsets["seed"] == 3) | (onsets["candidates"] == "all")]
    with pytest.raises(BirthlensError, match=r"'triggers among all' is read for some seeds and not for seed 4"):
        chosen_sets(lacking)


def test_what_an_order_rests_on_is_noted(runs: Any, moving_run: Any) -> None:
    assert "2 runs: a 95 % interval of a median needs at least six" in run("order", *runs).stderr
    noted = run("order", moving_run)
    assert "codebooks (W_E, W_U) change in training: each step is read in its own" in noted.stderr
    assert "moves" not in run("order", runs[0]).stderr


def test_what_is_named_twice_is_done_once(runs: Any, full_run: Any) -> None:
    for flags in (["--by", "rank:2,rank:2"], ["--from", "0,0"]):
        text = run("weight-patch", runs[0], "--to", "-1,-1", "--sequences", "4", *flags).stdout
        assert text.count("rank:2") == 3 * ("--by" in flags)
    found = rows("weight-patch", full_run, "--to", "-1", "--by", "rank:2,rank:8", "--sequences", "4")
    biases = found[(found["source"] == "rank:8") & (found["metric"] == "all_loss")]  # heads of 8: nothing is cut
    assert biases["change"].abs().max() < 1e-5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["associations", "{run}", "--matrix", "W_V^9"], "is not a memory"),
        (["associations", "{run}", "--matrix", "output_memory", "--step", "5"], "step = 5 is not kept"),
        (["weight-patch", "{run}", "--matrices", "W_K^7"], r"matrix = 'W_K\^7'"),
        (["weight-patch", "{run}", "--from", "5"], "step = 5 is not kept"),
        (["weight-patch", "{run}", "--by", "magic"], "source = 'magic'"),
        (["memories", "{run}", "--steps", "soon"], "steps = 'soon'"),
        (["memories", "{run}", "--cells"], "--cells: it acts with --ledger only"),
        (["memories", "{run}", "--fold"], "no layer norms to fold"),
        (["memories", "{run}", "--fold", "--ledger"], "--fold: the models of the ledger"),
        (["associations", "{run}", "--matrix", "W_O^2", "--fold"], "no layer norms to fold"),
        (["memories", "{run}", "--whole"], "--whole: it acts with --ledger only"),
        (["weight-patch", "{run}", "--by", "ideal", "--from", "0"], "--from: it acts on matrices of other steps"),
        (["weight-patch", "{run}", "--by", "initial", "--align"], "--align: it acts on matrices of other steps"),
        (["order", "{run}", "--width", "nan"], "width = nan"),
    ],
)
def test_bad_input_is_named(runs: Any, arguments: Any, words: Any) -> None:
    with pytest.raises(BirthlensError, match=words):
        run(*(argument.format(run=runs[0]) for argument in arguments))


def test_the_order_is_of_the_paper_model(full_run: Any) -> None:
    with pytest.raises(BirthlensError, match="is a full model of 2 layers"):
        run("order", full_run)
