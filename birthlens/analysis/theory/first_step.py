"""The first gradient step on the output memory, predicted from data counts alone (paper section 7).

At W_K = 0 attention is uniform, so layer 1 reads the prefix frequencies f_t(j) of tokens. Between w_E(j) W_V and u_k, and up
to interference of the codebooks, the step -grad W_O stores

    A(j, k) = E[ f_t(j) ( 1{y = k} - p_hat_t(k) ) ]     over the positions t of the loss, y the target

where p_hat is 1/N (`uniform`), p(y = k) (`frequency`; then A(j, k) = p(k) ( E[f_t(j) | y = k] - E[f_t(j)] )), or the model's
prediction at that position (`model`). The measured table is w_E(j) W_V (-grad) u_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch

from birthlens.analysis.theory.gradients import MATRICES, simplified_gradients, simplified_pass
from birthlens.config.model import ModelConfig
from birthlens.errors import BirthlensError
from birthlens.model.forward import tensors_of
from birthlens.model.initialisation import initial_weights
from birthlens.model.weights import Weights
from birthlens.shapes import Bool, Float
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.predictors.prefix import token_counts

Array = np.ndarray
Prediction = Literal["uniform", "frequency", "model"]
PREDICTIONS: tuple[Prediction, ...] = ("uniform", "frequency", "model")
ENTRIES = ("all", "diagonal", "off_diagonal")
_CHUNK = 64


def prefix_frequencies(batch: TokenBatch, d_vocab: int) -> Float[Array, "batch pos d_vocab"]:
    """Return f_t(j), the share of token j among z_1..z_t."""
    counts = token_counts(batch.tokens.numpy(), d_vocab)
    return counts / np.arange(1, counts.shape[1] + 1)[:, None]


def counts_table(
    batch: TokenBatch,
    mask: Bool[Array, "batch pos"],
    d_vocab: int,
    predicted: Float[Array, "batch pos d_vocab"] | None = None,
    prediction: Prediction = "uniform",
) -> Float[Array, "input output"]:
    """Return A(j, k) over the positions of `mask`; `predicted` is the model's p_hat, needed only for `model`."""
    frequencies = prefix_frequencies(batch, d_vocab)[mask]
    observed = np.eye(d_vocab)[batch.targets.numpy()[mask]]
    if prediction == "model":
        if predicted is None:
            raise BirthlensError("prediction = 'model': it needs the model's probabilities as `predicted`.")
        expected: Array = predicted[mask]
    else:
        level = observed.mean(0) if prediction == "frequency" else np.full(d_vocab, 1 / d_vocab)
        expected = np.broadcast_to(level, observed.shape)
    return np.asarray(frequencies.T @ (observed - expected) / len(observed))


def measured_table(weights: Weights, gradient: Float[Array, "d_head d_model"]) -> Float[Array, "input output"]:
    """Read -gradient of layer 1's W_O between the token embeddings (through W_V) and the unembedding."""
    return np.asarray(weights["W_E"] @ weights["L1.W_V"][0] @ -gradient @ weights["W_U"])


def zeroed(weights: Weights) -> Weights:
    """Return the weights with the three memories set to zero."""
    return weights.replaced({name: np.zeros_like(weights[name]) for name in MATRICES})


def first_step_table(
    task: BigramTask,
    model: ModelConfig,
    widths: Sequence[int],
    sequences: int = 512,
    seeds: Sequence[int] = (0,),
    starts: Sequence[Literal["zero", "init"]] = ("zero", "init"),
) -> pd.DataFrame:
    """Correlate the table predicted from counts with the one measured on the model, for increasing d_model.

    `zero` sets the memories to zero before the step. `init` keeps the initial weights, with which attention is not uniform
    and W_O is not zero. Columns: d_model, seed, start, prediction, entries (all, diagonal, off_diagonal), correlation, n
    (entries compared).
    """
    d_vocab = len(task.statistics)
    rows = []
    for seed in seeds:
        batch = task.batch(sequences, seed)
        for width in widths:
            initial = initial_weights(
                model.changed(d_model=width), d_vocab, task.config.context, np.random.default_rng(seed)
            )
            for start in starts:
                weights = zeroed(initial) if start == "zero" else initial
                measured, predicted = _measure(weights, batch)
                for prediction in PREDICTIONS:
                    expected = counts_table(batch, batch.in_context.numpy(), d_vocab, predicted, prediction)
                    for entries, chosen in _entries(d_vocab).items():
                        correlation = float(np.corrcoef(measured[chosen], expected[chosen])[0, 1])
                        rows.append((width, seed, start, prediction, entries, correlation, int(chosen.sum())))
    return pd.DataFrame(rows, columns=["d_model", "seed", "start", "prediction", "entries", "correlation", "n"])


def _measure(
    weights: Weights, batch: TokenBatch
) -> tuple[Float[Array, "input output"], Float[Array, "batch pos d_vocab"]]:
    tensors = tensors_of(weights)
    total = int(batch.in_context.sum())
    gradient: Array = np.zeros(weights["L1.W_O"].shape[1:])
    predicted = []
    for part in batch.chunks(_CHUNK):
        mask = part.in_context
        if mask.any():
            found = simplified_gradients(tensors, weights.score_scale, part.tokens, part.targets, mask, ["L1.W_O"])
            gradient += found["L1.W_O"][0].double().numpy() * (int(mask.sum()) / total)
        predicted.append(simplified_pass(tensors, weights.score_scale, part.tokens).logits.softmax(-1))
    return measured_table(weights, gradient), torch.cat(predicted).double().numpy()


def _entries(d_vocab: int) -> dict[str, Bool[Array, "input output"]]:
    diagonal = np.eye(d_vocab, dtype=bool)
    return dict(zip(ENTRIES, (np.ones_like(diagonal), diagonal, ~diagonal), strict=True))
