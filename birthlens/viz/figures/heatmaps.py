"""Tables as heat maps: memories, attention, patching, weight patching."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

from birthlens.errors import BirthlensError
from birthlens.labels import is_share, legible, shortened
from birthlens.shapes import Float
from birthlens.viz.attention_frames import ROLE_MARKS, AttentionFrames
from birthlens.viz.figures.style import (
    DIVERGING,
    SEQUENTIAL,
    columns_needed,
    label,
    legend_below,
    mixed_columns,
    panels,
    styled,
)
from birthlens.viz.figures.tick_labels import LINE_HEIGHT, SMALLEST_FONT, label_ticks, printable

if TYPE_CHECKING:
    import pandas as pd

LONGEST_NAME = 24
"""The number of characters shown of the name of a row or column."""

LONGEST_TOKEN = 10
"""The number of characters shown of a token."""

MEMORY_SIDES = {
    "output_memory": ("attended token", "predicted token"),
    "trigger_memory": ("query", "key"),
    "prev_token_memory": ("query position", "key position"),
}
"""What the rows and the columns of each memory's table are."""

HEADS_DOWN = 4
"""Attention maps of up to this many heads have a row for each head; with more, they have a block of rows for each step."""


@styled
def heatmap(
    table: pd.DataFrame,
    x: str,
    y: str,
    value: str = "value",
    title: str | None = None,
    limits: tuple[float, float] | None = None,
    centre: float | None = None,
    numbers: bool | None = None,
) -> Figure:
    """Draw the column `value` over two other columns of a tidy table; missing cells stay blank.

    With `centre` the colours diverge from it. `numbers` writes each value into its cell (default: up to 80 cells).

    Raises:
        BirthlensError: if two rows of the table belong to the same cell.
    """
    wide = _wide(table, x, y, value)
    figure, axes = panels(1, 1, 1.6 + min(0.42 * wide.shape[1] + 1.2, 6), 1.0 + min(0.34 * wide.shape[0] + 0.6, 6))
    image = _cells(axes[0][0], wide, limits, centre, numbers)
    axes[0][0].set(xlabel=label(x), ylabel=label(y))
    axes[0][0].set_title(title or "")
    figure.colorbar(image, ax=axes[0][0], label=label(value), shrink=0.9)
    return figure


@styled
def patching_map(
    table: pd.DataFrame,
    x: str = "position",
    y: str = "site",
    value: str = "recovered",
    title: str | None = None,
) -> Figure:
    """Draw how much of the clean-corrupted gap each patch recovers: 0 is white, 1 is red, below 0 is blue."""
    wide = _wide(table, x, y, value)
    bound = max(1.0, float(np.nanmax(np.abs(wide.to_numpy()))))
    return heatmap(table, x, y, value, title or "share of the gap recovered", (-bound, bound), 0.0)


@styled
def weight_patching_map(table: pd.DataFrame, metric: str | None = None) -> Figure:
    """Draw a metric after a matrix of one step is put into the model of another, one panel for each matrix.

    The table is that of `weight_patching.weight_patching_table`: columns matrix, from_step, to_step, metric, value. The
    diagonal is the unchanged model.
    """
    columns_needed(table, "matrix", "from_step", "to_step", "metric", numeric=("value",))
    chosen = metric or str(table["metric"].iloc[0])
    table = table[table["metric"] == chosen]
    columns_needed(table, "matrix")
    matrices = list(dict.fromkeys(table["matrix"]))
    limits = (float(table["value"].min()), float(table["value"].max()))
    if is_share(chosen):
        limits = (0.0, 1.0)
    figure, axes = panels(1, len(matrices), 2.6, 2.7)
    image = None
    for ax, matrix in zip(axes[0], matrices, strict=True):
        wide = _wide(table[table["matrix"] == matrix], "from_step", "to_step", "value")
        image = _cells(ax, wide.iloc[::-1], limits, None, False)
        ax.set_title(label(str(matrix)))
        ax.set_xlabel("matrix from step")
    axes[0][0].set_ylabel("model of step")
    assert image is not None
    figure.colorbar(image, ax=axes[0], label=label(chosen), shrink=0.85)
    return figure


def transplant_map(table: pd.DataFrame, metric: str | None = None) -> Figure:
    """Call `weight_patching_map`, with a warning: this is its old name."""
    warnings.warn("transplant_map is now called weight_patching_map.", DeprecationWarning, stacklevel=2)
    return weight_patching_map(table, metric)


