"""Which layer stores the noise, and which one recalls? Clean accuracy over training with parts of the model left out.

After a trigger comes noise with probability 0.5, else its output (Chen, Bruna, Bietti 2024). A linear W_F, and a ReLU MLP:
the probability of noise on noisy data; accuracy on clean data of the whole model, without the largest direction of W_F (of
the first matrix of the MLP), without the feed-forward, without the last attention; at the end, accuracy by rank from both
sides.

python analyses/which_layer_stores_the_noise.py        # 5 minutes of one core with the runs, 1 without
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from asking import curve, follow
from matplotlib.figure import Figure

from birthlens.analysis.behaviour.noisy_recall import clean_recall_table
from birthlens.claims.catalogue.memory_line import NOISE, NOISE_MLP
from birthlens.claims.claim import Evidence
from birthlens.claims.statistics.noise import noise_probability
from birthlens.runs.evaluation import evaluation_batch
from birthlens.tasks.noise import NoiseTask
from birthlens.viz.figures.style import COLOURS, DASHES, GREY, panels, save, styled

CASES = {"linear W_F": NOISE, "ReLU MLP": NOISE_MLP}
VARIANTS = {
    "whole": "whole",
    "without:1": "without its largest direction",
    "keep:0": "without feed-forward",
    "no_attention": "without attention",
}
RANKS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
EVERY = 50
NOISE_LINE = "noise probability on noisy data"


def by_part(evidence: Evidence) -> dict[str, float]:
    """Return the curves over training and, at the end, accuracy by rank."""
    run = evidence.runs["run"]
    task = run.task
    assert isinstance(task, NoiseTask)
    steps = [step for step in run.steps if step % EVERY == 0]
    batch = evaluation_batch(run, 64)
    found = {}
    for step, weights in run.checkpoints(steps):
        found[f"{NOISE_LINE}, step {step}"] = noise_probability(weights, batch, task.noise)
    for row in clean_recall_table(run.checkpoints(steps), task, tuple(VARIANTS), 64).to_dict("records"):
        if row["metric"] != "output_probability":
            name = "clean accuracy" if row["metric"] == "accuracy" else "noise probability on clean data"
            found[f"{name}, {VARIANTS[row['variant']]}, step {row['step']}"] = float(row["value"])
    sides = [f"{how}:{rank}" for how in ("keep", "without") for rank in RANKS]
    ends = clean_recall_table(run.checkpoints(run.steps[-1:]), task, sides, 64)
    for row in ends[ends["metric"] == "accuracy"].to_dict("records"):
        how, _, rank = row["variant"].partition(":")
        found[f"clean accuracy at the end, {how} rank {rank}"] = float(row["value"])
    return found


@styled
def picture(table: pd.DataFrame) -> Figure:
    """Draw the curves of both feed-forwards, and accuracy by rank."""
    figure, axes = panels(1, 3, 3.1, 2.7)
    for ax, case in zip(axes[0], CASES, strict=False):
        noise = curve(table, case, NOISE_LINE)
        ax.plot(noise.index, noise, color=GREY, linestyle="dashed", label=NOISE_LINE)
        for said, colour, dashes in zip(VARIANTS.values(), COLOURS, DASHES, strict=False):
            line = curve(table, case, f"clean accuracy, {said}")
            ax.plot(line.index, line, color=colour, linestyle=dashes, label=f"accuracy {said}")
        ax.set_title(case)
        ax.set_xlabel("step")
        ax.set_ylim(-0.03, 1.03)
    axes[0][0].set_ylabel("clean accuracy")
    handles, _ = axes[0][0].get_legend_handles_labels()
    ax = axes[0][2]
    means = table.groupby(["case", "quantity"])["value"].mean()
    for case, colour in zip(CASES, COLOURS, strict=False):
        for how, said, dashes in (("keep", "kept", "solid"), ("without", "left out", (0, (4, 2)))):
            values = [means[case, f"clean accuracy at the end, {how} rank {rank}"] for rank in RANKS]
            handles += ax.plot(np.arange(len(RANKS)), values, color=colour, linestyle=dashes, marker="o", markersize=3,
                               label=f"{case}, {said}")  # fmt: skip
    ax.set_xticks(np.arange(len(RANKS)), map(str, RANKS))
    ax.set_xlabel("largest directions kept, or left out")
    ax.set_title("accuracy by rank, at the end")
    figure.legend(handles=handles, loc="outside lower center", ncols=4, handlelength=3.5)
    return figure


def main() -> None:
    """Train, measure, write, print and draw."""
    arguments, table = follow(__file__, __doc__, CASES, by_part)
    save(picture(table), arguments.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
