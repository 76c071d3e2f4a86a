"""`--device` of the analyses: the same tables on another device, products computed there, and what is refused."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from pretend_card import CARD, pretend_card
from tiny_models import saved

from birthlens import devices
from birthlens.analysis.interventions.runner import evaluate
from birthlens.analysis.interventions.scoring import Scoring
from birthlens.cli import group, main
from birthlens.errors import BirthlensError
from birthlens.model.hooks import moved
from birthlens.runs.run import load_run

TINY = ["corpus.source=markov", "corpus.vocabulary=12", "task.context=16", "task.n_triggers=3", "task.cycles=clean",
        "model.d_model=8", "training.steps=6", "training.batch_size=8", "checkpoints.every=3",
        "evaluation.batch_size=8"]  # fmt: skip
KINDS = {
    "simplified": [],
    "full": ["model.family=full", "model.n_heads=2", "model.feed_forward=relu"],
    "rotary": ["model.positions=rotary"],
    "linear": ["model.family=full", "model.attention=linear"],
    "relative": ["model.family=full", "model.positions=relative"],
}
FEW = ["--batch-size", "6"]
METHODS = ["--methods", "zero,mean,mean_position,mean_role,resample,frozen_pattern,dropped_value,uniform_pattern",
           "--components"]  # fmt: skip
CALLS: dict[str, tuple[str, list[str]]] = {
    "ablate": ("simplified", ["ablate", *FEW, *METHODS]),
    "ablate rotary": ("rotary", ["ablate", *FEW, "--methods", "zero,previous_token_pattern"]),
    "ablate linear": ("linear", ["ablate", *FEW, "--methods", "mean,resample"]),
    "ablate relative": ("relative", ["ablate", *FEW, "--methods", "zero"]),
    "ablate models": ("models", ["ablate", *FEW, "--methods", "mean_position", "--steps", "all"]),
    "patch": ("full", ["patch", *FEW, "--draws", "0", "--by", "head,role", "--sites", "z,pattern,resid_pre"]),
    "edges": ("full", ["edges", *FEW, "--draws", "0", "--attribution", "--integration-steps", "2", "--freeze-norms",
                       "--edges", "embed->L0H1.k,L0H1->L1H0.v,L0.mlp->logits"]),
    **{f"scores {kind}": ("full", ["scores", *FEW, "--kind", kind])
       for kind in ("heads", "attention", "transfer", "in-context-learning", "sinks")},
    "weight-patch": ("full", ["weight-patch", "--sequences", "6", "--matrices", "L1.OV"]),
    "weight-patch models": ("models", ["weight-patch", "--sequences", "6", "--matrices", "L0.mlp"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    for kind, words in KINDS.items():
        assert CliRunner().invoke(group, ["train", str(folder / kind), *TINY, *words]).exit_code == 0
    for step in (0, 1):
        saved("neox", folder / "models" / f"step{step}", seed=step)
    return folder


def called(words: list[str], subject: Path, out: Path, *device: str) -> None:
    given = [words[0], str(subject), *words[1:], "--out", str(out), *device]
    done = CliRunner().invoke(group, given, catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("name", CALLS)
def test_tables_are_the_same_on_another_device(
    name: str, subjects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that is not there (`pretend_card`), where every tensor left behind on the CPU is an error."""
    subject, words = CALLS[name]
    called(words, subjects / subject, tmp_path / "here.csv")
    monkeypatch.setattr(devices, "chosen", lambda text, *_, **__: (str(CARD), "asked for"))
    with pretend_card() as card:
        called(words, subjects / subject, tmp_path / "there.csv", "--device", "cuda")
    assert card.products
    compare(tmp_path / "here.csv", tmp_path / "there.csv")


def compare(here: Path, there: Path) -> None:
    one, two = pd.read_csv(here), pd.read_csv(there)
    assert len(one) and list(one) == list(two)
    numbers = one.select_dtypes("number").columns
    pd.testing.assert_frame_equal(one.drop(columns=numbers), two.drop(columns=numbers))
    np.testing.assert_allclose(two[numbers], one[numbers], rtol=2e-3, atol=2e-5)


