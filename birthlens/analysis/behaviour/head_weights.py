"""Scores of heads from weights alone, and how strongly heads compose, each with its chance level or reference.

With W_QK = W_Q W_K^T and W_OV = W_V W_O of a head, on a set of tokens (and all positions), the scores are the shares of

    previous_token    positions t >= 1 where argmax over s <= t of p_t W_QK p_s is t - 1
    duplicate_token   tokens k where argmax over k' of w_E(k) W_QK w_E(k') is k
    copying           tokens k where argmax over k' of w_E(k) W_OV w_U(k') is k
    induction         tokens k where argmax over k' of w_E(k) W_QK (w_E(k') W_OV of an earlier head) is k

and copying_eigenvalues, sum(lambda) / sum|lambda| of W_E W_OV W_U (1 if all are positive, 0 by chance).

Composition of an earlier head's W_OV with a later head's matrix X is |W_OV X| / (|W_OV| |X|) in Frobenius norms, where X is
W_QK for queries, its transpose for keys, and W_OV for values. Its reference rotates the residual stream between the two at
random: the spectra stay the same, the subspaces become random. LayerNorm's gains are left out here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from birthlens.analysis.interventions.ablation import Models, sizes_of
from birthlens.errors import BirthlensError
from birthlens.model.components import all_heads
from birthlens.model.initialisation import random_orthogonal
from birthlens.model.sites import Head
from birthlens.model.weights import Weights
from birthlens.shapes import Float, Int

if TYPE_CHECKING:
    import pandas as pd

    from birthlens.model.hooked import HookedModel

Array = np.ndarray
MOST_TOKENS = 2048
"""Number of tokens scored by default: all of them, or this many evenly spaced ones of a larger vocabulary."""


class HeadWeights:
    """The matrices of every head, from weights or from a live model."""

    def __init__(self, model: Weights | HookedModel) -> None:
        self._model = model
        self.heads = all_heads(sizes_of(model))

    def matrix(self, name: str, head: Head) -> Float[Array, "rows columns"]:
        """Return W_Q, W_K, W_V or W_O of a head; in grouped-query attention several heads share keys and values."""
        if isinstance(self._model, Weights):
            return self._model[f"L{head.layer}.{name}"][head.head]
        stack = getattr(self._model.blocks[head.layer].attn, name)
        return stack[head.head * len(stack) // self._model.cfg.n_heads].detach().cpu().numpy()

    @property
    def embedding(self) -> Float[Array, "d_vocab d_model"]:
        """W_E."""
        return self._model["W_E"] if isinstance(self._model, Weights) else self._model.W_E.detach().cpu().numpy()

    @property
    def unembedding(self) -> Float[Array, "d_model d_vocab"]:
        """W_U."""
        return self._model["W_U"] if isinstance(self._model, Weights) else self._model.W_U.detach().cpu().numpy()

    @property
    def positions(self) -> Float[Array, "n_ctx d_model"] | None:
        """W_pos, or None if positions are not added to the residual stream."""
        if isinstance(self._model, Weights):
            return self._model.get("W_pos")
        if self._model.cfg.positional_embedding_type != "standard":
            return None
        room = self._model.pos_embed
        found = getattr(room, "W_pos", None)
        return (room.weight if found is None else found).detach().cpu().numpy()


def weight_scores_table(models: Models, tokens: Sequence[int] | None = None) -> pd.DataFrame:
    """Score every head from its weights at each checkpoint.

    Columns: step, layer, head, through (the earlier head, for induction), score, value, chance, n (tokens or positions).
    """
    import pandas as pd

    rows = []
    for step, model in models:
        rows += [(step, head.layer, str(head), *row) for head, row in _scored(HeadWeights(model), tokens)]
    return pd.DataFrame(rows, columns=["step", "layer", "head", "through", "score", "value", "chance", "n"])


def composition_table(
    models: Models, generator: np.random.Generator, draws: int = 20, level: float = 0.95
) -> pd.DataFrame:
    """Measure how every head composes with every later one at each checkpoint.

    Columns: step, sender, receiver, via ('q', 'k' or 'v'), value, reference (mean over `draws` random rotations),
    reference_low, reference_high (their `level` interval).

    Raises:
        BirthlensError: for a model with one layer, in which no head comes before another.
    """
    import pandas as pd

    rows = []
    rotations: list[Array] = []
    for step, model in models:
        parts = HeadWeights(model)
        if len({head.layer for head in parts.heads}) < 2:
            raise BirthlensError("composition: it needs heads in two layers, and the model has one layer.")
        width = parts.embedding.shape[1]
        if not rotations or len(rotations[0]) != width:
            rotations = [random_orthogonal(width, generator).astype(np.float32) for _ in range(draws)]
        writers = {head: _written(parts, head) for head in parts.heads}
        readers = {(head, via): matrix for head in parts.heads for via, matrix in _read(parts, head).items()}
        for (receiver, via), reader in readers.items():
            turned = [rotation @ reader for rotation in rotations]
            for sender, writer in writers.items():
                if sender.layer >= receiver.layer:
                    continue
                scale = _norm(writer) * _norm(reader) or 1.0
                value = _norm(writer @ reader) / scale
                random = np.array([_norm(writer @ other) / scale for other in turned])
                low, high = np.quantile(random, [(1 - level) / 2, (1 + level) / 2])
                rows.append((step, str(sender), str(receiver), via, value, random.mean(), low, high))
    names = ["step", "sender", "receiver", "via", "value", "reference", "reference_low", "reference_high"]
    return pd.DataFrame(rows, columns=names)


def _scored(parts: HeadWeights, tokens: Sequence[int] | None) -> Iterator[tuple[Head, tuple[object, ...]]]:
    embedding = parts.embedding
    positions = parts.positions
    d_vocab = len(embedding)
    count = min(d_vocab, MOST_TOKENS)
    chosen = np.linspace(0, d_vocab - 1, count).astype(int) if tokens is None else np.asarray(tokens, dtype=int)
    states = embedding[chosen]
    readout = parts.unembedding[:, chosen]
    n = len(chosen)
    remapped = {head: states @ parts.matrix("W_V", head) @ parts.matrix("W_O", head) for head in parts.heads}
    for head in parts.heads:
        queries = parts.matrix("W_Q", head)
        keys = parts.matrix("W_K", head)
        asked = states @ queries @ keys.T
        if positions is not None and len(positions) > 1:
            scores = positions @ queries @ keys.T @ positions.T
            scores[np.triu_indices(len(scores), 1)] = -np.inf
            right = _won(scores[1:], np.arange(len(scores) - 1))
            chance = np.mean(1 / np.arange(2, len(scores) + 1))
            yield head, (None, "previous_token", float(right.mean()), float(chance), len(right))
        yield head, (None, "duplicate_token", _own(asked @ states.T), 1 / n, n)
        yield head, (None, "copying", _own(remapped[head] @ readout), 1 / n, n)
        inner = parts.matrix("W_O", head) @ readout @ (states @ parts.matrix("W_V", head))
        yield head, (None, "copying_eigenvalues", _positive_share(inner), 0.0, n)
        for earlier in parts.heads:
            if earlier.layer < head.layer:
                yield head, (str(earlier), "induction", _own(asked @ remapped[earlier].T), 1 / n, n)


def _own(scores: Float[Array, "query key"]) -> float:
    return float(_won(scores, np.arange(len(scores))).mean())


def _won(scores: Float[Array, "query key"], right: Int[Array, "query"]) -> Float[Array, "query"]:
    """Return 1 where the right key has the largest score, 0 if another has, and NaN if a score is NaN."""
    found = scores.argmax(1)  # the first NaN, if there is one
    best = scores[np.arange(len(scores)), found]
    return np.where(np.isnan(best), np.nan, found == right)


def _positive_share(matrix: Float[Array, "rank rank"]) -> float:
    """Return the sum of the eigenvalues over the sum of their sizes; 0 if there are none, NaN if an entry is not finite."""
    if not np.isfinite(matrix).all():
        return float("nan")
    eigenvalues = np.linalg.eigvals(matrix)
    size = np.abs(eigenvalues).sum()
    return float(eigenvalues.sum().real / size) if size else 0.0


def _norm(matrix: Array) -> float:
    return float(np.linalg.norm(matrix))


def _written(parts: HeadWeights, head: Head) -> Float[Array, "rank d_model"]:
    """Return a matrix whose products with anything on its right have W_OV's norms: W_V's triangular factor times W_O."""
    return _triangle(parts.matrix("W_V", head)) @ parts.matrix("W_O", head)


def _read(parts: HeadWeights, head: Head) -> dict[str, Float[Array, "d_model rank"]]:
    """Return, for queries, keys and values, a matrix whose products with anything on its left have X's norms."""
    q, k, v, o = (parts.matrix(name, head) for name in ("W_Q", "W_K", "W_V", "W_O"))
    return {
        "q": q @ _triangle(k).T,
        "k": k @ _triangle(q).T,
        "v": v @ _triangle(o.T).T,
    }


def _triangle(matrix: Array) -> Float[Array, "rank rank"]:
    """Return R of matrix = QR, which has the same Gram matrix and the size of the rank."""
    return np.linalg.qr(matrix).R
