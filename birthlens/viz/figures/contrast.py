"""How changed runs differ from their controls, as curves of paired differences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from birthlens.viz.figures.style import COLOURS, GREY, columns_needed, label, panels, styled

if TYPE_CHECKING:
    import pandas as pd

SHOWN = ("in_context_accuracy", "in_context_loss", "output_memory", "trigger_memory", "prev_token_memory")


@styled
def difference_curves(contrast: pd.DataFrame) -> Figure:
    """Draw the difference from the control at every step, with its interval if there is one.

    `contrast` has columns step, metric, difference, low, high: `contrast.contrast_table`.
    """
    columns_needed(contrast, "metric", numeric=("step", "difference", "low", "high"))
    there = list(dict.fromkeys(contrast["metric"]))
    names = [name for name in SHOWN if name in there] or there
    figure, axes = panels(1, len(names), 2.8, 2.6)
    for number, (ax, name) in enumerate(zip(axes[0], names, strict=True)):
        part = contrast[contrast["metric"] == name].sort_values("step")
        ax.axhline(0, color=GREY, lw=0.8)
        ax.fill_between(part["step"], part["low"], part["high"], color=COLOURS[number % len(COLOURS)], alpha=0.25, lw=0)
        ax.plot(part["step"], part["difference"], color=COLOURS[number % len(COLOURS)])
        ax.set_title(label(name))
        ax.set_xlabel("step")
    axes[0][0].set_ylabel("difference from the control")
    return figure
