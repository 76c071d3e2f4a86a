"""When is each of the three memories learned, in the paper's setting at batch 128?

Trains the paper preset (d = 128, T = 256, K = 5 fixed triggers, loss on in-context targets) over seeds, reads accuracy and
recalls at the steps of the paper's reference run, and writes one small table.

    python analyses/when_is_each_memory_learned.py    # 80 s on one core for each seed; existing runs are reused

Results (means of 5 seeds, raw recalls): in-context accuracy is 0.28 at step 40, 0.60 at 100, 0.90 at 140 and 0.96 at 300.
W_K^2 recalls all 5 triggers from step 60 on, and from step 80 on also among all 64 tokens. W_O^2 recalls 0.45 of the tokens
at step 60, 0.99 at 120 and all of them from 140 on. W_K^1 is last and stays partial: 0.13 of the positions at step 100 and
0.24 at 300; of the first 64, 0.46 and 0.77. The task needs only early copies. W_K^2 is ahead only because it is read for 5
tokens; in_which_order_are_the_memories_born.py measures which memory is born first.
"""

from __future__ import annotations

import pandas as pd
from asking import keep, options

from birthlens import preset
from birthlens.analysis.behaviour.trajectory import memories_over
from birthlens.runs.run import Run
from birthlens.training.grid import Grid
from birthlens.training.sweep import runs_of

STEPS = [0, 20, 40, 60, 80, 100, 120, 140, 160, 200, 220, 300]
OVERRIDES = ["training.batch_size=128", "checkpoints.every=20", "evaluation.every=20", "evaluation.batch_size=256"]
PROBES = {
    ("output_memory", "all"): "output_memory",
    ("trigger_memory", "triggers"): "trigger_memory",
    ("trigger_memory", "triggers among all"): "trigger_memory_all_ways",
    ("prev_token_memory", "all"): "prev_token_memory",
    ("prev_token_memory", "first 64"): "prev_token_memory_first_64",
}


def one_seed(seed: int, run: Run) -> pd.DataFrame:
    """Return the table of one run: columns seed, step, metric, value, chance, n."""
    memories = memories_over(run, [step for step in STEPS if step in run.steps]).to_pandas()
    recall = memories[(memories["metric"] == "recall") & (memories["basis"] == "raw")].copy()
    recall["metric"] = [PROBES.get(key) for key in zip(recall["memory"], recall["candidates"], strict=True)]
    metrics = run.metrics()
    held_out = metrics[(metrics["split"] == "held_out") & metrics["step"].isin(STEPS)]
    wanted = ["in_context_accuracy", "in_context_unabsorbed_accuracy", "in_context_loss"]
    behaviour = held_out[held_out["metric"].isin(wanted)].assign(chance=float("nan"))
    columns = ["step", "metric", "value", "chance", "n"]
    table = pd.concat([behaviour[columns], recall.dropna(subset=["metric"])[columns]])
    table.insert(0, "seed", seed)
    return table.sort_values(["step", "metric"], ignore_index=True)


def main() -> None:
    """Train all seeds and print the means over seeds."""
    arguments = options(__file__, __doc__, tiers=False)
    grid = Grid(preset("paper", OVERRIDES), {"run": ()}, range(arguments.seeds or 5))
    runs = runs_of(grid, arguments.runs, arguments.processes)
    table = pd.concat([one_seed(seed, run) for (_, seed), run in runs.items()], ignore_index=True)
    keep(arguments, table, grid)
    wide = table.pivot_table(index="step", columns="metric", values="value", aggfunc=["mean", "min", "max"])
    print(wide["mean"].round(3).to_string())
    print(f"\nlowest and highest in-context accuracy over {table['seed'].nunique()} seeds:")
    print(wide.loc[:, (["min", "max"], "in_context_accuracy")].round(3).to_string())


if __name__ == "__main__":
    main()
