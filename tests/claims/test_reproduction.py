"""Reproduction: what is missing is run, what matches is used again, and failures stay in the table."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from claim_runs import TINY
from click.testing import CliRunner
from resealing import reseal
from typed import close, loc

from birthlens.claims import catalogue, identity, reproduction
from birthlens.claims.book import command_of
from birthlens.claims.claim import BOUND, Claim, Expectation
from birthlens.claims.reproduction import reproduce
from birthlens.claims.scorecard import Result, Scorecard, read_results, scorecard_table
from birthlens.claims.tiers import Tier
from birthlens.cli import group
from birthlens.errors import BirthlensError
from birthlens.runs.provenance import TRAINING, code_digest
from birthlens.runs.run import load_run
from birthlens.viz.report.scorecard import scorecard_page

TIER = Tier("laptop", (*TINY, "training.steps=4", "checkpoints.every=2"), 3)
CALLS: list[Any] = []


def width(evidence: Any) -> Any:
    """Stand for a statistic: a fact about the run that is known in advance."""
    CALLS.append(evidence.seed)
    return {"width": float(evidence.runs["run"].config.model.d_model), "seed": float(evidence.seed)}


def broken(evidence: Any) -> Any:
    if evidence.seed == 1:
        raise ZeroDivisionError("no such thing")
    return {"width": 1.0}


def nothing(evidence: Any) -> Any:
    return {"width": math.nan}


WIDE = Expectation("width", "width of the model", above=10)


def claim(id: Any, statistic: Any = width, expectation: Any = WIDE, **kw: Any) -> Any:
    kw.setdefault("cases", {"run": ()})
    return Claim(id, f"The {id} claim.", (expectation,), statistic, **kw)


TOO_WIDE = Expectation("width", "width of the model", below=10)
CLAIMS = [
    claim("true"),
    claim("false", expectation=TOO_WIDE),
    claim("open", expectation=Expectation("seed", "the seed", above=1)),
    claim("broken", broken),
    claim("blank", nothing),
    claim("diverging", cases={"run": ("optimiser.learning_rate=1e30",)}),
    claim("big", only="paper"),
    Claim("dreamt", "The dreamt claim.", unchecked="nobody knows how"),
]


def judged(claims: Any, folder: Any, tier: Any = TIER) -> Any:
    return {one.claim.id: one for one in reproduce(claims, tier, folder, processes=1) if isinstance(one, Result)}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("reproduce")
    return folder, judged(CLAIMS, folder)


def test_verdicts_are_what_they_must_be(done: Any) -> None:
    _, results = done
    assert {name: result.verdict for name, result in results.items()} == {
        "true": "pass", "false": "fail", "open": "inconclusive", "broken": "inconclusive", "blank": "inconclusive",
        "diverging": "inconclusive", "big": "not checked", "dreamt": "not checked",
    }  # fmt: skip
    row = results["open"].rows()[0]
    assert row["value"] == 1.0 and row["low"] == pytest.approx(1 - 2.484, abs=1e-3) and row["seeds"] == 3


def test_failures_stay_in_the_table_with_their_reason(done: Any) -> None:
    folder, results = done
    notes = scorecard_table(list(results.values())).set_index("claim")["note"]
    assert notes["broken"] == "seed 1: ZeroDivisionError: no such thing"
    assert "optimiser.learning_rate" in notes["diverging"] and "seed 2" in notes["diverging"]
    assert notes["dreamt"] == "nobody knows how" and "--tier paper" in notes["big"]
    assert "ZeroDivisionError" in (folder / "scorecard.csv").read_text()


def test_the_scorecard_says_what_made_it(done: Any) -> None:
    folder, _ = done
    report = json.loads(
        (folder / "scorecard.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON")
    )
    assert {"birthlens", "torch", "numpy", "python"} <= report["versions"].keys()
    assert report["command"] == command_of(CLAIMS, TIER)
    assert [one["id"] for one in report["claims"]] == [one.id for one in CLAIMS]
    assert [one["seed"] for one in report["claims"][0]["measured"]] == [0, 1, 2]
    assert report["totals"]["runs"] == 6 and report["claims"][0]["runs"] == 3 and report["claims"][0]["cpu_seconds"] > 0


def test_a_second_time_nothing_is_trained_or_measured(done: Any) -> None:
    folder, results = done
    CALLS.clear()
    events = list(reproduce(CLAIMS[:3], TIER, folder, processes=1))
    assert [event.state for event in events if not isinstance(event, Result)] == ["reused"] * 3 and not CALLS
    again = {event.claim.id: event for event in events if isinstance(event, Result)}
    assert all(again[name].rows() == results[name].rows() for name in again)


@pytest.mark.parametrize("change", ["settings", "code", "training", "versions", "corpus"])
def test_what_does_not_match_is_measured_anew_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    judged([claim("true")], tmp_path)
    CALLS.clear()
    one = claim("true", settings={"other": 1} if change == "settings" else {})
    if change == "code":
        monkeypatch.setattr(
            identity, "code_digest", lambda module: "other" if module == __name__ else code_digest(module)
        )
    if change == "training":
        monkeypatch.setattr(
            identity, "code_digest", lambda module: "other" if module == TRAINING else code_digest(module)
        )
    if change == "versions":
        monkeypatch.setattr(identity, "versions", lambda: {"torch": "1.0"})
    if change == "corpus":
        monkeypatch.setattr(identity, "corpus_digest", lambda statistics: "other")
    result = judged([one], tmp_path)["true"]
    assert sorted(CALLS) == [0, 1, 2] and result.again.startswith("measured again: the earlier measurement had other ")
    assert {"versions": "versions of packages", "corpus": "text"}.get(change, change) in result.again


def test_a_claim_without_runs_depends_on_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    one = claim("free", cases={})
    before = identity.made_of(one, TIER)
    monkeypatch.setattr(identity, "corpus_digest", lambda statistics: "other")
    assert identity.made_of(one, TIER) != before and before["corpus"]


def test_a_run_of_other_packages_is_made_anew(tmp_path: Path) -> None:
    first = judged([claim("true")], tmp_path)["true"]
    file = next((tmp_path / "runs").glob("*/run.json"))
    reseal(file.parent, lambda header: header["versions"].update(torch="1.0"))
    events = list(reproduce([claim("true")], TIER, tmp_path, processes=1))
    (outcome,) = [event for event in events if not isinstance(event, Result) and event.state == "trained"]
    assert "made by other code" in outcome.message and outcome.path == file.parent
    last = events[-1]
    assert isinstance(last, Result) and last.rows() == first.rows()


def test_a_run_that_cannot_be_opened_is_a_problem_and_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged([claim("true")], tmp_path)
    shutil.rmtree(tmp_path / "measurements")

    def shut(path: Any) -> None:
        raise ValueError("no run")

    monkeypatch.setattr(reproduction, "Run", shut)
    result = judged([claim("true")], tmp_path)["true"]
    assert result.verdict == "inconclusive" and "seed 1: ValueError: no run" in result.note()


def fine(evidence: Any) -> Any:
    """Stand for a number that lies next to its bound: rounded to six decimals it would not."""
    return {"width": 10.0 + 1e-9 * (1 + evidence.seed / 10)}


def test_the_second_time_gives_the_same_numbers_to_the_bit(tmp_path: Path) -> None:
    first = judged([claim("fine", fine)], tmp_path)["fine"]
    second = judged([claim("fine", fine)], tmp_path)["fine"]
    assert first.verdict == second.verdict == "pass" and first.rows() == second.rows()
    (read,) = read_results(tmp_path, [claim("fine", fine)])
    assert read.rows() == first.rows()
    assert pd.read_csv(tmp_path / "scorecard.csv")["low"][0] > 10


def test_what_is_asked_for_and_not_judged_is_listed_as_not_yet_run(tmp_path: Path) -> None:
    pages: list[Any] = []
    events = reproduce(CLAIMS[:3], TIER, tmp_path, processes=1, also=pages.append)
    assert next(event for event in events if isinstance(event, Result)).claim.id == "true"
    close(events)
    table = pd.read_csv(tmp_path / "scorecard.csv").set_index("claim")
    assert table["verdict"].to_dict() == {"true": "pass", "false": "not yet run", "open": "not yet run"}
    assert [result.verdict for result in pages[0].results] == ["not yet run"] * 3 and len(pages) == 2
    html = scorecard_page(pages[-1])
    assert "… not yet run" in html and "The open claim." in html and "✓ pass" in html


def test_other_claims_stay_in_the_scorecard_while_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = [claim("true"), claim("false", expectation=TOO_WIDE), claim("broken", broken)]
    monkeypatch.setattr(catalogue, "CLAIMS", tuple(named))
    judged(named, tmp_path)
    before = json.loads((tmp_path / "scorecard.json").read_text())["claims"]
    judged(named[:1], tmp_path)
    after = json.loads((tmp_path / "scorecard.json").read_text())
    assert after["claims"][1:] == before[1:] and after["command"] == command_of(named, TIER)
    other = claim("false", expectation=TOO_WIDE, settings={"other": 1})
    monkeypatch.setattr(catalogue, "CLAIMS", (named[0], other, named[2]))
    judged(named[:1], tmp_path)
    table = pd.read_csv(tmp_path / "scorecard.csv").set_index("claim")
    assert loc(table)["false", "verdict"] == "not yet run" and "with other code" in loc(table)["false", "note"]
    judged(named[:1], tmp_path, Tier("paper", TIER.base, 2))
    table = pd.read_csv(tmp_path / "scorecard.csv").set_index("claim")
    assert "at tier laptop" in loc(table)["broken", "note"] and loc(table)["true", "seeds"] == 2


def censored(evidence: Any) -> Any:
    """Stand for a step that seed 1 never reached, and one that is a bound for seed 2."""
    never = {"width": math.nan} if evidence.seed == 1 else {"width": 20.0 + evidence.seed}
    return never | ({"width" + BOUND: 1.0} if evidence.seed == 2 else {})


def test_numbers_that_cannot_be_had_and_bounds_are_named_with_their_seeds(tmp_path: Path) -> None:
    result = judged([claim("late", censored)], tmp_path)["late"]
    assert result.verdict == "inconclusive" and result.rows()[0]["seeds"] == 2
    assert "width has no number in seed 1" in result.note() and "width is a bound" in result.note()
    assert "in seed 2" in result.note() and not result.problems
    assert result.note().split(";")[0] in html_text(scorecard_page(Scorecard([result], "x")))


def html_text(html: Any) -> Any:
    return html.replace("&#x27;", "'")


def test_the_page_is_whole_and_fetches_nothing(done: Any) -> None:
    _, results = done
    html = scorecard_page(Scorecard(list(results.values()), "birthlens reproduce all"))
    for result in results.values():
        assert result.claim.sentence in html
    assert "✓ pass" in html and "✗ fail" in html and "ZeroDivisionError" in html and "nobody knows how" in html
    assert "http://" not in html.replace("http://www.w3.org", "") and "https://" not in html
    assert "nan" not in html.split("<main")[1].replace("loss is nan", "")


def test_workers_give_the_same_numbers(tmp_path: Path) -> None:
    """The real catalogue's functions travel to processes; a test module's could not."""
    from birthlens.claims.statistics.behaviours import speed

    one = claim("speed", speed, Expectation("tokens to half accuracy", "tokens", above=0))
    alone = judged([one], tmp_path / "alone", Tier("laptop", TIER.base, 2))["speed"]
    events = reproduce([one], Tier("laptop", TIER.base, 2), tmp_path / "pool", processes=2)
    together = next(event for event in events if isinstance(event, Result))
    for one, other in zip(together.measured, alone.measured, strict=True):
        assert one.values == pytest.approx(other.values, rel=0, abs=0, nan_ok=True)


def test_the_command_line_lists_and_refuses() -> None:
    runner = CliRunner()
    listed = runner.invoke(group, ["reproduce", "--list"])
    assert listed.exit_code == 0 and "order-random" in listed.output and "half-height" in listed.output
    for words, said in ((["perpetuum"], "perpetuum"), (["two-layers", "--tier", "desk"], "desk")):
        refused = runner.invoke(group, ["reproduce", *words])
        assert isinstance(refused.exception, BirthlensError) and said in str(refused.exception)


def test_the_command_line_checks_a_claim_and_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from birthlens.claims import catalogue, tiers

    monkeypatch.setattr(catalogue, "CLAIMS", (claim("true"), claim("broken", broken)))
    monkeypatch.setitem(tiers.TIERS, "laptop", TIER)
    out = tmp_path / "out"
    runner = CliRunner()
    good = runner.invoke(
        group, ["reproduce", "true", "--out", str(out), "--processes", "1", "--seeds", "2", "--format", "csv"]
    )
    assert good.exit_code == 0 and "pass" in good.output
    assert {"scorecard.csv", "scorecard.json", "scorecard.html"} <= {file.name for file in out.iterdir()}
    bad = runner.invoke(group, ["reproduce", "--out", str(out), "--processes", "1"])
    assert bad.exit_code == 1 and "broken: seed 1: ZeroDivisionError" in bad.output


def test_sweep_on_the_command_line(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    words = "\n".join(f"  - {word}" for word in TIER.base)
    grid.write_text(f"overrides:\n{words}\naxes:\n  model.d_model: [8, 16]\n  task.n_triggers: [1, 2]\nseeds: 2\n")
    runner = CliRunner()
    first = runner.invoke(
        group, ["sweep", str(grid), "--out", str(tmp_path / "runs"), "--processes", "1", "--format", "json"]
    )
    assert first.exit_code == 0 and first.output.count('"trained"') == 8
    second = runner.invoke(
        group, ["sweep", str(grid), "--out", str(tmp_path / "runs"), "--processes", "1", "--format", "json"]
    )
    assert second.output.count('"reused"') == 8
    table = pd.read_csv(tmp_path / "runs" / "sweep.csv")
    assert sorted(map(tuple, table[["model.d_model", "task.n_triggers", "seed"]].to_numpy().tolist())) == [
        (width, triggers, seed) for width in (8, 16) for triggers in (1, 2) for seed in (0, 1)
    ]
    for row in table.to_dict("records"):
        run = load_run(row["run"])
        assert run.config.model.d_model == row["model.d_model"]
        assert vars(run.config.task)["n_triggers"] == row["task.n_triggers"]
        metrics = run.metrics()
        seen = metrics[(metrics["metric"] == "in_context_accuracy") & (metrics["split"] == "held_out")]
        assert row["accuracy"] == pytest.approx(seen.sort_values("step")["value"].iloc[-1])
        born = seen.loc[seen["value"] >= 0.5, "step"].min()
        assert (math.isnan(row["birth"]) and math.isnan(born)) or row["birth"] == born
    picture = tmp_path / "grid.svg"
    drawn = ["plot", str(tmp_path / "runs" / "sweep.csv"), "--kind", "sweep", "--out", str(picture)]
    drawn += ["--option", "x=model.d_model", "--option", "y=task.n_triggers", "--option", "value=accuracy"]
    assert runner.invoke(group, drawn).exit_code == 0 and picture.exists()


SLOW = ("training.steps=1500", "checkpoints.every=100", "evaluation.every=100")
HARNESS = f"""
from birthlens.claims.statistics import behaviours
from birthlens.claims import catalogue
from birthlens.claims import tiers
from birthlens.claims.claim import Claim, Expectation
from birthlens.cli import main
end = Expectation("accuracy at the end", "accuracy at the end", 0)
quick = Claim("quick", "quick", (end,), lambda evidence: {{"accuracy at the end": 1.0}})
catalogue.CLAIMS = (quick, Claim("slow", "slow", (end,), behaviours.speed, {{"run": ()}}))
tiers.TIERS["laptop"] = tiers.Tier("laptop", {(*TINY, *SLOW)!r}, 1)
main()
"""


def begun(out: Any) -> Any:
    """Start a reproduction as a process of its own, and wait until its first claim is judged and its run has begun."""
    command = [sys.executable, "-c", HARNESS, "reproduce", "--out", str(out), "--processes", "1"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        # A shell starts what runs in the background with interrupts ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    card = out / "scorecard.csv"
    while time.monotonic() < deadline and process.poll() is None:
        judged_one = card.exists() and "requested" not in card.read_text().split("slow")[0]
        if judged_one and len(list(out.glob("runs/*/resume.safetensors"))) == 1:
            break
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    return process, command


@pytest.mark.long
def test_a_killed_reproduction_is_continued_by_the_same_command(tmp_path: Path) -> None:
    process, command = begun(tmp_path / "out")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    verdicts = pd.read_csv(tmp_path / "out" / "scorecard.csv").set_index("claim")["verdict"]
    assert verdicts["quick"] != "not yet run" and verdicts["slow"] == "not yet run"
    assert "not yet run" in (tmp_path / "out" / "scorecard.html").read_text()
    again = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("continued") == 1 and "trained" not in again.stderr, again.stderr
    command[command.index("--out") + 1] = str(tmp_path / "whole")
    subprocess.run(command, capture_output=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    cards = [pd.read_csv(tmp_path / name / "scorecard.csv") for name in ("out", "whole")]
    out, whole = (card.drop(columns=["seconds", "cpu_seconds"]) for card in cards)
    pd.testing.assert_frame_equal(out, whole, check_exact=True)


def test_an_interrupted_reproduction_says_how_it_is_continued(tmp_path: Path) -> None:
    process, _ = begun(tmp_path / "out")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "run the same command again to continue" in said
    assert "--resume" not in said and "Traceback" not in said
