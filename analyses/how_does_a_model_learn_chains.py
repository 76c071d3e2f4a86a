"""How does a model learn Markov chains in context? The predictor it is nearest to over training, and its two layers.

Each sequence has its own chain of three states (Edelman et al. 2024): KL from the uniform, unigram and bigram predictors to
the model over the second half of the context, with two layers and one; the attention of the last layer on tokens that
follow the query's, and of the first on the position before. Early steps are dense, since everything happens there.

python analyses/how_does_a_model_learn_chains.py        # 5 minutes of one core with the runs, 2 without
"""

from __future__ import annotations

import pandas as pd
from asking import curve, follow
from matplotlib.figure import Figure

from birthlens.claims.catalogue.memory_line import MARKOV
from birthlens.claims.claim import Evidence
from birthlens.claims.statistics.markov import divergences, statistical_induction
from birthlens.runs.evaluation import evaluation_batch
from birthlens.viz.figures.style import COLOURS, DASHES, legend_below, panels, save, styled

CASES = {"two layers": MARKOV, "one layer": (*MARKOV, "model.n_layers=1")}
PREDICTORS = ("uniform", "unigram", "bigram")
ATTENTION = {"last layer on what followed": "matching", "first layer on t - 1": "lag"}
EVERY = 10


def over_training(evidence: Evidence) -> dict[str, float]:
    """Return divergences and attention at each step."""
    run = evidence.runs["run"]
    steps = [step for step in run.steps if step % EVERY == 0]
    found = {}
    for row in divergences(run, run.task, steps, 48).to_dict("records"):
        found[f"KL from {row['predictor']}, step {row['step']}"] = float(row["divergence"])
    batch = evaluation_batch(run, 32)
    for step, weights in run.checkpoints(steps):
        matching, lag = statistical_induction(weights, batch)
        found |= {f"matching, step {step}": matching, f"lag, step {step}": lag}
    return found


@styled
def picture(table: pd.DataFrame) -> Figure:
    """Draw the divergences with two layers and one, and the attention of the two layers."""
    figure, axes = panels(1, 3, 2.7, 2.4)
    for ax, case in zip(axes[0], CASES, strict=False):
        for name, colour, dashes in zip(PREDICTORS, COLOURS, DASHES, strict=False):
            line = curve(table, case, f"KL from {name}")
            ax.plot(line.index, line, color=colour, linestyle=dashes, label=f"KL from {name}")
        ax.set_title(case)
        ax.set_ylim(0, 0.26)
    axes[0][0].set_ylabel("KL(predictor || model), nats")
    handles, _ = axes[0][0].get_legend_handles_labels()
    for (said, name), colour, dashes in zip(ATTENTION.items(), COLOURS[3:], DASHES, strict=False):
        line = curve(table, "two layers", name)
        handles += axes[0][2].plot(line.index, line, color=colour, linestyle=dashes, label=said)
    axes[0][2].set_title("attention, two layers")
    for ax in axes[0]:
        ax.set_xlabel("step")
    legend_below(figure, handles, columns=5)
    return figure


def main() -> None:
    """Train, measure, write, print and draw."""
    arguments, table = follow(__file__, __doc__, CASES, over_training)
    save(picture(table), arguments.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