@styled
def memory_heatmaps(table: pd.DataFrame, columns: int = 3) -> Figure:
    """Draw the score tables of memories, one panel each: rows are inputs (queries), columns are outputs.

    The table is that of `memory_scores_table`: columns memory, row, column, input, output, centred. Each panel has its
    own scale, symmetric about the median, which is 0 (the softmax does not depend on that constant).
    """
    import pandas as pd

    columns_needed(table, "memory", "row", "column", "input", "output", numeric=("centred",))
    names = list(dict.fromkeys(table["memory"]))
    rows = -(-len(names) // columns)
    figure, axes = panels(rows, min(columns, len(names)), 3.7, 3.5)
    flat = [ax for line in axes for ax in line]
    for ax, name in zip(flat, names, strict=False):
        cells = table[table["memory"] == name]
        wide = _wide(cells, "column", "row", "centred")
        wide.index = pd.Index(cells.loc[cells["column"] == 0, "input"])
        wide.columns = pd.Index(cells.loc[cells["row"] == 0, "output"])
        bound = float(np.nanmax(np.abs(wide.to_numpy()))) or 1.0
        image = _cells(ax, wide, (-bound, bound), 0.0, False, LONGEST_TOKEN)
        ax.set_title(label(str(name)))
        down, across = MEMORY_SIDES.get(str(name), ("input", "output"))
        ax.set(xlabel=across, ylabel=down)
        figure.colorbar(image, ax=ax, shrink=0.8, label="score minus median")
    for ax in flat[len(names) :]:
        ax.set_axis_off()
    return figure


@styled
def attention_maps(frames: AttentionFrames, steps: Sequence[int] | None = None) -> Figure:
    """Draw attention patterns; rows of a panel are queries, columns are keys, and a legend explains the marks.

    Up to four heads have one row of panels each, with their steps side by side. More heads are side by side, step by step.
    """
    chosen = list(frames.steps if steps is None else steps)
    if missing := [step for step in chosen if step not in frames.steps]:
        raise BirthlensError(f"steps = {missing} are not among the frames' steps {list(frames.steps)}.")
    if len(frames.heads) <= HEADS_DOWN:
        columns = len(chosen)
        shown = list(product(frames.heads, chosen))
    else:
        columns = next((n for n in (4, 3) if len(frames.heads) % n == 0), 4)
        shown = [(head, step) for step in chosen for head in frames.heads]
    # Large enough that every token of a typical sequence keeps its label.
    side = min(4.5, max(2.35, 0.7 + len(frames.tokens) * SMALLEST_FONT * LINE_HEIGHT * 1.08 / 72))
    figure, axes = panels(-(-len(shown) // columns), columns, side, side, "compressed")
    tokens = [shortened(printable(token), LONGEST_TOKEN) for token in frames.marked]
    image = None
    flat = [ax for line in axes for ax in line]
    for place, (ax, (head, step)) in enumerate(zip(flat, shown, strict=False)):
        pattern = frames.patterns[frames.steps.index(step), frames.heads.index(head)]
        future = np.triu(np.ones_like(pattern, dtype=bool), 1) & frames.causal
        image = ax.imshow(np.where(future, np.nan, pattern), vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
        ax.set_title(f"{head}, step {step}")
        _plain(ax)
        lowest = place + columns >= len(shown)
        leftmost = place % columns == 0
        label_ticks(ax, tokens if lowest else [], tokens if leftmost else [])
    for ax in flat[len(shown) :]:
        ax.set_axis_off()
    assert image is not None
    figure.colorbar(image, ax=flat, label="attention", shrink=min(0.8, 0.9 / len(axes) ** 0.5), aspect=30)
    present = {role for roles in frames.roles for role in roles}
    if present:
        said = [
            Line2D([], [], lw=0, label=f"{mark} {text}") for role, (mark, text) in ROLE_MARKS.items() if role in present
        ]
        legend_below(figure, said, 2 if columns < 4 else 4, handlelength=0, handletextpad=0)
    return figure


def _wide(table: pd.DataFrame, x: str, y: str, value: str) -> pd.DataFrame:
    columns_needed(table, x, y, numeric=(value,))
    mixed_columns(table, [x, y])
    wide = table.pivot(index=y, columns=x, values=value)
    # pivot sorts; text keeps the order of the table, numbers ascend.
    rows, columns = (list(dict.fromkeys(table[name])) for name in (y, x))
    numeric = [all(isinstance(v, int | float | np.number) for v in axis) for axis in (rows, columns)]
    return wide.reindex(index=sorted(rows) if numeric[0] else rows, columns=sorted(columns) if numeric[1] else columns)


def _cells(
    ax: Axes,
    wide: pd.DataFrame,
    limits: tuple[float, float] | None,
    centre: float | None,
    numbers: bool | None,
    longest: int = LONGEST_NAME,
) -> AxesImage:
    values: Float[np.ndarray, "row column"] = wide.to_numpy(dtype=float)
    finite = values[np.isfinite(values)]
    low, high = limits or ((float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0))
    if centre is not None and limits is None:
        bound = max(abs(low - centre), abs(high - centre)) or 1.0
        low = centre - bound
        high = centre + bound
    colours = SEQUENTIAL if centre is None else DIVERGING
    image = ax.imshow(values, vmin=low, vmax=high, cmap=colours, aspect="auto", interpolation="nearest")
    _plain(ax)
    label_ticks(ax, *([shortened(_name(name), longest) for name in names] for names in (wide.columns, wide.index)))
    if numbers or (numbers is None and values.size <= 80):
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                shown = f"{value:.2f}".replace("-0.00", "0.00")
                ax.text(column, row, shown, ha="center", va="center", fontsize=7, color="w" if dark else "k")
    return image


def _plain(ax: Axes) -> None:
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.tick_params(length=0)


def _name(value: object) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:g}"
    text = str(value)
    return printable(legible(text) if len(text) <= 2 else text)
