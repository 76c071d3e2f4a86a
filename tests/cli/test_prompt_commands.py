"""Prompts of a user, for runs with byte pairs and for model directories: patches, edges, logit splits and patterns."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from tiny_models import D_VOCAB, saved

from birthlens.analysis.behaviour.decomposition import logit_split_table
from birthlens.cli import group
from birthlens.errors import BirthlensError
from birthlens.model.directory import load_causal
from birthlens.model.hooked import build
from birthlens.runs.run import Run, load_run
from birthlens.tasks.tokenizing import encoded

WORDS = "the cat sat on the mat and the dog sat on the log while a cat and a dog ran to the mat. " * 12
SENTENCES = (
    {"text": "the cat and the", "corrupted": "the dog and the", "answer": " cat", "wrong": " dog"},
    {"text": "the mat and the", "corrupted": "the dog and the", "answer": " mat", "wrong": " dog"},
)
IDS = (
    {"text": [3, 7, 9, 3], "corrupted": [3, 8, 9, 3], "answer": 7, "wrong": 8},
    {"text": [5, 4, 2, 5], "corrupted": [5, 6, 2, 5], "answer": 4, "wrong": 6},
)
TINY = ["task.context=16", "task.vocabulary=40", "task.held_out=0.2", "corpus.source=text", "corpus.path=words.txt",
        "model.d_model=16", "model.n_heads=2", "training.steps=4", "training.batch_size=4",
        "evaluation.batch_size=4"]  # fmt: skip


def called(*arguments: Any) -> Any:
    return CliRunner().invoke(group, list(map(str, arguments)))


def refusal(*arguments: Any) -> str:
    error = called(*arguments).exception
    assert isinstance(error, BirthlensError), (arguments, error)
    return str(error)


def table(place: Path, *arguments: Any) -> pd.DataFrame:
    out = place / "table.csv"
    done = called(*arguments, "--out", out)
    assert done.exit_code == 0, done.exception
    return pd.read_csv(out)


def prompts(file: Path, *entries: dict[str, Any]) -> Path:
    file.write_text(json.dumps({"prompts": list(entries)}))
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny text run whose byte pairs are whole words."""
    place = tmp_path_factory.mktemp("prompts")
    (place / "words.txt").write_text(WORDS)
    words = [word.replace("words.txt", str(place / "words.txt")) for word in TINY]
    done = called("train", place / "run", "--preset", "text", *words)
    assert done.exit_code == 0, done.exception
    return load_run(place / "run")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of a tiny GPT-NeoX without a tokenizer."""
    place = tmp_path_factory.mktemp("models") / "series"
    for step in (1, 2):
        saved("neox", place / f"step{step}", seed=step)
    return place


def batches(run: Run) -> list[torch.Tensor]:
    """Return the clean and corrupted sentences, and the right and wrong answers."""
    ids = [[encoded(run.statistics, str(one[key])) for one in SENTENCES] for key in ("text", "corrupted")]
    answers = [[encoded(run.statistics, str(one[key]))[0] for one in SENTENCES] for key in ("answer", "wrong")]
    return [torch.tensor(values) for values in (*ids, *answers)]


def difference(logits: torch.Tensor, right: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
    last = logits[:, -1]
    return (last.gather(1, right[:, None]) - last.gather(1, wrong[:, None]))[:, 0]


def last_inputs(module: torch.nn.Module) -> list[torch.Tensor]:
    """Keep what a module is given at the last position, call by call."""
    kept: list[torch.Tensor] = []
    module.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0][:, -1].detach()))
    return kept


def test_a_run_is_patched_between_sentences(run: Run, tmp_path: Path) -> None:
    file = prompts(tmp_path / "pairs.json", *SENTENCES)
    found = table(tmp_path, "patch", run.path, "--prompts", file, "--sites", "z,resid_pre", "--by", "head,position")
    clean, corrupted, right, wrong = batches(run)
    model = build(run.weights(run.steps[-1]))
    _, cache = model.run_with_cache(clean)

    def given(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value[:, 2, 1] = cache[hook.name][:, 2, 1]
        return value

    with torch.no_grad():
        patched = model.run_with_hooks(corrupted.clone(), fwd_hooks=[("blocks.0.attn.hook_z", given)])
        ends = [float(difference(model(tokens), right, wrong).mean()) for tokens in (corrupted, clean)]
    row = found.query("site == 'z' and head == 'L0H1' and position == 2").iloc[0]
    assert (row["metric"], row["n"]) == ("logit_difference", 2)
    assert row["value"] == pytest.approx(float(difference(patched, right, wrong).mean()), abs=1e-5)
    assert [row["corrupted"], row["clean"]] == pytest.approx(ends, abs=1e-5)
    changed = (clean != corrupted).any(0).numpy()
    carried = found.query("site == 'resid_pre' and layer == 0").set_index("position")["recovered"]
    assert carried[changed].tolist() == pytest.approx([1]) and np.abs(carried[~changed]).max() < 1e-4
    manifest = json.loads((tmp_path / "table.csv.manifest.json").read_text())
    assert manifest["patch"]["prompts"][0]["answer"] == int(right[0])


def test_edges_of_a_series_are_patched_between_prompts(models: Path, tmp_path: Path) -> None:
    file = prompts(tmp_path / "pairs.json", *IDS)
    edges = [f"{sender}->logits" for sender in ("embed", "L0H0", "L0H1", "L0.mlp", "L1H0", "L1H1", "L1.mlp")]
    options = ["--steps", "all", "--freeze-norms", "--attribution", "--integration-steps", "1", "--draws", "0"]
    found = table(tmp_path, "edges", models, "--prompts", file, "--edges", ",".join(edges), *options)
    assert found["step"].unique().tolist() == [1, 2]
    # With the divisors held, what the edges into the logits recover adds up, and gradients give it exactly.
    np.testing.assert_allclose(found["attribution_0"], found["recovered"], atol=1e-3)
    for step, rows in found.groupby("step"):
        model = load_causal(models / f"step{step}")
        norm = model.gpt_neox.final_layer_norm
        right, wrong = torch.tensor([7, 4]), torch.tensor([8, 6])
        streams = last_inputs(norm)
        with torch.no_grad():
            ends = [
                difference(model(torch.tensor([one[key] for one in IDS])).logits, right, wrong)
                for key in ("text", "corrupted")
            ]
            clean, corrupted = streams
            scale = (corrupted.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
            moved = clean - corrupted
            out = model.get_output_embeddings()((moved - moved.mean(-1, keepdim=True)) / scale * norm.weight)
        expected = (difference(out[:, None], right, wrong).mean() / (ends[0] - ends[1]).mean()).item()
        assert rows["recovered"].sum() == pytest.approx(expected, abs=1e-3)


def test_logits_of_a_run_are_split_as_in_float64(run: Run, tmp_path: Path) -> None:
    file = prompts(
        tmp_path / "one.json", {"text": "the cat and the", "answer": " cat"}, {"text": "a dog", "answer": " sat"}
    )
    found = table(tmp_path, "logit-split", run.path, "--prompts", file, "--steps", "0,-1")
    assert found["metric"].unique().tolist() == ["logit"] and found["step"].nunique() == 2
    for number, (text, answer) in enumerate((("the cat and the", " cat"), ("a dog", " sat")), start=1):
        ids = encoded(run.statistics, text)
        token = encoded(run.statistics, answer)[0]
        slow = logit_split_table(run.weights(run.steps[-1]), ids, len(ids) - 1, token, paths=False)
        expected = slow.set_index("path")["value"].rename({"W_E": "embed", "W_pos": "pos_embed"})
        rows = found[(found["step"] == run.steps[-1]) & (found["prompt"] == number)].set_index("component")["value"]
        heads = ["embed", "pos_embed", "L0H0", "L0H1", "L1H0", "L1H1"]
        assert rows.index.tolist() == [*heads, "biases"]
        np.testing.assert_allclose(rows[heads], expected[heads], atol=1e-4)
        assert rows.sum() == pytest.approx(expected.sum(), abs=1e-4)


def test_logits_of_a_directory_are_split_over_what_it_writes(models: Path, tmp_path: Path) -> None:
    file = prompts(tmp_path / "pairs.json", *IDS)
    found = table(tmp_path, "logit-split", models / "step1", "--prompts", file)
    model = load_causal(models / "step1")
    layer = model.gpt_neox.layers[1]
    norm = model.gpt_neox.final_layer_norm
    kept: dict[str, torch.Tensor] = {}
    norm.register_forward_pre_hook(lambda module, inputs: kept.update(stream=inputs[0]))
    layer.attention.dense.register_forward_pre_hook(lambda module, inputs: kept.update(z=inputs[0]))
    with torch.no_grad():
        logits = model(torch.tensor([one["text"] for one in IDS])).logits
        wrote = kept["z"][..., 8:] @ layer.attention.dense.weight[:, 8:].T
        scale = (kept["stream"].var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        out = model.get_output_embeddings()((wrote - wrote.mean(-1, keepdim=True)) / scale * norm.weight)
    right, wrong = torch.tensor([7, 4]), torch.tensor([8, 6])
    head = found[found["component"] == "L1H1"].sort_values("prompt")["value"]
    np.testing.assert_allclose(head, difference(out, right, wrong), atol=1e-4)
    np.testing.assert_allclose(found.groupby("prompt")["value"].sum(), difference(logits, right, wrong), atol=1e-4)


def test_a_run_is_ablated_and_shown_on_sentences(run: Run, tmp_path: Path) -> None:
    file = prompts(tmp_path / "pairs.json", *SENTENCES)
    found = table(tmp_path, "ablate", run.path, "--prompts", file, "--heads", "L1H0", "--methods", "zero")
    clean, _, right, wrong = batches(run)
    model = build(run.weights(run.steps[-1]))

    def nothing(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value[:, :, 0] = 0
        return value

    with torch.no_grad():
        cut = model.run_with_hooks(clean, fwd_hooks=[("blocks.1.attn.hook_z", nothing)])
    row = found.query("ablated == 'L1H0' and metric == 'logit_difference'").iloc[0]
    assert row["value"] == pytest.approx(float(difference(cut, right, wrong).mean()), abs=1e-5)
    done = called("attention", run.path, "--prompts", file, "--out", tmp_path / "a.html")
    assert done.exit_code == 0, done.exception
    page = (tmp_path / "a.html").read_text()
    assert page.count('<figure class="bl-attention"') == 2 and len(re.findall("<bdi>[^<]*cat</bdi>", page)) > 0


def test_bad_prompts_for_patches_are_one_sentence(run: Run, models: Path, tmp_path: Path) -> None:
    model = models / "step1"
    for entries, options, message in (
        (({**IDS[0], "corrupted": [3, 8]},), [], "prompt 1 has 4 tokens and its corrupted version 2"),
        (({**IDS[0], "corrupted": IDS[0]["text"]},), [], "prompt 1 and its corrupted version are the same"),
        (({"text": [1], "answer": 1},), [], "not every prompt has a corrupted version"),
        (({**IDS[0], "wrong": 7},), [], "prompt 1: answer and wrong are the same token"),
        (({**IDS[0], "wrong": D_VOCAB},), [], f"wrong holds id {D_VOCAB}; the vocabulary ends at 29"),
        (({**IDS[0], "corrupted": [3, 99, 9, 3]},), [], "corrupted holds id 99; the vocabulary ends at 29"),
        (IDS, ["--by", "role"], "by = 'role': roles are those of a run's task"),
        ((IDS[0], {**IDS[1], "text": [5, 4, 5], "corrupted": [5, 6, 5]}), ["--by", "position"], "different lengths"),
        (({"text": [1] * 30, "corrupted": [2] * 30, "answer": 1, "wrong": 2},), [], "30 positions; the model has 24"),
        (IDS, ["--corruption", "shifted"], "--corruption: --prompts says which sequences; leave it out"),
        (IDS, ["--batch-size", "3"], "--batch-size: --prompts says which sequences; leave it out"),
    ):
        file = prompts(tmp_path / "bad.json", *entries)
        assert message in refusal("patch", model, "--prompts", file, *options), message
    file = prompts(tmp_path / "text.json", SENTENCES[0])
    assert f"text is text, and {model} has no tokenizer; give ids." in refusal("edges", model, "--prompts", file)
    file = prompts(tmp_path / "other.json", {**SENTENCES[0], "text": "the CAT and the"})
    assert "text holds ['A', 'C', 'T'], which the run's vocabulary" in refusal("patch", run.path, "--prompts", file)
    assert "takes a run" in refusal("patch", model) and "--prompts" in refusal("edges", model)
    gemma = tmp_path / "gemma"
    saved("gemma2", gemma)
    assert "the residual stream is not the sum" in refusal("logit-split", gemma, "--prompts", prompts(file, IDS[0]))
