"""The benchmark compares like with like: its baselines compute what birthlens computes, and its rows add up."""

import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from typed import gradient_of, present

from birthlens.analysis.behaviour.trajectory import memories_over
from birthlens.analysis.interventions.runner import evaluate
from birthlens.analysis.interventions.scoring import Scoring
from birthlens.analysis.interventions.spec import at_heads
from birthlens.bench import baselines, cases, ensembles, pages, whole_runs
from birthlens.bench.scaling import in_a_process, matmul_peak, useful_operations
from birthlens.bench.timing import Timing, interleaved
from birthlens.cli import group
from birthlens.config.presets import preset
from birthlens.config.run import RunConfig
from birthlens.errors import BirthlensError
from birthlens.model.hooked import build
from birthlens.model.weights import Weights
from birthlens.runs.run import load_run
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.corpus import statistics_of
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
def trainer() -> Trainer:
    return Trainer(CONFIG, statistics_of(CONFIG.corpus))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_plain_step_takes_the_configs_optimiser(trainer: Trainer, kind: str) -> None:
    config = CONFIG.changed(optimiser={"kind": kind, "learning_rate": 0.01, "weight_decay": 0.1})
    ours, numbers = Trainer(config, statistics_of(config.corpus)), range(3)
    model = baselines.PaperModel(ours.initial)
    step = baselines.autograd_step(model, list(model.parameters()), config, None)
    for number in numbers:
        step(ours.task.batch(8, config.seeds.data, number))
        ours.update()
    for name, parameter in ours.engine.parameters.items():
        moved = parameter.detach() - torch.from_numpy(ours.initial[name])
        theirs = getattr(model, name.replace(".", "_")).detach() - torch.from_numpy(ours.initial[name].squeeze())
        assert (moved.squeeze() - theirs).norm() < 1e-3 * moved.norm(), name


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_the_plain_step_computes_the_same_gradient(trainer: Trainer, micro_batch: int | None) -> None:
    weights = trainer.initial
    batch = trainer.task.batch(8, 0)
    model = baselines.PaperModel(weights)
    hooked = build(weights)(batch.tokens)
    torch.testing.assert_close(model(batch.tokens), hooked, rtol=1e-5, atol=1e-5)
    step = baselines.autograd_step(model, list(model.parameters()), CONFIG, micro_batch)
    step(batch)
    trainer.engine.gradients(batch, batch.in_context)
    for name, parameter in trainer.engine.parameters.items():
        expected = present(parameter.grad).squeeze()
        torch.testing.assert_close(getattr(model, name.replace(".", "_")).grad, expected, rtol=1e-4, atol=1e-6)


def test_the_plain_sampler_follows_the_task(trainer: Trainer) -> None:
    rng = np.random.default_rng(0)
    assert isinstance(trainer.task, BigramTask)
    sequences: NDArray[Any] = np.array(baselines.plain_sampler(trainer.task, 400, rng))
    fast = trainer.task.sample(4000, rng).tokens.numpy()
    ours, theirs = (np.bincount(tokens.ravel(), minlength=12) / tokens.size for tokens in (fast, sequences[:, :-1]))
    np.testing.assert_allclose(theirs, ours, atol=0.03)
    assert sequences.shape == (400, 25)


def test_hooked_ablations_are_the_runners(trainer: Trainer) -> None:
    weights, batch, reference = trainer.initial, trainer.task.batch(16, 1), trainer.task.batch(16, 2)
    plain = baselines.hooked_ablations(build(weights), batch, reference)
    suite = {f"{head} {how}": at_heads("z", how, [head]) for head in weights.heads for how in ("zero", "mean")}
    found = evaluate(weights, suite, batch, Scoring.of(batch, ("in_context.accuracy",)), reference)
    for case, values in zip(found.cases, np.asarray(found.values), strict=True):
        assert abs(plain[case] - float(values[0])) < 1e-5, case


