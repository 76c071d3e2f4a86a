"""Which layer stores the noise and which one recalls: clean accuracy of a model trained with noise, with parts removed.

A model is trained on the noisy task and tested on sequences without noise. Variants of its weights:

    whole           unchanged
    without:N       the N largest singular directions of the last feed-forward W_F are removed
    keep:N          only these are kept (keep:0 is a model without feed-forward)
    no_attention    the last attention layer writes nothing

If the feed-forward has two matrices, the first is truncated (LASER as published: Chen, Bruna, Bietti 2024).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from birthlens.analysis.memories.projections import largest_components
from birthlens.errors import BirthlensError
from birthlens.model import forward
from birthlens.model.weights import Weights
from birthlens.shapes import Float
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.noise import NoiseTask
from birthlens.tasks.roles import correct
from birthlens.tasks.task import Task

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray
VARIANTS = ("whole", "keep:0", "without:1", "no_attention")
COLUMNS = ["step", "variant", "metric", "value", "n"]
METRICS_OF_RECALL = ("accuracy", "noise_probability", "output_probability")


def clean_recall_table(
    checkpoints: Iterable[tuple[int, Weights]],
    task: Task,
    variants: Sequence[str] = VARIANTS,
    sequences: int = 128,
    seed: int = 0,
) -> pd.DataFrame:
    """Test variants of each checkpoint on clean sequences, at positions where the output of a trigger was seen before.

    Columns: step, variant, metric (accuracy; noise_probability and output_probability: the mean probability of the noise
    token and of the right output), value, n.

    Raises:
        BirthlensError: for any task other than the noisy one, or a variant that the model does not have.
    """
    import pandas as pd

    if not isinstance(task, NoiseTask):
        raise BirthlensError(f"task.kind = {task.config.kind!r}: clean recall is defined for the noise task only.")
    batch = task.clean().batch(sequences, seed)
    rows = []
    for step, weights in checkpoints:
        for variant in variants:
            for metric, value in recall(varied(weights, variant), batch, task.noise).items():
                rows.append((step, variant, metric, value, int(batch.in_context.sum())))
    return pd.DataFrame(rows, columns=COLUMNS)


@torch.no_grad()
def recall(weights: Weights, batch: TokenBatch, noise: int, chunk: int = 32) -> dict[str, float]:
    """Return accuracy, and the probabilities of noise and of the right output, at the in-context positions."""
    tensors = forward.tensors_of(weights)
    sums = np.zeros(3)
    for part in batch.chunks(chunk):
        mask = part.in_context
        targets = part.targets[mask]
        probabilities = forward.logits(tensors, weights.config, part.tokens)[mask].double().softmax(-1)
        right = correct(probabilities, targets)
        answered = probabilities.gather(1, targets[:, None])
        sums += [float(right.sum()), float(probabilities[:, noise].sum()), float(answered.sum())]
    return dict(zip(METRICS_OF_RECALL, (sums / max(int(batch.in_context.sum()), 1)).tolist(), strict=True))


def varied(weights: Weights, variant: str) -> Weights:
    """Return the weights of a variant.

    Raises:
        BirthlensError: for an unknown variant, or one that needs a feed-forward that the model does not have.
    """
    last = weights.n_layers - 1
    if variant == "whole":
        return weights
    if variant == "no_attention":
        return weights.replaced({f"L{last}.W_O": np.zeros_like(weights[f"L{last}.W_O"])})
    how, _, text = variant.partition(":")
    if how not in ("keep", "without") or not text.isdigit():
        raise BirthlensError(f"variant = {variant!r}: write whole, no_attention, keep:N or without:N.")
    name = next((each for each in (f"L{last}.W_F", f"L{last}.W_in") if each in weights), None)
    if name is None:
        raise BirthlensError(f"variant = {variant!r}: the last layer has no feed-forward to truncate.")
    return weights.replaced({name: truncated(weights[name], int(text), keep=how == "keep")})


def truncated(matrix: Float[Array, "rows columns"], directions: int, keep: bool) -> Float[Array, "rows columns"]:
    """Keep, or remove, the largest singular directions of a matrix."""
    whole = matrix.astype(np.float64)
    largest = largest_components(whole, directions)
    return np.asarray((largest if keep else whole - largest).astype(matrix.dtype))
