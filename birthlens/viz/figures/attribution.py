"""Which data taught a memory: the parts of a change, for one span or along training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from birthlens.errors import BirthlensError
from birthlens.viz.figures.style import COLOURS, DASHES, GREY, columns_needed, label, legend_below, panels, styled

if TYPE_CHECKING:
    import pandas as pd

MOST_BARS = 60


@styled
def data_parts(table: pd.DataFrame) -> Figure:
    """Draw the change that each part of the data caused: bars for one span, lines over the windows of several.

    `table` has columns memory, from, until, by, part, value: `data_attribution_table`. Bars are drawn for at most 60 parts,
    lines for at most 8.

    Raises:
        BirthlensError: for more parts than that, or several memories.
    """
    columns_needed(table, "memory", "by", "part", numeric=("from", "until", "value"))
    if table["memory"].nunique() > 1:
        raise BirthlensError("the table contains several memories; draw one at a time.")
    parts = list(dict.fromkeys(table["part"]))
    along = table["until"].nunique() > 1
    most = len(COLOURS) if along else MOST_BARS
    if len(parts) > most:
        raise BirthlensError(
            f"the table has {len(parts)} parts, and {most} can be drawn; group the data by role instead."
        )
    figure, axes = panels(1, 1, 6.0, 3.0 if along else 0.8 + 0.24 * len(parts))
    ax = axes[0][0]
    title = f"What changed the {label(str(table['memory'].iloc[0]))}"
    if along:
        ax.axhline(0, color=GREY, lw=0.8)
        lines = []
        for number, part in enumerate(parts):
            rows = table[table["part"] == part]
            style = {"color": GREY, "lw": 2.2} if part == "change" else {"color": COLOURS[number % len(COLOURS)]}
            dashes = DASHES[0] if part == "change" else DASHES[number % len(DASHES)]
            lines += ax.plot(rows["until"], rows["value"], label=label(part), linestyle=dashes, **style)
        ax.set_xlabel("step")
        ax.set_ylabel("change of the margin, nats")
        ax.set_title(title)
        legend_below(figure, lines)
        return figure
    places = range(len(parts))
    colours = [GREY if by in ("total", "optimiser") else COLOURS[0] for by in table["by"]]
    ax.barh(places, table["value"], color=colours)
    ax.set_yticks(places, [label(part) for part in table["part"]])
    ax.invert_yaxis()
    ax.axvline(0, color=GREY, lw=0.8)
    ax.set_xlabel("change of the margin, nats")
    ax.set_title(f"{title}, steps {table['from'].iloc[0]} to {table['until'].iloc[0]}")
    return figure
