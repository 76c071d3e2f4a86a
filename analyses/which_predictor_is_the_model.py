"""Which predictor is the model? The nearest one at each step, by role, and the excess loss over each at the end.

The model has W_F and is trained on all targets. The nearest predictor is the one with the smallest KL(predictor || model).
Excess losses are by role, occurrence number (the last one includes all later ones) and position (first of four quarters). If
one is negative, the model is better than the predictor. Bayes is the floor. With fixed triggers some predictors coincide:
bigram, bag and Bayes if the token is not a trigger; uniform, bag, copy and Bayes at first occurrences; copy and Bayes after
them. The first of them is named.

python analyses/which_predictor_is_the_model.py --tier laptop        # 1 minute on one core, and 8 for the runs
"""

from __future__ import annotations

import pandas as pd
import torch
from asking import ask
from matplotlib.figure import Figure
from torch import Tensor

from birthlens.analysis.behaviour.excess import divergence_table, excess_loss_table
from birthlens.claims.claim import Evidence
from birthlens.model import forward
from birthlens.runs.evaluation import evaluation_batch
from birthlens.tasks.predictors.reference import PREDICTORS
from birthlens.viz.figures.style import COLOURS, DASHES, legend_below, panels, save, styled

STEPS = [0, 20, 40, 60, 80, 100, 140, 200, 300, 400, 600]
ROLES = ["global", "first_occurrence", "in_context"]


def beside_predictors(evidence: Evidence) -> dict[str, float]:
    """Return KL from each predictor to the model at each step, and excess losses of the last weights."""
    run, batch = evidence.runs["run"], evaluation_batch(evidence.runs["run"], 96)

    def outputs(step: int) -> Tensor:
        weights = run.weights(step)
        with torch.inference_mode():
            tensors = forward.tensors_of(weights)
            return torch.cat([forward.logits(tensors, weights.config, part.tokens) for part in batch.chunks(32)])

    steps = [step for step in STEPS if step in run.steps]
    trace = divergence_table(((step, outputs(step)) for step in steps), run.task, batch, roles=ROLES, positions=2048)
    found = {
        f"step {row['step']}: {row['role']}: KL from {row['predictor']}": float(row["divergence"])
        for row in trace.to_dict("records")
    }
    excess = excess_loss_table(outputs(run.steps[-1]), run.task, batch, position_bins=4, occurrences=5)
    for row in excess.to_dict("records"):
        found[f"end: excess over {row['predictor']}: {row['by']} {row['group']}"] = float(row["excess"])
    return found


def nearest(table: pd.DataFrame) -> pd.DataFrame:
    """Return the nearest predictor at each step (rows) for each role, by the mean divergence over seeds."""
    chosen = table[table["quantity"].str.contains("KL from")]
    means = chosen.groupby("quantity", sort=False)["value"].mean().reset_index()
    means[["step", "role", "predictor"]] = means["quantity"].str.extract(r"step (\d+): (\w+): KL from (\w+)")
    means["step"] = means["step"].astype(int)
    best = means.loc[means.groupby(["step", "role"])["value"].idxmin()]
    best["shown"] = best["predictor"] + best["value"].map(" {:.2f}".format)
    return best.pivot(index="step", columns="role", values="shown")[ROLES]


@styled
def picture(table: pd.DataFrame) -> Figure:
    """Draw KL from each predictor over training, one panel for each role."""
    figure, axes = panels(1, len(ROLES), 2.7, 2.4)
    means = table.groupby("quantity")["value"].mean()
    steps = [step for step in STEPS if f"step {step}: {ROLES[0]}: KL from bayes" in means]
    for ax, role in zip(axes[0], ROLES, strict=True):
        for name, colour, dashes in zip(PREDICTORS, COLOURS, DASHES, strict=False):
            values = [means[f"step {step}: {role}: KL from {name}"] for step in steps]
            ax.plot(steps, values, color=colour, linestyle=dashes, label=name)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("step")
        ax.set_title(role.replace("_", " "))
    axes[0][0].set_ylabel("KL(predictor || model), nats")
    legend_below(figure, axes[0][0].get_lines(), 6)
    return figure


if __name__ == "__main__":
    arguments, table = ask(__file__, __doc__, beside_predictors)
    print(f"\nnearest predictor, and KL to it\n{nearest(table).to_string()}")
    save(picture(table), arguments.out.with_suffix(".svg"))
