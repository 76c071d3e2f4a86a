"""Whole trainings, an ablation suite over the checkpoints of a run, and peak memory."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from birthlens.bench.cases import synthetic_run
from birthlens.bench.scaling import in_a_process
from birthlens.config.run import RunConfig
from birthlens.runs.run import load_run
from birthlens.training.recording import train_to_disk

Row = dict[str, Any]


def training(config: RunConfig, setting: str, goal: float | None = None) -> list[Row]:
    """Train from the start, with evaluations and checkpoints, to the end or to an in-context accuracy above `goal`."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        accuracy = 0.0
        for record in train_to_disk(config, Path(folder) / "run"):
            found = [row["value"] for row in record.metrics if row["metric"] == "in_context_accuracy"]
            accuracy = found[-1] if found else accuracy
            if goal is not None and accuracy > goal:
                break
        return [
            {
                "case": "training",
                "setting": setting,
                "variant": "to the end" if goal is None else f"to accuracy {goal}",
                "seconds": time.perf_counter() - start,
                "steps": record.step,
                "in_context_accuracy": accuracy,
                "engine": record.trainer.engine_name,
            }
        ]


def ablation_suite(config: RunConfig, n_checkpoints: int, n_sequences: int) -> list[Row]:
    """Every head by zero, mean and resample over a run's checkpoints: evaluated, bootstrapped, and written to disk."""
    from birthlens.analysis.interventions.suite import Suite, execute

    suite = Suite(heads="all", methods=("zero", "mean", "resample"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        synthetic_run(config, path, n_checkpoints)
        run = load_run(path)
        batch = run.task.batch(n_sequences, 1)
        reference = run.task.batch(n_sequences, 2)
        start = time.perf_counter()
        table = execute(suite, run.checkpoints(), batch, reference, Path(folder) / "suite", statistics=run.statistics)
        return [
            {
                "case": "ablation suite",
                "setting": f"{n_checkpoints} checkpoints, {n_sequences} sequences",
                "variant": "suite",
                "seconds": time.perf_counter() - start,
                "ablations": table["case"].nunique() - 1,
                "steps": table["step"].nunique(),
            }
        ]


def memory(overrides: list[str], setting: str, rounds: int) -> list[Row]:
    """Peak memory of training steps, each engine in a process of its own; `before` is that of Python with torch alone."""
    rows = []
    for engine in ("handwritten", "fused"):
        found = in_a_process([*overrides, f"training.engine={engine}"], rounds)
        peak = found["peak_memory_mb"]
        before = found["before_training_mb"]
        facts = {"case": "memory", "setting": setting, "variant": engine, "peak_mb": peak, "before_mb": before}
        rows.append({**facts, "rounds": rounds})
    return rows
