"""Which orders of three gradient steps work? All six: the gradient of each step, and every memory's recall after it.

All of the theorem's assumptions are kept. A gradient of exactly zero stores nothing, whatever the step size.

python analyses/which_orders_of_three_steps_work.py --tier laptop        # 2 minutes on one core
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pandas as pd
from asking import joined, options, tell

from birthlens.analysis.theory.gradients import MATRICES
from birthlens.analysis.theory.three_steps import assumptions_table, sizes

SCALES = {"laptop": (256, 64, 64, 2048, 5), "paper": (512, 64, 128, 8192, 5)}
PAPER = {"L1.W_O": "W_O^2", "L1.W_K": "W_K^2", "L0.W_K": "W_K^1"}


def order_taken(order: tuple[str, str, str], size: tuple[int, int, int, int], seed: int) -> pd.DataFrame:
    """Take the steps in one order; return gradient, recalls and accuracy after each."""
    d, n, t, batch = size
    ((recipe, task, statistics, model),) = sizes([d], [n], [t], [batch]).values()
    name = ", ".join(PAPER[matrix] for matrix in order)
    table = assumptions_table({name: (replace(recipe, order=order), task, statistics, model)}, [seed])
    rows = []
    for step, group in table.groupby("step"):
        rows.append((name, seed, f"step {step}: gradient", float(group["gradient"].iloc[0])))
        for metric, value in zip(group["metric"], group["value"], strict=True):
            words = metric.replace("in_context_accuracy", "in-context accuracy")
            for matrix, symbol in PAPER.items():
                words = words.replace(matrix, f"of {symbol}")
            rows.append((name, seed, f"step {step}: {words}", float(value)))
    return pd.DataFrame(rows, columns=["case", "seed", "quantity", "value"])


def main() -> None:
    """Take the steps for all orders and seeds, write and print the results."""
    arguments = options(__file__, __doc__)
    *size, seeds = SCALES[arguments.tier]
    jobs = [
        (order, tuple(size), seed)
        for order in itertools.permutations(MATRICES)
        for seed in range(arguments.seeds or seeds)
    ]
    tell(arguments, joined(order_taken, jobs, arguments.processes))


if __name__ == "__main__":
    main()
