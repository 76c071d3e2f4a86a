"""Where does theory stop predicting SGD? Cosine of predicted and actual updates, by matrix and family, over training.

Updates are over 20 steps. Predictions are the population gradient at their start, the ideal memory, and the first step's
table from data counts. Compare a cosine with its null, 1 / sqrt(dimension of the family). Families overlap, so the shares of
an update add up to more than 1.

python analyses/where_does_theory_stop_predicting_sgd.py --tier laptop        # 1 minute on one core, and 2 for the runs
"""

from __future__ import annotations

from typing import cast

import pandas as pd
from asking import grid_of, joined, options, tell
from matplotlib.figure import Figure

from birthlens.analysis.theory.gradients import MATRICES, Loss
from birthlens.analysis.theory.updates import update_cosine_table
from birthlens.runs.run import Run
from birthlens.tasks.bigram import BigramTask
from birthlens.training.sweep import runs_of
from birthlens.viz.figures.style import COLOURS, DASHES, GREY, legend_below, panels, save, styled

EVERY = 20
PHASES = ((0, 40), (40, 80), (80, 160), (160, 240), (240, 400))
OWN = {"L1.W_O": "tokens -> outputs", "L1.W_K": "remapped <- tokens", "L0.W_K": "positions <- positions"}
SEQUENCES = {"laptop": 128, "paper": 256}


def cosines(case: str, seed: int, run: Run, sequences: int) -> pd.DataFrame:
    """Compare the updates of one run: the columns of `update_cosine_table`, with case and seed."""
    steps = [step for step in run.steps if step % EVERY == 0]
    table = update_cosine_table(
        run.checkpoints(steps), cast(BigramTask, run.task), cast(Loss, run.config.training.loss), sequences, seed
    )
    return table.assign(case=case, seed=seed)


def by_phase(table: pd.DataFrame) -> pd.DataFrame:
    """Average over phases of training: case, seed, quantity, value."""
    rows = []
    for first, last in PHASES:
        part = table[(table["step"] >= first) & (table["step"] < last)]
        means = part.groupby(["case", "seed", "matrix", "family", "prediction"], sort=False)[["cosine", "share"]].mean()
        for case, seed, matrix, family, prediction, cosine, share in means.reset_index().to_numpy():
            name = f"steps {first}-{last}: {matrix}, {family}"
            rows.append((case, seed, f"{name}, {prediction}", float(cosine)))
            if prediction == "gradient" and family != "all":
                rows.append((case, seed, f"{name}, share of the update", float(share)))
    nulls = table.drop_duplicates(["case", "seed", "matrix", "family"])
    rows += [
        (row["case"], row["seed"], f"null: {row['matrix']}, {row['family']}", row["null"])
        for row in nulls.to_dict("records")
    ]
    return pd.DataFrame(rows, columns=["case", "seed", "quantity", "value"])


@styled
def picture(table: pd.DataFrame) -> Figure:
    """Draw the cosine of the whole matrix and of its memory's family over training, one row of panels for each case."""
    cases = list(table["case"].unique())
    figure, axes = panels(len(cases), len(MATRICES), 2.7, 2.2)
    lines = {("all", "gradient"): "gradient, whole matrix", ("own", "gradient"): "gradient, own family",
             ("own", "memory"): "ideal memory, own family", ("own", "counts"): "counts, own family"}  # fmt: skip
    for row, case in zip(axes, cases, strict=True):
        for ax, matrix in zip(row, MATRICES, strict=True):
            mine = table[(table["case"] == case) & (table["matrix"] == matrix)]
            for (where, prediction), colour, dashes in zip(lines, COLOURS, DASHES, strict=False):
                family = OWN[matrix] if where == "own" else "all"
                chosen = mine[(mine["family"] == family) & (mine["prediction"] == prediction)]
                mean = chosen.groupby("next_step")["cosine"].mean()
                name = lines[where, prediction]
                ax.plot(mean.index, mean, color=colour, linestyle=dashes, label=name)
            ax.axhline(0, color=GREY, linewidth=0.8)
            ax.set_ylim(-0.3, 1.03)
            ax.set_title(matrix)
            ax.set_xlabel("step")
        row[0].set_ylabel(f"{case}:\ncosine with the update")
    legend_below(figure, axes[0][0].get_lines()[: len(lines)])
    return figure


def main() -> None:
    """Train what is missing, compare, write, print the memories' own families, and draw."""
    arguments = options(__file__, __doc__)
    runs = runs_of(grid_of(__file__, arguments), arguments.runs, arguments.processes)
    jobs = [(*key, run, SEQUENCES[arguments.tier]) for key, run in runs.items()]
    table = joined(cosines, jobs, arguments.processes)
    tell(arguments, by_phase(table))
    save(picture(table), arguments.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
