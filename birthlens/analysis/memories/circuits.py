"""The codebooks and circuits of a model, and the three memories of the paper's induction head (section 4).

In row vectors, with q = W_Q W_K^T (query left) and o = W_V W_O of the head named:

    prev_token_memory   p_t o q(L0H0) p_s^T               should peak at s = t - 1       the paper's W_K^1
    trigger_memory      w_E(k) q(L1H0) w_1(k')^T          should peak at k' = k          the paper's W_K^2
    output_memory       w_E(k) o(L1H0) w_U(k')^T          should peak at k' = k          the paper's W_O^2
    w_1(k) = w_E(k) o(L0H0)                               what the previous-token head writes when it reads k

These are the transposes of the paper's formulas: the query is on the left. Circuits contain no biases. They contain the
gains of layer norms only if `layer_norms.fold_layer_norms` has folded them into the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise, product
from typing import Literal

import numpy as np

from birthlens.analysis.memories.memory import Array, AssociativeMemory, Circuit, Codebook
from birthlens.analysis.memories.recall import Association
from birthlens.errors import BirthlensError
from birthlens.model.sites import Head
from birthlens.model.weights import Weights
from birthlens.shapes import Float

PREV_TOKEN_HEAD = Head(0, 0)
INDUCTION_HEAD = Head(1, 0)
EARLY = 64
"""Positions of the previous-token memory that all sequences contain; the paper's context is 256."""


def tokens(weights: Weights, labels: Sequence[str] | None = None) -> Codebook:
    """Return the token embeddings, one vector for each token."""
    return Codebook("W_E", weights["W_E"], _labels(weights["W_E"], labels))


def unembedding(weights: Weights, labels: Sequence[str] | None = None) -> Codebook:
    """Return the columns of W_U, one readout direction for each token."""
    directions = weights["W_U"].swapaxes(-1, -2)
    return Codebook("W_U", directions, _labels(directions, labels), space="readout")


def successors(
    weights: Weights, bigram: Float[Array, "d_vocab d_vocab"], labels: Sequence[str] | None = None
) -> Codebook:
    """Return, for each token i, the direction that its ideal feed-forward writes: sum_j log pi_b(j | i) w_U(j).

    The mean of each token's logarithms is subtracted, which does not change the softmax.
    """
    logs = log_bigram(bigram)
    readout = unembedding(weights, labels)
    written = (logs - logs.mean(1, keepdims=True)) @ readout.vectors.astype(np.float64)
    return Codebook("log pi_b W_U", written, readout.labels, space="readout")


