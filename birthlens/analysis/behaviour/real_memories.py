"""Memories of the heads of a real model, over its whole vocabulary, from weights alone and in bounded memory.

With e_k the embedding of token k, and f the fold of the norm before the head's layer (or the identity),

    QK      f(e_q) W_Q W_K^T f(e_k W_V W_O of an earlier head)^T     should be largest at k = q: the head looks for what the
                                                                      earlier head wrote when it read the query's token
    OV      f(e_k) W_V W_O g(w_U(v))^T                                should be largest at v = k: the head copies
    positions   f(p_t) W_Q W_K^T f(p_s)^T, s <= t                     should be largest at s = t - 1; learned positions only

Recall is the share of queries whose strongest entry is the right one. All tokens of the vocabulary are entries, and all of
them, or `MOST_QUERIES` evenly spaced ones, are queries; the strongest entries are those of these queries. Tables are read in
blocks of rows.

The fold is the affine part of a norm: gain and centring. It is found from the norm's outputs, so it is the norm of the
model. The divisor of a norm depends on the whole residual stream and is left out, as are biases. With the fold, a QK
score is correct up to a positive factor of its query, which does not change the strongest key, and one of its key,
which can.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from birthlens.analysis.behaviour.head_weights import HeadWeights
from birthlens.errors import BirthlensError
from birthlens.model.effects import architecture, check_edges
from birthlens.model.sites import Head
from birthlens.shapes import Bool, Float, Int

if TYPE_CHECKING:
    import pandas as pd

    from birthlens.model.hooked import HookedModel

Array = np.ndarray
MOST_QUERIES = 2048
BLOCK_ENTRIES = 1 << 22
"""The most scores in memory at once: 16 MB."""
COLUMNS = ["step", "layer", "head", "through", "memory", "metric", "place", "query", "entry", "value", "chance", "n"]


@dataclass(frozen=True, eq=False)
class Fold:
    """The affine part of a norm without its bias: x -> (x - mean of x, or x) * gain."""

    gain: Float[Array, "d_model"]
    centred: bool

    def __call__(self, states: Float[Array, "entry d_model"]) -> Float[Array, "entry d_model"]:
        """Return the norm of states without its divisor and its bias."""
        return np.asarray((states - states.mean(-1, keepdims=True) if self.centred else states) * self.gain)

    @classmethod
    def of(cls, norm: Any, width: int, kind: str | None) -> Fold:
        """Find the fold of a norm from its outputs.

        Raises:
            BirthlensError: if the norm is neither a LayerNorm nor an RMSNorm.
        """
        generator = np.random.default_rng(0)
        centred = kind is not None and kind.startswith("LN")
        first, second = (
            100 * generator.standard_normal((1, width)) for _ in range(2)
        )  # what is added to the square becomes negligible

        def linear(states: Array) -> Array:
            with torch.no_grad():
                outs = [norm(torch.from_numpy(sign * states[None]).float())[0].double().numpy() for sign in (1, -1)]
            return (outs[0] - outs[1]) / 2

        def plain(states: Array) -> Array:
            moved = states - states.mean(-1, keepdims=True) if centred else states
            return np.asarray(moved / np.sqrt((moved**2).mean(-1, keepdims=True)))

        gain = (linear(first) / plain(first))[0]
        if not np.allclose(linear(second), plain(second) * gain, atol=1e-3 * float(np.abs(gain).max())):
            raise BirthlensError(f"fold: the norm {type(norm).__name__} cannot be folded; leave --fold out.")
        return cls(gain, centred)


def real_memories_table(
    models: Iterable[tuple[int, HookedModel]],
    top: int = 10,
    heads: Sequence[Head] | None = None,
    fold: bool = True,
    labels: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Read the memories of heads at each checkpoint; earlier heads are those among `heads` (default: all).

    Columns: step, layer, head, through (the earlier head, for QK), memory ("QK", "OV", "positions"), metric ("recall", or
    "score" for the `top` strongest entries), place (from 1, of scores), query, entry (labels, of scores), value, chance, n
    (queries).

    Raises:
        BirthlensError: for heads that do not exist, a model whose residual stream is not the sum of what is written, and,
            with `fold`, a norm that cannot be folded.
    """
    import pandas as pd

    rows: list[tuple[object, ...]] = []
    for step, model in models:
        check_edges(model)
        rows += [(step, *row) for row in _of_model(_Parts(model, fold), heads, top, labels)]
    return pd.DataFrame(rows, columns=COLUMNS).astype({"place": "Int64"})


