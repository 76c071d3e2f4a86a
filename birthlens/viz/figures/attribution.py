"""Which data taught a memory: the parts of a change, for one span or along training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from birthlens.errors import BirthlensError
from birthlens.tasks.parts import NUMBERED
from birthlens.viz.figures.style import COLOURS, DASHES, GREY, columns_needed, label, legend_below, panels, styled

if TYPE_CHECKING:
    import pandas as pd

MOST_BARS = 60
VALUE = "change of the margin, nats"


@styled
def data_parts(table: pd.DataFrame) -> Figure:
    """Draw the change that each part of the data caused: bars for one span, lines over the windows of several.

    `table` has columns memory, from, until, by, part, value: `data_attribution_table`. Named parts have at most 60 bars, and
    windows at most 8 lines.

    Raises:
        BirthlensError: for more parts than that, or several memories.
    """
    columns_needed(table, "memory", "by", "part", numeric=("from", "until", "value"))
    if table["memory"].nunique() > 1:
        raise BirthlensError("the table holds several memories; draw one at a time.")
    if table["until"].nunique() > 1:
        return _along(table)
    data = table[~table["by"].isin(["optimiser", "total"])]
    if set(data["by"]) <= set(NUMBERED):
        return _numbered(data, table)
    if len(table) > MOST_BARS:
        raise BirthlensError(f"the table has {len(table)} parts, and {MOST_BARS} can be drawn; group the data by role.")
    figure, axes = panels(1, 1, 6.0, 0.8 + 0.24 * len(table))
    ax = axes[0][0]
    colours = [GREY if by in ("total", "optimiser") else COLOURS[0] for by in table["by"]]
    ax.barh(range(len(table)), table["value"], color=colours)
    ax.set_yticks(range(len(table)), [label(part) for part in table["part"]])
    ax.invert_yaxis()
    ax.axvline(0, color=GREY, lw=0.8)
    ax.set_xlabel(VALUE)
    ax.set_title(_title(table))
    return figure


def _numbered(data: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Draw a bar at every occurrence, position or step, and say the rest in words."""
    figure, axes = panels(1, 1, 6.0, 3.0)
    ax = axes[0][0]
    ax.bar(data["part"].astype(int), data["value"], color=COLOURS[0], width=0.9)
    ax.axhline(0, color=GREY, lw=0.8)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    rest = table[table["by"].isin(["optimiser", "total"])]
    words = ", ".join(f"{part} {value:.3g}" for part, value in zip(rest["part"], rest["value"], strict=True))
    ax.set_xlabel(f"{label(str(data['by'].iloc[0]))}\n{words}")
    ax.set_ylabel(VALUE)
    ax.set_title(_title(table))
    return figure


def _along(table: pd.DataFrame) -> Figure:
    """Draw a line for each part over the windows."""
    parts = list(dict.fromkeys(table["part"]))
    if len(parts) > len(COLOURS):
        raise BirthlensError(f"the table has {len(parts)} parts, and {len(COLOURS)} lines can be drawn; group by role.")
    figure, axes = panels(1, 1, 6.0, 3.0)
    ax = axes[0][0]
    ax.axhline(0, color=GREY, lw=0.8)
    lines = []
    for number, part in enumerate(parts):
        rows = table[table["part"] == part]
        colour = GREY if part == "change" else COLOURS[number]
        dashes = DASHES[0] if part == "change" else DASHES[number % len(DASHES)]
        width = 2.2 if part == "change" else 1.6
        lines += ax.plot(rows["until"], rows["value"], label=label(part), linestyle=dashes, color=colour, lw=width)
    ax.set_xlabel("step")
    ax.set_ylabel(VALUE)
    ax.set_title(f"What changed the {label(str(table['memory'].iloc[0]))}")
    legend_below(figure, lines)
    return figure


def _title(table: pd.DataFrame) -> str:
    name = label(str(table["memory"].iloc[0]))
    return f"What changed the {name}, steps {table['from'].iloc[0]} to {table['until'].iloc[0]}"
