"""The checkpoint from which a head has a score: onsets of previous-token, induction and other scores over a series.

The excess of a score is its value minus its chance level. A score begins at the first step from which its excess stays at or
above half of the largest excess of the series, until the end. A score whose excess never reaches `LEAST` never begins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from birthlens.analysis.memories.birth_order import onset
from birthlens.errors import BirthlensError

if TYPE_CHECKING:
    import pandas as pd

LEAST = 0.1
"""The smallest largest excess (mean attention above chance) for which a score counts."""


def head_onsets_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Find the onset of every score of every head, earliest first, from a table of `head_scores.scores_table`.

    Columns: head, score, onset (inf: never), before (the checkpoint before it, after which it began; NaN at the first),
    peak (largest excess), peak_step, last (excess at the last step), n (checkpoints).

    Raises:
        BirthlensError: if the table has fewer than two steps.
    """
    import pandas as pd

    steps = sorted(set(scores["step"]))
    if len(steps) < 2:
        raise BirthlensError("order: an onset needs at least two checkpoints.")
    rows = []
    for (head, score), part in scores.groupby(["head", "score"], sort=False):
        ordered = part.sort_values("step")
        excess = (ordered["value"] - ordered["chance"]).to_numpy()
        peak = float(np.nan_to_num(excess, nan=-np.inf).max())
        begun = onset(steps, excess >= peak / 2) if peak >= LEAST else float("nan")
        place = steps.index(int(begun)) if begun == begun else 0
        before = float(steps[place - 1]) if place else float("nan")
        peak_step = steps[int(np.nan_to_num(excess, nan=-np.inf).argmax())]
        rows.append((head, score, begun if begun == begun else np.inf, before, peak, peak_step, excess[-1], len(steps)))
    columns = ["head", "score", "onset", "before", "peak", "peak_step", "last", "n"]
    return pd.DataFrame(rows, columns=columns).sort_values("onset", kind="stable", ignore_index=True)