def test_attention_is_the_same_on_another_device(
    subjects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = []
    for subject in ("full", "models"):
        called(["attention"], subjects / subject, tmp_path / "here.html")
        monkeypatch.setattr(devices, "chosen", lambda text, *_, **__: (str(CARD), "asked for"))
        with pretend_card() as card:
            called(["attention"], subjects / subject, tmp_path / "there.html", "--device", "cuda")
        assert card.products
        monkeypatch.undo()
        pages += [(tmp_path / name).read_text() for name in ("here.html", "there.html")]
    for here, there in (pages[:2], pages[2:]):
        one, two = (levels(page) for page in (here, there))
        assert np.abs(one - two).max() <= 1  # of 65535: rounding


def levels(page: str) -> Any:
    """Read the attention patterns of a page, as numbers from 0 to 65535."""
    data = json.loads(page.split('<script type="application/json">')[1].split("</script>")[0])
    return np.frombuffer(base64.b64decode(data["patterns"]), "<u2").astype(int)


def test_results_name_their_device_and_are_not_continued_on_another(
    subjects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "table.csv"
    called(["ablate", *FEW, "--methods", "zero"], subjects / "simplified", out)
    manifest = tmp_path / "table.csv.suite" / "manifest.json"
    found = json.loads(manifest.read_text())
    assert found.pop("device") == "cpu"
    manifest.write_text(json.dumps(found))  # as before there were devices
    called(["ablate", *FEW, "--methods", "zero"], subjects / "simplified", out)
    monkeypatch.setattr(devices, "chosen", lambda text, *_, **__: (str(CARD), "asked for"))
    with pretend_card(), pytest.raises(BirthlensError, match="its device differ"):
        called(["ablate", *FEW, "--methods", "zero"], subjects / "simplified", out, "--device", "cuda")
    monkeypatch.undo()
    called(["patch", *FEW, "--sites", "z", "--draws", "0"], subjects / "simplified", tmp_path / "patch.csv")
    assert json.loads((tmp_path / "patch.csv.manifest.json").read_text())["device"] == "cpu"


def test_auto_counts_the_operations_of_an_analysis(
    subjects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert devices.chosen("auto", operations=10**13)[0] == "cuda:0"
    words = ["scores", str(subjects / "full"), *FEW, "--device", "auto"]
    said = CliRunner().invoke(group, words, catch_exceptions=False).stderr
    run = load_run(subjects / "full")
    size = sum(run.weights(-1)[name].size for name in run.weights(-1))
    assert f"device cpu: about {2 * size * 6 * 16:.0e} operations are too few to be worth a GPU" in said


@pytest.mark.parametrize("command", ["ablate", "patch", "edges", "scores", "attention", "weight-patch"])
def test_a_missing_device_is_one_sentence(command: str, subjects: Path) -> None:
    with pytest.raises(BirthlensError, match="device = 'cuda:99': this machine has"):
        CliRunner().invoke(
            group, [command, str(subjects / "simplified"), "--device", "cuda:99"], catch_exceptions=False
        )


def test_scores_of_weights_take_no_device(subjects: Path) -> None:
    with pytest.raises(BirthlensError, match="--device: --kind weights reads weights and no sequences"):
        words = ["scores", str(subjects / "simplified"), "--kind", "weights", "--device", "cpu"]
        CliRunner().invoke(group, words, catch_exceptions=False)


def test_too_little_memory_of_a_gpu_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("birthlens.cli.group", full)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "birthlens: out of memory on the GPU; use fewer or shorter sequences, or --device cpu.\n"
    )


def test_a_batch_and_a_model_on_two_devices_are_refused(subjects: Path) -> None:
    run = load_run(subjects / "simplified")
    batch = run.task.batch(2, 0)
    with pretend_card() as _, pytest.raises(BirthlensError, match=r"the batch is on cpu, the model on meta; move one"):
        evaluate(moved(run.model(), CARD), {}, batch, Scoring.of(batch))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")
@pytest.mark.parametrize("name", CALLS)
def test_tables_are_the_same_on_a_gpu(name: str, subjects: Path, tmp_path: Path) -> None:
    subject, words = CALLS[name]
    called(words, subjects / subject, tmp_path / "here.csv")
    called(words, subjects / subject, tmp_path / "there.csv", "--device", "cuda")
    compare(tmp_path / "here.csv", tmp_path / "there.csv")
