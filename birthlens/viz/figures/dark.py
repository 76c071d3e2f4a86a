"""Figures for dark pages: light text and lines on a dark background. Data colours stay, except those too dark to see."""

from __future__ import annotations

import numpy as np
from matplotlib.collections import Collection
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Text

from birthlens.viz.figures.style import GREY

GROUND = "#15181C"
INK = "#E8E8E8"
FAINT = "#3A3F46"
_LIGHTER = {"#000000": INK, GREY.lower(): "#A8A8A8", "#0072b2": "#56A8E0", "#8c6d1f": "#C9A64B"}
"""Colours that are too dark on a dark background, and their replacements."""
_MAPS = {
    "Blues": LinearSegmentedColormap.from_list("blues on dark", [GROUND, "#2A6DA8", "#D6ECFF"]),
    "RdBu_r": LinearSegmentedColormap.from_list(
        "blue to red on dark", ["#8EC9FF", "#2D6CB5", GROUND, "#B5402D", "#FFB59E"]
    ),
}
"""Colour maps whose white would be too bright, and those that begin at the dark background instead."""


def darken(figure: Figure) -> Figure:
    """Change a drawn figure in place, and return it.

    A map with text in its cells keeps its colours, which the text was chosen for.
    """
    figure.patch.set_facecolor(GROUND)
    on_cells = {text for ax in figure.axes if ax.images for text in ax.texts}
    for text in set(figure.findobj(Text)) - on_cells:
        text.set_color(INK)
    for ax in figure.axes:
        if to_hex(ax.get_facecolor()) == "#ffffff":
            ax.set_facecolor(GROUND)
        for spine in ax.spines.values():
            spine.set_edgecolor(INK)
        ax.tick_params(which="both", colors=INK)
        for line in [*ax.get_xgridlines(), *ax.get_ygridlines()]:
            line.set_color(FAINT)
        for image in ax.images:
            if not ax.texts and image.get_cmap().name in _MAPS:
                image.set_cmap(_MAPS[image.get_cmap().name])
    for line in figure.findobj(Line2D):
        colour = to_hex(line.get_color())
        line.set_color(_LIGHTER.get(colour, colour))
    for marks in figure.findobj(Collection):
        faces = np.asarray(marks.get_facecolor(), dtype=float)
        if len(faces) == 1 and to_hex(faces[0]) in _LIGHTER and marks.get_array() is None:
            red, green, blue = to_rgb(_LIGHTER[to_hex(faces[0])])
            marks.set_facecolor((red, green, blue, float(faces[0][3])))
    for legend in figure.findobj(Legend):
        legend.get_frame().set_facecolor(GROUND)
    return figure
