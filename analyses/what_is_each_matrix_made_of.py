"""What is each matrix made of, and which one does the work? The ledger and weight patching in the paper's setting.

Uses the run of `when_is_each_memory_learned.py` (d = 128, T = 256, batch 128, 300 steps; trains it if it is missing) and
writes four tables and three figures:

    ledger       share of each matrix's change that each association explains, the residual, and what wrong pairings explain
    transplant   in-context and global loss and accuracy with one matrix of one step in the model of another
    subset       every subset of the three matrices at its final value, the others at their initial value
    replacement  each matrix replaced by its ideal memory, its ledger projection (and the rest), or a low-rank truncation

    python analyses/what_is_each_matrix_made_of.py        # 20 s on one core, and 80 s more if the run is missing

Results (seed 0): of the change of W_O, its memory explains 0.87 of the squared norm, between w_E W_V and w_U, the codebooks
on its own sides; of the change of the product W_V W_O, between w_E and w_U, it explains 0.49 (wrong pairings below 0.03). Of
the two key matrices, the memory explains 0.55 and 0.38, and the rest is a residual that no association explains. The
residual of the trigger memory matters: without it accuracy falls from 0.96 to 0.82, while 8 singular components of the
whole matrix keep 0.96. Each matrix is necessary at the end (0.35, 0.25, 0.02 without it) and none is sufficient; only
the output memory has an effect alone (0.26). Patching in a matrix from another step helps only once the two other
memories are there, from step 80 to 120 on.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from asking import keep, options

from birthlens import preset
from birthlens.analysis.interventions.weight_patching import (
    Evaluate,
    replacement_table,
    subset_table,
    weight_patching_table,
)
from birthlens.analysis.memories.ledger_tables import paper_ledger_table
from birthlens.runs.evaluation import evaluation_batch
from birthlens.runs.run import Run
from birthlens.training.engines import choose, engine
from birthlens.training.grid import Grid
from birthlens.training.sweep import runs_of
from birthlens.viz import figures

OVERRIDES = ["training.batch_size=128", "checkpoints.every=20", "evaluation.every=20", "evaluation.batch_size=256"]
STEPS = [0, 40, 60, 80, 100, 120, 160, 220, 300]
SOURCES = ["initial", "ideal", "ideal_dual", "ledger", "without_ledger", *(f"rank:{2**i}" for i in range(7))]
METRICS = ["in_context_accuracy", "in_context_loss", "in_context_unabsorbed_accuracy", "global_loss", "all_loss"]


def evaluation(run: Run) -> Evaluate:
    """Return the evaluation function of the run's own engine."""
    name, _ = choose(run.config, len(run.statistics))
    return lambda weights, batch: engine(name, run.config, weights).evaluate(batch)


def tables(run: Run, sequences: int) -> dict[str, pd.DataFrame]:
    """Compute the four tables."""
    assert run.trigger_ids is not None, "the task has fixed triggers"
    triggers, batch, evaluate = run.trigger_ids.tolist(), evaluation_batch(run, sequences), evaluation(run)
    first, last = run.steps[0], run.steps[-1]
    ledger = paper_ledger_table(run.checkpoints(), triggers, generator=np.random.default_rng(0), cells=False)
    found = {
        "ledger": ledger.dropna(subset=["share"]),
        "transplant": weight_patching_table(run.checkpoints(STEPS), batch, evaluate=evaluate),
        "subset": subset_table(run.weights(first), run.weights(last), batch, evaluate=evaluate),
        "replacement": replacement_table(
            run.checkpoints([100, last]),
            batch,
            SOURCES,
            initial=run.weights(first),
            triggers=triggers,
            evaluate=evaluate,
        ),
    }
    kept = {name: table[table["metric"].isin(METRICS)] if "metric" in table else table for name, table in found.items()}
    return {name: table.round(4) for name, table in kept.items()}


def main() -> None:
    """Write the tables and figures, and print a summary."""
    arguments = options(__file__, __doc__, tiers=False, seed=0, sequences=64)
    grid = Grid(preset("paper", OVERRIDES), {"run": ()}, (arguments.seed,))
    (run,) = runs_of(grid, arguments.runs, arguments.processes).values()
    found = tables(run, arguments.sequences)
    keep(arguments, None, grid, **found)
    pictures = {"ledger": figures.ledger_areas(found["ledger"])}
    for metric in ("in_context_accuracy", "global_loss"):
        pictures[f"transplant_{metric}"] = figures.weight_patching_map(found["transplant"], metric)
    for name, picture in pictures.items():
        figures.save(picture, arguments.out.with_name(f"{arguments.out.stem}_{name}.svg"))

    end = found["ledger"][found["ledger"]["step"] == found["ledger"]["step"].max()]
    print("What each change is made of at the end (share; alone; mean of wrong pairings; chance by rank):")
    print(
        end[["matrix", "reading", "family", "share", "alone", "null_derangement", "null_rank"]].to_string(index=False)
    )
    for name, keys in {"subset": ["final"], "replacement": ["matrix", "source"]}.items():
        table = found[name] if name == "subset" else found[name][found[name]["step"] == found[name]["step"].max()]
        print(f"\n{name}:\n{table.pivot_table(index=keys, columns='metric', values='value', sort=False).to_string()}")
    accuracy = found["transplant"][found["transplant"]["metric"] == "in_context_accuracy"]
    for matrix, rows in accuracy.groupby("matrix", sort=False):
        wide = rows.pivot(index="to_step", columns="from_step", values="value")
        print(f"\nin-context accuracy with {matrix} from another step:\n{wide.to_string()}")


if __name__ == "__main__":
    main()
