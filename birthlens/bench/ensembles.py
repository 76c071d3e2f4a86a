"""Ensembles on a device: one tensor program for R runs against the same runs one at a time, and how its time grows.

Every row has the microseconds of one sequence in one step of one run, sampling included. The share of peak is the number of
useful operations (`scaling.useful_operations`) over the time and over the rate that torch's own matrix product reaches on
the device, in the same precision, in the same process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from birthlens.bench.baselines import PaperModel, autograd_step
from birthlens.bench.scaling import useful_operations
from birthlens.bench.timing import Timing, interleaved
from birthlens.config.presets import preset
from birthlens.config.run import RunConfig
from birthlens.devices import Execution
from birthlens.model.initialisation import initial_weights
from birthlens.training.drawing import MOST_STEPS, Draws
from birthlens.training.ensemble import Ensemble, chains_of
from birthlens.training.loop import Trainer

Row = dict[str, Any]
PLAIN = "plain loop"


@dataclass(frozen=True)
class Size:
    """R runs of one shape: width d, context T, batch B. A full model has heads, LayerNorm, an MLP and AdamW."""

    d: int
    T: int
    B: int
    R: int
    full: bool = False

    def __str__(self) -> str:
        return f"{'full, ' if self.full else ''}d {self.d}, T {self.T}, B {self.B}, R {self.R}"

    def configs(self) -> list[RunConfig]:
        """Return the configs, which differ in their seeds."""
        words = [f"model.d_model={self.d}", f"task.context={self.T}", f"training.batch_size={self.B}"]
        base = preset(
            "paper-full" if self.full else "paper", [*words, "corpus.source=markov", "evaluation.batch_size=1"]
        )
        seeds = [base.seeds.changed(init=seed, data=seed) for seed in range(self.R)]
        free = base.training.changed(engine="auto")
        return [base.changed(seeds=each, training=free) for each in seeds]


SIZES: Mapping[str, tuple[Size, ...]] = {
    "quick": (Size(16, 16, 8, 4),),
    "cpu": (
        Size(16, 16, 8, 16),
        Size(32, 32, 16, 16),
        Size(64, 64, 32, 16),
        Size(16, 16, 8, 16, full=True),
        Size(32, 32, 16, 16, full=True),
        Size(64, 64, 32, 16, full=True),
    ),
    "gpu": (Size(128, 256, 128, 64), Size(64, 64, 64, 1024), Size(128, 64, 64, 64), Size(128, 64, 64, 16, full=True)),
}
"""What `birthlens bench --device` times: `gpu` has the sizes of the goals, `cpu` those of docs/many_runs.md."""
GRIDS: Mapping[str, tuple[Size, dict[str, tuple[int, ...]]]] = {
    "quick": (Size(16, 16, 8, 2), {"R": (1, 4)}),
    "cpu": (Size(32, 32, 16, 8), {"R": (1, 4, 16), "B": (4, 16, 64), "T": (16, 32, 64), "d": (16, 32, 64)}),
    "gpu": (
        Size(128, 128, 64, 64),
        {"R": (1, 16, 64, 256), "B": (16, 64, 256), "T": (32, 128, 256, 512), "d": (32, 64, 128, 256)},
    ),
}
"""What `ensemble-scaling` changes, one at a time, around one size."""


def kind_of(device: str, quick: bool) -> str:
    """Return which sizes are for a device."""
    return "quick" if quick else "cpu" if device == "cpu" else "gpu"


def compared(device: str, kind: str, rounds: int) -> list[Row]:
    """Time ensembles against runs that are trained one at a time, on one device, in turns."""
    return [row for size in SIZES[kind] for row in _compared(size, device, rounds)]


def ways(device: str) -> dict[str, Execution]:
    """Return the ways in which ensembles are trained on a device, by their names in the rows."""
    found = {"ensemble, float32": Execution(device), "ensemble, float32, counter": Execution(device, sampler="counter")}
    if device != "cpu":
        found["ensemble, bfloat16, counter"] = Execution(device, "bfloat16", "counter")
    return found


def _compared(size: Size, device: str, rounds: int) -> list[Row]:
    configs = size.configs()
    variants: dict[str, Callable[[], object]] = {}
    for name, how in ways(device).items():
        ensemble = Ensemble(configs, execution=how)
        variants[name] = partial(ensemble.update, list(range(size.R)))
        variants[f"{name}: sampling alone"] = _sampling(ensemble)
    runs = dict.fromkeys(variants, size.R)
    if not size.full:
        variants[PLAIN] = _plain(configs[0], device)
    alone = Trainer(configs[0], chains_of(configs[:1])[0], execution=Execution(device))
    variants[f"one run at a time, {alone.engine_name}"] = alone.update
    baseline = f"one run at a time, {alone.engine_name}" if size.full else PLAIN
    timings = interleaved(
        {name: synchronised(call, device) for name, call in variants.items()}, rounds, calls=calls(device)
    )
    each = {name: timing.median / (runs.get(name, 1) * size.B) for name, timing in timings.items()}
    peaks = {
        precision: matmul_rate(device, precision) for precision in {how.precision for how in ways(device).values()}
    }
    operations = None if size.full else _operations(configs[0])
    rows = []
    for name, timing in timings.items():
        if name.endswith(": sampling alone"):
            continue
        sampled = each.get(f"{name}: sampling alone")
        precision = "bfloat16" if "bfloat16" in name else "float32"
        rows.append({
            "case": "ensemble", "device": device, "setting": str(size), "variant": name, "us": each[name] * 1e6,
            "spread": timing.spread, "times_baseline": each[baseline] / each[name], "baseline": baseline,
            "sampling": None if sampled is None else sampled / each[name],
            "share_of_peak": None if operations is None else operations / each[name] / peaks[precision],
            "rounds": rounds,
        })  # fmt: skip
    return rows


def scaled(device: str, kind: str, rounds: int) -> list[Row]:
    """Change one of R, B, T and d at a time, and time an ensemble in the fastest way of the device."""
    base, grid = GRIDS[kind]
    how = Execution(device) if device == "cpu" else Execution(device, "bfloat16", "counter")
    peak = matmul_rate(device, how.precision)
    rows = []
    for varied, values in grid.items():
        for value in values:
            size = Size(**{**vars(base), varied: value})
            configs = size.configs()
            ensemble = Ensemble(configs, execution=how)
            if device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats()
            call = synchronised(partial(ensemble.update, list(range(size.R))), device)
            timing: Timing = interleaved({"ensemble": call}, rounds, calls=calls(device))["ensemble"]
            each = timing.median / (size.R * size.B)
            memory = torch.cuda.max_memory_allocated() / 2**20 if device.startswith("cuda") else None
            rows.append({
                "case": "ensemble scaling", "device": device, "setting": str(size), "varied": varied, "value": value,
                "us": each * 1e6, "spread": timing.spread, "share_of_peak": _operations(configs[0]) / each / peak,
                "peak_memory_mb": memory, "rounds": rounds,
            })  # fmt: skip
    return rows


def calls(device: str) -> int:
    """Return how many steps a turn has: batches are drawn ahead on a GPU, so that single steps cost unequally."""
    return 1 if device == "cpu" else MOST_STEPS


def _sampling(ensemble: Ensemble) -> Callable[[], None]:
    """Return the drawing of the next batches of all members, with a count of steps of its own."""
    trainers = [copy(trainer) for trainer in ensemble.trainers]
    draws = Draws(trainers, ensemble.at_once)

    def draw() -> None:
        draws.of(range(len(trainers)))
        for trainer in trainers:
            trainer.step += 1

    return draw


def _operations(config: RunConfig) -> float:
    """Return the useful operations of one sequence, on average over a batch."""
    trainer = Trainer(config, chains_of([config])[0])
    batch = trainer.task.batch(config.training.batch_size, 0)
    sizes = config.model.d_model, len(trainer.task.statistics)
    return useful_operations(batch, *sizes, feed_forward="L1.W_F" in config.trained) / len(batch)


def _plain(config: RunConfig, device: str) -> Callable[[], None]:
    """Return a step of the paper's equations in plain PyTorch on a device, with its sampling on the CPU."""
    chain = chains_of([config])[0]
    trainer = Trainer(config, chain)
    weights = initial_weights(config.model, len(chain), config.task.context, np.random.default_rng(0))
    model = PaperModel(weights).to(device)
    step = autograd_step(model, list(model.parameters()), config, None)
    numbers = iter(range(10**9))
    return lambda: step(trainer.task.batch(config.training.batch_size, 0, next(numbers)).to(device))


def synchronised(call: Callable[[], object], device: str) -> Callable[[], None]:
    """Return a call that ends when the device has finished."""

    def waiting() -> None:
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        elif device == "mps":
            torch.mps.synchronize()

    return waiting


def matmul_rate(device: str, precision: str, rounds: int = 5) -> float:
    """Measure torch's matrix product on a device, in operations a second; float32 is not rounded to TF32."""
    size = 512 if device == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=getattr(torch, precision))
    call = synchronised(lambda: a @ a, device)
    call()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
