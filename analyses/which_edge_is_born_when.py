"""Which head and which edge cause the in-context accuracy, and from which step on?

For each run: when ablating a head starts to matter, when each edge becomes causal (exact patching of clean into corrupted
sequences whose triggers are swapped), how far attribution patching is off along the way, and four cuts at the last step.
Train the runs first, or let the script do it:

    python analyses/which_edge_is_born_when.py --run runs/demo --run runs/paper_clean
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from birthlens import Head, load_run, preset, train_to_disk
from birthlens.analysis.ablation import ablate_heads, ablation_table, cases_table
from birthlens.analysis.corruptions import triggers_swapped
from birthlens.analysis.paths import births_table, cut_edges, edge_table, other_edges
from birthlens.runs import Run

HERE = Path(__file__).parent
PRESETS = {
    "demo": ("demo", []),
    "paper_clean": (
        "paper",
        ["task.cycles=clean", "training.batch_size=128", "checkpoints.every=10", "evaluation.every=20"],
    ),
}


def ablations_over_training(run: Run, sequences: int) -> pd.DataFrame:
    """Ablate each head by its mean at every checkpoint."""
    batch, reference = run.task.batch(sequences, 0, 2**41), run.task.batch(sequences, 0, 2**41 + 1)
    metrics = ("in_context_unabsorbed.accuracy", "global.loss")
    return ablation_table(run.checkpoints(), batch, reference, methods=["mean"], metrics=metrics)


def starts_to_matter(ablations: pd.DataFrame) -> pd.DataFrame:
    """Say from which step on a head's ablation lowers the accuracy for good: the interval of the change stays below 0."""
    rows = []
    accuracy = ablations[(ablations["metric"] == "accuracy") & (ablations["ablated"] != "none")]
    for head, group in accuracy.groupby("ablated"):
        harmless = group[group["change_high"] >= 0]["step"]
        after = group[group["step"] > (harmless.max() if len(harmless) else -1)]
        first = after["step"].min() if len(after) else np.nan
        rows.append((head, first, group["value"].iloc[-1], group["change"].iloc[-1]))
    return pd.DataFrame(rows, columns=["head", "matters_from", "accuracy_without", "change_at_end"])


def edges_over_training(run: Run, sequences: int, every: int) -> pd.DataFrame:
    """Patch every edge at every so many checkpoints, exactly and by attribution."""
    clean = run.task.batch(sequences, 0, 2**41 + 2)
    pair = triggers_swapped(clean, np.random.default_rng(0), len(run.statistics))
    return edge_table(run.checkpoints(run.steps[::every]), pair, attribution_steps=(0, 8))


def cuts_at_the_end(run: Run, sequences: int) -> pd.DataFrame:
    """Compare the whole model with one head less, with layer 0 heard by layer 1's keys alone, and with an ideal pattern."""
    batch, reference = run.task.batch(sequences, 0, 2**41 + 3), run.task.batch(sequences, 0, 2**41 + 4)
    weights = run.weights(-1)
    sizes = weights.config
    cases = {
        "without L1H0": ablate_heads([Head(1, 0)], "mean"),
        "without L0H0": ablate_heads([Head(0, 0)], "mean"),
        "L0H0 to keys only": cut_edges(other_edges(sizes, "L0H0", ["L0H0->L1H0.k"]))(sizes),
        "ideal pattern in L0H0": ablate_heads([Head(0, 0)], "previous_token_pattern"),
    }
    metrics = ("in_context.accuracy", "in_context.loss", "global.loss")
    return cases_table([(run.steps[-1], weights)], cases, batch, reference, metrics)


def say(title: str, table: pd.DataFrame) -> None:
    """Print a table under its title."""
    print(f"\n{title}\n{table.round(3).to_string(index=False)}")


def main() -> None:
    """Analyse each run, print the story, and write three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", type=Path)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--every", type=int, default=2, help="of the checkpoints, for the edges")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True)
    for path in arguments.run or [Path("runs/demo"), Path("runs/paper_clean")]:
        if not path.exists():
            name, overrides = PRESETS[path.name]
            for _ in train_to_disk(preset(name, overrides), path):
                pass
        run = load_run(path)
        ablations = ablations_over_training(run, arguments.sequences)
        edges = edges_over_training(run, arguments.sequences // 4, arguments.every)
        cuts = cuts_at_the_end(run, arguments.sequences)
        births = births_table(edges).sort_values("born", na_position="last")
        errors = edges.groupby("step")[["attribution_0_error", "attribution_8_error"]].agg(
            lambda column: column.abs().max()
        )
        last = cuts[["case", "role", "metric", "value", "change"]]
        say(f"== {path}: from which step ablating a head matters", starts_to_matter(ablations))
        say("edges that carry half of the difference, and from which step", births.dropna())
        say("largest error of attribution patching over edges", errors.reset_index())
        say(f"cuts at step {run.steps[-1]}", last)
        for name, table in (("ablations", ablations), ("edges", edges), ("cuts", cuts)):
            table.round(4).to_csv(arguments.out / f"{path.name}_{name}.csv", index=False)


if __name__ == "__main__":
    main()
