"""The residual stream as a sum of named terms, and the exact split of one score or one logit over them.

The input of layer l at position t is a sum: token, position, and what every earlier head or feed-forward wrote. With
attention patterns (and the scales of layer norms) fixed at their values, everything else is linear, so that

    score(t, s) = scale * sum_{a,b} q_a(t) . k_b(s)       q_a = term_a W_Q, k_b = term_b W_K, biases as separate terms
    logit(v)    = sum_a term_a W_U[:, v]

hold up to rounding: attribution without approximation. `paths=True` follows each head's output back through the patterns to
what it read ("W_E > L0H0 > L1H0"), so that logits are split over paths from the embeddings. A ReLU feed-forward stays a
single term. Everything runs in float64 in numpy, for one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from birthlens.analysis.memories.memory import Array
from birthlens.errors import BirthlensError
from birthlens.model.sites import Head
from birthlens.model.weights import Weights
from birthlens.shapes import Float, Int

if TYPE_CHECKING:
    import pandas as pd

ResidualTerms = dict[str, Float[Array, "pos _"]]

_EPS = 1e-5  # of the layer norms
_MOST_TERMS = 2000
_PATH = "{} > {}"


@dataclass(frozen=True, eq=False)
class Decomposition:
    """One sequence through the model: residual terms before each layer (and after the last), patterns, scores, logits."""

    terms: list[ResidualTerms]
    scores: dict[Head, Float[Array, "query_pos key_pos"]]
    patterns: dict[Head, Float[Array, "query_pos key_pos"]]
    logits: Float[Array, "pos d_vocab"]


def decompose(weights: Weights, tokens: Int[Array, "pos"] | Sequence[int], paths: bool = False) -> Decomposition:
    """Run one sequence and keep every term of the residual stream.

    Raises:
        BirthlensError: for models with rotary or relative positions, whose scores are not a sum over residual terms; for
            tokens outside the vocabulary, or more tokens than the model has positions; if `paths` would give thousands of
            terms.
    """
    z = _checked(weights, tokens)
    terms: ResidualTerms = {"W_E": _exact(weights, "W_E")[z], "W_pos": _exact(weights, "W_pos")[: len(z)]}
    before = [terms]
    scores = {}
    patterns = {}
    for layer in range(weights.n_layers):
        block = f"L{layer}"
        normal = _normalised(weights, f"{block}.ln1", terms)
        written: ResidualTerms = {}
        for number in range(weights.n_heads):
            head = Head(layer, number)
            queries = _projected(weights, head, "Q", normal)
            keys = _projected(weights, head, "K", normal)
            scores[head] = weights.score_scale * sum(queries.values()) @ np.sum(list(keys.values()), axis=0).T
            patterns[head] = _pattern(weights, scores[head])
            out = _exact(weights, f"{block}.W_O")[number]
            values = _projected(weights, head, "V", normal)
            outputs = {_PATH.format(name, head): patterns[head] @ value @ out for name, value in values.items()}
            written |= outputs if paths else {str(head): np.sum(list(outputs.values()), axis=0)}
        if f"{block}.b_O" in weights:
            written[f"{block}.b_O"] = np.broadcast_to(_exact(weights, f"{block}.b_O"), terms["W_E"].shape)
        reads = terms if weights.config.parallel_attn_mlp else terms | written
        terms = terms | written | _feed_forward(weights, block, reads, paths)
        if len(terms) > _MOST_TERMS:
            raise BirthlensError(f"paths: more than {_MOST_TERMS} of them by layer {layer}; use paths=False.")
        before.append(terms)
    return Decomposition(before, scores, patterns, np.sum(list(_logits(weights, terms).values()), axis=0))


def score_split_table(
    weights: Weights,
    tokens: Int[Array, "pos"] | Sequence[int],
    head: Head,
    query_pos: int,
    key_pos: int,
    paths: bool = False,
    sources: bool = False,
) -> pd.DataFrame:
    """Split the attention score of one query and one key position over (query term x key term), positions from 0.

    Columns: query, key (terms: "W_E", "W_pos", "L0H0", biases, ...), value. Values sum to the model's score, with its scale.
    `sources=True` splits each earlier head's output by the position it came from ("L0H0 @ 3").

    Example:
        >>> from birthlens.config.model import ModelConfig
        >>> from birthlens.model.initialisation import initial_weights
        >>> weights = initial_weights(ModelConfig(d_model=8), d_vocab=5, n_ctx=4, generator=np.random.default_rng(0))
        >>> table = score_split_table(weights, [0, 1, 2], Head(1, 0), query_pos=2, key_pos=1)
        >>> len(table), bool(np.isclose(table["value"].sum(), decompose(weights, [0, 1, 2]).scores[Head(1, 0)][2, 1]))
        (9, True)
    """
    import pandas as pd

    if paths and sources:
        raise BirthlensError("paths and sources split a head's output in two different ways; choose one of them.")
    traced = decompose(weights, tokens, paths)
    if head not in traced.scores or not 0 <= key_pos <= query_pos < len(traced.logits):
        valid = f"a head of {', '.join(map(str, traced.scores))} and 0 <= key_pos <= query_pos < {len(traced.logits)}"
        raise BirthlensError(f"head = {head}, query_pos = {query_pos}, key_pos = {key_pos}: give {valid}.")
    sides = []
    for position, name in ((query_pos, "Q"), (key_pos, "K")):
        terms = traced.terms[head.layer]
        scale = _scale(weights, f"L{head.layer}.ln1", terms)[[position]]
        local = {term: value[[position]] for term, value in terms.items()}
        if sources:
            local = _by_source(weights, traced, local, head.layer, position)
        sides.append(_projected(weights, head, name, _normalised(weights, f"L{head.layer}.ln1", local, scale)))
    rows = [
        (query, key, weights.score_scale * float(q[0] @ k[0]))
        for query, q in sides[0].items()
        for key, k in sides[1].items()
    ]
    return pd.DataFrame(rows, columns=["query", "key", "value"])


def logit_split_table(
    weights: Weights, tokens: Int[Array, "pos"] | Sequence[int], pos: int, token: int, paths: bool = True
) -> pd.DataFrame:
    """Split the logit of `token` at position `pos` (from 0) over paths, or over terms with `paths=False`.

    Columns: path, value, centred (value minus its mean over the vocabulary, the part that affects the softmax). Values sum
    to the model's logit.
    """
    import pandas as pd

    traced = decompose(weights, tokens, paths)
    count, vocabulary = traced.logits.shape
    if not (0 <= pos < count and 0 <= token < vocabulary):
        raise BirthlensError(f"pos = {pos}, token = {token}: give 0 <= pos < {count} and 0 <= token < {vocabulary}.")
    found = _logits(weights, traced.terms[-1])
    rows = [
        (path, float(value[pos, token]), float(value[pos, token] - value[pos].mean())) for path, value in found.items()
    ]
    return pd.DataFrame(rows, columns=["path", "value", "centred"])


def _checked(weights: Weights, tokens: Int[Array, "pos"] | Sequence[int]) -> Int[Array, "pos"]:
    if "W_pos" not in weights:
        raise BirthlensError(
            f"This model has {weights.config.positions} positions: its scores are not a sum over residual terms."
        )
    z = np.asarray(tokens, dtype=np.int64)
    vocabulary = len(weights["W_E"])
    context = len(weights["W_pos"])
    if z.ndim != 1 or not 0 < len(z) <= context or z.min() < 0 or z.max() >= vocabulary:
        raise BirthlensError(f"tokens: give one sequence of 1 to {context} tokens from 0 to {vocabulary - 1}.")
    return z


def _exact(weights: Weights, name: str) -> Array:
    return weights[name].astype(np.float64)


def _scale(weights: Weights, norm: str, terms: ResidualTerms) -> Float[Array, "pos 1"]:
    total = np.sum(list(terms.values()), axis=0)
    if f"{norm}.w" not in weights:
        return np.ones((len(total), 1))
    return np.sqrt(total.var(-1, keepdims=True) + _EPS)


def _normalised(weights: Weights, norm: str, terms: ResidualTerms, scale: Array | None = None) -> ResidualTerms:
    """Return the terms after a layer norm whose scale is fixed; its bias is one more term."""
    if f"{norm}.w" not in weights:
        return terms
    scale = _scale(weights, norm, terms) if scale is None else scale
    gain = _exact(weights, f"{norm}.w")
    seen = {name: (value - value.mean(-1, keepdims=True)) / scale * gain for name, value in terms.items()}
    shape = next(iter(terms.values())).shape
    return seen | {f"{norm}.b": np.broadcast_to(_exact(weights, f"{norm}.b"), shape)}


def _projected(weights: Weights, head: Head, side: str, terms: ResidualTerms) -> ResidualTerms:
    """Return the terms through a head's W_Q, W_K or W_V; its bias is one more term."""
    block = f"L{head.layer}"
    matrix = _exact(weights, f"L{head.layer}.W_{side}")[head.head]
    seen = {name: value @ matrix for name, value in terms.items()}
    if f"{block}.b_{side}" not in weights:
        return seen
    bias = _exact(weights, f"{block}.b_{side}")[head.head]
    return seen | {f"{block}.b_{side}": np.broadcast_to(bias, (len(next(iter(seen.values()))), len(bias)))}


