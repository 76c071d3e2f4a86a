"""The memories' score tables at many steps, as bytes in the page, drawn by its script at the step of the cursor."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from birthlens.errors import BirthlensError
from birthlens.labels import label, shortened
from birthlens.viz.figures.gallery import memory_scores
from birthlens.viz.figures.heatmaps import MEMORY_SIDES
from birthlens.viz.html import escape, script_json

if TYPE_CHECKING:
    import pandas as pd

    from birthlens.runs.run import Run

MOST_LABELS = 16
LONGEST_LABEL = 6


def memory_tables(run: Run, steps: Sequence[int]) -> str:
    """Return the memories' tables as canvases with their data; each keeps one colour scale over all steps.

    Scores are shown minus the median of their table. Large vocabularies show the most frequent tokens only.
    """
    tables = [memory_scores(run, weights) for _, weights in run.checkpoints(steps)]
    return "\n".join(
        _table(name, [table[table["memory"] == name] for table in tables], steps)
        for name in tables[0]["memory"].unique()
    )


def _table(memory: str, tables: Sequence[pd.DataFrame], steps: Sequence[int]) -> str:
    name = label(memory)
    last = tables[-1]
    n = last["row"].nunique()
    m = last["column"].nunique()
    centred = np.stack([table["centred"].to_numpy(dtype=float).reshape(n, m) for table in tables])
    if not np.isfinite(centred).all():
        raise BirthlensError(f"the {name} contains scores that are not finite; the run has diverged.")
    bound = float(np.abs(centred).max()) or 1.0
    rows = [str(text) for text in last.loc[last["column"] == 0, "input"]]
    columns = [str(text) for text in last.loc[last["row"] == 0, "output"]]
    down, across = MEMORY_SIDES[memory]
    data = {
        "steps": list(steps),
        "bound": round(bound, 4),
        "rows": rows,
        "columns": columns,
        "rowsName": down,
        "columnsName": across,
        "values": base64.b64encode((np.rint(centred / bound * 127) + 127).astype(np.uint8).tobytes()).decode("ascii"),
    }
    right = last["right"].to_numpy().reshape(n, m)
    asked = right.any(axis=1)
    hits = float(right[np.arange(n), centred[-1].argmax(1)][asked].mean())
    alt = (
        f"Table of scores, {n} rows ({down}) by {m} columns ({across}). At step {steps[-1]} the "
        f"right entry, {'on' if asked.all() else 'one below'} the diagonal, is the largest in {hits:.0%} of the rows."
    )
    return f"""<figure class="table">
<figcaption>{escape(name)} <small>at step <span class="at">{steps[-1]}</span></small></figcaption>
<div class="map">{_ticks(rows, "rows", "top")}
<canvas width="{m}" height="{n}" tabindex="0" role="img" aria-label="{escape(alt)}"></canvas>
{_ticks(columns, "columns", "left")}</div>
<p class="scale">{-bound:.3g} <span class="ramp"></span> {bound:.3g}</p>
<p class="note" role="status">{escape(down)} down, {escape(across)} across</p>
<script type="application/json">{script_json(data)}</script>
</figure>"""


def _ticks(labels: Sequence[str], kind: str, side: str) -> str:
    """Label a side of a map, with positions in percent: as many labels as fit side by side, long ones shortened."""
    cut = [shortened(text, LONGEST_LABEL) for text in labels]
    longest = max(map(len, cut))
    upright = kind == "columns" and longest > 2
    every = -(-len(labels) // (MOST_LABELS // 2 if kind == "columns" and longest == 2 else MOST_LABELS))
    spans = "".join(
        f'<span style="{side}:{100 * (i + 0.5) / len(labels):.2f}%">{escape(cut[i])}</span>'
        for i in range(0, len(labels), every)
    )
    room = f"height:{longest if upright else 1.2}em" if kind == "columns" else f"width:{longest}ch"
    return f'<div class="ticks {kind}{" upright" if upright else ""}" style="{room}" aria-hidden="true">{spans}</div>'
