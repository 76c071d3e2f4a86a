"""Can one layer do what two do? One layer as control for two, on clean data, where no target can be copied for free.

python analyses/one_layer_or_two.py        # 2 minutes on one core for each seed
"""

from __future__ import annotations

import pandas as pd
from asking import keep, options

from birthlens import preset
from birthlens.training.grid import Grid
from birthlens.training.sweep import runs_of

OVERRIDES = ["task.cycles=clean", "training.batch_size=128", "training.steps=400", "checkpoints.every=100",
             "evaluation.every=20", "evaluation.batch_size=256"]  # fmt: skip


def main() -> None:
    """Train both models over seeds, save the measurements on held-out sequences, print best and last accuracies."""
    arguments = options(__file__, __doc__, tiers=False)
    cases = {str(layers): [f"model.n_layers={layers}"] for layers in (1, 2)}
    grid = Grid(preset("paper", OVERRIDES), cases, range(arguments.seeds or 5))
    tables = []
    for (layers, seed), run in runs_of(grid, arguments.runs, arguments.processes).items():
        metrics = run.metrics()
        held_out = metrics[(metrics["split"] == "held_out") & metrics["metric"].str.startswith("in_context_")]
        table = held_out.drop(columns="split")
        table.insert(0, "seed", seed)
        table.insert(0, "n_layers", int(layers))
        tables.append(table)
    table = pd.concat(tables)
    keep(arguments, table, grid)
    accuracy = table[table["metric"] == "in_context_accuracy"]
    print(accuracy.groupby(["n_layers", "seed"])["value"].agg(["max", "last"]).round(3).to_string())


if __name__ == "__main__":
    main()
