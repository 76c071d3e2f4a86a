"""In which order are the memories born? Onsets of the three memories over seeds, with intervals, and what they depend on.

Trains d = 128, T = 64, batch 128 with the paper's optimiser over seeds, with fixed and with random triggers, keeps every
second step, and asks when each memory leaves the band of its own shifted pairings for good. Then changes the probe, the
threshold, the basis and the candidate sets: the authors' recall of W_K^2 is a choice among 5 triggers and that of W_O^2 one
among all tokens.

    python analyses/in_which_order_are_the_memories_born.py --seeds 12
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from birthlens import load_run, preset, train_to_disk
from birthlens.analysis.birth_order import birth_order_table, order_sensitivity_table
from birthlens.analysis.orders import chosen_sets, crossings_table, onsets_table, scores_table
from birthlens.runs import Run

HERE = Path(__file__).parent
WIDTHS = [2.0, 4.0, 8.0]
STEPS = 200
OVERRIDES = ["task.context=64", "training.batch_size=128", f"training.steps={STEPS}", "checkpoints.every=2",
             "evaluation.every=10", "evaluation.batch_size=64"]  # fmt: skip


def runs_of(triggers: str, seeds: int, folder: Path) -> list[Run]:
    """Open or train one run a seed."""
    runs = []
    for seed in range(seeds):
        path = folder / f"order_{triggers}_seed{seed}"
        if not path.exists():
            named = [f"task.triggers={triggers}", f"seeds.init={seed}", f"seeds.data={seed}"]
            for _ in train_to_disk(preset("paper", [*OVERRIDES, *named]), path):
                pass
        runs.append(load_run(path))
    return runs


def orders(triggers: str, runs: list[Run]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabulate the birth order for each band width (and the authors' candidates), and how it depends on the probe."""
    onsets = []
    for basis in ("raw", "dual"):
        scores = scores_table(runs, basis)
        onsets += [onsets_table(scores, width).assign(basis=basis) for width in WIDTHS]
    found = pd.concat(onsets, ignore_index=True)
    raw, tables = found[found["basis"] == "raw"], []
    sets = {"matched": None, "as the authors": {"trigger_memory": ("triggers", "all"), "output_memory": ("all",)}}
    for width in WIDTHS:
        for name, wanted in sets.items():
            chosen = chosen_sets(raw[raw["threshold"] == width], wanted)
            table = birth_order_table(chosen, np.random.default_rng(0))
            tables.append(table.assign(width=width, sets=name))
    sensitivity = order_sensitivity_table(pd.concat([found, crossings_table(runs)], ignore_index=True))
    leading = {"triggers": triggers}
    return pd.concat(tables).assign(**leading), sensitivity.assign(**leading)


def main() -> None:
    """Train what is missing, write both tables and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "in_which_order_are_the_memories_born.csv")
    arguments = parser.parse_args()
    pairs = [orders(kind, runs_of(kind, arguments.seeds, arguments.runs)) for kind in ("fixed", "random")]
    order, sensitivity = (pd.concat(tables, ignore_index=True).round(4) for tables in zip(*pairs, strict=True))
    arguments.out.parent.mkdir(exist_ok=True)
    order.to_csv(arguments.out, index=False)
    sensitivity.to_csv(arguments.out.with_name(f"{arguments.out.stem}_sensitivity.csv"), index=False)
    for keys, rows in order.groupby(["triggers", "sets", "width"], sort=False):
        print(
            f"\n{', '.join(map(str, keys))}\n{rows[['kind', 'what', 'value', 'low', 'high', 'n']].to_string(index=False)}"
        )
    print(f"\n{sensitivity.to_string(index=False)}")


if __name__ == "__main__":
    main()