def _pattern(weights: Weights, scores: Float[Array, "query_pos key_pos"]) -> Float[Array, "query_pos key_pos"]:
    # Imported here: reading weights needs no torch.
    import torch

    from birthlens.model.attention import attention_pattern

    return np.asarray(attention_pattern(weights.config, torch.from_numpy(scores)).numpy())


def _feed_forward(weights: Weights, block: str, terms: ResidualTerms, paths: bool) -> ResidualTerms:
    if f"{block}.W_F" in weights:
        matrix = _exact(weights, f"{block}.W_F")
        outputs = {_PATH.format(name, f"{block}.W_F"): value @ matrix for name, value in terms.items()}
        return outputs if paths else {f"{block}.W_F": np.sum(list(outputs.values()), axis=0)}
    if f"{block}.W_in" not in weights:
        return {}
    x = np.sum(list(_normalised(weights, f"{block}.ln2", terms).values()), axis=0)
    biases = [_exact(weights, f"{block}.{name}") if f"{block}.{name}" in weights else 0.0 for name in ("b_in", "b_out")]
    hidden = x @ _exact(weights, f"{block}.W_in") + biases[0]
    if weights.config.feed_forward == "gelu":
        from scipy.special import ndtr

        hidden = hidden * ndtr(hidden)
    else:
        hidden = np.maximum(hidden, 0)
    return {f"{block}.mlp": hidden @ _exact(weights, f"{block}.W_out") + biases[1]}


def _logits(weights: Weights, terms: ResidualTerms) -> dict[str, Float[Array, "pos d_vocab"]]:
    readout = _exact(weights, "W_U")
    found = {name: value @ readout for name, value in _normalised(weights, "ln_final", terms).items()}
    if "b_U" not in weights:
        return found
    shape = next(iter(found.values())).shape
    return found | {"b_U": np.broadcast_to(_exact(weights, "b_U"), shape)}


def _by_source(
    weights: Weights, traced: Decomposition, local: ResidualTerms, layer: int, position: int
) -> ResidualTerms:
    """Replace each earlier head's term at `position` by one term for each source position."""
    split: ResidualTerms = {}
    for name, value in local.items():
        head = next((head for head in traced.patterns if str(head) == name and head.layer < layer), None)
        if head is None:
            split[name] = value
            continue
        normal = _normalised(weights, f"L{head.layer}.ln1", traced.terms[head.layer])
        values = np.sum(list(_projected(weights, head, "V", normal).values()), axis=0)
        outputs = values @ _exact(weights, f"L{head.layer}.W_O")[head.head]
        for source in range(position + 1):
            split[f"{name} @ {source}"] = traced.patterns[head][[position], source, None] * outputs[[source]]
    return split
