"""Phase diagrams: means over seeds with contours, and their spread, over two settings."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from birthlens.viz.figures.style import GREY, SEQUENTIAL, columns_needed, mixed_columns, panels, styled

if TYPE_CHECKING:
    import pandas as pd

MOST_TICKS = 9


@styled
def phase_map(table: pd.DataFrame, x: str, y: str, what: str = "value") -> Figure:
    """Draw a `phase_table`: the mean over seeds, with contours, and the spread beside it.

    Every cell has the colour of the nearest measured point on the axes; dots are measured points. A cross marks points at
    which the event happened in no seed, a slash those at which it happened in some.
    """
    columns_needed(table, x, y, "value", numeric=("spread", "n", "never"))
    mixed_columns(table, [x, y])
    columns = _marks(table[x])
    rows = _marks(table[y])
    places = np.array([(columns.index(a), rows.index(b)) for a, b in zip(table[x], table[y], strict=True)], dtype=float)
    figure, axes = panels(1, 2, 4.4, 3.6)
    for ax, name, title in zip(axes[0], ("value", "spread"), (what, "standard deviation over seeds"), strict=True):
        values = table[name].to_numpy(dtype=float)
        grid = _nearest(places, values, len(columns), len(rows))
        image = ax.imshow(grid, origin="lower", aspect="auto", cmap=SEQUENTIAL, interpolation="nearest")
        ax.set_facecolor("#D9D9D9")
        ax.grid(visible=False)
        if name == "value":
            _contours(ax, places, values)
        _dots(ax, places, table)
        ax.set_xticks(*_ticks(columns))
        ax.set_yticks(*_ticks(rows))
        ax.set_xlabel(x)
        ax.set_ylabel(y)
        if np.isfinite(values).any():
            figure.colorbar(image, ax=ax, shrink=0.85)
        ax.set_title(fill(title, 44))
    return figure


def _marks(column: pd.Series[Any]) -> list[Any]:
    """Return the values of an axis in order: numbers by size, others in the order of the table."""
    found = list(dict.fromkeys(column))
    return sorted(found) if column.dtype.kind in "iuf" else found


def _nearest(places: np.ndarray, values: np.ndarray, width: int, height: int) -> np.ndarray:
    """Fill every cell with the value of the nearest measured point."""
    cells = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(float)
    distance = ((cells[:, :, None, :] - places) ** 2).sum(-1)
    return np.asarray(values[distance.argmin(-1)])


def _contours(ax: Axes, places: np.ndarray, values: np.ndarray) -> None:
    """Draw lines of equal value, if the finite points span an area."""
    finite = np.isfinite(values)
    spots = places[finite]
    spread = len(spots) > 3 and np.linalg.matrix_rank(spots - spots.mean(0)) == 2
    if spread and np.ptp(values[finite]) > 0:
        ax.tricontour(spots[:, 0], spots[:, 1], values[finite], levels=5, colors="white", linewidths=0.8)


def _dots(ax: Axes, places: np.ndarray, table: pd.DataFrame) -> None:
    ax.scatter(places[:, 0], places[:, 1], s=4, color=GREY, linewidths=0)
    never = (table["never"] > 0).to_numpy()
    whole = never & (table["n"] == 0).to_numpy()
    for chosen, marker in ((whole, "x"), (never & ~whole, "$/$")):
        if chosen.any():
            ax.scatter(places[chosen, 0], places[chosen, 1], s=34, marker=marker, color="black", linewidths=1.0)


def _ticks(marks: Sequence[Any]) -> tuple[list[int], list[str]]:
    every = -(-len(marks) // MOST_TICKS)
    chosen = range(0, len(marks), every)
    return list(chosen), [f"{marks[i]:g}" if isinstance(marks[i], int | float) else str(marks[i]) for i in chosen]
