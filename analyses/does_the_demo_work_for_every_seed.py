"""Does the demo work for every seed, or was seed 0 lucky?

Trains the demo preset over seeds (initialisation and data) and compares its final values with those that it promises.

    python analyses/does_the_demo_work_for_every_seed.py        # 1 minute on one core
"""

from __future__ import annotations

import pandas as pd
from asking import keep, options

from birthlens import preset
from birthlens.analysis.behaviour.trajectory import memories_over
from birthlens.runs.run import Run
from birthlens.training.grid import Grid
from birthlens.training.sweep import runs_of

PROMISED = {
    "in_context_accuracy": 0.95,
    "output_memory": 0.9,
    "trigger_memory": 0.9,
    "prev_token_memory": 0.85,
}
CANDIDATES = {"output_memory": "all", "trigger_memory": "triggers among all", "prev_token_memory": "all"}


def final_values(run: Run) -> dict[str, tuple[float, int]]:
    """Return the held-out accuracy and the recalls at the last step, each with its number of positions or queries."""
    metrics, memories = run.metrics(), memories_over(run, run.steps[-1:], bases=["raw"]).to_pandas()
    accuracy = metrics[(metrics["split"] == "held_out") & (metrics["metric"] == "in_context_accuracy")].iloc[-1]
    recall = (
        memories[memories["metric"] == "recall"].set_index(["memory", "candidates"])[["value", "n"]].to_dict("index")
    )
    found = {"in_context_accuracy": (float(accuracy["value"]), int(accuracy["n"]))}
    for memory, candidates in CANDIDATES.items():
        row = recall[memory, candidates]
        found[memory] = (float(row["value"]), int(row["n"]))
    return found


def main() -> None:
    """Train all seeds, write a row for each seed and promise, and print the lowest of each."""
    arguments = options(__file__, __doc__, tiers=False)
    grid = Grid(preset("demo"), {"demo": ()}, range(arguments.seeds or 5))
    runs = runs_of(grid, arguments.runs, arguments.processes)
    rows = [
        (seed, metric, value, PROMISED[metric], value > PROMISED[metric], n)
        for (_, seed), run in runs.items()
        for metric, (value, n) in final_values(run).items()
    ]
    table = pd.DataFrame(rows, columns=["seed", "metric", "value", "promised", "kept", "n"])
    keep(arguments, table, grid)
    print(table.pivot_table(index="seed", columns="metric", values="value").round(3).to_string())
    print(f"\n{table['kept'].sum()} of {len(table)} promises kept over {table['seed'].nunique()} seeds")


if __name__ == "__main__":
    main()