def log_bigram(bigram: Float[Array, "d_vocab d_vocab"]) -> Float[Array, "d_vocab d_vocab"]:
    """Return log pi_b, cut off at 10 nats below uniform, since some counts are zero."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.maximum(np.log(bigram), np.log(1 / len(bigram)) - 10.0))


def positions(weights: Weights) -> Codebook:
    """Return the position embeddings, labelled from 0; raise BirthlensError for models without any."""
    if "W_pos" not in weights:
        raise BirthlensError(
            f"This model has no W_pos ({weights.config.positions} positions act on the scores), so it has no position "
            "codebook."
        )
    return Codebook("W_pos", weights["W_pos"], _numbers(0, weights["W_pos"].shape[-2]))


def qk_circuit(weights: Weights, head: Head) -> Circuit:
    """Return W_Q W_K^T of a head in factored form, with the query side on the left."""
    left = weights.of_head(head, "W_Q")
    right = weights.of_head(head, "W_K").swapaxes(-1, -2)
    return Circuit(f"{head}.QK", left, right, layer=head.layer, head=head)


def ov_circuit(weights: Weights, head: Head) -> Circuit:
    """Return W_V W_O of a head in factored form, with the attended side on the left."""
    left = weights.of_head(head, "W_V")
    right = weights.of_head(head, "W_O")
    return Circuit(f"{head}.OV", left, right, writes="readout", layer=head.layer, head=head)


def prev_token_memory(weights: Weights, head: Head = PREV_TOKEN_HEAD, first: int | None = None) -> AssociativeMemory:
    """Return the QK circuit between positions: all of them, or the `first` ones only. Its target is `Association.shift`.

    As in the paper, the argmax is over all positions except the last, including future ones.
    """
    book = positions(weights)
    if first is not None:
        book = book.subset(range(min(first, len(book))), f"W_pos[:{first}]")
    return AssociativeMemory(qk_circuit(weights, head), book, book)


def trigger_memory(
    weights: Weights,
    head: Head = INDUCTION_HEAD,
    prev_token_head: Head = PREV_TOKEN_HEAD,
    labels: Sequence[str] | None = None,
) -> AssociativeMemory:
    """Return the QK circuit from tokens (query) to tokens remapped by the previous-token head (key)."""
    book = tokens(weights, labels)
    return AssociativeMemory(qk_circuit(weights, head), book, book.through(ov_circuit(weights, prev_token_head)))


def output_memory(
    weights: Weights, head: Head = INDUCTION_HEAD, labels: Sequence[str] | None = None
) -> AssociativeMemory:
    """Return the OV circuit from tokens to the unembedding."""
    return AssociativeMemory(ov_circuit(weights, head), tokens(weights, labels), unembedding(weights, labels))


def feed_forward_memory(weights: Weights, labels: Sequence[str] | None = None) -> AssociativeMemory:
    """Return the linear feed-forward of the last block, from tokens to the unembedding: a bigram table (section 7)."""
    last = weights.n_layers - 1
    name = f"L{last}.W_F"
    if name not in weights:
        raise BirthlensError(f"This model has no {name}; a linear feed-forward memory needs feed_forward: linear.")
    circuit = Circuit(name, weights[name], reads="residual", writes="readout", layer=last)
    return AssociativeMemory(circuit, tokens(weights, labels), unembedding(weights, labels))


def feed_forward_kl(
    logits: Float[Array, "*step token d_vocab"], bigram: Float[Array, "d_vocab d_vocab"], leave_out: Sequence[int] = ()
) -> Float[Array, "*step"]:
    """Return the mean over tokens j of KL(bigram(.|j) || softmax(logits_j)), without the tokens in `leave_out`.

    The paper's KL(W_F) has logits = w_E(j) W_F W_U and leaves out the fixed triggers. Zeros of `bigram` add nothing.
    """
    if bigram.shape != (logits.shape[-2], logits.shape[-1]):
        raise BirthlensError(f"bigram has shape {bigram.shape}; the logits need {logits.shape[-2:]}.")
    kept = np.setdiff1d(np.arange(len(bigram)), np.asarray(leave_out, dtype=np.int64))
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    entropy = (bigram * np.log(np.where(bigram > 0, bigram, 1))).sum(-1)
    return np.asarray((entropy - (bigram * log_p).sum(-1))[..., kept].mean(-1))


@dataclass(frozen=True)
class NamedMemory:
    """A circuit through one or more heads, with the association that it would store (None if there is no natural one)."""

    kind: Literal["QK", "OV", "path"]
    heads: tuple[Head, ...]
    memory: AssociativeMemory
    association: Association | None


def all_memories(
    weights: Weights,
    heads: Sequence[Head] | None = None,
    labels: Sequence[str] | None = None,
    longest_path: int = 2,
) -> Iterator[NamedMemory]:
    """Yield every head's circuits between all codebooks that its layer's input contains.

    QK circuits are read between any two of tokens, positions, and tokens through each earlier head's OV circuit. OV circuits
    are read from tokens to the unembedding, as are the paths tokens -> OV -> ... -> OV -> unembedding through up to
    `longest_path` heads. Token codebooks are paired by identity and positions by the shift t -> t - 1. Tokens and positions
    have no pairing.
    """
    chosen = list(weights.heads if heads is None else heads)
    words = tokens(weights, labels)
    readout = unembedding(weights, labels)
    places = [positions(weights)] if "W_pos" in weights else []
    for head in chosen:
        earlier = [words.through(ov_circuit(weights, other)) for other in chosen if other.layer < head.layer]
        circuit = qk_circuit(weights, head)
        for inputs, outputs in product([words, *places, *earlier], repeat=2):
            yield NamedMemory(
                "QK", (head,), AssociativeMemory(circuit, inputs, outputs), _pairing(inputs, outputs, places)
            )
        memory = AssociativeMemory(ov_circuit(weights, head), words, readout)
        yield NamedMemory("OV", (head,), memory, Association.identity(len(words)))
    for length in range(2, longest_path + 1):
        for path in combinations(sorted(chosen), length):
            if all(first.layer < second.layer for first, second in pairwise(path)):
                circuit = ov_circuit(weights, path[0])
                for head in path[1:]:
                    circuit = circuit.then(ov_circuit(weights, head))
                memory = AssociativeMemory(circuit, words, readout)
                yield NamedMemory("path", path, memory, Association.identity(len(words)))


def _pairing(inputs: Codebook, outputs: Codebook, places: Sequence[Codebook]) -> Association | None:
    positional = [any(book is place for place in places) for book in (inputs, outputs)]
    if all(positional):
        return Association.shift(len(inputs)) if len(inputs) > 2 else None  # with two positions there is no choice
    return None if any(positional) else Association.identity(len(inputs))


def _labels(vectors: Array, labels: Sequence[str] | None) -> tuple[str, ...]:
    return _numbers(0, vectors.shape[-2]) if labels is None else tuple(labels)


@lru_cache
def _numbers(first: int, count: int) -> tuple[str, ...]:
    return tuple(map(str, range(first, first + count)))
