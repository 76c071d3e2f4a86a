"""Values over training: behaviour with the reference predictors, recall of the memories, timelines of interventions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from birthlens.analysis.memories.names import MEMORIES
from birthlens.errors import BirthlensError
from birthlens.labels import is_share
from birthlens.viz.figures.style import (
    COLOURS,
    DASHES,
    GREY,
    columns_needed,
    label,
    legend_below,
    legend_under,
    mixed_columns,
    panels,
    styled,
)

if TYPE_CHECKING:
    import pandas as pd


@styled
def training_curves(
    metrics: pd.DataFrame,
    references: pd.DataFrame | None = None,
    roles: Sequence[str] = ("in_context", "global"),
    split: str = "held_out",
) -> Figure:
    """Draw loss and accuracy over training, one column of panels for each role, with the reference predictors as lines.

    `metrics` has columns step, split, metric (as "in_context_loss"), value: `run.metrics()`. `references` has columns
    predictor, role, metric ("loss", "accuracy"), value: `tasks.predictors.scores.reference_table`.
    """
    columns_needed(metrics, "split", "metric", numeric=("step", "value"))
    table = metrics[metrics["split"] == split]
    mixed_columns(table, ["metric", "step"])
    shown = [role for role in roles if (table["metric"] == f"{role}_loss").any()]
    if not shown:
        raise BirthlensError(f"roles = {list(roles)}: none was measured on the split {split!r}.")
    figure, axes = panels(2, len(shown), 3.4, 2.3)
    names = [] if references is None else list(dict.fromkeys(references["predictor"]))
    handles: list[Line2D] = []
    for column, role in enumerate(shown):
        for row, metric in enumerate(("loss", "accuracy")):
            ax = axes[row][column]
            series = table[table["metric"] == f"{role}_{metric}"].sort_values("step")
            ax.plot(series["step"], series["value"], color=COLOURS[0], label="model", zorder=3)
            top = _top(series["value"], _floors(ax, references, names, role, metric))
            ax.set_title(f"{label(role)} {metric}")
            ax.set_ylim(bottom=0, top=1.02 if metric == "accuracy" else top)
            ax.set_ylabel("nats" if metric == "loss" else "share correct")
            _steps(ax, last=row == 1)
    handles = [Line2D([], [], color=COLOURS[0], label="model")]
    handles += [
        Line2D([], [], color=COLOURS[1 + i % 6], ls=DASHES[1 + i % 5], lw=1.1, label=label(name))
        for i, name in enumerate(names)
    ]
    legend_below(figure, handles, 4 if len(shown) > 1 else 3)
    return figure


@styled
def birth_panels(
    metrics: pd.DataFrame, references: pd.DataFrame, recalls: pd.DataFrame | None = None, reached: float = 0.9
) -> Figure:
    """Draw the birth in one row: in-context loss, in-context accuracy, and, if given, the recall of the three memories.

    `metrics` and `references` are those of `training_curves`, `recalls` is that of `recall_curves`. The trigger memory is
    read among the triggers if there are several, the others among all candidates. A grey line marks the first measured step
    with an accuracy above `reached`.
    """
    columns_needed(metrics, "split", "metric", numeric=("step", "value"))
    table = metrics[metrics["split"] == "held_out"].sort_values("step")
    if not (table["metric"] == "in_context_accuracy").any():
        raise BirthlensError("the run has no in-context accuracy, so there is no birth to draw.")
    figure, axes = panels(1, 2 if recalls is None else 3, 3.0, 3.0)
    names = [
        name for name in ("uniform", "bag", "bayes", "bayes (approximate)") if (references["predictor"] == name).any()
    ]
    above = table[(table["metric"] == "in_context_accuracy") & (table["value"] > reached)]["step"]
    for ax, metric in zip(axes[0], ("loss", "accuracy"), strict=False):
        series = table[table["metric"] == f"in_context_{metric}"]
        ax.plot(series["step"], series["value"], color=COLOURS[0], label="model", zorder=3)
        top = _top(series["value"], _floors(ax, references, names, "in_context", metric))
        ax.set_ylim(bottom=-0.02 * top, top=1.04 if metric == "accuracy" else top)
        ax.set_title(f"In-context {metric}")
        ax.set_ylabel("nats" if metric == "loss" else "share correct")
    if recalls is not None:
        _recalls_in_one(axes[0][2], recalls)
    for ax in axes[0]:
        if len(above):
            said = f"accuracy > {reached:g}: step {above.iloc[0]}"
            ax.axvline(float(above.iloc[0]), color=GREY, lw=0.8, zorder=1, label=said)
        _steps(ax, last=True)
        legend_under(ax)
    return figure


def _recalls_in_one(ax: Axes, recalls: pd.DataFrame) -> None:
    table = recalls[(recalls["metric"] == "recall") & (recalls["basis"] == "raw")]
    for number, (name, wanted) in enumerate(
        (("output_memory", "all"), ("trigger_memory", "triggers"), ("prev_token_memory", "all"))
    ):
        of = table[table["memory"] == name]
        rows = of[of["candidates"] == (wanted if (of["candidates"] == wanted).any() else "all")].sort_values("step")
        if rows.empty:  # a model without positions has no previous-token memory
            continue
        colour = COLOURS[number]
        count = f"{rows['n'].iloc[0]}{' triggers' if wanted == 'triggers' else ''}"
        ax.plot(
            rows["step"], rows["value"], color=colour, ls=DASHES[number], label=f"{label(name)} (n = {count})", zorder=3
        )
        ax.plot(rows["step"], rows["chance"], color=colour, ls=":", lw=1.0, zorder=2)
    ax.set_title("Recall of the three memories")
    ax.set_ylim(-0.02, 1.04)
    ax.set_ylabel("recall (dotted: chance)")


@styled
def recall_curves(
    table: pd.DataFrame,
    metric: str = "recall",
    basis: str = "raw",
    candidates: Sequence[str] = ("all", "triggers", "first 64"),
    memories: Sequence[str] = MEMORIES,
) -> Figure:
    """Draw the recall of each memory over training: one panel each, a line for each candidate set, chance dotted.

    The table is that of `recall_tables.memory_series`: columns step, memory, basis, metric, candidates, value, chance, n.
    """
    columns_needed(table, "memory", "basis", "metric", "candidates", numeric=("step", "value", "chance", "n"))
    table = table[(table["metric"] == metric) & (table["basis"] == basis)]
    mixed_columns(table, ["memory", "candidates", "step"])
    shown = [name for name in memories if (table["memory"] == name).any()]
    if not shown:
        raise BirthlensError(
            f"metric = {metric!r}, basis = {basis!r}: the table has no such readings of {', '.join(memories)}."
        )
    figure, axes = panels(1, len(shown), 2.7, 2.6)
    for ax, name in zip(axes[0], shown, strict=True):
        sets = [c for c in candidates if ((table["memory"] == name) & (table["candidates"] == c)).any()]
        for number, chosen in enumerate(sets):
            series = table[(table["memory"] == name) & (table["candidates"] == chosen)].sort_values("step")
            colour = COLOURS[number]
            count = int(series["n"].iloc[0])
            ax.plot(series["step"], series["value"], color=colour, ls=DASHES[number], label=f"{chosen} (n = {count})")
            ax.plot(series["step"], series["chance"], color=colour, ls=":", lw=1.0)
        ax.set_title(label(name))
        if is_share(metric):
            ax.set_ylim(-0.02, 1.04)
        _steps(ax, last=True)
        legend_under(ax)
    axes[0][0].set_ylabel(f"{label(metric)} (dotted: chance)")
    return figure


@styled
def timeline(
    table: pd.DataFrame,
    series: str = "case",
    metric: str | None = None,
    value: str = "value",
    title: str | None = None,
    most: int = 8,
    reference: float | None = None,
) -> Figure:
    """Draw one line for each entry of the column `series` over step: ablations, edges, any probe.

    The table has columns step, `series`, metric and `value`. If it has low and high (or change_low, change_high), they are
    drawn as a band. At most `most` lines are coloured, those that move furthest from zero; the others stay grey.
    `reference` draws a horizontal line.
    """
    columns_needed(table, series, numeric=("step", value))
    chosen = metric or (str(table["metric"].iloc[0]) if "metric" in table else value)
    if "metric" in table:
        table = table[table["metric"] == chosen]
        columns_needed(table, "step")
    mixed_columns(table, [series, "step"])
    figure, axes = panels(1, 1, 5.6, 3.1)
    ax = axes[0][0]
    reach = table.groupby(series, sort=False)[value].agg(lambda values: float(np.nanmax(np.abs(values))))
    furthest = set(reach.sort_values(ascending=False, kind="stable").index[:most])
    # Colours follow the order of the table, as in the report, so that a head has the same colour everywhere.
    leading = [name for name in reach.index if name in furthest]
    low, high = ("change_low", "change_high") if value == "change" else ("low", "high")
    for name, rows in table.groupby(series, sort=False):
        rows = rows.sort_values("step")
        if name not in leading:
            ax.plot(rows["step"], rows[value], color="#BBBBBB", lw=0.8, zorder=1)
            continue
        number = leading.index(name)
        colour = COLOURS[number % len(COLOURS)]
        dash = DASHES[number % len(DASHES)]
        ax.plot(rows["step"], rows[value], color=colour, ls=dash, label=str(name), zorder=3)
        if low in rows and high in rows:
            ax.fill_between(rows["step"], rows[low], rows[high], color=colour, alpha=0.1, lw=0, zorder=2)
    if reference is not None:
        ax.axhline(reference, color=GREY, lw=1, ls=":")
    roles = set(table["role"]) if "role" in table else set()
    said = label("_".join([*map(str, roles), chosen] if len(roles) == 1 else [chosen]))
    ax.set_ylabel(said if value == "value" else f"{label(value)} of {said}")
    if title:
        ax.set_title(title)
    _steps(ax, last=True)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), handlelength=2.4)
    return figure


def _floors(ax: Axes, references: pd.DataFrame | None, names: Sequence[str], role: str, metric: str) -> list[float]:
    """Draw the scores of the reference predictors as lines, in the same style in every panel; return the scores."""
    found: list[float] = []
    for number, name in enumerate(names):
        assert references is not None
        chosen = (references["predictor"] == name) & (references["role"] == role) & (references["metric"] == metric)
        for value in references[chosen]["value"]:
            colour = COLOURS[1 + number % 6]
            dash = DASHES[1 + number % 5]
            ax.axhline(value, color=colour, ls=dash, lw=1.1, zorder=2, label=f"{label(name)}: {value:.3g}")
            found.append(float(value))
    return found


def _top(*values: Iterable[float]) -> float:
    """Return the upper end of an axis: a little above the largest finite value."""
    return 1.06 * max((value for part in values for value in part if np.isfinite(value)), default=1.0)


def _steps(ax: Axes, last: bool) -> None:
    ax.margins(x=0.01)
    ax.locator_params(axis="x", nbins=6, integer=True)
    if last:
        ax.set_xlabel("step")
    else:
        ax.tick_params(labelbottom=False)
