"""The causal commands: their tables, what travels with them, and what they refuse."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner

from birthlens.analysis.interventions.spec import from_json
from birthlens.cli import group, main
from birthlens.cli.scoring import SCORE_KINDS

TINY = ["corpus.source=markov", "corpus.vocabulary=12", "task.context=24", "task.n_triggers=3", "task.cycles=clean",
        "model.d_model=16", "training.steps=8", "training.batch_size=8", "checkpoints.every=4",
        "evaluation.batch_size=8"]  # fmt: skip
RUNS = {
    "RUN": [],
    "ROTARY": ["model.positions=rotary"],
    "ONE": ["model.n_layers=1"],
    "FULL": ["model.family=full", "model.n_heads=2", "model.feed_forward=relu"],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("causal")
    for name, overrides in RUNS.items():
        done = CliRunner().invoke(group, ["train", str(folder / name), *TINY, *overrides])
        assert done.exit_code == 0, done.output
    (folder / "MODEL").mkdir()
    (folder / "MODEL/config.json").write_text("{}")
    (folder / "SUITE.yaml").write_text("heads: L0H0\nmethods: [zero]\n")
    (folder / "TAKEN.csv.suite").write_text("mine")
    return folder


@pytest.fixture()
def table(places: Any, tmp_path: Path) -> Any:
    """Run a command and read the table it writes."""

    def run(*arguments: Any) -> Any:
        out = tmp_path / "table.csv"
        words = [str(places / word) if word in (*RUNS, "SUITE.yaml") else word for word in arguments]
        done = CliRunner().invoke(group, [*words, "--out", str(out)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return pd.read_csv(out, keep_default_na=False, na_values=[""])

    return run


def test_ablate_says_what_is_ablated_and_how(table: Any, tmp_path: Path) -> None:
    found = table("ablate", "RUN", "--methods", "zero,mean_role", "--components", "--batch-size", "12")
    labels = found[["case", "ablated", "method"]].drop_duplicates()
    assert labels["ablated"].tolist() == [
        "none",
        "L0H0",
        "L0H0",
        "L1H0",
        "L1H0",
        "embed",
        "pos_embed",
        "embed",
        "pos_embed",
    ]
    assert labels["method"].tolist()[:3] == ["none", "zero", "mean_role"]
    assert {"kl", "accuracy", "loss"} <= set(found["metric"])
    manifest = json.loads((tmp_path / "table.csv.suite/manifest.json").read_text())
    assert [str(one) for one in map(from_json, manifest["interventions"]["L1H0 mean_role"])] == ["z L1H0 mean_role"]


def test_a_suite_says_everything_but_where_and_how_many(table: Any) -> None:
    assert set(table("ablate", "RUN", "--suite", "SUITE.yaml", "--batch-size", "8")["case"]) == {"none", "L0H0 zero"}


def test_patch_travels_with_its_manifest(table: Any, tmp_path: Path) -> None:
    found = table("patch", "RUN", "--sites", "z,q", "--by", "head,role", "--metrics", "loss,logit", "--draws", "20")
    assert set(found["metric"]) == {"loss", "logit"} and len(found) == 2 * 2 * 5 * 2
    assert (found["recovered_low"] <= found["recovered_high"]).all()
    manifest = json.loads((tmp_path / "table.csv.manifest.json").read_text())
    assert manifest["patch"]["corruption"] == "other_outputs" and manifest["patch"]["steps"] == [8]
    assert manifest["subject"]["config"]["task"]["n_triggers"] == 3 and manifest["versions"]["torch"]
    assert len(manifest["interventions"]) == 2 * 2 * 5
    assert str(from_json(manifest["interventions"][0])) == "z L0H0 patch at first_occurrence"
    assert manifest["clean"]["sha256"] != manifest["corrupted"]["sha256"]


def test_edges_with_frozen_norms_and_more_integration_steps(table: Any, tmp_path: Path) -> None:
    words = ("edges", "FULL", "--edges", "L0H1->L1H0.k, embed->logits", "--attribution", "--integration-steps", "3")
    loose, frozen = table(*words), table(*words, "--freeze-norms", "--metrics", "loss")
    assert {"attribution_0", "attribution_3_error", "recovered_low"} <= set(loose) and set(frozen["metric"]) == {"loss"}
    frozen_difference = table(*words, "--freeze-norms")
    assert (loose["value"] - frozen_difference["value"]).abs().max() > 1e-6
    manifest = json.loads((tmp_path / "table.csv.manifest.json").read_text())
    assert manifest["edges"]["attribution"] == [0, 3]
    sites = [one.get("site", "edge") for one in manifest["interventions"]["embed->logits"]]
    assert sites == ["edge", "ln1.scale", "ln2.scale", "ln1.scale", "ln2.scale", "ln_final.scale"]
    births = table("edges", "RUN", "--births", "--steps", "all", "--draws", "10")
    assert births.columns.tolist() == ["edge", "metric", "born", "peak", "peak_step", "last", "counted_from"]


def test_steps_are_taken_once(table: Any) -> None:
    assert len(table("edges", "RUN", "--edges", "embed->logits", "--steps", "8,8,-1")) == 1


def test_every_column_is_explained(table: Any) -> None:
    page = (Path(__file__).parents[2] / "docs/tables.md").read_text()
    explained = set(re.findall(r"`(\w+)`", page)) | {"attribution_8", "recovered_low", "recovered_high"}
    asked = [["ablate", "RUN", "--components"], ["patch", "RUN"], ["edges", "RUN", "--attribution"],
             ["edges", "RUN", "--births", "--steps", "all"],
             *(["scores", "RUN", "--kind", kind] for kind in SCORE_KINDS)]  # fmt: skip
    for words in asked:
        size = () if {"weights", "composition"} & set(words) else ("--batch-size", "8")
        found = table(*words, *size)
        assert set(found.columns) <= explained, set(found.columns) - explained
        named = {name for column in ("metric", "method", "score", "probe") if column in found for name in found[column]}
        assert named <= explained, named - explained
        assert "docs/tables.md" in CliRunner().invoke(group, [words[0], "--help"]).output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["edges", "RUN", "--edges", "pos_embed->L1.mlp"], ["no L1.mlp", "valid receivers are L0H0.q"]),
        (["edges", "RUN", "--edges", "L0.mlp->logits"], ["no L0.mlp", "valid senders are embed"]),
        (["edges", "RUN", "--edges", ","], ["--edges = ',' names nothing"]),
        (["edges", "ROTARY", "--edges", "pos_embed->logits"], ["no pos_embed", "valid senders are embed, L0H0"]),
        (["edges", "RUN", "--integration-steps", "4"], ["--integration-steps", "--attribution"]),
        (["edges", "RUN", "--metrics", "joy"], ["metric = 'scored.joy'", "accuracy, loss"]),
        (["edges", "MODEL"], ["takes a run", "--prompts"]),
        (["patch", "MODEL"], ["takes a run", "--prompts"]),
        (["patch", "RUN", "--sites", "mlp_out"], ["has no feed-forward", "valid are embed"]),
        (["patch", "RUN", "--sites", ","], ["--sites = ',' names nothing"]),
        (["patch", "ROTARY", "--sites", "pos_embed"], ["adds no positions", "valid are embed, resid_pre"]),
        (["ablate", "RUN", "--metrics", ","], ["--metrics = ',' names nothing"]),
        (["ablate", "RUN", "--methods", ","], ["--methods = ',' names nothing"]),
        (["ablate", "ONE", "--heads", "pairs"], ["only one head, L0H0"]),
        (["ablate", "RUN", "--steps", "every:0"], ["steps = 'every:0'", "at least 1"]),
        (["ablate", "RUN", "--steps", "every:-3"], ["at least 1"]),
        (["ablate", "RUN", "--steps", "every:x"], ["write all, last, every:N"]),
        (["ablate", "RUN", "--suite", "SUITE.yaml", "--seed", "0"], ["--seed", "the suite's file says this"]),
        (["ablate", "RUN", "--suite", "SUITE.yaml", "--heads", "all", "--components"], ["--heads, --components"]),
        (["ablate", "RUN", "--out", "TAKEN.csv"], ["TAKEN.csv.suite cannot be created as a directory"]),
    ],
)
def test_bad_questions_are_one_sentence_and_status_2(
    places: Any, arguments: Any, words: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = (*RUNS, "MODEL", "SUITE.yaml", "TAKEN.csv")
    arguments = [str(places / word) if word in files else word for word in arguments]
    before = sorted(places.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["birthlens", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error
    assert all(word in error for word in words), error
    assert sorted(places.rglob("*")) == before
