"""Suites: plain data in, one durable table out, resumed without doing anything twice."""

import json

import numpy as np
import pytest

from birthlens.analysis import suite as suite_module
from birthlens.analysis.ablation import ablation_table
from birthlens.analysis.batches import repeated_tokens
from birthlens.analysis.suite import Suite, execute, read_results
from birthlens.architecture import ModelConfig
from birthlens.errors import BirthlensError
from birthlens.initialisation import initial_weights

DATA = {
    "name": "mixed",
    "heads": "all",
    "methods": ["zero", "resample"],
    "cases": {
        "keys cut": [{"edge": "L0H0->L1H0.k", "method": "mean"}],
        "even": [{"site": "pattern", "method": "uniform", "layer": 1}],
    },
    "metrics": ["in_context.loss", "in_context.accuracy"],
    "draws": 30,
}


@pytest.fixture(scope="module")
def models():
    config = ModelConfig(d_model=12)
    return [(step, initial_weights(config, 9, 12, np.random.default_rng(step))) for step in (0, 5, 10)]


@pytest.fixture(scope="module")
def batches():
    return [repeated_tokens(6, 6, 9, np.random.default_rng(seed)) for seed in (0, 1)]


@pytest.fixture()
def counted(monkeypatch):
    """Count the cases that are really evaluated."""
    seen = []
    evaluate = suite_module.evaluate

    def counting(model, cases, *rest):
        seen.append(list(cases))
        return evaluate(model, cases, *rest)

    monkeypatch.setattr(suite_module, "evaluate", counting)
    return seen


def test_one_table_and_a_manifest(models, batches, tmp_path):
    suite, steps = Suite.from_data(DATA), []
    table = execute(suite, models, *batches, tmp_path, {"run": "here"}, progress=steps.append)
    assert steps == [0, 5, 10]
    assert list(dict.fromkeys(table["case"])) == [
        "none", "L0H0 zero", "L0H0 resample", "L1H0 zero", "L1H0 resample", "keys cut", "even",
    ]  # fmt: skip
    assert len(table) == 3 * 7 * 2
    direct = ablation_table(models, *batches, methods=("zero", "resample"), metrics=suite.metrics, draws=30)
    ours = table[~table["case"].isin(["keys cut", "even"])]
    for column in ("value", "change", "low", "high", "change_low", "change_high"):
        np.testing.assert_allclose(ours[column], direct[column], atol=1e-6)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["subject"] == {"run": "here"} and manifest["suite"]["seed"] == 0
    assert Suite.from_data(manifest["suite"]) == suite
    assert manifest["batch"]["sequences"] == 6 and len(manifest["batch"]["sha256"]) == 64
    assert manifest["versions"]["torch"] and manifest["versions"]["transformer-lens"]


def test_an_interrupted_suite_does_only_what_is_missing(models, batches, tmp_path, counted, monkeypatch):
    whole = execute(Suite.from_data(DATA), models, *batches, tmp_path / "whole")
    counted.clear()
    monkeypatch.setattr(suite_module, "GROUP", 2)

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(Suite.from_data(DATA), models, *batches, tmp_path / "cut", progress=stop)
    # Cut short in the middle of the second checkpoint, too: half of its cases are done.
    rows = json.loads((tmp_path / "cut/steps/0.json").read_text())
    kept = [row for row in rows if row["case"] in ("none", "L0H0 zero", "L0H0 resample")]
    (tmp_path / "cut/steps/0.json").write_text(json.dumps(kept))
    counted.clear()
    resumed = execute(Suite.from_data(DATA), models, *batches, tmp_path / "cut")
    assert sorted([*counted[0], *counted[1]]) == sorted(["L1H0 zero", "L1H0 resample", "keys cut", "even"])
    assert len(counted) == 2 + 3 + 3
    numbers = ["value", "change", "low", "high", "change_low", "change_high"]
    np.testing.assert_allclose(resumed[numbers], whole[numbers], atol=1e-6)
    assert resumed[["step", "case", "role", "metric", "n"]].equals(whole[["step", "case", "role", "metric", "n"]])
    counted.clear()
    again = execute(Suite.from_data(DATA), models, *batches, tmp_path / "cut")
    assert counted == [] and again.equals(resumed)
    assert read_results(tmp_path / "cut").equals(resumed)


def test_a_longer_run_adds_its_steps(models, batches, tmp_path, counted):
    suite = Suite.from_data(DATA)
    execute(suite, models[:1], *batches, tmp_path)
    table = execute(suite, models, *batches, tmp_path)
    assert len(counted) == 3 and sorted(set(table["step"])) == [0, 5, 10]


def test_results_of_another_suite_are_not_touched(models, batches, tmp_path):
    execute(Suite.from_data(DATA), models[:1], *batches, tmp_path)
    before = (tmp_path / "steps/0.json").read_bytes()
    for other, subject in ((DATA | {"seed": 1}, {}), (DATA, {"run": "elsewhere"})):
        with pytest.raises(BirthlensError, match="choose another directory"):
            execute(Suite.from_data(other), models, *batches, tmp_path, subject)
    with pytest.raises(BirthlensError, match="batch differ"):
        execute(Suite.from_data(DATA), models, batches[1], batches[1], tmp_path)
    assert (tmp_path / "steps/0.json").read_bytes() == before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"colour": "red"}, "valid keys are name, heads"),
        ({}, "names no intervention"),
        ({"heads": "L7H0"}, "valid are L0H0, L1H0"),
        ({"heads": "all", "methods": ["crush"]}, "valid are zero, mean"),
        ({"cases": ["z"]}, "map each case's name"),
        ({"cases": {"a": [{"site": "mind", "method": "zero"}]}}, "valid are embed"),
        ({"cases": {"none": [{"site": "embed", "method": "zero"}]}}, "choose another"),
        ({"heads": "all", "metrics": ["in_context.joy"]}, "must be one of accuracy"),
    ],
)
def test_bad_suites_are_refused(models, batches, tmp_path, data, message):
    with pytest.raises(BirthlensError, match=message):
        execute(Suite.from_data(data), models, *batches, tmp_path)


def test_reading_nothing(tmp_path):
    with pytest.raises(BirthlensError, match="holds no results"):
        read_results(tmp_path)
