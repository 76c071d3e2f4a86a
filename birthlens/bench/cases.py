"""The comparisons of `birthlens bench`: each returns rows (case, variant, setting, ms, spread, ratio to its baseline)."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from birthlens.bench.baselines import hooked_ablations, hooked_step, plain_sampler, plain_step
from birthlens.bench.timing import Timing, interleaved
from birthlens.config import RunConfig
from birthlens.corpus import statistics_of
from birthlens.initialisation import initial_weights
from birthlens.presets import preset
from birthlens.runs import load_run
from birthlens.task import BigramTask
from birthlens.training.loop import Trainer
from birthlens.weights import Weights

Row = dict[str, Any]


def training_step(batch_size: int, rounds: int) -> list[Row]:
    """The paper's setting, whole step: sampling, forward, backward, update."""
    config = preset("paper", [f"training.batch_size={batch_size}", "evaluation.batch_size=1"])
    task, weights = _task_and_weights(config)
    numbers = itertools.count()

    def on_fresh_batches(step: Callable[[Any], None]) -> Callable[[], None]:
        return lambda: step(task.batch(batch_size, 0, next(numbers)))

    variants: dict[str, Callable[[], object]] = {
        "hooked": on_fresh_batches(hooked_step(weights, config)),
        "plain": on_fresh_batches(plain_step(weights, config)),
        "plain, micro-batches of 16": on_fresh_batches(plain_step(weights, config, 16)),
        "handwritten": _engine_step(config, "handwritten"),
        "fused": _engine_step(config, "fused"),
        "sampling alone": lambda: task.batch(batch_size, 0, next(numbers)),
    }
    return _rows("training step", f"batch {batch_size}", interleaved(variants, rounds), "hooked")


def full_model_step(batch_size: int, rounds: int) -> list[Row]:
    """Two layers, four heads, LayerNorm and MLP, everything trainable: TransformerLens against the functional engine."""
    config = preset("paper-full", [f"training.batch_size={batch_size}", "evaluation.batch_size=1"])
    variants = {"hooked": _plain_hooked(config), "functional": _engine_step(config, "functional")}
    return _rows("full model step", f"batch {batch_size}", interleaved(variants, rounds), "hooked")


def sampling(batch_size: int, rounds: int) -> list[Row]:
    """Sampling a batch, fixed and random triggers, against one `Generator.choice` a token."""
    return [row for triggers in ("fixed", "random") for row in _sampling(triggers, batch_size, rounds)]


