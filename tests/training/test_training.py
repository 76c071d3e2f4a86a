"""Training: engines agree step by step, runs repeat to the bit, and a killed one resumes to the very same weights."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from resealing import replace, reseal
from typed import close, gradient_of, present

from birthlens.config.presets import preset
from birthlens.config.run import RunConfig
from birthlens.config.schedule import Schedule
from birthlens.errors import BirthlensError
from birthlens.model.forward import logits, tensors_of
from birthlens.model.hooked import build, parameters
from birthlens.model.weights import load_tensors, load_with_metadata, save_tensors
from birthlens.runs.files import commit
from birthlens.runs.header import seal_of
from birthlens.runs.metrics import read_metrics
from birthlens.runs.run import load_run
from birthlens.runs.seal import BLANK
from birthlens.runs.writer import RunWriter
from birthlens.training.engines import choose
from birthlens.training.loop import DivergedError, Trainer, train
from birthlens.training.recording import resume, train_to_disk

TINY = {
    "corpus": {"source": "markov", "vocabulary": 12},
    "task": {"context": 24, "n_triggers": 3},
    "model": {"d_model": 16},
    "training": {"steps": 12, "batch_size": 8},
    "checkpoints": {"every": 4},
    "evaluation": {"batch_size": 8, "every": 2},
}


def tiny(*overrides: Any) -> Any:
    return RunConfig.parse(TINY, overrides)


def final(config: Any) -> Any:
    return deque(train(config), maxlen=1)[0]


def train_all(config: Any, out: Any) -> Any:
    for _ in train_to_disk(config, out):
        pass
    return load_run(out)


ENGINE = {"name": "functional", "reason": "asked for", "threads": 1}
ENGINES = ["reference", "functional", "handwritten", "fused"]


@pytest.mark.parametrize(
    "optimiser", [["optimiser.kind=sgd"], ["optimiser.kind=adamw", "optimiser.learning_rate=0.003"]]
)
@pytest.mark.parametrize("extra", [[], ["model.feed_forward=linear", "training.loss=all"]], ids=["in_context", "W_F"])
def test_engines_take_the_same_path(optimiser: Any, extra: Any) -> None:
    """Fifty steps: float32 rounding grows along a trajectory, so weights agree to 1e-3 of their movement at its end."""
    runs = {}
    for engine in ENGINES:
        config = tiny("training.steps=50", f"training.engine={engine}", *optimiser, *extra)
        records = [(record.loss, record.weights) for record in train(config)]
        runs[engine] = records
    start = runs["reference"][0][1]
    for engine in ENGINES[1:]:
        for (expected, _), (loss, _) in zip(runs["reference"][1:], runs[engine][1:], strict=True):
            assert abs(present(loss) - present(expected)) < 2e-5 * max(1, present(expected)), engine
        for name in config.trained:
            reference = runs["reference"][-1][1][name]
            moved = np.linalg.norm(reference - start[name])
            assert moved > 0
            assert np.linalg.norm(runs[engine][-1][1][name] - reference) < 1e-3 * moved, (engine, name)


OF_FULL = ["model.family=full", "model.feed_forward=relu"]


@pytest.mark.parametrize(
    "extra",
    [
        ["model.attention=relu"],
        ["model.attention=linear"],
        ["model.block=sequential", "model.feed_forward_layers=[1]"],
        ["model.positions=relative"],
        ["model.positions=rotary", "model.unembedding=tied"],
        ["model.n_layers=3", "model.positions=rotary"],
    ],
)
def test_options_of_the_full_model_train_alike_in_both_engines_and_no_other_takes_them(extra: Any) -> None:
    words = [*OF_FULL, *extra, "training.steps=5"]
    ends = {
        engine: list(train(tiny(*words, f"training.engine={engine}")))[-1].weights
        for engine in ("reference", "functional")
    }
    start = next(iter(train(tiny(*words)))).weights
    for name in start:
        moved = np.linalg.norm(ends["reference"][name] - start[name])
        assert np.linalg.norm(ends["functional"][name] - ends["reference"][name]) <= 1e-3 * moved + 1e-7, name
    for engine in ("handwritten", "fused"):
        with pytest.raises(
            BirthlensError, match=f"'{engine}' cannot train this config: it needs the two-layer simplified"
        ):
            next(iter(train(tiny(*words, f"training.engine={engine}"))))


def test_a_tied_unembedding_is_whole_in_every_checkpoint(tmp_path: Path) -> None:
    words = [*OF_FULL, "model.unembedding=tied", "model.init=scaled", "training.steps=4", "checkpoints.every=2"]
    words += ["training.clamps=[freeze W_E until=2]", "optimiser.kind=adamw"]
    run = train_all(tiny(*words), tmp_path / "run")
    first, middle, last = (run.weights(step) for step in (0, 2, 4))
    for step in (0, 2, 4):
        tensors = run.checkpoint(step)
        assert np.array_equal(tensors["W_U"], tensors["W_E"].T)
    assert np.array_equal(first["W_U"], middle["W_U"]) and not np.array_equal(middle["W_U"], last["W_U"])
    assert "W_U" not in run.constants and not any("W_U" in name for name in run.state()[0])
    batch = run.task.batch(2, 0)
    with torch.no_grad():
        found = run.model()(batch.tokens)
    np.testing.assert_allclose(found, logits(tensors_of(last), last.config, batch.tokens), atol=1e-5)
    again = RunConfig.parse(run.config.to_data(), ["training.steps=2"])
    train_all(again, tmp_path / "part")
    deque(resume(tmp_path / "part", steps=4), maxlen=1)
    for name, tensor in load_run(tmp_path / "part").weights(4).items():
        assert np.array_equal(tensor, last[name]), name


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_in_several_chunks_gives_the_gradient_of_the_whole(engine: Any) -> None:
    """Batches that every engine divides, against one pass of the HookedTransformer over all of them."""
    config = tiny(
        "training.batch_size=150", "evaluation.batch_size=70", "task.context=10", "model.d_model=8",
        f"training.engine={engine}",
    )  # fmt: skip
    trainer = Trainer(config, _statistics(config))
    model = build(trainer.initial, config.trained)
    batch = trainer.task.batch(150, config.seeds.data, 0)
    logits = model(batch.tokens)[batch.in_context]
    expected = torch.nn.functional.cross_entropy(logits, batch.targets[batch.in_context])
    expected.backward()
    moving = parameters(model, config.model)
    assert trainer.engine.gradients(batch, batch.in_context) == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in trainer.engine.parameters.items():
        torch.testing.assert_close(parameter.grad, moving[name].grad, rtol=1e-4, atol=1e-6)

    with torch.no_grad():
        logits = model(trainer.held_out.tokens)
    losses, predictions = trainer.engine.evaluate(trainer.held_out)
    each = torch.nn.functional.cross_entropy(logits.mT, trainer.held_out.targets, reduction="none")
    torch.testing.assert_close(losses, each, rtol=1e-4, atol=1e-5)
    assert torch.equal(predictions, logits.argmax(-1))


@pytest.mark.parametrize(
    "kw", [{"family": "full", "n_heads": 2, "feed_forward": "relu"}, {"positions": "rotary"}, {"n_layers": 1}]
)
def test_the_functional_engine_equals_the_reference_on_other_models(kw: Any) -> None:
    model = [f"model.{key}={value}" for key, value in kw.items()]
    losses = {}
    for engine in ("reference", "functional"):
        config = tiny("training.steps=10", "optimiser.learning_rate=0.05", f"training.engine={engine}", *model)
        losses[engine] = [present(record.loss) for record in list(train(config))[1:]]
    np.testing.assert_allclose(losses["functional"], losses["reference"], rtol=2e-5)


def test_plain_sgd_by_hand() -> None:
    """Two updates of momentum SGD with weight decay, written out, from gradients by autograd."""
    config = tiny("training.steps=2", "optimiser.weight_decay=0.01", "training.engine=functional")
    trainer = Trainer(config, _statistics(config))
    velocity: dict[Any, Any] = {}
    for _ in range(2):
        before = trainer.engine.tensors()
        trainer.update()
        for name, parameter in trainer.engine.parameters.items():
            slope = gradient_of(parameter) + 0.01 * before[name]
            velocity[name] = 0.9 * velocity[name] + slope if name in velocity else slope
            np.testing.assert_allclose(
                parameter.detach().numpy(), before[name] - 0.2 * velocity[name], rtol=1e-5, atol=1e-7
            )


def _statistics(config: Any) -> Any:
    from birthlens.tasks.corpus import statistics_of

    return statistics_of(config.corpus)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_seed_gives_the_same_bits(engine: Any) -> None:
    config = tiny(f"training.engine={engine}")
    one, two = final(config), final(config)
    assert one.loss == two.loss
    assert all(np.array_equal(one.weights[name], two.weights[name]) for name in config.trained)
    other = final(tiny(f"training.engine={engine}", "seeds.data=1"))
    assert one.loss != other.loss


def test_seeds_are_separate() -> None:
    base, data, init = final(tiny()), final(tiny("seeds.data=1")), final(tiny("seeds.init=1"))
    np.testing.assert_array_equal(base.weights["W_E"], data.weights["W_E"])
    assert not np.array_equal(base.weights["W_E"], init.weights["W_E"])
    torch.testing.assert_close(base.trainer.held_out.tokens, data.trainer.held_out.tokens)


def test_frozen_matrices_do_not_move_until_their_step() -> None:
    config = tiny("training.freeze_until={L0.W_K: 5, L1.W_O: 12}", "optimiser.weight_decay=0.1")
    previous = None
    moved: dict[str, list[int]] = {"L0.W_K": [], "L1.W_K": [], "L1.W_O": []}
    for record in train(config):
        now = record.weights
        if previous is not None:
            for name, steps in moved.items():
                if not np.array_equal(now[name], previous[name]):
                    steps.append(record.step)
        previous = now
    assert moved == {"L0.W_K": list(range(6, 13)), "L1.W_K": list(range(1, 13)), "L1.W_O": []}


def test_the_caller_may_stop_at_any_step() -> None:
    steps = []
    for record in train(tiny()):
        steps.append(record.step)
        if record.step == 3:
            break
    assert steps == [0, 1, 2, 3]


def test_kept_steps_and_metrics(tmp_path: Path) -> None:
    run = train_all(tiny("checkpoints.steps=[5]"), tmp_path / "run")
    assert run.steps == [0, 4, 5, 8, 12] and run.finished
    table = run.metrics()
    assert list(table.columns) == ["step", "split", "metric", "value", "n"]
    losses = table[(table.split == "train") & (table.metric == "loss")]
    assert losses.step.tolist() == list(range(1, 13))
    held_out = table[(table.split == "held_out") & (table.metric == "in_context_accuracy")]
    assert held_out.step.tolist() == [0, 2, 4, 5, 6, 8, 10, 12]
    assert held_out.value.between(0, 1).all() and (held_out.n > 0).all()


def test_two_hundred_checkpoints_of_the_papers_model_stay_under_60_mb(tmp_path: Path) -> None:
    """Random numbers, which no encoding shrinks, in the place of what training would leave."""
    config = preset("paper", ["training.steps=995"])
    trainer = Trainer(config, _statistics(config))
    writer = RunWriter.create(tmp_path / "run", config, trainer.task, trainer.initial, ENGINE)
    generator = np.random.default_rng(0)
    shapes = {name: trainer.initial[name].shape for name in config.trained}
    columns = {"split": "held_out", "metric": "in_context_unabsorbed_accuracy", "n": 128 * 256}
    for step in range(0, 1000, 5):
        tensors = {name: generator.random(shape, np.float32) for name, shape in shapes.items()}
        metrics = [{"step": step, **columns, "value": generator.random()} for _ in range(17)]  # twelve, and five losses
        state = {f"momentum_buffer/{name}": tensors[name] for name in tensors}
        writer.keep(step, tensors, metrics, state, {"engine": ENGINE["name"]})
    run = load_run(tmp_path / "run")
    assert len(run.steps) == 200 and run.steps[-1] == 995
    assert sum(file.stat().st_size for file in run.path.rglob("*") if file.is_file()) < 60e6


def test_a_run_gives_back_what_was_trained(tmp_path: Path) -> None:
    config = tiny("model.feed_forward=linear", "training.loss=all")
    in_memory = {record.step: record.weights for record in train(config)}
    run = train_all(config, tmp_path / "run")
    assert run.config == config
    for step, weights in run.checkpoints():
        assert all(np.array_equal(weights[name], in_memory[step][name]) for name in weights)
    tokens = run.task.batch(2, seed=5).tokens
    from birthlens.model import forward

    expected = forward.logits(forward.tensors_of(run.weights(8)), config.model, tokens)
    torch.testing.assert_close(run.model(8)(tokens), expected, rtol=1e-4, atol=1e-5)
    stack = run.stacked(["L0.W_K", "W_E"])
    assert stack["L0.W_K"].shape == (4, 1, 16, 16) and stack["W_E"].shape == (4, 12, 16)
    np.testing.assert_array_equal(stack["L0.W_K"][-1], run.weights(-1)["L0.W_K"])


@pytest.mark.long
def test_a_killed_process_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """Start a real process, kill -9 it in the middle, resume, and compare with a run that nobody touched."""
    overrides = ["training.steps=400", "checkpoints.every=7", "checkpoints.sensitivity=0.2", "optimiser.kind=adamw"]
    config = tiny("training.engine=handwritten", "optimiser.learning_rate=0.003", *overrides)
    config.save(tmp_path / "config.yaml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "birthlens",
        "train",
        str(tmp_path / "killed"),
        "--config",
        str(tmp_path / "config.yaml"),
    ]
    process = subprocess.Popen(command, env=environment)
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 120
    while len(list(checkpoints.glob("step_*"))) < 6 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not load_run(tmp_path / "killed").finished, "the process was too fast to be killed"
    resumed = subprocess.run(
        [sys.executable, "-m", "birthlens", "train", str(tmp_path / "killed"), "--resume"],
        env=environment, check=True, capture_output=True,
    )  # fmt: skip
    assert b"400 steps" in resumed.stderr
    whole = subprocess.run([*command[:4], str(tmp_path / "whole"), *command[5:]], env=environment, check=True)
    assert whole.returncode == 0
    one, two = load_run(tmp_path / "killed"), load_run(tmp_path / "whole")
    assert one.steps == two.steps
    for step in two.steps:
        first, second = one.checkpoint(step), two.checkpoint(step)
        assert all(np.array_equal(first[name], second[name]) for name in second)
    assert one.metrics().equals(two.metrics())


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set torch's number of threads, for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("engine", "warns"), [("fused", False), ("handwritten", True), ("functional", True)])
def test_resuming_keeps_the_engine_and_warns_where_its_threads_matter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, threads: Any, engine: Any, warns: Any
) -> None:
    threads(1)
    for record in train_to_disk(tiny(f"training.engine={engine}"), tmp_path / "run"):
        if record.step == 5:
            break
    header = json.loads((tmp_path / "run" / "run.json").read_text())
    how = {"device": "cpu", "precision": "float32", "sampler": "numpy"}
    assert header["engine"] == {"name": engine, "reason": "asked for", "threads": 1, **how}
    reseal(tmp_path / "run", lambda header: header["engine"].update(reason="a whim"))
    threads(3)
    with caplog.at_level("INFO", logger="birthlens"):
        *_, last = resume(tmp_path / "run")
    assert last.trainer.engine_reason == "a whim" and last.trainer.engine.threads == 3
    said = [record.getMessage() for record in caplog.records]
    assert f"engine {engine}: a whim" in said
    assert any("threads = 1 and continues with 3" in line and "OMP_NUM_THREADS=1" in line for line in said) == warns


def test_the_fused_engine_gives_the_same_bits_on_any_number_of_threads(threads: Any) -> None:
    found = {}
    for number in (1, 2, 3):
        threads(number)
        record = final(tiny("training.engine=fused", "training.batch_size=80"))
        found[number] = record.loss, {name: record.weights[name].tobytes() for name in record.trainer.config.trained}
        assert record.trainer.engine.threads == number
    assert found[1] == found[2] == found[3]


def test_a_run_names_the_commit_that_made_it(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    assert commit(tmp_path / "no checkout") is None
    (tmp_path / "code.py").write_text("1")
    for command in (["init", "-q"], ["add", "code.py"], ["commit", "-q", "-m", "x"], ["tag", "-m", "v", "v1"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert commit(tmp_path) == head
    (tmp_path / "code.py").write_text("2")
    commit.cache_clear()
    assert commit(tmp_path) == f"{head}-dirty"


def test_resuming_a_finished_run_trains_nothing(tmp_path: Path) -> None:
    run = train_all(tiny(), tmp_path / "run")
    before = {file: file.read_bytes() for file in sorted(run.path.rglob("step_*"))}
    assert list(resume(tmp_path / "run")) == []
    assert before == {file: file.read_bytes() for file in sorted(run.path.rglob("step_*"))}


def test_resuming_measures_nothing_twice(tmp_path: Path) -> None:
    whole = train_all(tiny(), tmp_path / "whole")
    for stop in (1, 5):
        records = train_to_disk(tiny(), tmp_path / f"stopped{stop}")
        while next(records).step < stop:
            pass
        close(records)
        deque(resume(tmp_path / f"stopped{stop}"), maxlen=0)
        assert load_run(tmp_path / f"stopped{stop}").metrics().equals(whole.metrics())


# What is on disk when a kill comes so early, in the order of writing.
EARLY = {
    "nothing yet": ["checkpoints"],
    "in the tables": ["checkpoints", ".tables.safetensors.7.tmp"],
    "tables": ["checkpoints", "tables.safetensors", "constants.safetensors", ".run.json.7.tmp"],
    "header": ["checkpoints", "tables.safetensors", "constants.safetensors", "run.json"],
    "metrics": ["checkpoints", "tables.safetensors", "constants.safetensors", "run.json", "metrics.jsonl"],
    "step 0": ["checkpoints", "tables.safetensors", "constants.safetensors", "run.json", "metrics.jsonl", "step 0"],
}


@pytest.mark.parametrize("moment", EARLY)
def test_a_kill_before_the_first_checkpoint_is_no_dead_end(tmp_path: Path, moment: Any) -> None:
    whole = train_all(tiny(), tmp_path / "whole")
    path = tmp_path / "killed"
    next(train_to_disk(tiny(), path))
    (path / ".tables.safetensors.7.tmp").write_text("torn")
    (path / ".run.json.7.tmp").write_text("{")
    for file in path.iterdir():
        if file.name not in EARLY[moment]:
            file.unlink()
    if "step 0" not in EARLY[moment]:
        (path / "checkpoints" / "step_00000000.safetensors").unlink()
    if (path / "run.json").exists():
        with pytest.raises(BirthlensError, match="already holds a run"):
            next(train_to_disk(tiny(), path))
        deque(resume(path), maxlen=0)
    else:
        with pytest.raises(BirthlensError, match=r"holds no run.json"):
            next(resume(path))
        deque(train_to_disk(tiny(), path), maxlen=0)
    run = load_run(path)
    assert run.steps == whole.steps and run.metrics().equals(whole.metrics())
    for step in run.steps:
        assert all(
            np.array_equal(run.checkpoint(step)[name], whole.checkpoint(step)[name]) for name in run.config.trained
        )


def test_an_existing_directory_is_left_alone(tmp_path: Path) -> None:
    run = train_all(tiny(), tmp_path / "run")
    before = {file: file.read_bytes() for file in run.path.rglob("*.*")}
    with pytest.raises(BirthlensError, match="already holds a run"):
        next(train_to_disk(tiny("seeds.data=1"), tmp_path / "run"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(BirthlensError, match="other files"):
        next(train_to_disk(tiny(), tmp_path / "notes"))
    with pytest.raises(BirthlensError, match=r"a.txt' is a file"):
        next(train_to_disk(tiny(), tmp_path / "notes" / "a.txt"))
    with pytest.raises(BirthlensError, match=r"out = .*x' cannot be made: Not a directory"):
        next(train_to_disk(tiny(), tmp_path / "notes" / "a.txt" / "x"))
    with pytest.raises(BirthlensError, match="out = '' is not a name"):
        next(train_to_disk(tiny(), ""))
    header = (run.path / "run.json").read_bytes()
    (run.path / "run.json").unlink()
    with pytest.raises(BirthlensError, match="other files"):  # checkpoints may be a run's that lost its header
        next(train_to_disk(tiny(), run.path))
    (run.path / "run.json").write_bytes(header)
    assert before == {file: file.read_bytes() for file in run.path.rglob("*.*")}


def test_damage_is_named(tmp_path: Path) -> None:
    run = train_all(tiny(), tmp_path / "run")
    with pytest.raises(BirthlensError, match=r"step = 3 .* 0, 4, 8, 12"):
        run.weights(3)
    file = run.path / "checkpoints" / "step_00000008.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BirthlensError, match=r"step_00000008.safetensors is damaged"):
        run.weights(8)
    header = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps({**header, "format": 99}))
    with pytest.raises(BirthlensError, match=r"run.json has format 99.*upgrade"):
        load_run(run.path)
    (run.path / "run.json").write_text("{")
    with pytest.raises(BirthlensError, match=r"run.json is damaged"):
        load_run(run.path)
    with pytest.raises(BirthlensError, match="does not exist"):
        load_run(tmp_path / "absent")
    with pytest.raises(BirthlensError, match=r"holds no run.json"):
        load_run(tmp_path)


def _read_all(path: Any) -> None:
    run = load_run(path)
    assert len(run.task.statistics) == 12 and len(run.metrics())
    deque(run.checkpoints(), maxlen=0)
    run.stacked(run.config.trained)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": "task"}, r"'config' is not of type dict"),
        ({"config": [1]}, r"'config' is not of type dict"),
        ({"config": {"task": {"contxt": 3}}}, r"config that cannot be read: task.contxt = 3 is unknown"),
        ({"engine": None}, r"'engine' is not of type dict"),
        ({"engine": {}}, r"'engine' has no name"),
        ({"engine": {"name": "fused", "reason": ""}}, r"engine.threads is None, it must be an int of 1 or more"),
        ({"engine": {"name": "fused", "reason": "", "threads": True}}, r"engine.threads is True"),
        ({"engine": {"name": "steam", "reason": "", "threads": 1}}, r"engine.name is 'steam', valid are reference,"),
        ({"vocab": ["a", "b"]}, r"shape \(12,\) for 2 tokens"),
        ({"vocab": list(range(12))}, r"'vocab' holds something else than strings"),
        ({"vocab": ["a"] * 12}, r"'vocab' must hold two or more distinct strings"),
        ({"format": "1"}, r"'format' is not of type int"),
        ({"format": True}, r"'format' is not of type int"),
        ({"format": 0}, r"'format' is 0, valid are 1 to 2"),
        ({"format": -1}, r"'format' is -1"),
        ({"format": 1}, r"it has the field 'digest', which format 1 has not"),
        ({"files": {}}, r"'files' must give the digests of tables.safetensors and constants.safetensors"),
        ({"versions": {"torch": 2}}, r"'versions' holds something else than strings"),
        ({"code": 5}, r"'code' is not a str"),
    ],
)
def test_a_damaged_header_is_named(tmp_path: Path, change: Any, said: Any) -> None:
    run = train_all(tiny(), tmp_path / "run")
    header = json.loads((run.path / "run.json").read_text())
    if change.keys() & {"format", "files", "versions", "code"} or not isinstance(change.get("config", {}), dict):
        (run.path / "run.json").write_text(json.dumps({**header, **change}))
    else:
        reseal(run.path, lambda header: header.update(change))
    with pytest.raises(BirthlensError, match=said) as error:
        _read_all(run.path)
    assert str(run.path) in str(error.value)


def seal(run: Any) -> Any:
    """Return what puts the digest into resume.safetensors."""
    return lambda data: present(seal_of(run.header)).sealed("resume.safetensors", data)


def test_damaged_tensors_rows_and_notes_are_named(tmp_path: Path) -> None:
    run = train_all(tiny(), tmp_path / "run")
    steps = run.steps
    for stranger in ("step_copy", "step_5", "step_00000008 (1)"):
        (run.path / "checkpoints" / f"{stranger}.safetensors").write_bytes(b"")
    _read_all(run.path)
    assert run.steps == steps
    metrics = (run.path / "metrics.jsonl").read_bytes()
    for row in ("5", '{"a": 5}', '{"step": "x", "split": "", "metric": "", "value": 1, "n": 1}'):
        (run.path / "metrics.jsonl").write_bytes(metrics + row.encode() + b"\n")
        with pytest.raises(
            BirthlensError, match=r"metrics.jsonl is damaged at line \d+: the line, or one before it, was"
        ):
            run.metrics()
        with pytest.raises(BirthlensError, match=r"metrics.jsonl is damaged at line \d+; restore"):
            read_metrics(run.path)
    (run.path / "metrics.jsonl").write_bytes(metrics)

    state = load_tensors(run.path / "resume.safetensors")
    metadata = load_with_metadata(run.path / "resume.safetensors")[1]
    for notes in ("{", "[]", '{"step": "last"}', '{"step": true}'):
        save_tensors(run.path / "resume.safetensors", state, {"notes": notes, "digest": BLANK}, seal(run))
        with pytest.raises(BirthlensError, match=r"resume.safetensors does not say which step"):
            next(resume(run.path))
    wrong = {name: np.zeros((2, 2), np.float32) for name in state}
    replace(run.path, "resume.safetensors", wrong, metadata["notes"])
    with pytest.raises(BirthlensError, match=r"resume.safetensors has momentum_buffer.* of shape \(2, 2\)"):
        next(resume(run.path))
    replace(run.path, "resume.safetensors", state)

    file = run.path / "checkpoints" / "step_00000004.safetensors"
    tensors = load_tensors(file)
    name = "checkpoints/step_00000004.safetensors"
    replace(run.path, name, {**tensors, "L1.W_O": np.zeros((1, 16, 8), np.float32)})
    with pytest.raises(BirthlensError, match=r"step_00000004.* has L1.W_O of shape \(1, 16, 8\), not \(1, 16, 16\)"):
        _read_all(run.path)
    replace(run.path, name, {"L1.W_O": tensors["L1.W_O"]})
    with pytest.raises(BirthlensError, match=r"step_00000004.* lacks L0.W_K, L1.W_K"):
        load_run(run.path).stacked(["L0.W_K"])
    file.unlink()
    file.mkdir()
    with pytest.raises(BirthlensError, match=r"step_00000004.safetensors cannot be read: Is a directory"):
        _read_all(run.path)


def test_a_torn_last_line_of_metrics_is_dropped(tmp_path: Path) -> None:
    run = train_all(tiny(), tmp_path / "run")
    n = len(run.metrics())
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "spl')
    assert len(run.metrics()) == n


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["checkpoints.schedule=explicit", "checkpoints.steps=[3, 9]"], [0, 3, 9, 100]),
        (["checkpoints.schedule=log", "checkpoints.per_decade=2"], [0, 1, 3, 10, 32, 100]),
        (["checkpoints.schedule=linear", "checkpoints.every=40"], [0, 40, 80, 100]),
    ],
)
def test_schedules(overrides: Any, steps: Any) -> None:
    schedule = Schedule(tiny("training.steps=100", *overrides))
    assert [step for step in range(101) if schedule.planned(step)] == steps


@given(st.integers(1, 400), st.integers(1, 3000))
def test_a_logarithmic_schedule_is_every_rounded_power(per_decade: Any, last: Any) -> None:
    config = tiny(f"training.steps={last}", "checkpoints.schedule=log", f"checkpoints.per_decade={per_decade}")
    powers = {round(10 ** (power / per_decade)) for power in range(4 * per_decade)}
    schedule = Schedule(config)
    wanted = {0, last, *(step for step in powers if step < last)}
    assert {step for step in range(last + 1) if schedule.planned(step)} == wanted


@pytest.mark.parametrize("kind", ["checkpoints.schedule=log", "checkpoints.every=1"])
def test_no_schedule_is_too_long_to_begin(kind: Any) -> None:
    long = 10**12
    schedule = Schedule(tiny(f"training.steps={long}", kind, f"checkpoints.per_decade={10 * long}"))
    assert schedule.planned(long) and schedule.planned(1) and schedule.planned(long - 1)


def test_checkpoints_are_denser_where_the_loss_moves() -> None:
    schedule = Schedule(tiny("training.steps=100", "checkpoints.every=50", "checkpoints.sensitivity=0.1"))
    loss = {step: 3.0 if step < 60 else max(0.1, 3.0 - 0.2 * (step - 60)) for step in range(101)}
    kept = [step for step in range(101) if schedule.keeps(step, loss[step])]
    assert kept[:2] == [0, 50] and len([step for step in kept if 60 <= step <= 80]) > 10
    assert Schedule(tiny("checkpoints.sensitivity=0.1"), last_kept_loss=2.0).keeps(3, 1.0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("engine", ["functional", "handwritten", "fused"])
def test_divergence_stops_with_advice(tmp_path: Path, engine: Any) -> None:
    config = tiny(
        "optimiser.learning_rate=1e12", f"training.engine={engine}", "training.steps=50", "evaluation.every=50",
        "checkpoints.schedule=explicit", "checkpoints.steps=[1]",
    )  # fmt: skip
    with pytest.raises(DivergedError, match=r"training loss is nan at step \d+.*optimiser.learning_rate") as stopped:
        for _ in train_to_disk(config, tmp_path / "run"):
            pass
    kept = load_run(tmp_path / "run")
    assert all(np.isfinite(array).all() for array in kept.checkpoint(kept.steps[-1]).values())
    assert f"the last kept step is {kept.steps[-1]}" in str(stopped.value)
    # What was measured since then is on disk too, up to the update that failed.
    step = int(str(stopped.value).split("at step ")[1].split(";")[0])
    assert kept.metrics().query("metric == 'loss'")["step"].tolist() == list(range(1, step + 1))
    assert step > kept.steps[-1] == 1
    with pytest.raises(DivergedError, match="the last kept step is 1"):
        for _ in resume(tmp_path / "run"):
            pass


def test_a_held_out_loss_that_is_not_finite_stops_before_its_step_is_kept() -> None:
    """One update makes the weights so large that the held-out loss is NaN, before any training batch sees them."""
    config = tiny(
        "optimiser.learning_rate=1e30",
        "optimiser.weight_decay=1e8",
        "training.engine=functional",
        "checkpoints.every=1",
    )
    with pytest.raises(DivergedError, match=r"held-out loss is nan at step 1; .* kept step is 0"):
        final(config)


def test_weights_that_are_not_finite_are_not_kept_where_no_held_out_target_tells() -> None:
    config = tiny(
        "optimiser.weight_decay=1e30", "optimiser.learning_rate=1e30", "checkpoints.every=1",
        "task.context=5", "evaluation.batch_size=1", "training.batch_size=64",
    )  # fmt: skip
    trainer, kept = Trainer(config, _statistics(config)), []
    assert not trainer.held_out.in_context.any()
    with pytest.raises(DivergedError, match=r"L0.W_K holds numbers that are not finite at step 1; .* kept step is 0"):
        for record in train(config, trainer=trainer):
            kept.append(record.step)
    assert kept == [0]


def test_without_a_held_out_target_only_planned_steps_are_kept() -> None:
    schedule = Schedule(tiny("checkpoints.every=4", "checkpoints.sensitivity=0.1"))
    assert [step for step in range(13) if schedule.keeps(step, None)] == [0, 4, 8, 12]


@pytest.mark.parametrize(
    ("overrides", "engine"),
    [
        ([], "handwritten"),
        (["training.steps=100000"], "fused"),
        (["model.family=full"], "functional"),
        (["model.n_layers=3"], "functional"),
        (["model.feed_forward=relu"], "functional"),
        (["training.trained=[W_E, L1.W_O]"], "functional"),
        (["training.engine=reference"], "reference"),
    ],
)
def test_the_engine_is_chosen_by_the_config_and_says_why(overrides: Any, engine: Any) -> None:
    name, reason = choose(tiny(*overrides), 12)
    assert name == engine and reason


@pytest.mark.parametrize("overrides", [["task.context=2040"], ["corpus.vocabulary=2030"]])
def test_a_context_or_vocabulary_too_large_to_fold_falls_back(overrides: Any) -> None:
    config = tiny("training.steps=1", "training.batch_size=1", "evaluation.batch_size=1", "model.d_model=2", *overrides)
    trainer = Trainer(config, _statistics(config))
    assert trainer.engine_name == "functional" and "n_ctx + d_vocab = 20" in trainer.engine_reason
    assert np.isfinite(present(trainer.update()))
    with pytest.raises(
        BirthlensError, match=r"'handwritten' cannot train this config: n_ctx \+ d_vocab = 20.*use auto"
    ):
        Trainer(config.changed(training={"engine": "handwritten"}), _statistics(config))


UNUSABLE_NUMBA = {
    "an import that fails": "raise ImportError('built for another numpy')",
    "no directory for its cache": "def njit(*a, **k): return lambda f: cannot_cache()\n"
    "def cannot_cache(): raise RuntimeError('cannot cache function: no locator available')",
}


@pytest.mark.parametrize("code", UNUSABLE_NUMBA.values(), ids=UNUSABLE_NUMBA)
def test_a_numba_that_cannot_be_used_is_done_without(tmp_path: Path, code: Any) -> None:
    """In a process of its own, with a broken numba first on the path: sampling and training go on without it."""
    (tmp_path / "numba.py").write_text(code)
    tiny("training.steps=100000").save(tmp_path / "config.json")
    program = (
        "from birthlens.config.run import RunConfig\n"
        "from birthlens.tasks.corpus import statistics_of\n"
        "from birthlens.errors import BirthlensError\n"
        "from birthlens.training.loop import Trainer\n"
        "config = RunConfig.load('config.json')\n"
        "trainer = Trainer(config, statistics_of(config.corpus))\n"
        "trainer.update()\n"
        "print(trainer.engine_name, trainer.engine_reason)\n"
        "try:\n"
        "    config = config.changed(training={'engine': 'fused'})\n"
        "    Trainer(config, statistics_of(config.corpus))\n"
        "except BirthlensError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    said, refused = done.stdout.splitlines()
    assert said.startswith("handwritten the compiled kernels cannot be loaded (")
    assert refused.startswith(
        "training.engine = 'fused' cannot train this config: the compiled kernels cannot be loaded"
    )


def test_forcing_an_engine_that_cannot_is_an_error() -> None:
    with pytest.raises(BirthlensError, match=r"'fused' cannot train this config.*W_E must stay frozen"):
        choose(tiny("training.engine=fused", "training.trained=[W_E]"), 12)


def test_a_loss_without_targets_is_refused() -> None:
    with pytest.raises(BirthlensError, match=r"n_triggers = 0"):
        next(train(tiny("task.n_triggers=0")))


def test_a_finished_run_goes_on_to_the_bits_of_a_longer_one(tmp_path: Path) -> None:
    from birthlens.runs.verify import verify

    whole = train_to_disk(tiny("training.steps=6", "optimiser.momentum=0.5"), tmp_path / "whole")
    assert [record.step for record in whole] == list(range(7))
    list(train_to_disk(tiny("training.steps=4", "optimiser.momentum=0.5"), tmp_path / "run"))
    header = (tmp_path / "run" / "run.json").read_text()
    with pytest.raises(BirthlensError, match=r"training.steps = 3: the run has 4 already"):
        list(resume(tmp_path / "run", 3))
    assert (tmp_path / "run" / "run.json").read_text() == header
    assert [record.step for record in resume(tmp_path / "run", 6)] == [5, 6]
    run = load_run(tmp_path / "run")
    assert run.config.training.steps == 6 and run.finished and not list(resume(tmp_path / "run"))
    for name, tensor in load_run(tmp_path / "whole").checkpoint(6).items():
        np.testing.assert_array_equal(run.checkpoint(6)[name], tensor)
    assert verify(tmp_path / "run").whole
    path = tmp_path / "run" / "run.json"
    path.write_text(path.read_text().replace('"steps": 6', '"steps": 7'))
    with pytest.raises(BirthlensError, match="its 'longer' does not match its digest"):
        load_run(tmp_path / "run")
    list(train_to_disk(tiny("training.steps=4", "optimiser.decay=cosine"), tmp_path / "decays"))
    with pytest.raises(BirthlensError, match=r"learning rate decays towards step 4"):
        list(resume(tmp_path / "decays", 6))
