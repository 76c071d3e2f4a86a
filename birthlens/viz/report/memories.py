"""The memories' score tables at many steps, as bytes in the page, drawn by its script at the step of the cursor."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from birthlens.errors import BirthlensError
from birthlens.labels import shortened
from birthlens.viz.figures.gallery import memory_frames
from birthlens.viz.html import escape, script_json

if TYPE_CHECKING:
    import pandas as pd

    from birthlens.runs.run import Run

MOST_ENTRIES = 96
MOST_LABELS = 16
LONGEST_LABEL = 6


def memory_tables(run: Run, steps: Sequence[int]) -> str:
    """Return the memories' tables as canvases with their data; each keeps one colour scale over all steps.

    The median of each table is subtracted; tables of more than 96 rows show the most frequent tokens only.
    """
    frames = [memory_frames(run, weights) for _, weights in run.checkpoints(steps)]
    order = np.argsort(-run.statistics.unigram, kind="stable")[:MOST_ENTRIES]
    return "\n".join(_table(name, [_cut(frame[name], order) for frame in frames], steps) for name in frames[0])


def _cut(table: pd.DataFrame, order: np.ndarray) -> pd.DataFrame:
    return table if max(table.shape) <= MOST_ENTRIES else table.iloc[np.sort(order), np.sort(order)]


def _table(name: str, tables: Sequence[pd.DataFrame], steps: Sequence[int]) -> str:
    shifted = np.stack([t.to_numpy(dtype=float) - np.median(t.to_numpy(dtype=float)) for t in tables])
    if not np.isfinite(shifted).all():
        raise BirthlensError(f"the {name} contains scores that are not finite; the run has diverged.")
    bound = float(np.abs(shifted).max()) or 1.0
    first = tables[0]
    rows = [str(label) for label in first.index]
    columns = [str(label) for label in first.columns]
    data = {
        "steps": list(steps),
        "bound": round(bound, 4),
        "rows": rows,
        "columns": columns,
        "rowsName": str(first.index.name),
        "columnsName": str(first.columns.name),
        "values": base64.b64encode((np.rint(shifted / bound * 127) + 127).astype(np.uint8).tobytes()).decode("ascii"),
    }
    n, m = first.shape
    offset = int(first.attrs["diagonal"])
    right = np.maximum(np.arange(n) + offset, 0)
    hits = float((shifted[-1].argmax(1) == right)[-offset:].mean())
    alt = (
        f"Table of scores, {n} rows ({first.index.name}) by {m} columns ({first.columns.name}). At step {steps[-1]} the "
        f"right entry, {'one below' if offset else 'on'} the diagonal, is the largest in {hits:.0%} of the rows."
    )
    return f"""<figure class="table">
<figcaption>{escape(name)} <small>at step <span class="at">{steps[-1]}</span></small></figcaption>
<div class="map">{_ticks(rows, "rows", "top")}
<canvas width="{m}" height="{n}" tabindex="0" role="img" aria-label="{escape(alt)}"></canvas>
{_ticks(columns, "columns", "left")}</div>
<p class="scale">{-bound:.3g} <span class="ramp"></span> {bound:.3g}</p>
<p class="note" role="status">{escape(str(first.index.name))} down, {escape(str(first.columns.name))} across</p>
<script type="application/json">{script_json(data)}</script>
</figure>"""


def _ticks(labels: Sequence[str], kind: str, side: str) -> str:
    """Label a side of a map, with positions in percent: as many labels as fit side by side, long ones shortened."""
    cut = [shortened(label, LONGEST_LABEL) for label in labels]
    longest = max(map(len, cut))
    upright = kind == "columns" and longest > 2
    every = -(-len(labels) // (MOST_LABELS // 2 if kind == "columns" and longest == 2 else MOST_LABELS))
    spans = "".join(
        f'<span style="{side}:{100 * (i + 0.5) / len(labels):.2f}%">{escape(cut[i])}</span>'
        for i in range(0, len(labels), every)
    )
    room = f"height:{longest if upright else 1.2}em" if kind == "columns" else f"width:{longest}ch"
    return f'<div class="ticks {kind}{" upright" if upright else ""}" style="{room}" aria-hidden="true">{spans}</div>'