def test_variants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    timings = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warm_up=1)
    assert calls == ["a", "b"] * 4
    assert all(len(timing.seconds) == 3 for timing in timings.values())
    calls.clear()
    clock = itertools.count()
    monkeypatch.setattr("birthlens.bench.timing.time.perf_counter", lambda: float(next(clock)))  # a second a turn
    timings = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, warm_up=0, calls=3)
    assert calls == ["a"] * 3 + ["b"] * 3 + ["a"] * 3 + ["b"] * 3
    assert timings["a"].seconds == (1 / 3, 1 / 3)  # of one call
    part = Timing("x", (1.0, 2.0, 3.0)).of_share(0.5)
    assert part.median == 4.0 and part.share == 0.5


class Products:
    """A matrix product that counts the multiplications and additions it makes."""

    def __init__(self) -> None:
        self.operations = 0

    def __call__(self, a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        self.operations += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return a @ b


def plain_gradients(weights: Weights, batch: TokenBatch, product: Products) -> dict[str, NDArray[Any]]:
    """The step target by target, in the algebra of `training.folding`: only products over the batch are counted."""
    w = {name: array[0] if array.ndim == 3 else array for name, array in weights.items()}
    scale, d, n = weights.score_scale, weights.d_model, int(batch.in_context.sum())
    qk0, qk1 = (scale * w[f"L{layer}.W_Q"] @ w[f"L{layer}.W_K"].T for layer in (0, 1))
    feed_forward = w.get("L1.W_F", np.zeros((d, d)))
    direct = w["W_U"] + feed_forward @ w["W_U"]
    attended = w["L1.W_V"] @ w["L1.W_O"] @ direct
    d_qk0, d_qk1 = np.zeros((d, d)), np.zeros((d, d))
    d_direct, d_attended = np.zeros_like(direct), np.zeros_like(direct)
    for tokens, targets, marked in zip(*map(np.asarray, (batch.tokens, batch.targets, batch.in_context)), strict=True):
        if not marked.any():
            continue
        reach = np.flatnonzero(marked)[-1] + 1
        x = (w["W_E"][tokens] + w["W_pos"][: len(tokens)])[:reach].astype(float)
        value, scores = x @ w["L0.W_V"] @ w["L0.W_O"], x @ qk0 @ x.T  # look-ups
        patterns = [softmax(scores[t : t + 1, : t + 1]) for t in range(reach)]
        x1 = x + np.concatenate([product(patterns[t], value[: t + 1]) for t in range(reach)])
        d_x1 = np.zeros_like(x1)
        for t in np.flatnonzero(marked).tolist():
            query, past, d_past = x1[t : t + 1], x1[: t + 1], d_x1[: t + 1]
            folded = product(query, qk1)
            pattern = softmax(product(folded, past.T))
            context = product(pattern, past)
            d_logits = softmax(product(query, direct) + product(context, attended))
            d_logits[0, targets[t]] -= 1
            d_logits /= n
            d_attended += product(context.T, d_logits)
            if "L1.W_F" in w:
                d_direct += product(query.T, d_logits)
            d_context = product(d_logits, attended.T)
            d_scores = through_softmax(pattern, product(d_context, past.T))
            d_folded = product(d_scores, past)
            d_qk1 += product(query.T, d_folded)
            d_past += product(pattern.T, d_context) + product(d_scores.T, folded)
            d_x1[t : t + 1] += product(d_folded, qk1.T) + product(d_logits, direct.T)
        for t in range(reach):
            d_scores = through_softmax(patterns[t], product(d_x1[t : t + 1], value[: t + 1].T))
            d_qk0 += x[t : t + 1].T @ (d_scores @ x[: t + 1])  # sums in tables
    found = {f"L{layer}.W_K": scale * d_qk.T @ w[f"L{layer}.W_Q"] for layer, d_qk in enumerate((d_qk0, d_qk1))}
    found["L1.W_O"] = w["L1.W_V"].T @ d_attended @ direct.T
    found["L1.W_F"] = (d_direct + w["L1.W_O"].T @ w["L1.W_V"].T @ d_attended) @ w["W_U"].T
    return found


def softmax(scores: NDArray[Any]) -> NDArray[Any]:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def through_softmax(pattern: NDArray[Any], d_pattern: NDArray[Any]) -> NDArray[Any]:
    return pattern * (d_pattern - (pattern * d_pattern).sum())


@pytest.mark.parametrize("feed_forward", ["none", "linear"])
def test_useful_operations_are_those_of_a_plain_step_that_counts_its_products(feed_forward: Any) -> None:
    config = CONFIG.changed(model={"d_model": 16, "feed_forward": feed_forward})
    trainer, product = Trainer(config, statistics_of(config.corpus)), Products()
    batch = trainer.task.batch(5, 5)
    found = plain_gradients(trainer.initial, batch, product)
    trainer.engine.gradients(batch, batch.in_context)
    for name, parameter in trainer.engine.parameters.items():
        np.testing.assert_allclose(found[name], gradient_of(parameter).squeeze(), rtol=1e-3, atol=1e-6)
    assert useful_operations(batch, 16, 12, feed_forward == "linear") == product.operations


SMALL = ["task.context=16", "model.d_model=8", "training.batch_size=4", "evaluation.batch_size=1"]
SHORT = CONFIG.changed(training={"steps": 3, "batch_size": 4})
CASES = {
    "training step": lambda: cases.training_step(CONFIG, 2),
    "full model step": lambda: cases.full_model_step(preset("paper-full", SMALL), 1),
    "sampling": lambda: cases.sampling(CONFIG, 2),
    "weight probes": lambda: cases.weight_probes(CONFIG, 3, 1),
    "interventions": lambda: cases.interventions(CONFIG, 4, 1),
    "checkpoint": lambda: cases.checkpointing(CONFIG, 2),
    "clamped step": lambda: cases.clamped_step(CONFIG, 1),
    "monitor": lambda: cases.monitoring(CONFIG, 1),
    "start-up": lambda: cases.start_up(CONFIG, 1),
    "training": lambda: [
        *whole_runs.training(SHORT, "short", goal=-1.0),
        *whole_runs.training(SHORT, "short"),
    ],
    "ablation suite": lambda: whole_runs.ablation_suite(CONFIG, 3, 4),
    "memory": lambda: whole_runs.memory(SMALL, "small", 1),
}


@cache
def small(name: str) -> Any:
    return CASES[name]()


@pytest.mark.parametrize("name", CASES)
def test_every_case_runs_at_a_small_size(name: str) -> None:
    rows = small(name)
    assert name in {row["case"] for row in rows}
    for row in rows:
        assert {"case", "setting", "variant"} <= row.keys()
        assert all(np.isfinite(value) and value >= 0 for value in row.values() if isinstance(value, float))
    by_variant = {row["variant"]: row for row in rows}
    if name == "training step":
        assert {row["case"] for row in rows} == {name, "sampling in a step"}
        part = by_variant["sampling alone"]
        assert "times_baseline" not in part
        assert part["baseline"] == "fused" and part["share_of_baseline"] == pytest.approx(
            part["ms"] / by_variant["fused"]["ms"]
        )
    elif name == "sampling":
        assert by_variant["plain"]["measured"] == 1 / 8 and by_variant["numpy"]["measured"] == 1
    elif name == "checkpoint":
        often, seldom = by_variant["save"], by_variant["saves a step, one every 10 steps"]
        assert seldom["share_of_baseline"] == pytest.approx(often["share_of_baseline"] / 10)
    elif name == "training":
        assert by_variant["to accuracy -1.0"]["steps"] == 0 and by_variant["to the end"]["steps"] == 3
    elif name == "ablation suite":
        assert rows[0]["ablations"] == 6 and rows[0]["steps"] == 3
    elif name == "memory":
        assert all(row["peak_mb"] > row["before_mb"] > 50 for row in rows)


def test_peak_memory_is_not_that_of_the_parent() -> None:
    """A child of a large process reports its own peak: Linux's ru_maxrss would begin with the parent's."""
    ballast = np.ones(150_000_000)  # 1.2 GB
    found = in_a_process(SMALL, 1)
    assert found["peak_memory_mb"] < ballast.nbytes / 2**20


def report_with(*rows: Mapping[str, object]) -> dict[str, Any]:
    return {"machine": {"processor": "abacus", "cores": 2}, "quick": False, "rows": list(rows)}


def test_tables_are_written_into_the_blocks_of_a_page(tmp_path: Path) -> None:
    step = {"case": "training step", "setting": "batch 512", "spread": 0.01, "rounds": 5, "measured": 1.0}
    rows = [
        {**step, "variant": "hooked", "ms": 3000.0, "times_baseline": 1.0, "baseline": "hooked"},
        {**step, "variant": "plain", "ms": 1200.0, "times_baseline": 2.5, "baseline": "hooked"},
        {**step, "variant": "fused", "ms": 200.0, "times_baseline": 15.0, "baseline": "hooked"},
    ]
    sizes = {"case": "scaling", "varied": "task.context", "value": 64, "ms": 3.0, "useful_gflop": 0.5,
             "share_of_peak": 0.6, "peak_memory_mb": 300.0}  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(report_with(*rows)))
    (tmp_path / "b.json").write_text(json.dumps(report_with(sizes)))
    page = tmp_path / "page.md"
    blocks = "".join(f"<!-- bench: {name} -->\nold\n<!-- bench: end -->\n" for name in pages.BLOCKS)
    page.write_text(f"# Speed\n{blocks}The end.\n")
    command = ["bench", "--from", str(tmp_path / "a.json"), "--from", str(tmp_path / "b.json"), "--into", str(page)]
    for _ in range(2):  # twice the same
        result = CliRunner().invoke(group, command)
        assert result.exit_code == 0, result.output
        text = page.read_text()
        assert "| fused step against a HookedTransformer loop, batch 512 | **15 times** | at least 10 times |" in text
        assert "| **6 times** | at least 7 times, **missed** |" in text
        assert "| task.context | 64 | 3 | 0.5 | 0.6 | 300 |" in text and "processor abacus" in text
        assert "old" not in text and text.startswith("# Speed\n") and text.endswith("The end.\n")
        assert text.count("**Training step**") == 1


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_the_tables_of_our_pages_are_those_of_the_bench_files(page: str) -> None:
    root = Path(__file__).parents[2]
    files = [root / "docs" / "bench.json", root / "docs" / "scaling.json"]
    text = (root / page).read_text()
    if not all(file.exists() for file in files):
        assert "Not measured yet." in text
        return
    assert pages.filled(text, pages.read(files)) == text


