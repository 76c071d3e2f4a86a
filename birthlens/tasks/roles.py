"""The behaviour of a model by role of the token: loss and accuracy (paper section 5, behavioural probes).

Roles are masks over the positions of a TokenBatch:

    in_context             occurrence >= 2: predictable from the context and from nothing else
    in_context_unabsorbed  the same without absorbed positions, which can be copied for free
    first_occurrence       occurrence 1: unpredictable
    trigger                occurrence >= 1
    global                 no trigger: the global bigrams
    all                    every position
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from birthlens.shapes import Bool, Float, Int
from birthlens.tasks.batch import TokenBatch

if TYPE_CHECKING:
    import pandas as pd

TOKEN_ROLES = ("in_context", "in_context_unabsorbed", "first_occurrence", "trigger", "global", "all")


def role_masks(batch: TokenBatch) -> dict[str, Bool[Tensor, "batch pos"]]:
    """Return the mask of each role."""
    seen = batch.occurrence
    return {
        "in_context": batch.in_context,
        "in_context_unabsorbed": batch.in_context & ~batch.absorbed,
        "first_occurrence": seen == 1,
        "trigger": seen >= 1,
        "global": batch.is_global,
        "all": torch.ones_like(batch.absorbed),
        **batch.marks,
    }


def losses(logits: Float[Tensor, "batch pos d_vocab"], targets: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
    """Return the cross-entropy at each position, in nats."""
    return functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def correct(logits: Float[Tensor, "*axes d_vocab"], targets: Int[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Return 1 where the target has the largest logit, 0 if another token has, and NaN if a logit is NaN."""
    # argmax treats NaN as the largest number, so if a row contains NaN, argmax points to it.
    found = logits.argmax(-1)
    best = logits.gather(-1, found[..., None])[..., 0]
    return torch.where(best.isnan(), best, (found == targets).to(logits.dtype))


def summary(
    loss: Float[Tensor, "batch pos"], prediction: Int[Tensor, "batch pos"], batch: TokenBatch
) -> dict[tuple[str, str], tuple[float, int]]:
    """Average loss and accuracy over each role: (role, 'loss' or 'accuracy') -> (mean, number of positions).

    Roles without positions are left out. If the loss is NaN, so is the accuracy, because the prediction was then made from
    logits that are NaN.
    """
    loss = loss.cpu()
    batch = batch.to("cpu")
    right = torch.where(loss.isnan(), torch.nan, (prediction.cpu() == batch.targets).double())
    out: dict[tuple[str, str], tuple[float, int]] = {}
    for role, mask in role_masks(batch).items():
        n = int(mask.sum())
        if n:
            out[role, "loss"] = (float(loss[mask].double().mean()), n)
            out[role, "accuracy"] = (float(right[mask].mean()), n)
    return out


def behaviour_table(logits: Float[Tensor, "batch pos d_vocab"], batch: TokenBatch) -> pd.DataFrame:
    """Tabulate loss and accuracy by role: columns role, metric, value, n."""
    import pandas as pd

    found = summary(losses(logits, batch.targets), logits.argmax(-1), batch)
    rows = [(role, metric, value, n) for (role, metric), (value, n) in found.items()]
    return pd.DataFrame(rows, columns=["role", "metric", "value", "n"])
