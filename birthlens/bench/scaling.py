"""How step time and memory grow with T, d, batch, N and K, and the share of the machine's peak that is reached."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from birthlens.config.presets import preset
from birthlens.tasks.batch import TokenBatch

Row = dict[str, Any]

BASE = {
    "task.context": 256,
    "model.d_model": 128,
    "training.batch_size": 64,
    "corpus.vocabulary": 64,
    "task.n_triggers": 5,
}
GRID: dict[str, tuple[int, ...]] = {
    "task.context": (32, 64, 128, 256, 512, 1024),
    "model.d_model": (32, 64, 128, 256, 512),
    "training.batch_size": (8, 32, 64, 128, 512, 2048),
    "corpus.vocabulary": (32, 64, 256, 1024),
    "task.n_triggers": (1, 5, 20),
}


def useful_operations(batch: TokenBatch, d_model: int, d_vocab: int, feed_forward: bool = False) -> float:
    """Count the multiplications and additions that a step needs, forward and backward.

    With n loss positions p, and c = sum of (p + 1) over them: layer 0 mixes values and takes their gradient (two products of
    L (L + 1) / 2 pairs with d_model, where a sequence has its last loss position at L - 1); layer 1 has six products of c
    pairs with d_model (scores, context, and their four gradients); the folded query three products of n with d_model^2; the
    logits five of n with d_model times d_vocab, and a sixth where the linear feed-forward is trained.
    """
    mask = batch.in_context.numpy()
    positions = np.arange(1, mask.shape[1] + 1)
    pairs = float((mask * positions).sum())
    n = float(mask.sum())
    reach = (mask * positions).max(axis=1)
    layer_0 = float((reach * (reach + 1)).sum()) * d_model
    logits = (6 if feed_forward else 5) * n * d_model * d_vocab
    return 2 * (layer_0 + 6 * pairs * d_model + 3 * n * d_model**2 + logits)


def matmul_peak(size: int = 1536, rounds: int = 5) -> float:
    """Measure this machine's float32 matrix multiply on all its threads, in operations a second."""
    a = np.ones((size, size), np.float32)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def scaling(rounds: int) -> list[Row]:
    """Change one of T, d, batch, N, K at a time, each setting in a process of its own (for its peak memory)."""
    rows = []
    for name, values in GRID.items():
        for value in values:
            overrides = [f"{key}={setting}" for key, setting in {**BASE, name: value}.items()]
            rows.append({"case": "scaling", "varied": name, "value": value, **in_a_process(overrides, rounds)})
    return rows


def in_a_process(overrides: list[str], rounds: int) -> Row:
    """Call `measure` in a new process, whose peak memory is then that of these steps alone."""
    command = [sys.executable, "-m", "birthlens.bench.scaling", str(rounds), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def measure(overrides: list[str], rounds: int) -> Row:
    """Time training steps of one setting: ms, operations, share of the peak, and the process's peak memory in MB.

    `before_training_mb` is what Python with torch held before there was a model or a batch.
    """
    from birthlens.tasks.corpus import statistics_of
    from birthlens.training.loop import Trainer

    before = peak_memory_mb()
    config = preset("paper", ["corpus.source=markov", "training.engine=fused", "evaluation.batch_size=1", *overrides])
    trainer = Trainer(config, statistics_of(config.corpus))
    seconds = []
    operations = []
    peak = matmul_peak()
    for number in range(rounds + 1):
        batch = trainer.task.batch(config.training.batch_size, config.seeds.data, trainer.step)
        start = time.perf_counter()
        trainer.update()
        if number:
            seconds.append(time.perf_counter() - start)
            sizes = config.model.d_model, len(trainer.task.statistics)
            operations.append(useful_operations(batch, *sizes, feed_forward="L1.W_F" in config.trained))
    median = float(np.median(seconds))
    return {
        "ms": median * 1e3,
        "useful_gflop": float(np.mean(operations)) / 1e9,
        "share_of_peak": float(np.mean(operations)) / median / peak,
        "peak_memory_mb": peak_memory_mb(),
        "before_training_mb": before,
    }


def peak_memory_mb() -> float:
    """Return the most memory that this process has held, in MB.

    Linux's `ru_maxrss` begins with the memory of the parent process, so it is read on other systems only.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    # A child process answers its parent in JSON.
    sys.stdout.write(json.dumps(measure(sys.argv[2:], int(sys.argv[1]))))
