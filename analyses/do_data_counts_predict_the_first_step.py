"""Do data counts predict the first step on W_O^2? Correlation with the model's gradient by d, prediction and entries.

p_hat in the formula is 1/N, p(y), or the model's prediction. Data are published or clean. Codebooks are the authors' or
orthogonal (the theory's limit of large d, as far as they fit).

python analyses/do_data_counts_predict_the_first_step.py --tier laptop        # 3 minutes on one core
"""

from __future__ import annotations

import itertools
from typing import Literal

import pandas as pd
from asking import joined, options, tell
from matplotlib.figure import Figure

from birthlens.analysis.theory.first_step import PREDICTIONS, first_step_table
from birthlens.config.model import ModelConfig
from birthlens.config.run import CorpusConfig, TaskConfig
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.corpus import statistics_of
from birthlens.viz.figures.style import COLOURS, DASHES, legend_below, panels, save, styled

SCALES = {"laptop": (256, 64, 5), "paper": (2048, 256, 5)}
WIDTHS = (64, 128, 256, 512, 1024)
CASES = tuple(itertools.product(("published", "clean"), ("authors", "orthogonal")))


def correlations(
    data: Literal["published", "clean"], init: Literal["authors", "orthogonal"], context: int, sequences: int, seed: int
) -> pd.DataFrame:
    """Return the table of one case and seed: columns case, seed, quantity, value."""
    task = BigramTask(TaskConfig(context=context, cycles=data), statistics_of(CorpusConfig()))
    table = first_step_table(task, ModelConfig(init=init), WIDTHS, sequences, (seed,), ("zero",))
    table["quantity"] = [
        _quantity(entries, prediction, width)
        for entries, prediction, width in table[["entries", "prediction", "d_model"]].to_numpy()
    ]
    return table.assign(case=f"{data} data, {init}", value=table["correlation"])[["case", "seed", "quantity", "value"]]


def _quantity(entries: str, prediction: str, width: int) -> str:
    return f"{entries}, {prediction}, d = {width}"


@styled
def picture(table: pd.DataFrame) -> Figure:
    """Draw the off-diagonal correlation against d, one panel for each case, and that of the diagonal as a thin line."""
    means = table.groupby(["case", "quantity"])["value"].mean()
    cases = list(table["case"].unique())
    figure, axes = panels(1, len(cases), 2.1, 2.5)
    for ax, case in zip(axes[0], cases, strict=True):
        for prediction, colour, dashes in zip(PREDICTIONS, COLOURS, DASHES, strict=False):
            off, on = ([means[case, _quantity(entries, prediction, d)] for d in WIDTHS]
                       for entries in ("off_diagonal", "diagonal"))  # fmt: skip
            ax.plot(WIDTHS, off, color=colour, linestyle=dashes, marker="o", markersize=3, label=f"p_hat: {prediction}")
            ax.plot(WIDTHS, on, color=colour, linestyle=dashes, linewidth=0.7)
        ax.set_xscale("log", base=2)
        ax.set_xticks(WIDTHS, map(str, WIDTHS))
        ax.set_ylim(0, 1.03)
        ax.set_xlabel("d_model")
        ax.set_title(case.replace(", ", ",\n"))
    axes[0][0].set_ylabel("correlation off the diagonal\n(thin: on it)")
    legend_below(figure, axes[0][0].get_lines()[::2])
    return figure


def main() -> None:
    """Compute the correlations for every case and seed, write, print and draw them."""
    arguments = options(__file__, __doc__)
    sequences, context, seeds = SCALES[arguments.tier]
    jobs = [(*case, context, sequences, seed) for case in CASES for seed in range(arguments.seeds or seeds)]
    table = joined(correlations, jobs, arguments.processes)
    tell(arguments, table)
    save(picture(table), arguments.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
