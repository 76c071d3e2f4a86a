"""`birthlens fork`, `contrast` and `data-attribution` as commands: what they write, show and refuse."""

import json
import shlex
from io import StringIO
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from birthlens.analysis.behaviour.contrast import birth_shifts_table, contrast_table, paired_interval, pairs_of
from birthlens.analysis.behaviour.phase import VALUES
from birthlens.cli import group
from birthlens.errors import BirthlensError
from birthlens.runs.run import load_run
from birthlens.tasks.parts import GROUPINGS

TINY = [
    "corpus.source=markov", "corpus.vocabulary=12", "task.context=24", "task.n_triggers=5", "model.d_model=32",
    "training.steps=60", "training.batch_size=64", "checkpoints.every=5", "evaluation.every=5",
    "optimiser.learning_rate=0.5",
]  # fmt: skip


def invoke(*words: Any) -> Any:
    return CliRunner().invoke(group, [str(word) for word in words])


def run(*words: Any) -> Any:
    result = invoke(*words)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two controls, and their forks in which the output memory is held at zero for twenty steps."""
    folder = tmp_path_factory.mktemp("forks")
    for seed in (0, 1):
        run("train", folder / f"control{seed}", *TINY, f"seeds.init={seed}", f"seeds.data={seed}")
        run(
            "fork",
            folder / f"control{seed}",
            folder / f"late{seed}",
            "--at",
            10,
            "--clamp",
            "hold L1.W_O initial until=30",
        )
    return folder


def test_a_fork_is_shown_by_steps_and_by_its_report(runs: Any, tmp_path: Path) -> None:
    text = run("steps", runs / "late0").stdout
    assert "forked from" in text and "control0 at step 10, clamp 'hold L1.W_O initial from=10 until=30'" in text
    assert json.loads(run("steps", runs / "late0", "--format", "json").stdout)[0] == 10
    page = tmp_path / "report.html"
    run("report", runs / "late0", "--out", page, "--quick")
    text = page.read_text()
    assert "The fork and its parent" in text and "control0 at step 10" in text and "birthlens fork" in text
    assert (
        "The fork and its parent"
        not in (run("report", runs / "control0", "--out", page, "--quick"), page.read_text())[1]
    )


def test_a_fork_of_a_fork_shows_its_whole_lineage(runs: Any, tmp_path: Path) -> None:
    run("fork", runs / "late0", tmp_path / "second", "--at", 50, "optimiser.learning_rate=0.1")
    second, first = load_run(tmp_path / "second").lineage
    assert (second.path.name, second.step, first.path.name, first.step) == ("late0", 50, "control0", 10)
    text = run("steps", tmp_path / "second").stdout
    assert text.index("late0 at step 50") < text.index("control0 at step 10")
    page = tmp_path / "report.html"
    run("report", tmp_path / "second", "--out", page, "--quick")
    assert "which was forked from" in page.read_text()


def test_a_contrast_says_what_its_intervals_are_not(runs: Any) -> None:
    pairs = {"alone": ["control0", "late0"], "shared": ["control0", "late0", "late1"], "seeds": ["control0", "late1"]}
    said = {name: run("contrast", *(runs / word for word in words)).stderr for name, words in pairs.items()}
    assert "one pair has no interval" in said["alone"] and "share" not in said["alone"] + said["seeds"]
    assert "several runs share a control" in said["shared"] and "has other seeds than" in said["shared"]
    assert "has other seeds than" in said["seeds"] and "other seeds" not in said["alone"]
    both = run("contrast", f"{runs / 'control0'},{runs / 'control1'}", runs / "late0", runs / "late1").stderr
    assert "note" not in both


def test_the_command_in_the_report_makes_the_fork_again(runs: Any, tmp_path: Path) -> None:

    from birthlens.viz.report.command_of_run import command_of

    words = shlex.split(command_of(load_run(runs / "late1")))[1:]
    words[2] = str(tmp_path / "again")
    run(*words)
    again = load_run(tmp_path / "again")
    np.testing.assert_array_equal(again.weights(-1)["L1.W_O"], load_run(runs / "late1").weights(-1)["L1.W_O"])


def test_a_withheld_output_memory_is_born_later(runs: Any) -> None:
    controls = f"{runs / 'control0'},{runs / 'control1'}"
    table = pd.read_json(StringIO(run("contrast", controls, runs / "late1", runs / "late0", "--format", "json").stdout))
    shifts = table.set_index("event")
    assert set(shifts.index) == {"output_memory", "trigger_memory", "prev_token_memory", "in_context_accuracy"}
    assert shifts.loc["output_memory", "n"] == 2
    low, shift, high = (shifts[name]["output_memory"] for name in ("low", "shift", "high"))
    assert shift > 5 and low <= shift <= high


def test_differences_are_those_of_the_runs(runs: Any, tmp_path: Path) -> None:
    out, figure = tmp_path / "steps.csv", tmp_path / "steps.svg"
    controls = f"{runs / 'control0'},{runs / 'control1'}"
    run("contrast", controls, runs / "late0", runs / "late1", "--what", "steps", "--out", out, "--figure", figure)
    assert figure.stat().st_size > 1000
    table = pd.read_csv(out).set_index(["metric", "step"])
    assert table.index.get_level_values("step").min() == 10 and (table["n"] == 2).all()
    values = []
    for seed in (0, 1):
        both = []
        for name in ("late", "control"):
            metrics = load_run(runs / f"{name}{seed}").metrics()
            both.append(metrics.query("metric == 'in_context_accuracy' and step == 40")["value"].iloc[0])
        values.append(both[0] - both[1])
    row: Any = table.loc["in_context_accuracy", 40]
    assert row["difference"] == pytest.approx(np.mean(values))
    half = 12.706 * abs(values[0] - values[1]) / 2  # Student's t of one degree of freedom
    assert row["high"] - row["low"] == pytest.approx(2 * half, rel=1e-3)
    result = run("contrast", runs / "control0", runs / "late0", "--what", "first", "--format", "json")
    first = pd.read_json(StringIO(result.stdout))
    assert first.set_index("metric").loc["output_memory", "first"] == 10
    assert first.set_index("metric").loc["trigger_memory", "first"] == 15


def test_a_run_does_not_differ_from_its_plain_fork(runs: Any, tmp_path: Path) -> None:
    run("fork", runs / "control0", tmp_path / "same", "--at", 5)
    result = run("contrast", runs / "control0", tmp_path / "same", "--what", "steps", "--format", "json")
    assert (pd.read_json(StringIO(result.stdout))["difference"] == 0).all()
    assert "one pair has no interval" in result.stderr
    pair = pairs_of([load_run(runs / "control0")], [load_run(tmp_path / "same")])
    shifts = birth_shifts_table(pair)
    assert (shifts["shift"].dropna() == 0).all() and shifts["low"].isna().all()


def test_the_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    draws = generator.standard_normal((4000, 6)) + 0.3
    ends = np.array([paired_interval(draw) for draw in draws])
    assert np.mean((ends[:, 0] < 0.3) & (ends[:, 1] > 0.3)) == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fork", "{run}", "{out}", "--at", "61"], "step = 61 is outside"),
        (["fork", "{run}", "{out}", "--at", "10", "--clamp", "melt L0.W_K"], "it must begin with one of freeze"),
        (["fork", "{run}", "{out}", "--at", "10", "--clamp", "freeze W_E"], "W_E is not a trained matrix"),
        (["fork", "{run}", "{out}", "--at", "10", "corpus.vocabulary=13"], "corpus.vocabulary cannot change in a fork"),
        (["fork", "{run}", "{run}", "--at", "10"], "already holds a run"),
        (["fork", "nothing", "{out}", "--at", "10"], "does not exist"),
        (["contrast", "{run}", "{run}", "{run}"], "is given twice"),
        (["contrast", "nothing", "{run}"], "does not exist"),
        (["contrast", "{run},", "{run}"], "a run is missing beside a comma"),
    ],
)
def test_mistakes_are_one_sentence(runs: Any, tmp_path: Path, words: Any, message: Any) -> None:
    words = [word.format(run=runs / "control0", out=tmp_path / "out") for word in words]
    with pytest.raises(BirthlensError, match=message):
        CliRunner().invoke(group, words, standalone_mode=False, catch_exceptions=False)
    assert not (tmp_path / "out").exists()


def test_runs_are_paired_by_lineage_and_then_by_seeds(runs: Any) -> None:
    controls = [load_run(runs / "control0"), load_run(runs / "control1")]
    pairs = pairs_of(controls, [load_run(runs / "late1"), load_run(runs / "late0")])
    assert [pair.control.path.name for pair in pairs] == ["control1", "control0"]
    assert contrast_table(pairs)["n"].eq(2).all()
    with pytest.raises(BirthlensError, match="has 0 controls with seeds"):
        pairs_of([controls[0], controls[0]], [controls[1]])


def test_the_commands_offer_what_the_library_has() -> None:
    for command, option, valid in (("data-attribution", "by", GROUPINGS), ("phase", "value", tuple(VALUES))):
        context = click.Context(group)
        found = group.get_command(context, command)
        assert found is not None
        (parameter,) = (one for one in found.params if one.name == option)
        assert isinstance(parameter.type, click.Choice) and tuple(parameter.type.choices) == valid


def test_data_attribution_prints_writes_and_draws(runs: Any, tmp_path: Path) -> None:
    words = ("data-attribution", runs / "control0", "trigger_memory", "--until", 10)
    table = pd.read_json(StringIO(run(*words, "--format", "json").stdout))
    assert table[table["by"] != "total"]["value"].sum() == pytest.approx(table["value"].iloc[-1], rel=1e-3, abs=1e-6)
    for more in ((), ("--every", 5), ("--by", "token"), ("--by", "position", "--from", 2)):
        figure = tmp_path / f"taught{len(more)}.svg"
        run(*words, *more, "--out", tmp_path / "taught.csv", "--figure", figure)
        assert figure.stat().st_size > 5000
    for option, step, sentence in (
        ("--from", 60, "must lie in steps 0 to 60"),
        ("--until", 61, "from = 0, until = 61"),
    ):
        result = invoke("data-attribution", runs / "control0", "trigger_memory", option, step)
        assert result.exit_code != 0 and sentence in str(result.exception or result.output)
    result = invoke("data-attribution", runs / "late0", "output_memory", "--until", 40)
    assert "clamp 'hold L1.W_O initial from=10 until=30' writes L1.W_O" in str(result.exception or result.output)
