"""The benchmark compares like with like: its baselines compute what birthlens computes, and its rows add up."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from birthlens.analysis.interventions import at_heads
from birthlens.analysis.metrics import Scoring
from birthlens.analysis.runner import evaluate
from birthlens.bench import baselines
from birthlens.bench.scaling import useful_operations
from birthlens.bench.timing import Timing, interleaved
from birthlens.cli import group
from birthlens.config import RunConfig
from birthlens.corpus import statistics_of
from birthlens.model import build
from birthlens.training.loop import Trainer

CONFIG = RunConfig.parse(
    {
        "corpus": {"source": "markov", "vocabulary": 12},
        "task": {"context": 24, "n_triggers": 3},
        "model": {"d_model": 16},
    },
    ["training.batch_size=8", "evaluation.batch_size=4", "training.engine=handwritten"],
)


@pytest.fixture(scope="module")
def trainer():
    return Trainer(CONFIG, statistics_of(CONFIG.corpus))


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_the_plain_step_computes_the_same_gradient(trainer, micro_batch):
    weights = trainer.initial
    batch = trainer.task.batch(8, 0)
    model = baselines.PaperModel(weights)
    hooked = build(weights)(batch.tokens)
    torch.testing.assert_close(model(batch.tokens), hooked, rtol=1e-5, atol=1e-5)
    step = baselines._autograd_step(model, list(model.parameters()), CONFIG, micro_batch)
    step(batch)
    trainer.engine.gradients(batch, batch.in_context)
    for name, parameter in trainer.engine.parameters.items():
        expected = parameter.grad.squeeze()
        torch.testing.assert_close(getattr(model, name.replace(".", "_")).grad, expected, rtol=1e-4, atol=1e-6)


def test_the_plain_sampler_follows_the_task(trainer):
    rng = np.random.default_rng(0)
    sequences = np.array(baselines.plain_sampler(trainer.task, 400, rng))
    fast = trainer.task.sample(4000, rng).tokens.numpy()
    ours, theirs = (np.bincount(tokens.ravel(), minlength=12) / tokens.size for tokens in (fast, sequences[:, :-1]))
    np.testing.assert_allclose(theirs, ours, atol=0.03)
    assert sequences.shape == (400, 25)


def test_hooked_ablations_are_the_runners(trainer):
    weights, batch, reference = trainer.initial, trainer.task.batch(16, 1), trainer.task.batch(16, 2)
    plain = baselines.hooked_ablations(build(weights), batch, reference)
    suite = {f"{head} {how}": at_heads("z", how, [head]) for head in weights.heads for how in ("zero", "mean")}
    found = evaluate(weights, suite, batch, Scoring.of(batch, ("in_context.accuracy",)), reference)
    for case, values in zip(found.cases, np.asarray(found.values), strict=True):
        assert abs(plain[case] - float(values[0])) < 1e-5, case


def test_variants_take_turns():
    calls = []
    timings = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warm_up=1)
    assert calls == ["a", "b"] * 4
    assert all(len(timing.seconds) == 3 for timing in timings.values())
    assert Timing("x", (1.0, 2.0, 3.0)).times(2).median == 4.0


def test_useful_operations_are_counted_from_the_batch(trainer):
    """A slow loop over positions and their keys gives the same count."""
    batch, d, n = trainer.task.batch(3, 5), 16, 12
    count = 0
    for row in range(3):
        for t in range(24):
            count += 2 * 2 * (t + 1) * d
            if batch.in_context[row, t]:
                count += 2 * (6 * (t + 1) * d + 3 * d * d + 6 * d * n)
    assert useful_operations(batch, d, n) == count


def test_the_command_measures_and_writes_json(tmp_path):
    out = tmp_path / "bench.json"
    result = CliRunner().invoke(group, ["bench", "--quick", "--only", "start", "--out", str(out)])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert {row["variant"] for row in report["rows"]} >= {"python alone", "import birthlens", "birthlens --help"}
    assert all(row["ms"] > 0 for row in report["rows"]) and report["machine"]["cores"] >= 1


def test_one_setting_of_the_scaling_table():
    command = [sys.executable, "-m", "birthlens.bench.scaling", "1", "task.context=16", "model.d_model=8",
               "training.batch_size=4", "corpus.vocabulary=8", "training.engine=handwritten"]  # fmt: skip
    row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert row["ms"] > 0 and 0 < row["share_of_peak"] < 1 and row["peak_memory_mb"] > 50
