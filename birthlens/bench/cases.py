"""The comparisons of `birthlens bench`: each returns one row per variant, with its time and its ratio to a baseline.

Every row has case, setting, variant, ms, spread, times_baseline, baseline, rounds, and `measured`, the share of the work
that was timed where a slow baseline is scaled up. The config sets the size of a case.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from birthlens.bench.baselines import hooked_ablations, hooked_step, plain_sampler, plain_step
from birthlens.bench.timing import Timing, interleaved
from birthlens.config.run import RunConfig
from birthlens.config.task import as_bigram
from birthlens.model.initialisation import initial_weights
from birthlens.model.weights import Weights
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.corpus import statistics_of
from birthlens.training.loop import Trainer

Row = dict[str, Any]


def training_step(config: RunConfig, rounds: int) -> list[Row]:
    """A whole step of the simplified model (sampling, forward, backward, update), and sampling as a share of it.

    Small batches take several steps in each turn, since in training the caches are not filled by another variant.
    """
    task, weights = _task_and_weights(config)
    size = config.training.batch_size
    numbers = itertools.count()

    def on_fresh_batches(step: Callable[[Any], None]) -> Callable[[], None]:
        return lambda: step(task.batch(size, 0, next(numbers)))

    variants: dict[str, Callable[[], object]] = {
        "hooked": on_fresh_batches(hooked_step(weights, config)),
        "plain": on_fresh_batches(plain_step(weights, config)),
        "plain, micro-batches of 16": on_fresh_batches(plain_step(weights, config, 16)),
        "handwritten": engine_step(config, "handwritten"),
        "fused": engine_step(config, "fused"),
        "sampling alone": lambda: task.batch(size, 0, next(numbers)),
    }
    timings = interleaved(variants, rounds, calls=max(1, 256 // size))
    parts = {"fused": timings["fused"], "sampling alone": timings.pop("sampling alone")}
    return [
        *rows_of("training step", f"batch {size}", timings, "hooked"),
        *share_rows("sampling in a step", f"batch {size}", parts, "fused"),
    ]


def full_model_step(config: RunConfig, rounds: int) -> list[Row]:
    """Two layers, four heads, LayerNorm and MLP, everything trainable: TransformerLens against the functional engine."""
    variants = {"hooked": _plain_hooked(config), "functional": engine_step(config, "functional")}
    return rows_of("full model step", f"batch {config.training.batch_size}", interleaved(variants, rounds), "hooked")


def sampling(config: RunConfig, rounds: int) -> list[Row]:
    """Sampling a batch, fixed and random triggers, against one `Generator.choice` for each token."""
    return [row for triggers in ("fixed", "random") for row in _sampling(config, triggers, rounds)]


def _sampling(config: RunConfig, triggers: str, rounds: int) -> list[Row]:
    size = config.training.batch_size
    task = BigramTask(as_bigram(config.task).changed(triggers=triggers), statistics_of(config.corpus))
    rng = np.random.default_rng(0)
    few = max(1, size // 32)
    variants: dict[str, Callable[[], object]] = {
        "plain": lambda: plain_sampler(task, few, rng),
        "numpy": lambda: task.sample(size, rng, compiled=False),
        "compiled": lambda: task.sample(size, rng),
    }
    timings = interleaved(variants, rounds)
    timings["plain"] = timings["plain"].of_share(few / size)
    return rows_of("sampling", f"{triggers} triggers, batch {size}", timings, "plain")


def weight_probes(config: RunConfig, n_checkpoints: int, rounds: int) -> list[Row]:
    """All memories over the checkpoints of a run, in new processes: birthlens against a loop over HookedTransformers.

    Both read the same table; the process also writes it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        synthetic_run(config, path, n_checkpoints)
        loop = f"from birthlens.bench.baselines import hooked_probes; hooked_probes({str(path)!r})"
        commands = {
            "hooked loop": [sys.executable, "-W", "ignore", "-c", loop],
            "probe process": [sys.executable, "-m", "birthlens", "probe", str(path), "--out", f"{folder}/probe.csv"],
        }
        timings = interleaved(_processes(commands), rounds, warm_up=0)  # new processes: none can warm up the next
        return rows_of("weight probes", f"{n_checkpoints} checkpoints", timings, "hooked loop")


def interventions(config: RunConfig, n_sequences: int, rounds: int) -> list[Row]:
    """Clean and {2 heads} x {zero, mean, resample} on one checkpoint: the runner against hooks."""
    from birthlens.analysis.interventions.runner import evaluate
    from birthlens.analysis.interventions.scoring import Scoring
    from birthlens.analysis.interventions.spec import at_heads
    from birthlens.model.hooked import build

    task, weights = _task_and_weights(config)
    batch = task.batch(n_sequences, 1)
    reference = task.batch(n_sequences, 2)
    model = build(weights)
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
    setting = f"{n_sequences} sequences, {len(suite)} cases"
    return rows_of("interventions", setting, interleaved(variants, rounds), "hooks per case")


