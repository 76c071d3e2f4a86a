"""Can one layer do what two do? The one-layer control against the two-layer model, on clean data where nothing is free.

python analyses/one_layer_or_two.py --seeds 3
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from birthlens import load_run, preset, train_to_disk

HERE = Path(__file__).parent
OVERRIDES = ["task.cycles=clean", "training.batch_size=128", "checkpoints.every=100", "evaluation.every=20",
             "evaluation.batch_size=256"]  # fmt: skip


def one_run(n_layers: int, seed: int, steps: int, folder: Path) -> pd.DataFrame:
    """Train (or reuse) one run: columns n_layers, seed, step, metric, value, n on held-out sequences."""
    path = folder / f"clean_{n_layers}_layers_seed{seed}"
    if not path.exists():
        seeds = [f"seeds.init={seed}", f"seeds.data={seed}"]
        config = preset("paper", [*OVERRIDES, *seeds, f"model.n_layers={n_layers}", f"training.steps={steps}"])
        for _ in train_to_disk(config, path):
            pass
    metrics = load_run(path).metrics()
    held_out = metrics[(metrics["split"] == "held_out") & metrics["metric"].str.startswith("in_context_")]
    table = held_out.drop(columns="split")
    table.insert(0, "seed", seed)
    table.insert(0, "n_layers", n_layers)
    return table


def main() -> None:
    """Train both models over seeds and print their best and last accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "one_layer_or_two.csv")
    arguments = parser.parse_args()
    cases = [(layers, seed) for layers in (1, 2) for seed in range(arguments.seeds)]
    table = pd.concat([one_run(layers, seed, arguments.steps, arguments.runs) for layers, seed in cases])
    arguments.out.parent.mkdir(exist_ok=True)
    table.round(4).to_csv(arguments.out, index=False)
    accuracy = table[table["metric"] == "in_context_accuracy"]
    print(accuracy.groupby(["n_layers", "seed"])["value"].agg(["max", "last"]).round(3).to_string())


if __name__ == "__main__":
    main()
