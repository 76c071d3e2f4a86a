"""Tables as heat maps: memories, attention, patching, transplants, sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from birthlens.attention_frames import AttentionFrames
from birthlens.errors import BirthlensError
from birthlens.figures.style import DIVERGING, SEQUENTIAL, columns_needed, label, panels, styled
from birthlens.legible import legible

if TYPE_CHECKING:
    import pandas as pd

MOST_TICKS = 40


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

    With `centre` the colours diverge from it. `numbers` writes each value into its cell, by default up to 80 cells.

    Raises:
        BirthlensError: where two rows of the table fall on one cell.
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
    """Draw how much of the clean-corrupted gap each patch recovers: 0 white, 1 full red, below 0 blue."""
    wide = _wide(table, x, y, value)
    bound = max(1.0, float(np.nanmax(np.abs(wide.to_numpy()))))
    return heatmap(table, x, y, value, title or "share of the gap recovered", (-bound, bound), 0.0)


@styled
def transplant_map(table: pd.DataFrame, metric: str | None = None) -> Figure:
    """Draw the outcome of giving a matrix of one step to the model of another, one panel a matrix.

    Columns: matrix, from_step, to_step, metric, value. The diagonal is the model untouched.
    """
    columns_needed(table, "matrix", "from_step", "to_step", "metric", "value")
    chosen = metric or str(table["metric"].iloc[0])
    table = table[table["metric"] == chosen]
    columns_needed(table, "matrix")
    matrices = list(dict.fromkeys(table["matrix"]))
    low, high = float(table["value"].min()), float(table["value"].max())
    limits = (0.0, 1.0) if "accuracy" in chosen or "recall" in chosen else (low, high)
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


@styled
def sweep_heatmap(
    table: pd.DataFrame, x: str, y: str, value: str = "value", metric: str | None = None, title: str | None = None
) -> Figure:
    """Draw a sweep's outcome over two settings; several rows on one cell (seeds) are averaged."""
    columns_needed(table, x, y, value)
    if metric is not None:
        table = table[table["metric"] == metric]
        columns_needed(table, x)
    mean = table.groupby([x, y], sort=False)[value].mean().reset_index()
    return heatmap(mean, x, y, value, title or (label(metric) if metric else None))


@styled
def memory_heatmaps(tables: Mapping[str, pd.DataFrame], columns: int = 3) -> Figure:
    """Draw score tables of memories, one panel each: rows are inputs (queries), columns outputs, labels from the frame.

    Each panel has its own scale, symmetric about the table's median, which a softmax does not see.
    """
    if not tables:
        raise BirthlensError("there is no memory table to draw; give at least one.")
    rows = -(-len(tables) // columns)
    figure, axes = panels(rows, min(columns, len(tables)), 3.7, 3.5)
    flat = [ax for line in axes for ax in line]
    for ax, (title, wide) in zip(flat, tables.items(), strict=False):
        shifted = wide - float(np.nanmedian(wide.to_numpy()))
        bound = float(np.nanmax(np.abs(shifted.to_numpy()))) or 1.0
        image = _cells(ax, shifted, (-bound, bound), 0.0, False)
        ax.set_title(title)
        ax.set(xlabel=wide.columns.name or "output", ylabel=wide.index.name or "input")
        figure.colorbar(image, ax=ax, shrink=0.8, label="score less median")
    for ax in flat[len(tables) :]:
        ax.set_axis_off()
    return figure


@styled
def attention_maps(frames: AttentionFrames, steps: Sequence[int] | None = None) -> Figure:
    """Draw attention patterns, heads down and steps across; rows of a panel are queries, columns keys."""
    chosen = list(frames.steps if steps is None else steps)
    if missing := [step for step in chosen if step not in frames.steps]:
        raise BirthlensError(f"steps = {missing} are not among the frames' steps {list(frames.steps)}.")
    figure, axes = panels(len(frames.heads), len(chosen), 2.35, 2.3)
    tokens, image = [printable(token) for token in frames.marked], None
    for row, head in enumerate(frames.heads):
        for column, step in enumerate(chosen):
            ax = axes[row][column]
            pattern = frames.patterns[frames.steps.index(step), row]
            future = (
                np.triu(np.ones_like(pattern, dtype=bool), 1) if frames.causal else np.zeros_like(pattern, dtype=bool)
            )
            image = ax.imshow(np.where(future, np.nan, pattern), vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
            ax.set_title(f"{head}, step {step}")
            _plain(ax)
            _ticks(ax, tokens if row == len(frames.heads) - 1 else [], tokens if column == 0 else [], most=32)
    assert image is not None
    flat = [ax for line in axes for ax in line]
    figure.colorbar(image, ax=flat, label="attention", shrink=min(0.8, 0.9 / len(frames.heads) ** 0.5), aspect=30)
    return figure


def printable(text: str) -> str:
    """Spell a label in characters that the figures' font has; others by their code points."""
    known = _glyphs()
    return "".join(c if ord(c) in known else f"U+{ord(c):04X}" for c in text).replace("$", r"\$")


@cache
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())


def _wide(table: pd.DataFrame, x: str, y: str, value: str) -> pd.DataFrame:
    columns_needed(table, x, y, value)
    if table.duplicated([x, y]).any():
        raise BirthlensError(f"several rows share one {x} and {y}; pick one metric (and step) first.")
    wide = table.pivot(index=y, columns=x, values=value)
    # pivot sorts; text keeps the order of the table, numbers go up.
    rows, columns = (list(dict.fromkeys(table[name])) for name in (y, x))
    numeric = [all(isinstance(v, int | float | np.number) for v in axis) for axis in (rows, columns)]
    return wide.reindex(index=sorted(rows) if numeric[0] else rows, columns=sorted(columns) if numeric[1] else columns)


def _cells(
    ax: Axes, wide: pd.DataFrame, limits: tuple[float, float] | None, centre: float | None, numbers: bool | None
) -> AxesImage:
    values: Float[np.ndarray, "row column"] = wide.to_numpy(dtype=float)
    finite = values[np.isfinite(values)]
    low, high = limits or ((float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0))
    if centre is not None and limits is None:
        bound = max(abs(low - centre), abs(high - centre)) or 1.0
        low, high = centre - bound, centre + bound
    colours = SEQUENTIAL if centre is None else DIVERGING
    image = ax.imshow(values, vmin=low, vmax=high, cmap=colours, aspect="auto", interpolation="nearest")
    _plain(ax)
    _ticks(ax, [_name(c) for c in wide.columns], [_name(r) for r in wide.index])
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


def _ticks(ax: Axes, columns: Sequence[str], rows: Sequence[str], most: int = MOST_TICKS) -> None:
    """Label as many columns and rows as can be read, columns upright where they would run together."""
    width = ax.bbox.width / ax.figure.dpi
    for axis, names in ((ax.xaxis, columns), (ax.yaxis, rows)):
        every = -(-len(names) // most) if names else 1
        kept = range(0, len(names), every)
        axis.set_ticks(list(kept), [names[i] for i in kept])
        size = 8.0 if len(kept) <= 16 else 6.5 if len(kept) <= 26 else 5.0
        longest = max((len(names[i]) for i in kept), default=0)
        needed = (longest + 1) * len(kept) * 0.6 * size / 72  # inches; a character is about 0.6 of the size wide
        turned = axis is ax.xaxis and longest > 1 and needed > width
        axis.set_tick_params(labelsize=size, labelrotation=90 if turned else 0)


def _name(value: object) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:g}"
    text = str(value)
    return printable(legible(text) if len(text) <= 2 else text)
