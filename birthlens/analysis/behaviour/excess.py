"""A model compared with the reference predictors: excess loss by role, occurrence and position, KL over training, floors.

Means weight all positions equally. The standard error of a mean treats whole sequences as independent draws (ratio
estimator), because positions of one sequence share triggers and outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from birthlens.errors import BirthlensError
from birthlens.shapes import Bool, Float
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.predictors.reference import (
    cross_entropy,
    entropies,
    predict,
    smoothed,
)
from birthlens.tasks.predictors.scores import SMOOTHING
from birthlens.tasks.roles import losses, role_masks
from birthlens.tasks.task import Task

Array = np.ndarray


def clustered_mean(values: Float[Array, "batch pos"], mask: Bool[Array, "batch pos"]) -> tuple[float, float]:
    """Return the mean of values[mask] and its standard error over sequences (NaN if no or only one sequence counts).

    Example:
        >>> clustered_mean(np.ones((4, 3)), np.ones((4, 3), dtype=bool))
        (1.0, 0.0)
    """
    counts = mask.sum(1)
    n = counts.sum()
    rows = int((counts > 0).sum())
    if n == 0:
        return float("nan"), float("nan")
    mean = float(values[mask].mean())
    residuals = np.where(mask, values - mean, 0.0).sum(1)
    error = float(np.sqrt((residuals**2).sum() * rows / max(rows - 1, 1)) / n) if rows > 1 else float("nan")
    return mean, error


def floors_table(task: Task, batch: TokenBatch) -> pd.DataFrame:
    """Estimate the lowest reachable loss by role: columns role, floor, error, n, estimator.

    If the prefix determines the role, the floor is the mean entropy of the Bayes prediction (`entropy`, which has less
    variance). Otherwise it is the mean loss of the Bayes prediction (`loss`). Both are marked "(approximate)" if
    `Task.approximation` says that the prediction is approximate. `error` is one standard error over the batch.
    """
    if task.exact is None:
        raise BirthlensError("this task has no exact law of the next token, so there is no floor to state.")
    probabilities = predict(task.exact, task, batch)
    entropy = entropies(probabilities)
    loss = cross_entropy(probabilities, batch.targets.numpy())
    rows = []
    for role, mask in role_masks(batch).items():
        told = task.roles_are_known or role == "all"
        estimator = "entropy" if told and role != "in_context_unabsorbed" else "loss"
        mean, error = clustered_mean(entropy if estimator == "entropy" else loss, mask.numpy())
        named = f"{estimator} (approximate)" if task.approximation else estimator
        rows.append((role, mean, error, int(mask.sum()), named))
    return pd.DataFrame(rows, columns=["role", "floor", "error", "n", "estimator"])


def excess_loss_table(
    logits: Float[Tensor, "batch pos d_vocab"],
    task: Task,
    batch: TokenBatch,
    predictors: Sequence[str] | None = None,
    smoothing: float = SMOOTHING,
    position_bins: int = 8,
    occurrences: int = 8,
) -> pd.DataFrame:
    """Compare a model's loss with each predictor's, by role, by occurrence number and by position.

    Columns: predictor, by (role, occurrence, position), group (the role; the occurrence, where the last one includes all
    later ones; or the bin's first position), model_loss, predictor_loss, excess (their difference), error (its standard
    error over sequences), n.
    """
    mine = losses(logits.double(), batch.targets).numpy()
    rows = []
    for name in task.predictors if predictors is None else predictors:
        theirs = _reference_loss(name, task, batch, smoothing)
        for by, group, mask in _groups(batch, position_bins, occurrences):
            if mask.any():
                excess, error = clustered_mean(mine - theirs, mask)
                rows.append(
                    (
                        task.shown_as(name),
                        by,
                        group,
                        mine[mask].mean(),
                        theirs[mask].mean(),
                        excess,
                        error,
                        int(mask.sum()),
                    )
                )
    columns = ["predictor", "by", "group", "model_loss", "predictor_loss", "excess", "error", "n"]
    return pd.DataFrame(rows, columns=columns)


def divergence_table(
    checkpoints: Iterable[tuple[int, Float[Tensor, "batch pos d_vocab"]]],
    task: Task,
    batch: TokenBatch,
    predictors: Sequence[str] | None = None,
    roles: Sequence[str] | None = None,
    positions: int = 4096,
    seed: int = 0,
) -> pd.DataFrame:
    """Compute KL(predictor || model) over training, which shows which predictor the model matches at each step.

    `checkpoints` yields (step, logits on `batch`). At most `positions` positions, drawn with `seed`, are compared. Columns:
    step, role, predictor, divergence (nats, mean over positions), error (over positions), nearest (the smallest for its step
    and role), n.
    """
    mask = _some_positions(batch, positions, seed)
    names = task.predictors if predictors is None else predictors
    references = {name: predict(name, task, batch)[mask] for name in names}
    own = {name: -entropies(p) for name, p in references.items()}
    chosen = torch.from_numpy(mask)
    members = {
        role: member[chosen].numpy() for role, member in role_masks(batch).items() if roles is None or role in roles
    }
    rows = []
    for step, logits in checkpoints:
        log_model = logits[chosen].double().log_softmax(-1).numpy()
        for name, reference in references.items():
            divergence = own[name] - np.einsum("nv,nv->n", reference, log_model)
            for role, member in members.items():
                n = int(member.sum())
                if n:
                    spread = divergence[member].std(ddof=1) / np.sqrt(n) if n > 1 else float("nan")
                    rows.append((step, role, task.shown_as(name), divergence[member].mean(), spread, n))
    table = pd.DataFrame(rows, columns=["step", "role", "predictor", "divergence", "error", "n"])
    smallest = table.groupby(["step", "role"])["divergence"].transform("min")
    table.insert(5, "nearest", table["divergence"] == smallest)
    return table


def _reference_loss(name: str, task: Task, batch: TokenBatch, smoothing: float) -> Float[Array, "batch pos"]:
    probabilities = predict(name, task, batch)
    share = 0.0 if name == task.exact else smoothing
    return cross_entropy(smoothed(probabilities, share), batch.targets.numpy())


def _groups(
    batch: TokenBatch, position_bins: int, occurrences: int
) -> Iterator[tuple[str, str | int, Bool[Array, "batch pos"]]]:
    for role, mask in role_masks(batch).items():
        yield "role", role, mask.numpy()
    seen = batch.occurrence.numpy()
    for number in range(occurrences + 1):
        yield "occurrence", number, seen >= number if number == occurrences else seen == number
    length = seen.shape[1]
    edges = np.unique(np.linspace(0, length, position_bins + 1).astype(int))
    at = np.broadcast_to(np.arange(length), seen.shape)
    for first, last in pairwise(edges):
        yield "position", int(first), (at >= first) & (at < last)


def _some_positions(batch: TokenBatch, positions: int, seed: int) -> Bool[Array, "batch pos"]:
    if positions < 1:
        raise BirthlensError(f"positions = {positions}: compare at least one position.")
    total = batch.tokens.numel()
    mask = np.zeros(total, dtype=bool)
    mask[np.random.default_rng(seed).permutation(total)[:positions]] = True
    return mask.reshape(batch.tokens.shape)
