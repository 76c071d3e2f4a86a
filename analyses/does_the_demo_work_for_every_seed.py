"""Does the demo work for every seed, or was seed 0 lucky?

Trains the demo preset over seeds (initialisation and data) and writes what it ends with, beside what it promises.

    python analyses/does_the_demo_work_for_every_seed.py --seeds 5
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from birthlens import preset
from birthlens.analysis.trajectory import memories_over
from birthlens.runs import Run
from birthlens.sweep import Grid, runs_of

HERE = Path(__file__).parent
PROMISED = {
    "in_context_accuracy": 0.95,
    "output_memory": 0.9,
    "trigger_memory": 0.9,
    "prev_token_memory": 0.85,
}
CANDIDATES = {"output_memory": "all", "trigger_memory": "triggers among all", "prev_token_memory": "all"}


def final_values(run: Run) -> dict[str, tuple[float, int]]:
    """Return the held-out accuracy and the recalls at the last step, each with its number of positions or queries."""
    metrics, memories = run.metrics(), memories_over(run, run.steps[-1:], bases=["raw"])
    accuracy = metrics[(metrics["split"] == "held_out") & (metrics["metric"] == "in_context_accuracy")].iloc[-1]
    recall = memories[memories["metric"] == "recall"].set_index(["memory", "candidates"])
    found = {"in_context_accuracy": (float(accuracy["value"]), int(accuracy["n"]))}
    for memory, candidates in CANDIDATES.items():
        row = recall.loc[memory, candidates]
        found[memory] = (float(row["value"]), int(row["n"]))
    return found


def main() -> None:
    """Train all seeds, write a row for each seed and promise, and print the lowest of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/demo_seeds"))
    parser.add_argument("--processes", type=int, help="how many at once; by default one a core")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "does_the_demo_work_for_every_seed.csv")
    arguments = parser.parse_args()
    runs = runs_of(Grid(preset("demo"), {"demo": ()}, range(arguments.seeds)), arguments.runs, arguments.processes)
    rows = [
        (seed, metric, value, PROMISED[metric], value > PROMISED[metric], n)
        for (_, seed), run in runs.items()
        for metric, (value, n) in final_values(run).items()
    ]
    table = pd.DataFrame(rows, columns=["seed", "metric", "value", "promised", "kept", "n"])
    arguments.out.parent.mkdir(exist_ok=True)
    table.round(4).to_csv(arguments.out, index=False)
    print(table.pivot_table(index="seed", columns="metric", values="value").round(3).to_string())
    print(f"\n{table['kept'].sum()} of {len(table)} promises kept over {arguments.seeds} seeds")


if __name__ == "__main__":
    main()
