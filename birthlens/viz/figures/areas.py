"""Shares of each matrix over training, as stacked areas."""

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from birthlens.errors import BirthlensError
from birthlens.labels import in_words
from birthlens.viz.figures.style import COLOURS, columns_needed, label, legend_under, mixed_columns, panels, styled

if TYPE_CHECKING:
    import pandas as pd

MOST_CELLS = 3


@styled
def ledger_areas(table: pd.DataFrame) -> Figure:
    """Draw the shares of each matrix's squared norm as stacked areas, one panel for each matrix and reading.

    The table is that of `ledger_tables.ledger_table`, or of `paper_ledger_table` with its column reading: columns step,
    matrix, family, kind ("association", "cell", "residual"), share. Named associations are at the bottom in full colour,
    followed by the largest cells and the sum of the small ones; the residual is grey. Steps at which the matrix is still
    zero are left out. A single step is drawn as a bar.

    Raises:
        BirthlensError: if all matrices are zero at all steps.
    """
    columns_needed(table, "matrix", "family", "kind", numeric=("step", "share"))
    keys = ["matrix", "reading"] if "reading" in table else ["matrix"]
    mixed_columns(table, [*keys, "family", "step"])
    groups = list(table.dropna(subset=["share"]).groupby(keys, sort=False))
    if not groups:
        raise BirthlensError("the table has no share: at these steps every matrix is still zero.")
    figure, axes = panels(1, len(groups), 3.0, 3.9)
    for ax, (key, rows) in zip(axes[0], groups, strict=True):
        wide = (
            rows.pivot_table(index="step", columns="family", values="share", sort=False).sort_index().dropna(how="all")
        )
        kinds = dict(zip(rows["family"], rows["kind"], strict=True))
        bands, names, colours = _bands(wide, kinds)
        steps = list(wide.index)
        if len(steps) == 1:
            ax.set_xticks(steps)
            bands = [np.repeat(band, 2) for band in bands]
            steps = [steps[0] - 0.5, steps[0] + 0.5]
        else:
            ax.locator_params(axis="x", nbins=5, integer=True)
        ax.stackplot(steps, bands, labels=names, colors=colours, linewidth=0.4, edgecolor="white")
        ax.set_title("\n".join([label(str(key[0])), *map(str, key[1:])]))
        ax.set_ylim(0, 1)
        ax.margins(x=0)
        ax.set_xlabel("step")
        handles, texts = ax.get_legend_handles_labels()
        # Reversed, so that the legend lists the stack from top to bottom.
        legend_under(ax, handles=handles[::-1], labels=[fill(in_words(text), 30) for text in texts[::-1]])
    axes[0][0].set_ylabel("share of squared norm")
    return figure


def _bands(wide: pd.DataFrame, kinds: dict[str, str]) -> tuple[list[np.ndarray], list[str], list[str]]:
    families = [str(family) for family in wide]
    named = [family for family in families if kinds[family] == "association"]
    cells = sorted(
        (family for family in families if kinds[family] == "cell"), key=lambda f: -float(np.max(wide[f].to_numpy()))
    )
    # A single small cell is shown with its name; several are added up.
    shown = len(cells) if len(cells) == MOST_CELLS + 1 else MOST_CELLS
    large = cells[:shown]
    small = cells[shown:]
    rest = [family for family in families if kinds[family] not in ("association", "cell")]
    bands = [wide[family].to_numpy() for family in (*named, *large)]
    names = [*named, *large]
    colours = list(COLOURS[: len(named)])
    tints = ("#9FB4C7", "#C3B59B", "#A9C4B4", "#C9B3C6")
    colours += list(tints[: len(large)])
    if small:
        bands.append(wide[small].to_numpy().sum(1))
        names.append(f"the {len(small)} smaller cells")
        colours.append("#D9D9D9")
    for family in rest:
        bands.append(wide[family].to_numpy())
        names.append(family)
        colours.append("#EFEFEF")
    return bands, names, colours
