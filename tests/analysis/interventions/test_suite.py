"""Suites: plain data in, one durable table out, resumed without doing anything twice."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typed import loc, present

from birthlens.analysis.interventions import suite as suite_module
from birthlens.analysis.interventions.ablation import ablation_table
from birthlens.analysis.interventions.backends import FunctionalBackend, HookedBackend
from birthlens.analysis.interventions.runner import evaluate
from birthlens.analysis.interventions.scoring import Outcomes
from birthlens.analysis.interventions.spec import Intervention, from_json
from birthlens.analysis.interventions.suite import Suite, execute, read_results
from birthlens.config.model import ModelConfig
from birthlens.config.run import CorpusConfig
from birthlens.errors import BirthlensError
from birthlens.model.hooked import build
from birthlens.model.initialisation import initial_weights
from birthlens.model.sites import Head
from birthlens.model.weights import Weights
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.corpus import markov_chain
from birthlens.tasks.positions import repeated_tokens

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
def models() -> list[tuple[int, Weights]]:
    config = ModelConfig(d_model=12)
    return [(step, initial_weights(config, 9, 12, np.random.default_rng(step))) for step in (0, 5, 10)]


@pytest.fixture(scope="module")
def batches() -> tuple[TokenBatch, TokenBatch]:
    first, second = (repeated_tokens(6, 6, 9, np.random.default_rng(seed)) for seed in (0, 1))
    return first, second


@pytest.fixture()
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Count the cases that are really evaluated."""
    seen = []

    def counting(model: FunctionalBackend | HookedBackend, cases: dict[str, Any], *rest: Any) -> Outcomes:
        seen.append(list(cases))
        return evaluate(model, cases, *rest)

    monkeypatch.setattr(suite_module, "evaluate", counting)
    return seen


def test_one_table_and_a_manifest(
    models: list[tuple[int, Weights]], batches: tuple[TokenBatch, TokenBatch], tmp_path: Path
) -> None:
    suite, seen = Suite.from_data(DATA), []
    table = execute(suite, models, *batches, tmp_path, {"run": "here"}, chunk=2, progress=lambda *at: seen.append(at))
    assert [step for step, share in seen if share == 1] == [0, 5, 10]
    for one in (0, 5, 10):  # within a step, too: after every chunk of sequences
        shares = [share for step, share in seen if step == one]
        assert shares == sorted(shares) and len(shares) == 3 + 1
    assert list(dict.fromkeys(table["case"])) == [
        "none", "L0H0 zero", "L0H0 resample", "L1H0 zero", "L1H0 resample", "keys cut", "even",
    ]  # fmt: skip
    assert len(table) == 3 * 7 * 2
    direct = ablation_table(models, *batches, methods=("zero", "resample"), metrics=present(suite.metrics), draws=30)
    ours = table[~table["case"].isin(["keys cut", "even"])]
    for column in ("value", "change", "low", "high", "change_low", "change_high"):
        np.testing.assert_allclose(ours[column], direct[column], atol=1e-6)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["subject"] == {"run": "here"} and manifest["suite"]["seed"] == 0
    assert Suite.from_data(manifest["suite"]) == suite
    spelled = manifest["interventions"]
    assert list(map(from_json, spelled["L1H0 resample"])) == [Intervention("z", "resample", heads=(Head(1, 0),))]
    assert len(spelled) == 6 and spelled["even"][0]["method"] == "uniform"
    labels = table[["case", "ablated", "method"]].drop_duplicates().set_index("case")
    assert loc(labels)["none"].tolist() == ["none", "none"]
    assert loc(labels)["L1H0 resample"].tolist() == ["L1H0", "resample"]
    assert loc(labels)["keys cut"].tolist() == ["keys cut", "mean"]
    assert manifest["batch"]["sequences"] == 6 and len(manifest["batch"]["sha256"]) == 64
    assert manifest["versions"]["torch"] and manifest["versions"]["transformer-lens"]


