"""Check and time everything on a card: `python tests/training/on_a_card.py [cuda:0]`; it should take a few minutes.

It runs the tests marked `gpu`, compares ensembles and batches with those of the CPU, counts births in two precisions, trains
1,024 small runs, and times ensembles against the plain loop, each beside its goal. It was written where no card was at hand,
and has been tried with `cpu --tiny` only, which a test does.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from birthlens.bench.ensembles import Size, compared, scaled, synchronised
from birthlens.config.run import RunConfig
from birthlens.devices import Execution, chosen
from birthlens.tasks.counter_sampling import counter_batch
from birthlens.tasks.kinds import chain_of, task_of
from birthlens.training.ensemble import Ensemble
from birthlens.training.loop import StepRecord


class Finding(NamedTuple):
    """What was measured, the goal in words, and whether it was reached (None: no goal)."""

    what: str
    measured: str
    goal: str = ""
    reached: bool | None = None


def config(d: int, context: int, batch: int, seed: int, steps: int) -> RunConfig:
    words = [f"model.d_model={d}", f"task.context={context}", f"training.batch_size={batch}", f"training.steps={steps}"]
    words += [f"seeds.init={seed}", f"seeds.data={seed}", "checkpoints.every=10000", f"evaluation.every={steps}"]
    return RunConfig.parse({}, [*words, "training.engine=functional", "evaluation.batch_size=32"])


def trained(how: Execution, configs: list[RunConfig]) -> dict[int, StepRecord]:
    """Train an ensemble in memory; return the last record of each member."""
    return {
        number: event for number, event in Ensemble(configs, execution=how).train() if isinstance(event, StepRecord)
    }


def tests() -> Iterator[Finding]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(Path(__file__).parents[1])],
        capture_output=True,
        text=True,
        check=False,
    )
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]
    yield Finding("pytest -m gpu", last, "all pass", done.returncode == 0)


def equality(device: str) -> Iterator[Finding]:
    few = [config(32, 32, 8, seed, 5) for seed in range(2)]
    here = trained(Execution(), few)
    there = trained(Execution(device), few)
    apart = max(
        float(np.abs(here[number].weights[name] - there[number].weights[name]).max())
        for number in here
        for name in few[0].trained
    )
    yield Finding("largest difference of a weight after 5 steps, float32", f"{apart:.2g}", "1e-4", apart <= 1e-4)
    task = task_of(few[0].task, chain_of(few[0]))
    same = torch.equal(counter_batch(task, 64, 1, 2, device).tokens.cpu(), counter_batch(task, 64, 1, 2).tokens)
    yield Finding("batches of the sampler counter are those of the CPU", str(same), "True", same)


def births(device: str, tiny: bool) -> Iterator[Finding]:
    n, steps = (3, 3) if tiny else (32, 300)
    size = (16, 16, 4) if tiny else (128, 64, 64)
    accuracies = {}
    for precision in ("float32", "bfloat16"):
        last = trained(Execution(device, precision, "counter"), [config(*size, s, steps) for s in range(n)])
        accuracies[precision] = found = np.array([metric(record, "in_context_accuracy") for record in last.values()])
        yield Finding(f"born of {n}, {precision}", f"{np.sum(found > 0.9)}, mean accuracy {found.mean():.4f}")
    apart = accuracies["bfloat16"] - accuracies["float32"]
    error = 1.96 * apart.std(ddof=1) / np.sqrt(n)
    low, high = apart.mean() - error, apart.mean() + error
    yield Finding("bfloat16 - float32, mean accuracy", f"[{low:.4f}, {high:.4f}]", "contains 0", low <= 0 <= high)


def metric(record: StepRecord, name: str) -> float:
    return next((row["value"] for row in record.metrics if row["metric"] == name), float("nan"))


def thousand(device: str, tiny: bool) -> Iterator[Finding]:
    n, steps = (4, 3) if tiny else (1024, 300)
    d, context, batch = (16, 16, 4) if tiny else (64, 64, 64)
    configs = [config(d, context, batch, seed, steps) for seed in range(n)]
    begun = time.perf_counter()
    synchronised(lambda: trained(Execution(device, "bfloat16", "counter"), configs), device)()
    spent = time.perf_counter() - begun
    what = f"{n} runs of d {d}, T {context}, B {batch}, {steps} steps"
    yield Finding(what, f"{spent:.1f} s") if tiny else Finding(what, f"{spent:.1f} s", "60 s", spent <= 60)


def speed(device: str, tiny: bool) -> Iterator[Finding]:
    kind = "quick" if tiny else "gpu"
    for row in compared(device, kind, 3):
        measured = f"{row['us']:.2f} us, {row['times_baseline']:.1f} times {row['baseline']}"
        measured += "" if row["sampling"] is None else f", sampling {row['sampling']:.0%}"
        measured += "" if row["share_of_peak"] is None else f", {row['share_of_peak']:.0%} of peak"
        what = f"{row['setting']}: {row['variant']}"
        if row["variant"] != "ensemble, bfloat16, counter" or row["setting"] != str(Size(128, 256, 128, 64)):
            yield Finding(what, measured)
            continue
        reached = row["us"] <= 1.3 and row["times_baseline"] >= 15 and row["sampling"] < 0.1
        yield Finding(what, measured, "1.3 us, 15 times, sampling 10 %", reached)
    for row in scaled(device, kind, 3):
        yield Finding(f"{row['setting']}: ensemble", f"{row['us']:.2f} us, {row['share_of_peak']:.0%} of peak")


def main(words: list[str]) -> None:
    tiny = "--tiny" in words
    device = chosen(next((word for word in words if not word.startswith("-")), "cuda"))[0]
    card = "" if device == "cpu" else torch.cuda.get_device_name(device)
    print(f"device {device} {card}, torch {torch.__version__}")
    parts = [equality(device), births(device, tiny), thousand(device, tiny), speed(device, tiny)]
    missed = 0
    for part in parts if tiny else [tests(), *parts]:
        for finding in part:
            said = {None: "", True: f"  goal {finding.goal}: reached", False: f"  goal {finding.goal}: MISSED"}
            print(f"{finding.what}: {finding.measured}{said[finding.reached]}", flush=True)
            missed += finding.reached is False
    print(f"{missed} goals missed")


if __name__ == "__main__":
    main(sys.argv[1:])