def start_up(config: RunConfig, rounds: int) -> list[Row]:
    """New processes: the interpreter alone, the import, the help, the list of steps."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        synthetic_run(config, path, 3)
        commands = {
            "python alone": [sys.executable, "-c", "pass"],
            "import birthlens": [sys.executable, "-c", "import birthlens"],
            "birthlens --help": [sys.executable, "-m", "birthlens", "--help"],
            "birthlens steps": [sys.executable, "-m", "birthlens", "steps", str(path)],
        }
        return rows_of("start-up", "new process", interleaved(_processes(commands), rounds), "python alone")


def checkpointing(config: RunConfig, rounds: int) -> list[Row]:
    """Saving a checkpoint, and what that adds to a step on average, at the config's schedule."""
    from birthlens.runs.writer import RunWriter

    trainer = Trainer(config, statistics_of(config.corpus))
    every = config.checkpoints.every
    with tempfile.TemporaryDirectory() as folder:
        header = {"name": trainer.engine_name, "reason": "a benchmark", "threads": trainer.engine.threads}
        writer = RunWriter.create(Path(folder) / "run", config, trainer.task, trainer.initial, header)
        numbers = itertools.count()

        def save() -> None:
            state, notes = trainer.snapshot()
            writer.keep(next(numbers), trainer.engine.tensors(), [], state, notes)

        timings = interleaved({trainer.engine_name: trainer.update, "save": save}, rounds)
        name = f"saves a step, one every {every} steps"
        timings[name] = Timing(name, tuple(second / every for second in timings["save"].seconds))
        setting = f"batch {config.training.batch_size}"
        return share_rows("checkpoint", setting, timings, trainer.engine_name)


CLAMPS = {
    "freeze": "freeze L0.W_K",
    "hold ideal": "hold L1.W_O ideal",
    "hold rank 8": "hold L1.W_O rank:8",
    "hold ledger": "hold L1.W_O ledger",
    "add held": "add L1.W_O 2 held",
    "set learning rate": "set optimiser.learning_rate=0.1",
    "pinned pattern (functional)": "pin L0H0 previous",
}


def clamped_step(config: RunConfig, rounds: int) -> list[Row]:
    """A step under one clamp, by the engine that takes it, against the fused (and the functional) step without clamps."""
    variants: dict[str, Callable[[], object]] = {name: engine_step(config, name) for name in ("fused", "functional")}
    for name, clamp in CLAMPS.items():
        training = config.training.changed(engine="auto", clamps=[clamp])
        variants[name] = Trainer(config.changed(training=training), statistics_of(config.corpus)).update
    return rows_of("clamped step", f"batch {config.training.batch_size}", interleaved(variants, rounds), "fused")


def monitoring(config: RunConfig, rounds: int) -> list[Row]:
    """A `Monitor` at its defaults in a HookedTransformer loop: a measurement, and what that adds to a step on average."""
    from birthlens.analysis.behaviour.monitor import Monitor
    from birthlens.model.hooked import build

    task, weights = _task_and_weights(config)
    monitor = Monitor(build(weights))
    steps = itertools.count(1)
    step = hooked_step(weights, config)
    variants: dict[str, Callable[[], object]] = {
        "hooked": lambda: step(task.batch(config.training.batch_size, 0, next(steps))),
        "measurement": lambda: monitor.step(monitor.every * next(steps)),
    }
    timings = interleaved(variants, rounds)
    name = f"measurements a step, one every {monitor.every} steps"
    timings[name] = Timing(name, tuple(second / monitor.every for second in timings["measurement"].seconds))
    return share_rows("monitor", f"batch {config.training.batch_size}", timings, "hooked")


def _processes(commands: Mapping[str, list[str]]) -> dict[str, Callable[[], object]]:
    run = partial(subprocess.run, check=True, capture_output=True)
    return {name: partial(run, command) for name, command in commands.items()}


def engine_step(config: RunConfig, name: str) -> Callable[[], object]:
    """Return one engine's training step."""
    trainer = Trainer(config.changed(training=config.training.changed(engine=name)), statistics_of(config.corpus))
    return trainer.update


def _plain_hooked(config: RunConfig) -> Callable[[], object]:
    task, weights = _task_and_weights(config)
    step = hooked_step(weights, config)
    numbers = itertools.count()
    return lambda: step(task.batch(config.training.batch_size, 0, next(numbers)))


def _task_and_weights(config: RunConfig) -> tuple[BigramTask, Weights]:
    statistics = statistics_of(config.corpus)
    weights = initial_weights(config.model, len(statistics), config.task.context, np.random.default_rng(0))
    return BigramTask(as_bigram(config.task), statistics), weights


def synthetic_run(config: RunConfig, path: Path, n_checkpoints: int) -> None:
    """Write a run with `n_checkpoints` checkpoints whose trained weights are the initial ones plus noise."""
    from birthlens.runs.writer import RunWriter

    config = config.changed(training=config.training.changed(steps=n_checkpoints - 1), checkpoints={"every": 1})
    task, weights = _task_and_weights(config)
    engine = {"name": "functional", "reason": "a benchmark", "threads": 1}
    writer = RunWriter.create(path, config, task, weights, engine)
    generator = np.random.default_rng(1)
    for step in range(n_checkpoints):
        moved = {name: weights[name] + 0.01 * generator.standard_normal(weights[name].shape) for name in config.trained}
        tensors = {name: array.astype(np.float32) for name, array in moved.items()}
        writer.keep(step, tensors, [], {}, {"engine": engine["name"]})


def rows_of(case: str, setting: str, timings: Mapping[str, Timing], baseline: str) -> list[Row]:
    """Tabulate an interleaved run."""
    return [
        {
            "case": case,
            "setting": setting,
            "variant": name,
            "ms": timing.median * 1e3,
            "spread": timing.spread,
            "times_baseline": timings[baseline].median / timing.median,
            "baseline": baseline,
            "rounds": len(timing.seconds),
            "measured": timing.share,
        }
        for name, timing in timings.items()
    ]


def share_rows(case: str, setting: str, timings: Mapping[str, Timing], whole: str) -> list[Row]:
    """Tabulate an interleaved run of a whole and its parts, each as a share of the whole."""
    rows = rows_of(case, setting, timings, whole)
    for row in rows:
        row["share_of_baseline"] = 1 / row.pop("times_baseline")
    return rows
