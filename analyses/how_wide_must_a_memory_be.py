"""How wide must a memory be? Accuracy of the closed-form induction head by d_model, and the recall of its matrices.

Builds the three memories as outer products of raw Gaussian, dual, or orthogonal vectors (the embedded corpus, K = 5 fixed
triggers) at two context lengths, and runs them on new sequences. Nothing is trained.

    python analyses/how_wide_must_a_memory_be.py        # half a minute on one core

Results (means of 5 draws): a recall of 1 does not mean full accuracy. At d = 128 every raw memory recalls everything that it
stores, but because of interference the model is right on only 0.75 (T = 64) and 0.72 (T = 256) of the in-context
targets. Raw vectors need d = 512 for 0.996. Orthogonal ones have 1.000 and 0.999 at d = 256, and 0.93 and 0.95 at d =
128, where tokens, remapped tokens and positions no longer fit. Dual vectors do as well if the codebooks of a layer are
linearly independent (0.999 at d = 256, T = 64), and worse than raw ones if they are far from it (0.36 at d = 128, T = 256).
"""

from __future__ import annotations

import pandas as pd
from asking import keep, options
from matplotlib.figure import Figure

from birthlens import BigramTask
from birthlens.analysis.memories.ideal import Strengths
from birthlens.analysis.theory.width import VECTORS, width_table
from birthlens.config.run import CorpusConfig, TaskConfig
from birthlens.tasks.corpus import statistics_of
from birthlens.viz.figures.style import COLOURS, DASHES, legend_below, panels, save, styled

WIDTHS = [32, 64, 128, 256, 512, 1024]
METRICS = ["in_context_accuracy", "in_context_unabsorbed_accuracy", "in_context_loss", "output_memory_recall",
           "trigger_memory_recall", "prev_token_memory_recall"]  # fmt: skip


def one_context(context: int, seeds: int, sequences: int) -> pd.DataFrame:
    """Return the table of one context length: columns context and those of `width_table`."""
    task = BigramTask(TaskConfig(context=context), statistics_of(CorpusConfig()))
    table = width_table(task, WIDTHS, seeds=range(seeds), sequences=sequences, strengths=Strengths(avoid_first=20))
    table.insert(0, "context", context)
    return table[table["metric"].isin(METRICS)]


@styled
def picture(table: pd.DataFrame) -> Figure:
    """Draw accuracy by width, one panel for each context length, with the lowest recall of the raw memories."""
    contexts = sorted(set(table["context"]))
    figure, axes = panels(1, len(contexts), 3.0, 2.6)
    for ax, context in zip(axes[0], contexts, strict=True):
        rows = table[table["context"] == context]
        accuracy = rows[rows["metric"] == "in_context_accuracy"]
        recall = rows[rows["metric"].str.endswith("_recall") & (rows["vectors"] == "raw")]
        for kind, colour, dashes in zip(VECTORS, COLOURS, DASHES, strict=False):
            mean = accuracy[accuracy["vectors"] == kind].groupby("d_model")["value"].mean()
            ax.plot(
                mean.index, mean, color=colour, linestyle=dashes, marker="o", markersize=3, label=f"{kind}: accuracy"
            )
        lowest = recall.groupby(["d_model", "metric"])["value"].mean().groupby("d_model").min()
        ax.plot(lowest.index, lowest, color="#6E6E6E", linewidth=0.9, label="raw: lowest recall")
        ax.set_xscale("log", base=2)
        ax.set_xticks(WIDTHS, map(str, WIDTHS))
        ax.set_ylim(0, 1.03)
        ax.set_xlabel("d_model")
        ax.set_title(f"T = {context}")
    axes[0][0].set_ylabel("in-context accuracy, recall")
    legend_below(figure, axes[0][0].get_lines())
    return figure


def main() -> None:
    """Write the table, draw it and print the means over seeds."""
    arguments = options(__file__, __doc__, tiers=False, sequences=32)
    table = pd.concat([one_context(context, arguments.seeds or 5, arguments.sequences) for context in (64, 256)])
    keep(arguments, table)
    save(picture(table), arguments.out.with_suffix(".svg"))
    wide = table.pivot_table(index=["context", "vectors", "d_model"], columns="metric", values="value", sort=False)
    print(wide[METRICS].round(3).to_string())


if __name__ == "__main__":
    main()
