"""Three revisions of a tiny GPT-NeoX, in the layout of the hub's cache, go through every command or are refused by name."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from tiny_models import D_VOCAB, saved

from birthlens.analysis.behaviour.head_onsets import head_onsets_table
from birthlens.cli import HOMES, group
from birthlens.errors import BirthlensError
from birthlens.model import hooked
from birthlens.model.directory import load_causal
from birthlens.viz.report.charts import number

STEPS = (0, 1000, 2000)
OPTIONS = {
    "plot": ["--kind", "recall", "--out", "a.png"], "watch": ["--once"], "associations": ["--matrix", "output_memory"],
    "fork": ["new", "--at", "0"], "data-attribution": ["output_memory"],
}  # fmt: skip
"""What commands need that take runs only, and refuse a series by name."""
TAKEN = {
    "scores": ["--batch-size", "4"], "ablate": ["--batch-size", "4", "--methods", "zero"], "attention": ["--length", "8"],
    "order": [], "steps": [], "audit": [], "memories": ["--fold"], "report": ["--quick"],
    "weight-patch": ["--sequences", "4", "--matrices", "L0.mlp"], "logit-split": ["--prompts", "ids.json"],
    "patch": ["--prompts", "ids.json", "--sites", "z"], "edges": ["--prompts", "ids.json", "--edges", "L0H0->L1H0.k"],
}  # fmt: skip
SUBJECTS = {"run", "runs", "subject", "series", "source", "paths"}
"""What commands call the run or the models that they are asked about."""


def commands() -> list[str]:
    """Name the commands that are asked about runs or models."""
    found = {name: group.get_command(None, name) for name in HOMES}
    return sorted(name for name, one in found.items() if one is not None and one.params[0].name in SUBJECTS)


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    place = tmp_path_factory.mktemp("hub") / "models--EleutherAI--pythia-tiny"
    (place / "refs").mkdir(parents=True)
    for step in STEPS:
        snapshot = f"{step + 1:040x}"
        (place / "refs" / f"step{step}").write_text(snapshot)
        saved("neox", place / "snapshots" / snapshot, seed=step)
    return place


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, series: Path) -> Path:
    """The last revision, with a tokenizer of one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    place = shutil.copytree(series / "snapshots" / f"{STEPS[-1] + 1:040x}", tmp_path_factory.mktemp("words") / "m")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(D_VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(place)
    return place


def called(*arguments: Any) -> Any:
    return CliRunner().invoke(group, list(map(str, arguments)))


def printed(*arguments: Any) -> str:
    done = called(*arguments)
    assert done.exit_code == 0, done.exception
    return done.output


def refusal(*arguments: Any) -> str:
    error = called(*arguments).exception
    assert isinstance(error, BirthlensError), (arguments, error)
    return str(error)


@pytest.mark.parametrize("command", commands())
def test_a_series_goes_through_every_command(
    command: str, series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if command not in TAKEN:
        said = refusal(command, series, *OPTIONS.get(command, []))
        assert str(series) in said and "series of model directories" in said
        return
    prompts(Path("ids.json"), PAIRS[1])
    text = printed(command, series, *TAKEN[command])
    if command == "attention":
        text = (tmp_path / "attention.html").read_text()
        assert re.search(r'"steps": ?\[0, ?1000, ?2000\]', text)
    elif command == "report":
        assert "left out on request" in (tmp_path / "report.html").read_text()
    assert text


@pytest.mark.parametrize("command", ["scores", "attention", "memories", "edges"])
def test_one_checkpoint_is_in_memory_at_a_time(
    command: str, series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prompts(Path("ids.json"), PAIRS[1])
    seen: list[Any] = []
    load = hooked.load_pretrained

    def loaded(path: Path) -> Any:
        assert all(sum(tensor.numel() for tensor in model.parameters()) == 0 for model in seen)
        seen.append(load(path))
        return seen[-1]

    monkeypatch.setattr(hooked, "load_pretrained", loaded)
    steps = [] if command == "attention" else ["--steps", "all"]
    printed(command, series, *TAKEN[command], *steps)
    assert len(seen) == len(STEPS)


def test_the_report_shows_the_scores_and_ablations_of_the_series(series: Path, tmp_path: Path) -> None:
    printed("report", series, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count('<figure class="chart">') == 5 and "Nothing is suspicious about the labels" in page
    printed("scores", series, "--steps", "all", "--out", tmp_path / "scores.csv")
    scores = pd.read_csv(tmp_path / "scores.csv").set_index(["step", "head", "score"])["value"]
    for head in ("L0H0", "L0H1", "L1H0", "L1H1"):
        first, last = (number(scores[step, head, "induction"]) for step in (0, 2000))
        assert f"{head} goes from {first} at step 0 to {last} at step 2000" in page
    metric = ["--methods", "mean", "--metrics", "in_context.loss", "--batch-size", "64"]
    printed("ablate", series, "--steps", "all", *metric, "--out", tmp_path / "ablate.csv")
    table = pd.read_csv(tmp_path / "ablate.csv").set_index(["step", "ablated"])["change"]
    first, last = (number(table[step, "L1H1"]) for step in (0, 2000))
    assert f"L1H1 goes from {first} at step 0 to {last} at step 2000" in page
    assert "is one model; a report describes a series" in refusal("report", series / "snapshots" / f"{1:040x}")


def test_onsets_are_found_where_they_were_planted() -> None:
    rows = [
        (step, head, "induction", value, 0.1)
        for head, values in {"late": (0.1, 0.1, 0.35, 0.5), "never": (0.15, 0.1, 0.1, 0.15), "lost": (0.1, 0.9, 0.1, 0.1),
                             "first": (0.9, 0.8, 0.9, 0.7)}.items()
        for step, value in zip((0, 10, 20, 30), values, strict=True)
    ]  # fmt: skip
    table = head_onsets_table(pd.DataFrame(rows, columns=["step", "head", "score", "value", "chance"])).set_index(
        "head"
    )
    assert table["onset"].to_dict() == {"first": 0, "late": 20, "never": np.inf, "lost": np.inf}
    found: dict[Any, Any] = table.to_dict("index")
    assert (found["late"]["before"], found["late"]["peak_step"]) == (10, 30) and np.isnan(found["first"]["before"])
    assert found["late"]["peak"] == pytest.approx(0.4) and found["lost"]["last"] == pytest.approx(0)


def test_the_onsets_of_a_series_are_those_of_its_scores(series: Path, tmp_path: Path) -> None:
    printed("order", series, "--out", tmp_path / "order.csv")
    printed("scores", series, "--steps", "all", "--out", tmp_path / "scores.csv")
    expected = head_onsets_table(pd.read_csv(tmp_path / "scores.csv"))
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "order.csv"), expected, check_dtype=False)
    assert "two checkpoints" in refusal("order", series / "snapshots" / f"{1:040x}")


def prompts(file: Path, *entries: dict[str, Any]) -> Path:
    file.write_text(json.dumps({"prompts": list(entries)}))
    return file


PAIRS = (
    {"text": "w3 w7 w9 w3", "corrupted": "w3 w8 w9 w3", "answer": "w7", "wrong": "w8"},
    {"text": [5, 4, 2, 5], "corrupted": [5, 6, 2, 5], "answer": 4, "wrong": 6},
)


def test_ablations_read_the_logit_difference_of_the_answers(words: Path, tmp_path: Path) -> None:
    file = prompts(tmp_path / "pairs.json", *PAIRS)
    printed(
        "ablate", words, "--prompts", file, "--methods", "zero,resample", "--heads", "L1H1", "--out", tmp_path / "a.csv"
    )
    table = pd.read_csv(tmp_path / "a.csv").set_index(["ablated", "method", "role", "metric"])
    model = load_causal(words)
    model.requires_grad_(False)
    tokens = torch.tensor([[3, 7, 9, 3], [5, 4, 2, 5]])
    right, wrong = torch.tensor([7, 4]), torch.tensor([8, 6])

    def difference() -> float:
        last = model(tokens).logits[:, -1]
        return float((last.gather(1, right[:, None]) - last.gather(1, wrong[:, None])).mean())

    rows: Any = table.loc
    whole = rows["none", "none", "answer", "logit_difference"]
    assert whole["value"] == pytest.approx(difference(), abs=1e-5) and whole["n"] == 2
    model.gpt_neox.layers[1].attention.dense.weight.data[:, 8:] = 0
    cut = rows[("L1H1", "zero", "answer", "logit_difference"), "value"]
    assert cut == pytest.approx(difference(), abs=1e-5) and abs(cut - whole["value"]) > 1e-4


def test_prompts_are_padded_behind_and_shown(words: Path, tmp_path: Path) -> None:
    long = {"text": "w1 w2 w3 w4 w5 w6", "answer": "w2"}
    short = {"text": "w9 w3", "answer": "w7"}
    values = []
    for name, entries in (("both", (short, long)), ("short", (short,)), ("long", (long,))):
        file = prompts(tmp_path / f"{name}.json", *entries)
        printed("ablate", words, "--prompts", file, "--methods", "zero", "--out", tmp_path / f"{name}.csv")
        table = pd.read_csv(tmp_path / f"{name}.csv")
        assert set(table["metric"]) == {"logit", "loss", "accuracy"}
        values.append(table["value"].to_numpy())
    np.testing.assert_allclose(values[0], (values[1] + values[2]) / 2, atol=1e-5)
    both = tmp_path / "both.json"
    assert "different lengths" in refusal("ablate", words, "--prompts", both, "--methods", "mean")
    printed("attention", words, "--prompts", both, "--out", tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert page.count('<figure class="bl-attention"') == 2 and "<bdi>w9</bdi>" in page and "<bdi>w6</bdi>" in page
    printed("attention", words, "--text", "w11 w12", "--out", tmp_path / "b.html")
    assert "<bdi>w12</bdi>" in (tmp_path / "b.html").read_text()


def test_bad_prompts_are_one_sentence(words: Path, series: Path, tmp_path: Path) -> None:
    for entries, message in (
        ((), "holds no prompts"),
        (({"answer": "w1"},), "prompt 1 is {'answer': 'w1'}; write a mapping with text"),
        (({"text": "w1", "answers": 3},), "has the key 'answers'; valid are text, corrupted, answer, wrong"),
        (({"text": "w1"},), "prompt 1 has no answer"),
        (({"text": "w1", "answer": "w1 w2"},), "answer = 'w1 w2' is 2 tokens; answers are one"),
        (({"text": [1, -2], "answer": 1},), "text = [1, -2]; give text or ids"),
        (({"text": [1], "corrupted": [1, 2], "answer": 1},), "has 1 tokens and its corrupted version 2"),
        (({"text": [D_VOCAB], "answer": 1},), "vocabulary ends at 29"),
        (({"text": "w1", "answer": 1},), "not every prompt has one"),
    ):
        file = prompts(tmp_path / "bad.json", *entries)
        methods = "resample" if "not every" in message else "zero"
        assert message in refusal("ablate", words, "--prompts", file, "--methods", methods), message
    file = prompts(tmp_path / "pairs.json", *PAIRS)
    said = refusal("ablate", series, "--prompts", file)
    assert said == f"{file}, prompt 1: text is text, and {series} has no tokenizer; give ids."
    assert f"{series} has no tokenizer" in refusal("attention", series, "--text", "once")
