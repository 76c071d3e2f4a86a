"""Labels of the rows and columns of heat maps: as many as fit, in characters that the font has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.textpath import text_to_path

from birthlens.viz.figures.style import Drawing

LARGEST_FONT = 8.0
SMALLEST_LEVEL_FONT = 6.5
"""Column labels that would need a smaller font than this, in points, are rotated."""

SMALLEST_FONT = 5.5
LINE_HEIGHT = 1.3
"""Height of a line of text, as a multiple of the font size."""


def printable(text: str) -> str:
    """Return a label in characters that the figures' font has; others become their code points."""
    known = _glyphs()
    return "".join(c if ord(c) in known else f"U+{ord(c):04X}" for c in text).replace("$", r"\$")


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())


def label_ticks(ax: Axes, columns: Sequence[str], rows: Sequence[str]) -> None:
    """Label columns and rows, as many as are readable at the final size of the panel."""
    for axis, names in ((ax.xaxis, columns), (ax.yaxis, rows)):
        # Until then, the widest name reserves the space.
        axis.set_ticks([0] if names else [], [max(names, key=len)] if names else [])
    figure = ax.figure
    assert isinstance(figure, Drawing)
    figure.fits.append(lambda: _fit(ax.xaxis, columns, ax.bbox.width / figure.dpi, across=True))
    figure.fits.append(lambda: _fit(ax.yaxis, rows, ax.bbox.height / figure.dpi, across=False))


def _fit(axis: Axis, names: Sequence[str], inches: float, across: bool) -> None:
    """Label one axis: columns horizontally if they fit, otherwise rotated; smaller, then fewer, if they would overlap.

    Consecutive numbers (positions) stay horizontal and large, because omitted ones can be counted.
    """
    if not names:
        return
    pitch = 72 * inches / len(names)  # in points
    size = LARGEST_FONT
    every = 1
    upright = False
    widest = max(_width(name) for name in names) + 0.6
    counting = (
        [*names] == [str(n) for n in range(int(names[0]), int(names[0]) + len(names))]
        if names[0].isdecimal()
        else False
    )
    if counting:
        needed = size * (widest if across else LINE_HEIGHT) / pitch
        every = next((n for n in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64) if n >= needed), int(needed) + 1)
    elif across and widest * SMALLEST_LEVEL_FONT <= pitch:
        size = min(LARGEST_FONT, pitch / widest)
    else:
        upright = across and widest > 1.6
        size = max(SMALLEST_FONT, min(LARGEST_FONT, pitch / LINE_HEIGHT))
        every = max(1, int(np.ceil(size * LINE_HEIGHT / pitch - 1e-6)))
    kept = range(0, len(names), every)
    axis.set_ticks(list(kept), [names[i] for i in kept])
    axis.set_tick_params(labelsize=size, labelrotation=90 if upright else 0)


@cache
def _width(text: str) -> float:
    """Return the width of a text in units of its font size."""
    font = FontProperties(family="DejaVu Sans", size=100)
    return float(text_to_path.get_text_width_height_descent(text.replace(r"\$", "$"), font, False)[0]) / 100
