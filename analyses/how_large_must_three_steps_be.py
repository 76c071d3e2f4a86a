"""How large must d, N, T and the batch be for three gradient steps? Each is varied alone from d 256, N 64, T 64, batch 2048.

All of the theorem's assumptions are kept (orthogonal codebooks, independent tokens, clean data, projected steps). Tokens,
remapped tokens and positions are orthogonal to each other only if d >= 2N + T.

python analyses/how_large_must_three_steps_be.py --tier laptop        # 5 minutes on one core
"""

from __future__ import annotations

import pandas as pd
from asking import joined, options, tell
from matplotlib.figure import Figure

from birthlens.analysis.theory.three_steps import assumptions_table, sizes
from birthlens.viz.figures.style import COLOURS, DASHES, legend_below, panels, save, styled

BASE = {"d": 256, "N": 64, "T": 64, "batch": 2048}
VARIED = {
    "laptop": {"d": (64, 128, 192, 256, 384), "N": (16, 32, 64, 128), "T": (16, 32, 64, 128), "batch": (128, 512, 2048)},
    "paper": {"d": (64, 128, 192, 256, 384, 512, 1024), "N": (16, 32, 64, 128, 256), "T": (16, 32, 64, 128, 256),
              "batch": (128, 512, 2048, 8192, 16384)},
}  # fmt: skip
SEEDS = {"laptop": 5, "paper": 5}
NAMES = {"recall L1.W_O": "recall of W_O^2", "recall L1.W_K": "recall of W_K^2", "recall L0.W_K": "recall of W_K^1",
         "in_context_accuracy": "in-context accuracy"}  # fmt: skip


def case_of(**changed: int) -> str:
    """Return the name of a size, as in `three_steps.sizes`."""
    return " ".join(f"{name}={value}" for name, value in (BASE | changed).items())


def steps_at(seed: int, case: str) -> pd.DataFrame:
    """Take the three steps at one size; return the readings after the third step."""
    d, n, t, batch = (int(word.split("=")[1]) for word in case.split())
    table = assumptions_table(sizes([d], [n], [t], [batch]), [seed])
    last = table[table["step"] == 3]
    return last.assign(quantity=last["metric"].map(NAMES))[["case", "seed", "quantity", "value"]]


@styled
def picture(table: pd.DataFrame, varied: dict[str, tuple[int, ...]]) -> Figure:
    """Draw the readings after the third step, one panel for each varied size."""
    means = table.groupby(["case", "quantity"])["value"].mean()
    figure, axes = panels(1, len(varied), 2.1, 2.4)
    for ax, (name, values) in zip(axes[0], varied.items(), strict=True):
        for quantity, colour, dashes in zip(NAMES.values(), COLOURS, DASHES, strict=False):
            series = [means[case_of(**{name: value}), quantity] for value in values]
            ax.plot(values, series, color=colour, linestyle=dashes, marker="o", markersize=3, label=quantity)
        ax.axvline(BASE[name], color="#6E6E6E", linewidth=0.7)
        ax.set_xscale("log", base=2)
        ax.set_xticks(values, map(str, values))
        ax.minorticks_off()
        ax.set_ylim(-0.02, 1.03)
        ax.set_xlabel({"batch": "sequences in a step"}.get(name, name))
    axes[0][0].set_ylabel("recall, accuracy")
    legend_below(figure, axes[0][0].get_lines()[: len(NAMES)])
    return figure


def main() -> None:
    """Take the steps at every size and seed, write, print and draw."""
    arguments = options(__file__, __doc__)
    varied = VARIED[arguments.tier]
    cases = dict.fromkeys(case_of(**{name: value}) for name, values in varied.items() for value in values)
    seeds = range(arguments.seeds or SEEDS[arguments.tier])
    table = joined(steps_at, [(seed, case) for case in cases for seed in seeds], arguments.processes)
    tell(arguments, table)
    save(picture(table, varied), arguments.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
