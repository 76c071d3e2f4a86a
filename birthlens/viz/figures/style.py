"""One style for all figures: Okabe and Ito's colours, line styles that differ without colour, vector fonts."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from birthlens.errors import BirthlensError
from birthlens.labels import label as label
from birthlens.system import write_atomically

if TYPE_CHECKING:
    import pandas as pd

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
"""Okabe and Ito's palette, its yellow darkened for white paper."""

DASHES = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
GREY = "#6E6E6E"
SEQUENTIAL = "cividis"
DIVERGING = "RdBu_r"
ENDINGS = (".png", ".svg", ".pdf")

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "figure.dpi": 150,
    "savefig.dpi": 300,
    "svg.fonttype": "path",
    "svg.hashsalt": "birthlens",
    "pdf.fonttype": 42,
}

P = ParamSpec("P")


class Drawing(Figure):
    """A figure that notebooks show without pyplot; the functions in `fits` run once its panels have their sizes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fits: list[Callable[[], None]] = []

    def fit(self) -> None:
        """Lay out the panels, then place what depends on their sizes."""
        if self.fits:
            self.draw_without_rendering()
        while self.fits:
            self.fits.pop(0)()

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        buffer = io.BytesIO()
        with mpl.rc_context(STYLE):
            self.savefig(buffer, format="png", dpi=200)
        width, height = self.get_size_inches()
        return buffer.getvalue(), {"width": round(width * 100), "height": round(height * 100)}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Make a function draw in this style; the caller's own matplotlib style does not change."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            figure = draw(*args, **kwargs)
            _mark_single_points(figure)
            if isinstance(figure, Drawing):
                figure.fit()
            return figure

    return drawn


def _mark_single_points(figure: Figure) -> None:
    """Draw lines of one point as a point, at the only tick of its axis."""
    for ax in figure.axes:
        alone = [line for line in ax.lines if len(np.atleast_1d(line.get_xdata())) == 1]
        for line in alone:
            line.set_marker("o")
        places = {float(np.atleast_1d(line.get_xdata())[0]) for line in alone}
        if len(places) == 1:
            ax.set_xticks(list(places))


def panels(
    rows: int, columns: int, width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained"
) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure with a grid of axes, each `width` x `height` inches; "compressed" is for square maps."""
    figure = Drawing(figsize=(columns * width, rows * height), layout=layout)
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def legend_below(figure: Figure, handles: Iterable[object], columns: int = 4, **options: Any) -> None:
    """Put one legend below all panels."""
    listed = list(handles)
    figure.legend(handles=listed, loc="outside lower center", ncols=min(columns, max(1, len(listed))), **options)


def legend_under(ax: Axes, **options: Any) -> None:
    """Put a legend below the panel, under its axis label and aligned with its left edge."""
    down = ScaledTranslation(0, -0.47, ax.figure.dpi_scale_trans)
    ax.legend(
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=ax.transAxes + down,
        borderaxespad=0.0,
        handlelength=2.4,
        **options,
    )


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure; the ending of the name (.png, .svg, .pdf) sets the format. The same figure gives the same bytes.

    Raises:
        BirthlensError: for any other ending, or a directory that does not exist.
    """
    path = check_name(path)
    stamp = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[path.suffix]
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format=path.suffix[1:], metadata=stamp)
    write_atomically(path, buffer.getvalue())
    return path


def check_name(path: str | Path) -> Path:
    """Raise BirthlensError unless a figure can be written there."""
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise BirthlensError(f"out = {str(path)!r}: the name of a figure must end in {', '.join(ENDINGS)}.")
    if not path.parent.is_dir():
        raise BirthlensError(f"out = {str(path)!r}: the directory {str(path.parent)!r} does not exist; make it first.")
    return path


def columns_needed(table: pd.DataFrame, *names: str, numeric: Sequence[str] = ()) -> None:
    """Raise BirthlensError if a table lacks a column (the message lists those it has), has no rows, or text for numbers."""
    present = list(table.columns)
    if missing := [name for name in (*names, *numeric) if name not in present]:
        raise BirthlensError(
            f"the table lacks the columns {', '.join(missing)}; it has {', '.join(map(str, present))}."
        )
    if not len(table):
        raise BirthlensError("the table has no rows, so there is nothing to draw.")
    for name in numeric:
        if table[name].dtype.kind not in "iufb":
            raise BirthlensError(f"column {name!r} holds {table[name].iloc[0]!r}; to be drawn it must hold numbers.")
        if name in ("value", "change", "difference") and table[name].isna().all():
            raise BirthlensError(f"column {name!r} holds no value in any row, so there is nothing to draw.")


SEEDS = ("seed", "run", "path", "state")
"""Columns that distinguish the runs of one setting, in addition to those that begin with "seeds."."""


def mixed_columns(table: pd.DataFrame, keys: Sequence[str], averaged: bool = False) -> None:
    """Raise BirthlensError if several rows would be drawn at the same place, naming the columns in which they differ.

    `keys` are the columns that determine where a row is drawn. With `averaged`, rows that differ only in their seeds or in
    measured numbers may share a place.
    """
    doubles = table[table.duplicated(list(keys), keep=False)]
    if doubles.empty:
        return
    where = " and ".join(keys)
    others = [name for name in table.columns if name not in keys]
    groups = doubles.groupby(list(keys), sort=False, dropna=False)
    differing = [str(name) for name in others if (groups[name].nunique(dropna=False) > 1).any()]
    settings = [name for name in differing if _is_setting(table, name) and name not in SEEDS]
    if averaged and not settings:
        return
    if settings:
        values = ", ".join(map(str, list(dict.fromkeys(doubles[settings[0]]))[:4]))
        raise BirthlensError(
            f"several rows share one {where}; they differ in {', '.join(settings)}. "
            f"Choose one with --option {settings[0]}=VALUE (there are {values})."
        )
    if seeds := [name for name in differing if name in SEEDS or name.startswith("seeds.")]:
        raise BirthlensError(
            f"several rows share one {where}; they differ in {', '.join(seeds)}. "
            f"Choose one with --option {seeds[0]}=VALUE, or average them first."
        )
    raise BirthlensError(f"several rows share one {where}; keep one row for each.")


def _is_setting(table: pd.DataFrame, name: str) -> bool:
    """Return whether a column is a setting rather than a result: a text, a key such as model.d_model, a step."""
    if name.startswith("seeds."):
        return False
    return "." in name or name == "step" or table[name].dtype.kind not in "iufb"
