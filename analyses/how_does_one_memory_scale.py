"""How does one memory scale? Its error by d and by T, for Zipf data, with the published exponents as lines.

1000 tokens with p(x) ~ x^-a in five classes are stored at once, weighted by p, sqrt(p), or 1 for the d/12 most
frequent. With all data known, the error is plotted against d. With T samples and d = 384, it is plotted against T, with
the exact data term. Dashed lines have the published slopes and start at the first point. Each group of 20 draws of the
codebooks (a seed) has a fitted slope.

python analyses/how_does_one_memory_scale.py        # 30 s on one core
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from asking import options, tell
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from birthlens.analysis.theory.memory_scaling import SCHEMES, data_rate, scaling_table, slope
from birthlens.viz.figures.style import COLOURS, GREY, legend_below, panels, save, styled

EXPONENTS = (1.5, 2.0)
WIDTHS = (12, 24, 48, 96, 192, 384)
SAMPLES = (10, 30, 100, 300, 1000)
TRIALS = 20


def measured(seeds: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the errors by d with all data, and by T at the largest d."""
    drawn = range(seeds * TRIALS)
    by_width = scaling_table(EXPONENTS, WIDTHS, seeds=drawn)
    by_samples = scaling_table(EXPONENTS, WIDTHS[-1:], SAMPLES, drawn, SCHEMES[:1])
    return tuple(table.assign(seed=table["seed"] // TRIALS) for table in (by_width, by_samples))  # type: ignore[return-value]


def slopes(by_width: pd.DataFrame, by_samples: pd.DataFrame) -> pd.DataFrame:
    """Fit a slope for each seed: case (exponent and scheme), seed, quantity, value."""
    rows = []
    for table, size, said in ((by_width, "d_model", "d"), (by_samples, "samples", "T")):
        for (exponent, scheme, seed), group in table.groupby(["exponent", "scheme", "seed"], sort=False):
            means = group.groupby(size)["error"].mean()
            case = f"a = {exponent:g}, {scheme}"
            rows.append((case, seed, f"slope on {said}", slope(means.index.to_numpy(dtype=float), means.to_numpy())))
            rows += [(case, seed, f"error, {said} = {at:g}", value) for at, value in means.items()]
            if said == "T":
                ratio = means / group.groupby(size)["data_term"].mean()
                rows += [(case, seed, f"error over data term, T = {at:g}", value) for at, value in ratio.items()]
    return pd.DataFrame(rows, columns=["case", "seed", "quantity", "value"])


def published_line(ax: Axes, sizes: np.ndarray, first: float, rate: float, colour: str) -> None:
    """Draw a power law through the first point."""
    ax.plot(sizes, first * (sizes / sizes[0]) ** rate, color=colour, linestyle=(0, (4, 2)), linewidth=0.9)


@styled
def picture(by_width: pd.DataFrame, by_samples: pd.DataFrame) -> Figure:
    """Draw error against d for each exponent, and against T for both."""
    figure, axes = panels(1, len(EXPONENTS) + 1, 2.7, 2.5)
    for ax, exponent in zip(axes[0], EXPONENTS, strict=False):
        for scheme, colour in zip(SCHEMES, COLOURS, strict=False):
            chosen = by_width[(by_width["exponent"] == exponent) & (by_width["scheme"] == scheme.name)]
            means = chosen.groupby("d_model")["error"].mean()
            ax.plot(means.index, means, color=colour, marker="o", markersize=3, linewidth=1.2, label=scheme.name)
            if np.isfinite(scheme.rate(exponent)):
                published_line(ax, means.index.to_numpy(dtype=float), means.iloc[0], scheme.rate(exponent), colour)
        ax.set_xscale("log")
        ax.set_xticks(WIDTHS, map(str, WIDTHS), minor=False)
        ax.set_xticks([], minor=True)
        ax.set_xlabel("d")
        ax.set_ylabel("error")
        ax.set_title(f"a = {exponent:g}, all data")
    ax = axes[0][-1]
    for exponent, colour in zip(EXPONENTS, COLOURS, strict=False):
        drawn = by_samples[by_samples["exponent"] == exponent].groupby("samples")[["error", "data_term"]].mean()
        sizes = drawn.index.to_numpy(dtype=float)
        ax.plot(sizes, drawn["error"], color=colour, marker="o", markersize=3, linewidth=1.2, label=f"a = {exponent:g}")
        ax.plot(sizes, drawn["data_term"], color=GREY, linestyle="none", marker="x", markersize=5)
        ax.set_xscale("log")
        published_line(ax, sizes, drawn["error"].iloc[0], data_rate(exponent), colour)
    ax.set_xlabel("T")
    ax.set_title("d = 384, q = 1")
    for ax in axes[0]:
        ax.set_yscale("log")
    handles, _ = axes[0][0].get_legend_handles_labels()
    handles.append(Line2D([], [], color=GREY, linestyle="none", marker="x", label="data term"))
    handles.append(Line2D([], [], color=GREY, linestyle=(0, (4, 2)), linewidth=0.9, label="published slope"))
    axes[0][-1].legend(loc="lower left")
    legend_below(figure, handles, columns=6)
    return figure


def main() -> None:
    """Measure, fit, write, print and draw."""
    arguments = options(__file__, __doc__, tiers=False)
    by_width, by_samples = measured(arguments.seeds or 5)
    save(picture(by_width, by_samples), arguments.out.with_suffix(".svg"))
    tell(arguments, slopes(by_width, by_samples))


if __name__ == "__main__":
    main()