def test_an_interrupted_suite_does_only_what_is_missing(
    models: list[tuple[int, Weights]],
    batches: tuple[TokenBatch, TokenBatch],
    tmp_path: Path,
    counted: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = execute(Suite.from_data(DATA), models, *batches, tmp_path / "whole")
    counted.clear()
    monkeypatch.setattr(suite_module, "GROUP", 2)

    def stop(step: int, share: float) -> None:
        if share == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(Suite.from_data(DATA), models, *batches, tmp_path / "cut", progress=stop)
    # Cut short in the middle of the second checkpoint, too: half of its cases are done.
    part = json.loads((tmp_path / "cut/steps/0.json").read_text())
    part["rows"] = [row for row in part["rows"] if row["case"] in ("none", "L0H0 zero", "L0H0 resample")]
    (tmp_path / "cut/steps/0.json").write_text(json.dumps(part))
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


@pytest.mark.parametrize("live", [False, True])
def test_another_model_in_the_same_place_is_measured_anew(
    models: list[tuple[int, Weights]],
    batches: tuple[TokenBatch, TokenBatch],
    tmp_path: Path,
    counted: list[Any],
    live: bool,
) -> None:
    suite = Suite.from_data(DATA | {"draws": 0})
    first, second = (build(models[number][1]) if live else models[number][1] for number in (0, 1))
    before = execute(suite, [(0, first), (5, second)], *batches, tmp_path, {"model": "here"})
    counted.clear()
    after = execute(suite, [(0, second), (5, second)], *batches, tmp_path, {"model": "here"})
    assert len(counted) == 1  # step 5 holds the same weights as before
    assert not np.allclose(before["value"][before["step"] == 0], after["value"][after["step"] == 0])
    np.testing.assert_array_equal(after["value"][after["step"] == 0], after["value"][after["step"] == 5])
    assert execute(suite, [(0, second), (5, second)], *batches, tmp_path, {"model": "here"}).equals(after)


def test_global_bigrams_are_read_where_they_are_known(
    models: list[tuple[int, Weights]], batches: tuple[TokenBatch, TokenBatch], tmp_path: Path
) -> None:
    statistics = markov_chain(CorpusConfig(source="markov", vocabulary=9))
    suite = Suite.from_data({"heads": "L0H0", "methods": ["zero"], "draws": 0})
    without = execute(suite, models[:1], *batches, tmp_path / "without")
    table = execute(suite, models[:1], *batches, tmp_path / "with", statistics=statistics)
    assert set(table["metric"]) - set(without["metric"]) == {"kl"}
    manifest = json.loads((tmp_path / "with/manifest.json").read_text())
    assert "global.kl" in manifest["suite"]["metrics"]


@pytest.mark.parametrize("text", ["", '{"model"', "{}", "[]", '{"model": "x", "rows": [3]}', '{"rows": 5}'])
def test_damaged_results_are_named(
    models: list[tuple[int, Weights]], batches: tuple[TokenBatch, TokenBatch], tmp_path: Path, text: str
) -> None:
    suite = Suite.from_data({"heads": "L0H0", "methods": ["zero"], "draws": 0})
    execute(suite, models[:1], *batches, tmp_path)
    (tmp_path / "steps/0.json").write_text(text)
    for again in (lambda: execute(suite, models[:1], *batches, tmp_path), lambda: read_results(tmp_path)):
        with pytest.raises(BirthlensError, match=r"steps/0\.json is damaged.*delete it"):
            again()
    (tmp_path / "manifest.json").write_text(text[:1])
    with pytest.raises(BirthlensError, match=r"manifest\.json is damaged.*delete it"):
        execute(suite, models[:1], *batches, tmp_path)


def test_a_file_is_no_results_directory(
    models: list[tuple[int, Weights]], batches: tuple[TokenBatch, TokenBatch], tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(BirthlensError, match="cannot be created as a directory"):
        execute(Suite.from_data(DATA), models, *batches, tmp_path / "taken")
    with pytest.raises(BirthlensError, match="no checkpoint"):
        execute(Suite.from_data(DATA), [], *batches, tmp_path / "new")
    assert (tmp_path / "taken").read_text() == "mine" and not (tmp_path / "new").exists()


def test_a_longer_run_adds_its_steps(
    models: list[tuple[int, Weights]], batches: tuple[TokenBatch, TokenBatch], tmp_path: Path, counted: list[Any]
) -> None:
    suite = Suite.from_data(DATA)
    execute(suite, models[:1], *batches, tmp_path)
    table = execute(suite, models, *batches, tmp_path)
    assert len(counted) == 3 and sorted(set(table["step"])) == [0, 5, 10]


def test_results_of_another_suite_are_not_touched(
    models: list[tuple[int, Weights]], batches: tuple[TokenBatch, TokenBatch], tmp_path: Path
) -> None:
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
        ({}, "has no intervention"),
        ({"heads": "L7H0"}, "valid are L0H0, L1H0"),
        ({"heads": "all", "methods": ["crush"]}, "valid are zero, mean"),
        ({"cases": ["z"]}, "map each case's name"),
        ({"cases": {"a": [{"site": "mind", "method": "zero"}]}}, "valid are embed"),
        ({"cases": {"none": [{"site": "embed", "method": "zero"}]}}, "choose another"),
        ({"heads": "all", "metrics": ["in_context.joy"]}, "must be one of accuracy"),
        ({"heads": ["L0H0"]}, r"suite.heads = \['L0H0'\]: expected str"),
        ({"heads": 3}, "suite.heads = 3"),
        ({"heads": "all", "methods": 3}, "suite.methods = 3: expected list"),
        ({"heads": "all", "methods": None}, "suite.methods = None"),
        ({"heads": "all", "methods": "zero"}, "suite.methods = 'zero': expected list"),
        ({"heads": "all", "methods": [1]}, "suite.methods.0 = 1: expected str"),
        ({"heads": "all", "metrics": []}, "suite.metrics = .*length >= 1"),
        ({"heads": "all", "metrics": [3]}, "suite.metrics.0 = 3"),
        ({"heads": "all", "draws": "many"}, "suite.draws = 'many'"),
        ({"heads": "all", "draws": -3}, "suite.draws = -3"),
        ({"heads": "all", "draws": 2.5}, "suite.draws = 2.5"),
        ({"heads": "all", "seed": -1}, "suite.seed = -1"),
        ({"heads": "all", "seed": "abc"}, "suite.seed = 'abc'"),
        ({"heads": "all", "seed": 1.5}, "suite.seed = 1.5"),
        ({"heads": "all", "seed": True}, "suite.seed = True"),
        ({"heads": "all", "components": "no"}, "suite.components = 'no'"),
        ({"name": 5, "heads": "all"}, "suite.name = 5"),
        ({"cases": {"a": "z"}}, "map each case's name"),
        ({"cases": None}, "map each case's name"),
        ({"cases": {"a": [5]}}, "intervention = 5: it must map fields"),
        ({"cases": {"a": ["z"]}}, "intervention = 'z': it must map fields"),
        ({"cases": {"a": []}}, "suite.cases.a = .*at least one intervention"),
        ({"cases": {"a": [{"edge": 5, "method": "zero"}]}}, "edge = 5 is not an edge"),
        ({"cases": {"a": [{"edge": "L0H0->L1.mlp", "method": "zero"}]}}, "no L1.mlp; valid receivers are L0H0.q"),
        (
            {"heads": "all", "cases": {"L0H0 zero": [{"site": "embed", "method": "zero"}]}},
            "a case of heads or components",
        ),
        ({3: "x", "heads": "all"}, "suite.3 = 'x' is unknown"),
    ],
)
def test_bad_suites_are_refused(
    models: list[tuple[int, Weights]],
    batches: tuple[TokenBatch, TokenBatch],
    tmp_path: Path,
    data: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(BirthlensError, match=message):
        execute(Suite.from_data(data), models, *batches, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_reading_nothing(tmp_path: Path) -> None:
    with pytest.raises(BirthlensError, match="holds no results"):
        read_results(tmp_path)


def test_a_manifest_of_an_earlier_form_is_continued_and_other_versions_are_named(
    models: Any, batches: Any, tmp_path: Path, counted: Any
) -> None:
    execute(Suite.from_data(DATA), models[:1], batches[0], batches[1], tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    # Earlier manifests held no machine and no numba.
    earlier = {
        name: manifest["versions"][name] for name in ("python", "birthlens", "torch", "transformer-lens", "numpy")
    }
    path.write_text(json.dumps(manifest | {"versions": earlier}))
    counted.clear()
    execute(Suite.from_data(DATA), models[:1], batches[0], batches[1], tmp_path)
    assert counted == []
    path.write_text(json.dumps(manifest | {"versions": earlier | {"torch": "1.0"}}))
    with pytest.raises(BirthlensError, match=r"made with other versions \(torch was 1.0, is "):
        execute(Suite.from_data(DATA), models[:1], batches[0], batches[1], tmp_path)


TRUNCATED = {
    "name": "truncated",
    "cases": {
        "low": [{"matrix": "L1.W_O", "method": "rank:2"}],
        "rest of two": [
            {"matrix": "L1.W_O", "method": "without_rank:2"},
            {"matrix": "L0.W_K", "method": "without_rank:1"},
        ],
        "change": [{"matrix": "L1.W_O", "method": "change_rank:1"}],
        "head": [{"site": "z", "method": "zero", "layer": 1}],
    },
    "metrics": ["in_context.loss"],
    "draws": 20,
}


def without(matrix: Any, rank: int) -> Any:
    """A matrix less its largest singular components, by eigenvectors of W^T W."""
    _, vectors = np.linalg.eigh(matrix.T @ matrix)
    return matrix - matrix @ vectors[:, -rank:] @ vectors[:, -rank:].T


def test_matrices_are_truncated_at_every_checkpoint(
    models: list[tuple[int, Weights]], batches: tuple[TokenBatch, TokenBatch], tmp_path: Path
) -> None:
    suite = Suite.from_data(TRUNCATED)
    assert Suite.from_data(suite.to_data()) == suite
    initial = models[0][1]
    table = execute(suite, models, *batches, tmp_path, initial=initial).set_index(["step", "case"])
    batch = batches[0]
    for step, weights in models:
        wide = {name: weights[name][0].astype(np.float64) for name in ("L1.W_O", "L0.W_K")}
        change = wide["L1.W_O"] - initial["L1.W_O"][0]
        by_hand = {
            "none": {},
            "low": {"L1.W_O": wide["L1.W_O"] - without(wide["L1.W_O"], 2)},
            "rest of two": {"L1.W_O": without(wide["L1.W_O"], 2), "L0.W_K": without(wide["L0.W_K"], 1)},
            "change": {"L1.W_O": wide["L1.W_O"] - without(change, 1)},
            "head": {"L1.W_O": 0 * wide["L1.W_O"]},
        }
        for case, changed in by_hand.items():
            replaced = weights.replaced({name: matrix[None].astype(np.float32) for name, matrix in changed.items()})
            losses = torch.nn.functional.cross_entropy(
                build(replaced)(batch.tokens).mT, batch.targets, reduction="none"
            )[batch.in_context]
            assert table["value"][step, case] == pytest.approx(losses.mean().item(), abs=2e-5), (step, case)
    assert table["method"][5, "rest of two"] == "without_rank:2+without_rank:1"
    assert (table["change_low"] <= table["change"] + 1e-9).all() and (
        table["change"] <= table["change_high"] + 1e-9
    ).all()
    assert table["change"][10, "low"] != 0 != table["change"][10, "change"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ([{"matrix": "L1.W_O", "method": "half"}], "method = 'half': a matrix is truncated by rank:R, without_rank:R"),
        ([{"matrix": "L9.W_O", "method": "rank:1"}], "matrix = 'L9.W_O' does not exist; valid are W_E, W_pos, L0.W_Q"),
        ([{"matrix": "L1.W_O", "method": "rank:99"}], "write rank:R with R from 1 to 12"),
        ([{"matrix": "L1.W_O", "method": "change_rank:1"}], "give the initial weights"),
        ([{"matrix": "L1.W_O", "method": "rank:1", "layer": 1}], "a matrix has a method and nothing else"),
        ([{"matrix": "L1.W_O", "method": "rank:1"}, {"site": "embed", "method": "zero"}], "not both"),
    ],
)
def test_truncations_that_cannot_be_are_refused(
    case: Any, message: str, models: list[tuple[int, Weights]], batches: tuple[TokenBatch, TokenBatch], tmp_path: Path
) -> None:
    with pytest.raises(BirthlensError) as error:
        execute(Suite.from_data({"cases": {"x": case}, "draws": 0}), models, *batches, tmp_path)
    assert message in str(error.value) and str(error.value).count("\n") == 0


def test_live_models_have_no_matrices_to_truncate(
    models: list[tuple[int, Weights]], batches: tuple[TokenBatch, TokenBatch], tmp_path: Path
) -> None:
    with pytest.raises(BirthlensError, match="matrices are truncated in the checkpoints of a run only"):
        execute(Suite.from_data(TRUNCATED), [(0, build(models[0][1]))], *batches, tmp_path)