def _sampling(triggers: str, batch_size: int, rounds: int) -> list[Row]:
    config = preset("paper", [f"task.triggers={triggers}"])
    task = BigramTask(config.task, statistics_of(config.corpus))
    rng, few = np.random.default_rng(0), max(1, batch_size // 32)
    variants: dict[str, Callable[[], object]] = {
        "plain": lambda: plain_sampler(task, few, rng),
        "numpy": lambda: task.sample(batch_size, rng, compiled=False),
        "compiled": lambda: task.sample(batch_size, rng),
    }
    timings = interleaved(variants, rounds)
    # The plain sampler draws a share of the batch; its time is scaled up.
    timings["plain"] = timings["plain"].times(batch_size / few)
    return _rows("sampling", f"{triggers} triggers, batch {batch_size}", timings, "plain")


def weight_probes(n_checkpoints: int, rounds: int) -> list[Row]:
    """All memories over a run's checkpoints: a new process of birthlens against loading each into a HookedTransformer."""
    from birthlens.model import build

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        _synthetic_run(path, n_checkpoints)
        run, few = load_run(path), min(20, n_checkpoints)
        command = [sys.executable, "-m", "birthlens", "probe", str(path), "--out", str(path.parent / "probe.csv")]

        def hooked_loop() -> None:
            for step in run.steps[:few]:
                model = build(run.weights(step))
                remapped = model.W_E @ model.OV[0, 0].AB
                (model.W_E @ model.OV[1, 0].AB @ model.W_U).argmax(-1)
                (model.W_E @ model.QK[1, 0].AB @ remapped.T).argmax(-1)
                (model.W_pos @ model.QK[0, 0].AB @ model.W_pos.T).argmax(-1)

        variants: dict[str, Callable[[], object]] = {
            "hooked loop": hooked_loop,
            "probe process": lambda: subprocess.run(command, check=True, capture_output=True),
        }
        timings = interleaved(variants, rounds)
        timings["hooked loop"] = timings["hooked loop"].times(n_checkpoints / few)
        return _rows("weight probes", f"{n_checkpoints} checkpoints", timings, "hooked loop")


def interventions(rounds: int) -> list[Row]:
    """Clean and {2 heads} x {zero, mean, resample} on 256 sequences of the paper's model: the runner against hooks."""
    from birthlens.analysis.interventions import at_heads
    from birthlens.analysis.metrics import Scoring
    from birthlens.analysis.runner import evaluate
    from birthlens.model import build

    config = preset("paper")
    task, weights = _task_and_weights(config)
    batch, reference, model = task.batch(256, 1), task.batch(256, 2), build(weights)
    suite = {
        f"{head} {method}": at_heads("z", method, [head])
        for head in weights.heads
        for method in ("zero", "mean", "resample")
    }
    scoring = Scoring.of(batch, ("in_context.accuracy",))
    variants: dict[str, Callable[[], object]] = {
        "hooks per case": lambda: hooked_ablations(model, batch, reference),
        "runner": lambda: evaluate(weights, suite, batch, scoring, reference),
    }
    return _rows("interventions", "256 sequences, 6 cases", interleaved(variants, rounds), "hooks per case")


def start_up(rounds: int) -> list[Row]:
    """New processes: the interpreter alone, the import, the help, the list of steps."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        _synthetic_run(path, 3)
        commands = {
            "python alone": [sys.executable, "-c", "pass"],
            "import birthlens": [sys.executable, "-c", "import birthlens"],
            "birthlens --help": [sys.executable, "-m", "birthlens", "--help"],
            "birthlens steps": [sys.executable, "-m", "birthlens", "steps", str(path)],
        }
        variants = {
            name: partial(subprocess.run, command, check=True, capture_output=True)
            for name, command in commands.items()
        }
        return _rows("start-up", "new process", interleaved(variants, rounds), "python alone")


def checkpointing(rounds: int) -> list[Row]:
    """Saving one checkpoint, to be read beside the training step and the default schedule."""
    from birthlens.run_writer import RunWriter

    config = preset("paper", ["evaluation.batch_size=1"])
    trainer = Trainer(config, statistics_of(config.corpus))
    with tempfile.TemporaryDirectory() as folder:
        writer = RunWriter.create(Path(folder) / "run", config, trainer.task.statistics, trainer.initial, {"name": "-"})
        trainer.update()
        numbers = itertools.count()

        def save() -> None:
            state, notes = trainer.snapshot()
            writer.keep(next(numbers), trainer.engine.tensors(), [], state, notes)

        return _rows("checkpoint", "d = 128", interleaved({"save": save}, rounds), "save")


def _engine_step(config: RunConfig, name: str) -> Callable[[], object]:
    trainer = Trainer(
        config.changed(training={**config.training.model_dump(), "engine": name}), statistics_of(config.corpus)
    )
    return trainer.update


def _plain_hooked(config: RunConfig) -> Callable[[], object]:
    task, weights = _task_and_weights(config)
    step, numbers = hooked_step(weights, config), itertools.count()
    return lambda: step(task.batch(config.training.batch_size, 0, next(numbers)))


def _task_and_weights(config: RunConfig) -> tuple[BigramTask, Weights]:
    statistics = statistics_of(config.corpus)
    weights = initial_weights(config.model, len(statistics), config.task.context, np.random.default_rng(0))
    return BigramTask(config.task, statistics), weights


def _synthetic_run(path: Path, n_checkpoints: int) -> None:
    """Write a run of the d = 128 model with as many checkpoints as asked for; its weights are those of step 0."""
    from birthlens.run_writer import RunWriter

    config = preset("paper", [f"training.steps={n_checkpoints - 1}", "checkpoints.every=1"])
    statistics = statistics_of(config.corpus)
    _, weights = _task_and_weights(config)
    writer = RunWriter.create(path, config, statistics, weights, {"name": "none", "reason": "a benchmark"})
    trained = {name: weights[name] for name in config.trained}
    for step in range(n_checkpoints):
        writer.keep(step, trained, [], {}, {})


def _rows(case: str, setting: str, timings: Mapping[str, Timing], baseline: str) -> list[Row]:
    return list(_measured(case, setting, timings, baseline))


def _measured(case: str, setting: str, timings: Mapping[str, Timing], baseline: str) -> Iterator[Row]:
    for name, timing in timings.items():
        yield {
            "case": case,
            "setting": setting,
            "variant": name,
            "ms": timing.median * 1e3,
            "spread": timing.spread,
            "times_baseline": timings[baseline].median / timing.median,
            "baseline": baseline,
            "rounds": len(timing.seconds),
        }