def test_bad_files_are_named(tmp_path: Path) -> None:
    for text in (
        "{}",
        "[" * 100_000,
        '{"machine": {}, "quick": false, "rows": [1]}',
        '{"machine": 1, "quick": false, "rows": []}',
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(BirthlensError, match=r"a.json' is not a file of `birthlens bench --out`"):
            pages.read([tmp_path / "a.json"])
    with pytest.raises(BirthlensError, match=r"has no block; write <!-- bench: NAME"):
        pages.filled("text", report_with())
    with pytest.raises(BirthlensError, match="has blocks other"):
        pages.filled("<!-- bench: other -->\n<!-- bench: end -->", report_with())
    for arguments in (["--from", "x.json", "--quick"], ["--from", "absent.json"], ["--into", "absent.md"]):
        assert isinstance(CliRunner().invoke(group, ["bench", *arguments]).exception, BirthlensError)


def test_every_goal_names_a_row_that_the_cases_make() -> None:
    made = {(row["case"], row["variant"]): row for name in CASES for row in small(name)}
    columns = ensembles.compared("cpu", "quick", 1)[0]
    made |= {("ensemble", way): columns for way in ensembles.ways("cuda")}
    for goal in pages.GOALS:
        assert goal.case != "ensemble" or goal.setting in map(str, ensembles.SIZES["gpu"]), goal
        variant = "to accuracy -1.0" if goal.variant == "to accuracy 0.9" else goal.variant
        assert goal.column in made[goal.case, variant], goal
        assert goal.baseline is None or (goal.case, goal.baseline) in made, goal


def test_the_command_measures_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    result = CliRunner().invoke(group, ["bench", "--quick", "--only", "start", "--out", str(out)])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert {row["variant"] for row in report["rows"]} >= {"python alone", "import birthlens", "birthlens --help"}
    assert all(row["ms"] > 0 for row in report["rows"]) and report["machine"]["cores"] >= 1


def test_one_setting_of_the_scaling_table() -> None:
    command = [sys.executable, "-m", "birthlens.bench.scaling", "1", "task.context=16", "model.d_model=8",
               "training.batch_size=4", "corpus.vocabulary=8", "training.engine=handwritten"]  # fmt: skip
    row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert row["ms"] > 0 and 0 < row["share_of_peak"] < 1 and row["peak_memory_mb"] > 50


def test_the_plain_loop_reads_what_the_probes_read(tmp_path: Path) -> None:
    config = CONFIG.changed(task=CONFIG.task.changed(context=80))
    cases.synthetic_run(config, tmp_path / "run", 2)
    run = load_run(tmp_path / "run")
    table = memories_over(run).to_pandas().set_index(["step", "memory", "basis", "metric", "candidates"])["value"]
    found = pd.Series(baselines.hooked_probes(run.path))
    assert set(found.index) == set(table.index)
    pd.testing.assert_series_equal(found[table.index], table, rtol=2e-3, atol=1e-5, check_names=False)
    assert not np.array_equal(run.checkpoint(0)["L1.W_O"], run.checkpoint(1)["L1.W_O"])


def test_ensembles_are_timed_against_the_same_runs_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def known(variants: Any, rounds: int, calls: int) -> dict[str, Timing]:
        """Run everything, and say that it took known times: those of a busy machine would show nothing."""
        seconds = {name: 0.1 if "alone" in name else 0.8 if "ensemble" in name else 0.4 for name in variants}
        timings = interleaved(variants, rounds, calls=calls)
        return {name: replace(timing, seconds=(seconds[name],)) for name, timing in timings.items()}

    monkeypatch.setattr(ensembles, "interleaved", known)
    rows = {row["variant"]: row for row in ensembles.compared("cpu", "quick", 2)}
    assert list(rows) == [
        "ensemble, float32",
        "ensemble, float32, counter",
        "plain loop",
        "one run at a time, handwritten",
    ]
    plain = rows["plain loop"]
    for row in rows.values():
        assert row["times_baseline"] == pytest.approx(plain["us"] / row["us"])
        assert row["share_of_peak"] * row["us"] == pytest.approx(
            plain["share_of_peak"] * plain["us"]
        )  # one count, one peak
        assert 0 < row["share_of_peak"] < 1
        together = row["variant"].startswith("ensemble")
        assert row["us"] == pytest.approx((0.8 / 4 if together else 0.4) / 8 * 1e6)  # 4 runs of 8 sequences
        assert row["sampling"] == (pytest.approx(0.1 / 0.8) if together else None)
    monkeypatch.undo()
    grown = ensembles.scaled("cpu", "quick", 1)
    assert [(row["varied"], row["value"]) for row in grown] == [("R", 1), ("R", 4)]
    assert set(ensembles.SIZES) == set(ensembles.GRIDS) == {"quick", "cpu", "gpu"}
    assert ensembles.kind_of("cuda:1", False) == "gpu"


def test_the_product_of_a_device_is_timed_like_that_of_numpy() -> None:
    assert 0.2 < ensembles.matmul_rate("cpu", "float32") / matmul_peak(512) < 5


def test_bench_on_a_device_refuses_other_cases() -> None:
    runner = CliRunner()
    with pytest.raises(BirthlensError, match=r"only = 'start': it runs on the CPU; with --device, give ensemble or"):
        runner.invoke(group, ["bench", "--device", "cpu", "--only", "start"], catch_exceptions=False)
    with pytest.raises(BirthlensError, match="device = 'cuda:99': this machine has"):
        runner.invoke(group, ["bench", "--device", "cuda:99"], catch_exceptions=False)


def test_the_script_for_a_card_says_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[1] / "training/on_a_card.py"
    spec = importlib.util.spec_from_file_location("on_a_card", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(["cpu", "--tiny"])
    said = capsys.readouterr().out
    assert "largest difference of a weight after 5 steps, float32: 0  goal 1e-4: reached" in said
    assert "batches of the sampler counter are those of the CPU: True  goal True: reached" in said
    assert "4 runs of d 16, T 16, B 4, 3 steps" in said and "goals missed" in said
    assert "d 16, T 16, B 8, R 4: ensemble, float32, counter" in said
