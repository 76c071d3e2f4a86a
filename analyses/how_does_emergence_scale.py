"""How does emergence scale with batch size and context length? Steps and tokens to half accuracy, with published claims.

The lines are tokens ~ T sqrt(batch) and steps ~ T^2, each through the middle of the measurements.

    python analyses/how_does_emergence_scale.py --tier laptop
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from asking import ask
from matplotlib.figure import Figure

from birthlens.claims.claim import interval
from birthlens.claims.statistics.behaviours import speed
from birthlens.claims.statistics.timing import slope
from birthlens.viz.figures.style import COLOURS, panels, save, styled

CLAIMED = {"batch": ("tokens to half accuracy", 0.5), "context": ("steps to half accuracy", 2.0)}
MEASURED = ("steps to half accuracy", "tokens to half accuracy")


def exponents(table: pd.DataFrame, over: str) -> pd.DataFrame:
    """Fit log(quantity) on log(size) for each seed: columns quantity, exponent, low, high (over seeds).

    NaN if a run never reached half accuracy.
    """
    rows = []
    for quantity in MEASURED:
        wide = _wide(table, over, quantity)
        slopes = [slope(np.log(wide.index.to_numpy()), np.log(wide[seed].to_numpy())) for seed in wide]
        rows.append((quantity, *interval(slopes)))
    return pd.DataFrame(rows, columns=["quantity", "exponent", "low", "high"])


def _wide(table: pd.DataFrame, over: str, quantity: str) -> pd.DataFrame:
    rows = table[(table["quantity"] == quantity) & table["case"].str.startswith(over)]
    return rows.assign(size=rows["case"].str.split().str[1].astype(float)).pivot(
        index="size", columns="seed", values="value"
    )


@styled
def picture(table: pd.DataFrame) -> Figure:
    """Draw every seed, with the claimed power law as a line."""
    figure, axes = panels(1, len(CLAIMED), 2.8, 2.4)
    for ax, (over, (quantity, power)) in zip(axes[0], CLAIMED.items(), strict=True):
        wide = _wide(table, over, quantity)
        ax.plot(wide.index, wide, "o", color=COLOURS[0], markersize=3)
        sizes, middle = wide.index.to_numpy(), np.nanmean(np.log(wide.to_numpy()))
        ax.plot(sizes, np.exp(middle + power * (np.log(sizes) - np.log(sizes).mean())), "--", color="#6E6E6E")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel({"batch": "sequences in a batch", "context": "context length T"}[over])
        ax.set_ylabel(quantity)
        ax.set_title(f"line: exponent {power:g}")
    return figure


if __name__ == "__main__":
    arguments, table = ask(__file__, __doc__, speed)
    for over in CLAIMED:
        print(f"\nexponents over {over}\n{exponents(table, over).round(3).to_string(index=False)}")
    save(picture(table), arguments.out.with_suffix(".svg"))
