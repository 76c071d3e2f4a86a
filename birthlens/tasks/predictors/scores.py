"""The scores of the reference predictors by role: the lines in plots of loss and accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.predictors.reference import cross_entropy, predict, smoothed
from birthlens.tasks.roles import role_masks
from birthlens.tasks.task import Task

if TYPE_CHECKING:
    import pandas as pd

SMOOTHING = 0.01
"""Share of the uniform distribution mixed into every inexact predictor for its loss, because they exclude tokens."""


def reference_table(
    task: Task, batch: TokenBatch, predictors: Sequence[str] | None = None, smoothing: float = SMOOTHING
) -> pd.DataFrame:
    """Score reference predictors on a batch: columns predictor, role, metric ("loss", "accuracy"), value, n.

    Accuracy is the expected one of the most probable token, with ties broken at random. Roles without positions are left
    out. The exact predictor is called "bayes (approximate)" if its distribution is an approximation
    (`Task.approximation`).

    Raises:
        BirthlensError: for an unknown predictor, or a smoothing outside 0 to 1.
    """
    import numpy as np
    import pandas as pd

    targets = batch.targets.numpy()
    rows = []
    masks = {role: mask.numpy() for role, mask in role_masks(batch).items() if mask.any()}
    for name in task.predictors if predictors is None else predictors:
        probabilities = predict(name, task, batch)
        tied = np.isclose(probabilities, probabilities.max(-1, keepdims=True), rtol=1e-9, atol=0)
        right = np.take_along_axis(tied, targets[..., None], -1)[..., 0] / tied.sum(-1)
        loss = cross_entropy(probabilities if name == task.exact else smoothed(probabilities, smoothing), targets)
        for role, mask in masks.items():
            rows.append((task.shown_as(name), role, "loss", float(loss[mask].mean()), int(mask.sum())))
            rows.append((task.shown_as(name), role, "accuracy", float(right[mask].mean()), int(mask.sum())))
    return pd.DataFrame(rows, columns=["predictor", "role", "metric", "value", "n"])
