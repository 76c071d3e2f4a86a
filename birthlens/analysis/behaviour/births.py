"""When the events of a run happen: the birth of each memory, and that of the in-context accuracy.

A memory is born at the step from which its right entries stay above the null band (`memories.birth_order`), the accuracy at
the step from which it stays at one half or above. An event that has not happened by the last step has the step NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from birthlens.analysis.memories.birth_order import onset, onset_table, standardised_table
from birthlens.analysis.memories.names import is_paper_model
from birthlens.analysis.memories.order_tables import MATCHED
from birthlens.runs.run import Run
from birthlens.shapes import Float, Int

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray
BORN = 0.5
"""In-context accuracy counts as born at the step from which it stays at this share or above."""


def memory_births(run: Run, steps: Sequence[int] | None = None, width: float = 4.0) -> dict[str, float]:
    """Return the step of birth of each memory, read at some of the kept steps; empty for any model but the paper's."""
    if not is_paper_model(run.config.model):
        return {}
    scores = standardised_table(run.checkpoints(run.steps if steps is None else steps), run.triggers)
    births = onset_table(one_reading_each(scores), width)
    return {str(row["memory"]): float(row["onset"]) for _, row in births.iterrows()}


def accuracy_birth(metrics: pd.DataFrame, steps: Sequence[int] | None = None) -> float:
    """Return the first measured step from which the held-out in-context accuracy stays at `BORN` or above.

    `metrics` are those of a run (`Run.metrics`), read at some of their steps (default: all).
    """
    measured, values = held_out(metrics, "in_context_accuracy")
    chosen = np.isin(measured, measured if steps is None else steps)
    return onset(measured[chosen].tolist(), values[chosen] >= BORN) if chosen.any() else float("nan")


def held_out(metrics: pd.DataFrame, metric: str) -> tuple[Int[Array, "step"], Float[Array, "step"]]:
    """Return the steps and the values of a held-out measurement, in the order of the steps."""
    rows = metrics[(metrics["split"] == "held_out") & (metrics["metric"] == metric)].sort_values("step", kind="stable")
    return rows["step"].to_numpy(dtype=np.int64), rows["value"].to_numpy(dtype=float)


def at_the_end(metrics: pd.DataFrame, metric: str) -> float:
    """Return the last value of a held-out measurement; NaN if it was never measured."""
    _, values = held_out(metrics, metric)
    return float(values[-1]) if len(values) else float("nan")


def one_reading_each(scores: pd.DataFrame) -> pd.DataFrame:
    """Keep one candidate set for each memory of a `standardised_table`, the same as in the order of birth."""
    import pandas as pd

    kept = []
    for memory, rows in scores.groupby("memory", sort=False):
        there = set(rows["candidates"])
        name = next((name for name in MATCHED.get(str(memory), ()) if name in there), None)
        if name is not None:
            kept.append(rows[rows["candidates"] == name])
    return pd.concat(kept, ignore_index=True)