class _Parts(HeadWeights):
    """The weights of a model, and the folds of its norms."""

    def __init__(self, model: HookedModel, fold: bool) -> None:
        super().__init__(model)
        width = int(model.cfg.d_model)
        kind = model.cfg.normalization_type
        identity = Fold(np.ones(width), False)
        if fold and kind is None:
            raise BirthlensError(f"fold: this model ({architecture(model)}) has no norms to fold; leave --fold out.")
        norms = [block.ln1 for block in model.blocks] if fold else []
        self.reading = [Fold.of(norm, width, kind) for norm in norms] or [identity] * int(model.cfg.n_layers)
        self.final = Fold.of(model.ln_final, width, kind) if fold else identity

    def written(self, head: Head) -> Float[Array, "d_vocab d_model"]:
        """Return what a head writes when it reads each token."""
        states = self.reading[head.layer](self.embedding)
        return np.asarray(states @ self.matrix("W_V", head) @ self.matrix("W_O", head))

    def readout(self) -> Float[Array, "d_vocab d_model"]:
        """Return the directions along which the logits are read: rows of W_U^T after the last norm's fold."""
        directions = self.unembedding.T * self.final.gain
        return np.asarray(directions - directions.mean(-1, keepdims=True) if self.final.centred else directions)


def _of_model(
    parts: _Parts, heads: Sequence[Head] | None, top: int, labels: Sequence[str] | None
) -> Iterator[tuple[object, ...]]:
    chosen = parts.heads if heads is None else list(heads)
    if wrong := [head for head in chosen if head not in parts.heads]:
        raise BirthlensError(f"head = {wrong[0]} does not exist in this model; the last one is {parts.heads[-1]}.")
    vocabulary = len(parts.embedding)
    names = [str(token) for token in range(vocabulary)] if labels is None else list(labels)
    queries = np.unique(np.linspace(0, vocabulary - 1, min(vocabulary, MOST_QUERIES)).astype(int))
    for head in chosen:
        fold = parts.reading[head.layer]
        asked = fold(parts.embedding[queries]) @ parts.matrix("W_Q", head)
        for earlier in chosen:
            if earlier.layer < head.layer:
                keys = fold(parts.written(earlier)) @ parts.matrix("W_K", head)
                yield from _rows(head, str(earlier), "QK", _read(asked, keys, queries, queries, top), names, names)
        values = fold(parts.embedding[queries]) @ parts.matrix("W_V", head)
        read = parts.readout() @ parts.matrix("W_O", head).T
        yield from _rows(head, None, "OV", _read(values, read, queries, queries, top), names, names)
        if parts.positions is not None and len(parts.positions) > 1:
            states = fold(parts.positions)
            places = np.arange(1, len(states))
            asked = states[1:] @ parts.matrix("W_Q", head)
            keys = states @ parts.matrix("W_K", head)
            numbers = [str(place) for place in range(len(states))]
            found = _read(asked, keys, places, places - 1, top, causal=True)
            yield from _rows(head, None, "positions", found, numbers, numbers)


@dataclass(frozen=True, eq=False)
class _Found:
    recall: float
    chance: float
    n: int
    top: list[tuple[float, int, int]]


def _read(
    left: Float[Array, "query rank"],
    right: Float[Array, "entry rank"],
    queries: Int[Array, "query"],
    answers: Int[Array, "query"],
    top: int,
    causal: bool = False,
) -> _Found:
    """Read a table of scores in blocks: the share of queries whose strongest entry is the answer, and the top entries."""
    won: list[Bool[Array, "query"]] = []
    best: list[tuple[float, int, int]] = []
    size = max(1, BLOCK_ENTRIES // len(right))
    for start in range(0, len(left), size):
        scores = left[start : start + size] @ right.T
        block = queries[start : start + size]
        if causal:
            scores = np.where(np.arange(len(right)) <= block[:, None], scores, -np.inf)
        won.append(scores.argmax(1) == answers[start : start + size])
        few = min(top, scores.size)
        found = [divmod(int(one), len(right)) for one in np.argpartition(scores.ravel(), -few)[-few:]] if few else []
        best += [(float(scores[row, entry]), int(block[row]), entry) for row, entry in found]
        best = sorted((one for one in best if np.isfinite(one[0])), key=lambda one: (-one[0], one[1:]))[:top]
    chance = float(np.mean(1 / (queries + 1))) if causal else 1 / len(right)
    return _Found(float(np.concatenate(won).mean()), chance, len(left), best)


def _rows(
    head: Head, through: str | None, memory: str, found: _Found, inputs: Sequence[str], outputs: Sequence[str]
) -> Iterator[tuple[object, ...]]:
    place = (head.layer, str(head), through, memory)
    yield (*place, "recall", None, None, None, found.recall, found.chance, found.n)
    for number, (score, query, entry) in enumerate(found.top, start=1):
        yield (*place, "score", number, inputs[query], outputs[entry], score, float("nan"), found.n)
