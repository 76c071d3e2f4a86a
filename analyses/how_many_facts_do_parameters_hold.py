"""How many facts do parameters hold? One softmax layer with an MLP, at several widths.

The capacity model of Nichani, Lee and Bietti 2024 (`birthlens.analysis.theory.fact_capacity`): S subjects and S relations
with drawn facts, 8 answers to a relation, 16 tokens, 4 heads, an MLP of 4 d units, AdamW for at most 1,200 steps of 256
sequences at the rates 0.03 and 0.01. S grows by one until neither rate gives accuracy 0.99; the last S * S before that is
the number of facts. The slope of log(facts) on log(parameters) is fitted for each seed. Theory: in proportion, up to
logarithms.

python analyses/how_many_facts_do_parameters_hold.py        # 4 minutes of one core
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from asking import joined, options, tell
from matplotlib.figure import Figure

from birthlens.analysis.theory.fact_capacity import Training, fact_capacity_table
from birthlens.claims.statistics.timing import slope
from birthlens.viz.figures.style import COLOURS, GREY, panels, save, styled

WIDTHS = (8, 12, 16, 24, 32)
FITS = (8, 12)


def measured(width: int, seed: int) -> pd.DataFrame:
    """Measure one width with one seed: case, seed, quantity, value."""
    (row,) = fact_capacity_table((width,), (seed,), Training()).to_dict("records")
    rows = [(f"d = {width}", seed, name, float(row[name])) for name in ("parameters", "facts")]
    return pd.DataFrame(rows, columns=["case", "seed", "quantity", "value"])


def by_width(table: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Return a quantity of the table as a row for each width and a column for each seed."""
    rows = table[table["quantity"] == quantity]
    widths = rows["case"].str.removeprefix("d = ").astype(int)
    return rows.assign(width=widths).pivot(index="width", columns="seed", values="value")


def fitted(table: pd.DataFrame) -> pd.DataFrame:
    """Fit log(facts) on log(parameters) for each seed and each smallest width: case, seed, quantity, value."""
    parameters = by_width(table, "parameters")
    facts = by_width(table, "facts")
    rows = []
    for least in FITS:
        for seed in facts:
            x = np.log(parameters[seed].loc[least:].to_numpy())
            y = np.log(facts[seed].loc[least:].to_numpy())
            rows.append(("log(facts) on log(parameters)", seed, f"slope, d = {least} to {WIDTHS[-1]}", slope(x, y)))
    return pd.DataFrame(rows, columns=["case", "seed", "quantity", "value"])


@styled
def picture(table: pd.DataFrame) -> Figure:
    """Draw every seed, and a line on which facts are in proportion to parameters."""
    figure, axes = panels(1, 1, 3.4, 2.6)
    ax = axes[0][0]
    parameters = by_width(table, "parameters").mean(axis=1)
    facts = by_width(table, "facts")
    share = np.exp((np.log(facts.mean(axis=1)) - np.log(parameters)).mean())
    for seed in facts:
        ax.plot(parameters, facts[seed], "o", color=COLOURS[0], markersize=3, label="one seed" if seed == 0 else None)
    ax.plot(parameters, share * parameters, color=GREY, linestyle=(0, (4, 2)), linewidth=0.9, label="slope 1")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("trained parameters")
    ax.set_ylabel("facts at accuracy 0.99")
    ax.legend(loc="upper left")
    return figure


def main() -> None:
    """Measure, fit, write, print and draw."""
    arguments = options(__file__, __doc__, tiers=False)
    seeds = range(arguments.seeds or 3)
    jobs = [(width, seed) for seed in seeds for width in WIDTHS]
    table = joined(measured, jobs, arguments.processes)
    save(picture(table), arguments.out.with_suffix(".svg"))
    tell(arguments, table, slopes=fitted(table))


if __name__ == "__main__":
    main()
