"""Reproduction: what is missing is run, what matches is used again, and failures stay in the table."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from claim_runs import TINY
from click.testing import CliRunner

from birthlens.claims import reproduction
from birthlens.claims.claim import Claim, Expectation
from birthlens.claims.reproduction import command_of, reproduce
from birthlens.claims.scorecard import Result, scorecard_table
from birthlens.claims.tiers import Tier
from birthlens.cli import group
from birthlens.errors import BirthlensError
from birthlens.scorecard_page import scorecard_page

TIER = Tier("laptop", (*TINY, "training.steps=4", "checkpoints.every=2"), 3)
CALLS = []


def width(evidence):
    """Stand for a statistic: a fact about the run that is known in advance."""
    CALLS.append(evidence.seed)
    return {"width": float(evidence.runs["run"].config.model.d_model), "seed": float(evidence.seed)}


def broken(evidence):
    if evidence.seed == 1:
        raise ZeroDivisionError("no such thing")
    return {"width": 1.0}


def nothing(evidence):
    return {"width": math.nan}


WIDE = Expectation("width", "width of the model", above=10)


def claim(id, statistic=width, expectation=WIDE, **kw):
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


def judged(claims, folder, tier=TIER):
    return {one.claim.id: one for one in reproduce(claims, tier, folder, processes=1) if isinstance(one, Result)}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    return folder, judged(CLAIMS, folder)


def test_verdicts_are_what_they_must_be(done):
    _, results = done
    assert {name: result.verdict for name, result in results.items()} == {
        "true": "pass", "false": "fail", "open": "inconclusive", "broken": "inconclusive", "blank": "inconclusive",
        "diverging": "inconclusive", "big": "not checked", "dreamt": "not checked",
    }  # fmt: skip
    row = results["open"].rows()[0]
    assert row["value"] == 1.0 and row["low"] == pytest.approx(1 - 2.484, abs=1e-3) and row["seeds"] == 3


def test_failures_stay_in_the_table_with_their_reason(done):
    folder, results = done
    notes = scorecard_table(list(results.values())).set_index("claim")["note"]
    assert notes["broken"] == "seed 1: ZeroDivisionError: no such thing"
    assert "optimiser.learning_rate" in notes["diverging"] and "seed 2" in notes["diverging"]
    assert notes["dreamt"] == "nobody knows how" and "--tier paper" in notes["big"]
    assert "ZeroDivisionError" in (folder / "scorecard.csv").read_text()


def test_the_scorecard_says_what_made_it(done):
    folder, _ = done
    report = json.loads(
        (folder / "scorecard.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON")
    )
    assert {"birthlens", "torch", "numpy", "python"} <= report["versions"].keys()
    assert report["command"] == command_of(CLAIMS, TIER)
    assert [one["id"] for one in report["claims"]] == [one.id for one in CLAIMS]
    assert [one["seed"] for one in report["claims"][0]["measured"]] == [0, 1, 2]
    assert report["totals"]["runs"] == 6 and report["claims"][0]["runs"] == 3 and report["claims"][0]["cpu_seconds"] > 0


def test_a_second_time_nothing_is_trained_or_measured(done):
    folder, results = done
    CALLS.clear()
    events = list(reproduce(CLAIMS[:3], TIER, folder, processes=1))
    assert [event.state for event in events if not isinstance(event, Result)] == ["reused"] * 3 and not CALLS
    again = {event.claim.id: event for event in events if isinstance(event, Result)}
    assert all(again[name].rows() == results[name].rows() for name in again)


def test_what_does_not_match_is_measured_anew(tmp_path, monkeypatch):
    judged([claim("true")], tmp_path)
    for change in ("settings", "version", "source"):
        CALLS.clear()
        changed = claim("true", settings={"other": 1} if change == "settings" else {})
        if change == "version":
            monkeypatch.setattr(reproduction, "__version__", "0.0.9")
        if change == "source":
            monkeypatch.setattr(reproduction.inspect, "getsource", lambda module: "another text")
        judged([changed], tmp_path)
        assert sorted(CALLS) == [0, 1, 2], change


def test_a_run_of_another_version_is_refused_by_name(tmp_path):
    judged([claim("true")], tmp_path)
    file = next((tmp_path / "runs").glob("*/run.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "birthlens": "0.0.9"}))
    result = judged([claim("true")], tmp_path)["true"]
    assert (
        result.verdict == "inconclusive"
        and "made by birthlens 0.0.9" in result.note()
        and file.parent.name in result.note()
    )


def test_the_page_is_whole_and_fetches_nothing(done):
    _, results = done
    html = scorecard_page(list(results.values()), "birthlens reproduce all")
    for result in results.values():
        assert result.claim.sentence in html
    assert "✓ pass" in html and "✗ fail" in html and "ZeroDivisionError" in html and "nobody knows how" in html
    assert "http://" not in html.replace("http://www.w3.org", "") and "https://" not in html
    assert "nan" not in html.split("<main")[1].replace("loss is nan", "")


def test_workers_give_the_same_numbers(tmp_path):
    """The real catalogue's functions travel to processes; a test module's could not."""
    from birthlens.claims.behaviours import speed

    one = claim("speed", speed, Expectation("tokens to half accuracy", "tokens", above=0))
    alone = judged([one], tmp_path / "alone", Tier("laptop", TIER.base, 2))["speed"]
    events = reproduce([one], Tier("laptop", TIER.base, 2), tmp_path / "pool", processes=2)
    together = next(event for event in events if isinstance(event, Result))
    assert [m.values for m in together.measured] == [m.values for m in alone.measured]


def test_the_command_line_lists_and_refuses():
    runner = CliRunner()
    listed = runner.invoke(group, ["reproduce", "--list"])
    assert listed.exit_code == 0 and "order-random" in listed.output and "half-height" in listed.output
    for words, said in ((["perpetuum"], "perpetuum"), (["two-layers", "--tier", "desk"], "desk")):
        refused = runner.invoke(group, ["reproduce", *words])
        assert isinstance(refused.exception, BirthlensError) and said in str(refused.exception)


def test_the_command_line_checks_a_claim_and_writes_its_files(tmp_path, monkeypatch):
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


def test_sweep_on_the_command_line(tmp_path):
    grid = tmp_path / "grid.yaml"
    words = "\n".join(f"  - {word}" for word in TIER.base)
    grid.write_text(f"overrides:\n{words}\naxes:\n  model.d_model: [8, 16]\n")
    runner = CliRunner()
    first = runner.invoke(
        group, ["sweep", str(grid), "--out", str(tmp_path / "runs"), "--processes", "1", "--format", "json"]
    )
    assert first.exit_code == 0 and first.output.count('"trained"') == 2
    second = runner.invoke(
        group, ["sweep", str(grid), "--out", str(tmp_path / "runs"), "--processes", "1", "--format", "json"]
    )
    assert second.output.count('"reused"') == 2


def test_a_killed_reproduction_is_continued(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "birthlens", "reproduce", "diverse-outputs", "--out", str(out), "--processes", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 60
    while not list(out.glob("runs/*/resume.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (path,) = [file.parent for file in out.glob("runs/*/run.json")]
    from birthlens.claims.catalogue import claims_named
    from birthlens.claims.tiers import TIERS
    from birthlens.sweep import Grid, prepare, run_path

    configs = Grid(TIERS["laptop"].config, claims_named(["diverse-outputs"])[0].cases, (0,)).configs()
    (config,) = [config for config in configs.values() if run_path(config, out / "runs") == path]
    assert prepare(config, path).state == "continued"
