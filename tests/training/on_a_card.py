"""Check and time ensembles on a card: `python tests/training/on_a_card.py [cuda:0]`. It takes a few minutes there.

It was written where no card was at hand, and has been tried with `cpu tiny` only.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from birthlens.config.run import RunConfig
from birthlens.devices import Execution, chosen
from birthlens.tasks.counter_sampling import counter_batch, counter_batches
from birthlens.tasks.kinds import chain_of, task_of
from birthlens.training.ensemble import Ensemble
from birthlens.training.loop import StepRecord, Trainer


def config(d: int, context: int, batch: int, seed: int, steps: int = 300) -> RunConfig:
    words = [f"model.d_model={d}", f"task.context={context}", f"training.batch_size={batch}", f"training.steps={steps}"]
    words += [f"seeds.init={seed}", f"seeds.data={seed}", "checkpoints.every=10000", f"evaluation.every={steps}"]
    return RunConfig.parse({}, [*words, "training.engine=functional", "evaluation.batch_size=32"])


def seconds(call: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def trained(how: Execution, configs: list[RunConfig]) -> dict[int, StepRecord]:
    return {
        number: event for number, event in Ensemble(configs, execution=how).train() if isinstance(event, StepRecord)
    }


def check(device: str) -> None:
    few = [config(32, 32, 8, seed, steps=5) for seed in range(2)]
    here = trained(Execution(), few)
    there = trained(Execution(device), few)
    apart = max(
        float(np.abs(here[number].weights[name] - there[number].weights[name]).max())
        for number in here
        for name in few[0].trained
    )
    print(f"float32, 5 steps: largest difference of a weight {apart:.2g} (goal: under 1e-4)")
    task = task_of(few[0].task, chain_of(few[0]))
    same = torch.equal(counter_batch(task, 64, 1, 2, device).tokens.cpu(), counter_batch(task, 64, 1, 2).tokens)
    print(f"sampler counter: equal to the CPU's to the bit: {same}")


def births(device: str, tiny: bool) -> None:
    n, steps = (2, 3) if tiny else (32, 300)
    for precision in ("float32", "bfloat16"):
        last = trained(Execution(device, precision, "counter"), [config(128, 64, 64, s, steps) for s in range(n)])
        found = np.array([metric(record, "in_context_accuracy") for record in last.values()])
        error = 1.96 * found.std(ddof=1) / np.sqrt(n)
        print(f"{precision}: {np.sum(found > 0.9)} of {n} born; mean accuracy {found.mean():.4f} +- {error:.4f}")


def metric(record: StepRecord, name: str) -> float:
    return next((row["value"] for row in record.metrics if row["metric"] == name), float("nan"))


def updated(ensemble: Ensemble, numbers: list[int]) -> None:
    for _ in range(3):
        ensemble._update(numbers)


def drawn(ensemble: Ensemble) -> None:
    for trainer in ensemble.trainers:
        trainer.draw()


def stepped(trainer: Trainer) -> None:
    for _ in range(3):
        trainer.update()


def timing(device: str, tiny: bool) -> None:
    print("precision sampler     d   T   B    R   us a sequence and step, and the sampler's share")
    sizes = (
        [(16, 16, 4, 2)] if tiny else [(128, 256, 128, 1), (128, 256, 128, 64), (64, 64, 64, 1024), (128, 64, 64, 64)]
    )
    for d, context, batch, runs in sizes:
        configs = [config(d, context, batch, seed) for seed in range(runs)]
        for how in (Execution(device), Execution(device, "bfloat16"), Execution(device, "bfloat16", "counter")):
            ensemble = Ensemble(configs, execution=how)
            numbers = list(range(runs))
            ensemble._update(numbers)

            spent = seconds(partial(updated, ensemble, numbers), device) / 3
            drawing = seconds(partial(drawn, ensemble), device)
            each = 1e6 * spent / (runs * batch)
            print(
                f"{how.precision:9} {how.sampler:7} {d:5}{context:4}{batch:4}{runs:5}   {each:.2f}   {drawing / spent:.0%}"
            )
        lone = Trainer(configs[0], chain_of(configs[0]), execution=Execution(device))
        lone.update()
        each = 1e6 * seconds(partial(stepped, lone), device) / (3 * batch)
        print(f"float32   one run {d:5}{context:4}{batch:4}    1   {each:.2f}")
    task = task_of(configs[0].task, chain_of(configs[0]))
    many = 64 if not tiny else 2
    spent = seconds(lambda: counter_batches(task, 128, list(range(many)), [0] * many, device), device)
    print(f"counter, {many} batches of 128 in one program: {1e6 * spent / (many * 128):.3f} us a sequence")


if __name__ == "__main__":
    place = chosen(sys.argv[1] if len(sys.argv) > 1 else "cuda")[0]
    small = "tiny" in sys.argv
    print(place, torch.__version__, torch.cuda.get_device_name() if place != "cpu" else "")
    check(place)
    births(place, small)
    timing(place, small)
