"""The training step of the simplified model in plain torch: forward and backward by hand, no autograd, no compilation.

The equations are those of `folding`. Sequences are taken in small chunks, so that the data of a chunk stays in the cache
and memory does not grow with the batch. The sequences of a chunk have similar numbers of targets, so that padding is small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from birthlens.shapes import Bool, Float, Int
from birthlens.training.simplified.folding import Batch, FoldedStep, Needs, StepOutcome, Sums, Tables

_SEQUENCES = 8
_LAYER_0_QUERIES = 128
_LAYER_1_QUERIES = 64
"""Largest number of queries per matrix product; keys after a block of queries are left out."""


class SimplifiedStep(FoldedStep):
    """The folded step in torch; see `FoldedStep` for the interface.

    Example:
        >>> from birthlens.config.model import ModelConfig
        >>> from birthlens.model.initialisation import initial_weights
        >>> weights = initial_weights(ModelConfig(d_model=8), d_vocab=5, n_ctx=4, generator=np.random.default_rng(0))
        >>> step = SimplifiedStep(weights, weights.score_scale, trained=["L1.W_O"])
        >>> tokens = np.array([[0, 1, 0, 1], [2, 3, 2, 3]])
        >>> result = step.loss_and_gradients(tokens, np.roll(tokens, -1, axis=1), mask=tokens == 1)
        >>> result.outcome.losses.shape, result.gradients["L1.W_O"].shape
        ((2,), (1, 8, 8))
    """

    @torch.inference_mode()
    def _run(self, batch: Batch, tables: Tables, needs: Needs, *, logits: bool) -> tuple[StepOutcome, Sums]:
        n = len(batch.targets)
        outcome = StepOutcome(
            losses=np.empty(n, np.float32),
            predictions=np.empty(n, np.int64),
            logits=np.empty((n if logits else 0, self.d_vocab), np.float32),
        )
        sums = Sums(*(np.zeros_like(getattr(tables, name)) for name in Sums._fields))
        folded = _Folded(*map(torch.from_numpy, tables))
        gradients = _Gradients(*map(torch.from_numpy, sums))
        counts = np.diff(batch.starts)
        order = np.argsort(counts, kind="stable")[np.count_nonzero(counts == 0) :]
        for first in range(0, len(order), _SEQUENCES):
            chosen = order[first : first + _SEQUENCES]
            entries = batch.starts[chosen, None] + np.arange(counts[chosen].max())
            valid = entries < batch.starts[chosen + 1, None]
            entries = np.where(valid, entries, batch.starts[chosen, None])
            parts = (batch.tokens[chosen], batch.positions[entries], batch.targets[entries], valid)
            found = _run_chunk(_Chunk(*map(torch.from_numpy, parts)), folded, needs, gradients, 1 / n)
            for whole, part in zip(outcome, found, strict=True):
                if len(whole):
                    whole[entries[valid]] = part.numpy()[valid]
        return outcome, sums


class _Chunk(NamedTuple):
    """Some sequences, with their targets padded to the same number; `valid` is False if a target is padding."""

    tokens: Int[Tensor, "batch pos"]
    positions: Int[Tensor, "batch target"]
    targets: Int[Tensor, "batch target"]
    valid: Bool[Tensor, "batch target"]

    def slice(self, start: int, stop: int) -> _Chunk:
        """Select some of the targets of every sequence."""
        return _Chunk(self.tokens, *(part[:, start:stop] for part in self[1:]))


class _Folded(NamedTuple):
    """`folding.Tables` as tensors."""

    codebook: Float[Tensor, "entry d_model"]
    values: Float[Tensor, "entry d_model"]
    scores: Float[Tensor, "entry entry"]
    bilinear: Float[Tensor, "d_model d_model"]
    direct: Float[Tensor, "d_model d_vocab"]
    attended: Float[Tensor, "d_model d_vocab"]


class _Gradients(NamedTuple):
    """`folding.Sums` as tensors that share its memory."""

    scores: Float[Tensor, "entry entry"]
    bilinear: Float[Tensor, "d_model d_model"]
    direct: Float[Tensor, "d_model d_vocab"]
    attended: Float[Tensor, "d_model d_vocab"]


def _run_chunk(chunk: _Chunk, folded: _Folded, needs: Needs, gradients: _Gradients, weight: float) -> list[Tensor]:
    """Return losses, predictions and logits [batch target ...], and add to the gradients of `weight` times the loss."""
    length = int(chunk.positions.max()) + 1
    tokens = chunk.tokens[:, :length]
    n_pos = len(folded.codebook) - folded.direct.shape[1]
    one_hot = functional.one_hot(tokens, folded.direct.shape[1]).float()

    def look_up(table: Float[Tensor, "entry column"]) -> Float[Tensor, "batch pos column"]:
        return table[n_pos:].index_select(0, tokens.flatten()).view(*tokens.shape, -1).add_(table[:length])

    value = look_up(folded.values)
    rows = look_up(folded.scores)
    resid = look_up(folded.codebook)
    patterns = []
    for start, stop in _blocks(length, _LAYER_0_QUERIES):
        scores = torch.baddbmm(rows[:, start:stop, :stop], rows[:, start:stop, n_pos:], one_hot[:, :stop].mT)
        patterns.append(_attention(scores, torch.arange(start, stop)))
        resid[:, start:stop] += patterns[-1] @ value[:, :stop]

    d_resid = torch.zeros_like(resid)
    found = [
        _run_layer_1(chunk.slice(start, stop), resid, folded, needs, gradients, weight, d_resid)
        for start, stop in _blocks(chunk.targets.shape[1], _LAYER_1_QUERIES)
    ]
    if needs.scores:
        for pattern, (start, stop) in zip(patterns, _blocks(length, _LAYER_0_QUERIES), strict=True):
            d_scores = _through_softmax(pattern, d_resid[:, start:stop] @ value[:, :stop].mT)
            by_token = d_scores @ one_hot[:, :stop]
            queries = one_hot[:, start:stop].flatten(0, 1).T
            gradients.scores[start:stop, :stop] += d_scores.sum(0)
            gradients.scores[start:stop, n_pos:] += by_token.sum(0)
            gradients.scores[n_pos:, :stop] += queries @ d_scores.flatten(0, 1)
            gradients.scores[n_pos:, n_pos:] += queries @ by_token.flatten(0, 1)
    return [torch.cat(parts, dim=1) for parts in zip(*found, strict=True)]


def _run_layer_1(
    chunk: _Chunk,
    resid: Float[Tensor, "batch pos d_model"],
    folded: _Folded,
    needs: Needs,
    gradients: _Gradients,
    weight: float,
    d_resid: Float[Tensor, "batch pos d_model"],
) -> tuple[Float[Tensor, "batch target"], Int[Tensor, "batch target"], Float[Tensor, "batch target d_vocab"]]:
    """Run some targets of a chunk from x1 to the loss and, if gradients are needed, back to x1."""
    reach = int(chunk.positions.max()) + 1
    past = resid[:, :reach]
    d_past = d_resid[:, :reach]
    at = chunk.positions[..., None].expand(-1, -1, resid.shape[2])
    query = resid.gather(1, at)
    keyed = query @ folded.bilinear
    pattern = _attention(keyed @ past.mT, chunk.positions)
    context = pattern @ past
    logits = query @ folded.direct + context @ folded.attended
    log_probs = logits.log_softmax(-1)
    target = chunk.targets[..., None]
    found = -log_probs.gather(-1, target)[..., 0], logits.argmax(-1), logits
    if not any(needs):
        return found

    d_logits = log_probs.exp_().scatter_add_(-1, target, torch.full_like(target, -1.0, dtype=torch.float32))
    d_logits *= (weight * chunk.valid)[..., None]
    if needs.attended:
        _add_product(gradients.attended, context, d_logits)
    if needs.direct:
        _add_product(gradients.direct, query, d_logits)
    if not (needs.bilinear or needs.scores):
        return found
    d_context = d_logits @ folded.attended.T
    d_scores = _through_softmax(pattern, d_context @ past.mT)
    d_keyed = d_scores @ past
    if needs.bilinear:
        _add_product(gradients.bilinear, query, d_keyed)
    if needs.scores:
        d_past.add_(pattern.mT @ d_context).add_(d_scores.mT @ keyed)
        d_resid.scatter_add_(1, at, d_keyed @ folded.bilinear.T + d_logits @ folded.direct.T)
    return found


def _blocks(length: int, size: int) -> Iterator[tuple[int, int]]:
    """Divide the range from 0 to `length` into equal intervals of at most `size`."""
    n = math.ceil(length / size)
    return ((length * i // n, length * (i + 1) // n) for i in range(n))


def _attention(
    scores: Float[Tensor, "batch query_pos key_pos"], positions: Int[Tensor, "... query_pos"]
) -> Float[Tensor, "batch query_pos key_pos"]:
    """Return attention to the keys that are not later than each query."""
    later = torch.arange(scores.shape[-1]) > positions[..., None]
    return scores.masked_fill_(later, -math.inf).softmax(-1)


def _through_softmax(
    pattern: Float[Tensor, "batch query_pos key_pos"], d_pattern: Float[Tensor, "batch query_pos key_pos"]
) -> Float[Tensor, "batch query_pos key_pos"]:
    """Turn the gradient of attention into that of its scores, in place."""
    d_pattern *= pattern
    return d_pattern.sub_(pattern * d_pattern.sum(-1, keepdim=True))


def _add_product(total: Float[Tensor, "left right"], left: Tensor, right: Tensor) -> None:
    """Add the sum of the outer products left x right over sequences and targets."""
    total.addmm_(left.flatten(0, 1).T, right.flatten(0, 1))
