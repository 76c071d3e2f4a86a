"""The closed-form induction head: three associative memories written down without training (paper section 4).

In row vectors, scores after scaling, with w_1(k) = w_E(k) W_V W_O of layer 0:

    layer 0 QK   prev_token * sum_t p_t (x) p_{t-1}               attend to the previous position
    layer 1 QK   trigger    * sum_k w_E(k) (x) w_1(k)             attend to where the previous token was this one
    layer 1 OV   output     * sum_k w_E(k) (x) w_U(k)             copy the attended token to the logits
    W_F          log pi_b(j | i) on w_E(i) (x) w_U(j), optional   the global bigrams

(x) is the outer product: read on the left, write on the right. With `raw`, each vector is divided by its squared norm, so
that orthogonal codebooks return the strengths exactly. With `dual`, each vector is replaced by its dual among all codebooks
that its layer's input contains, so that any linearly independent codebooks return them exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from birthlens.analysis.memories.circuits import log_bigram
from birthlens.analysis.memories.duals import dual_vectors
from birthlens.config.model import ModelConfig
from birthlens.errors import BirthlensError
from birthlens.model.initialisation import initial_weights
from birthlens.model.weights import Weights
from birthlens.shapes import Float, Int

Array = np.ndarray
Codebooks = Literal["raw", "dual"]


@dataclass(frozen=True)
class Strengths:
    """Scores and logits, in nats, that each memory gives to what it stores.

    `avoid_first` is not one of the paper's memories. The first position of layer 0 has no previous position to attend to, so
    layer 0 marks it as its own successor. This score keeps layer 1 from attending to it.
    """

    prev_token: float = 20.0
    trigger: float = 20.0
    output: float = 15.0
    avoid_first: float = 0.0


def ideal_weights(
    config: ModelConfig,
    d_vocab: int,
    n_ctx: int,
    generator: np.random.Generator,
    triggers: Sequence[int] | Int[Array, "n_triggers"] | None = None,
    strengths: Strengths | None = None,
    codebooks: Codebooks = "raw",
    bigram: Float[Array, "d_vocab d_vocab"] | None = None,
) -> Weights:
    """Write the induction head into otherwise untrained weights of a simplified model.

    `triggers` limits the layer-1 keys to some tokens (default: all). `bigram` is written into W_F and needs a config with a
    linear feed-forward. `config.init="orthogonal"` makes the memories exact as far as d_model allows.

    Raises:
        BirthlensError: for any model other than the simplified one with two layers and absolute positions, for unknown
            codebooks, or for a bigram table without W_F.

    Example:
        >>> config = ModelConfig(d_model=64, init="orthogonal")
        >>> weights = ideal_weights(config, d_vocab=10, n_ctx=16, generator=np.random.default_rng(0))
        >>> p = weights["W_pos"]
        >>> scores = p @ weights["L0.W_K"][0].T @ p.T * weights.score_scale
        >>> [int(row.argmax()) for row in scores[1:5]]
        [0, 1, 2, 3]
    """
    _check_model(config)
    start = initial_weights(config, d_vocab, n_ctx, generator, dtype=np.float64)
    full = start.replaced(ideal_matrices(start, triggers, strengths, codebooks, bigram))
    return Weights(config, {name: tensor.astype(np.float32) for name, tensor in full.items()})


def ideal_matrices(
    weights: Weights,
    triggers: Sequence[int] | Int[Array, "n_triggers"] | None = None,
    strengths: Strengths | None = None,
    codebooks: Codebooks = "raw",
    bigram: Float[Array, "d_vocab d_vocab"] | None = None,
) -> dict[str, Float[Array, "..."]]:
    """Return the induction head's memories in the codebooks of `weights`: the matrices of `ideal_weights`, by name.

    They fit any weights with these embeddings and frozen maps, such as those of a trained run. Arguments and errors are as
    in `ideal_weights`. Everything is computed in float64.

    Example:
        >>> weights = initial_weights(ModelConfig(d_model=64), 10, 16, np.random.default_rng(0))
        >>> sorted(ideal_matrices(weights))
        ['L0.W_K', 'L1.W_K', 'L1.W_O']
    """
    config = weights.config
    _check_model(config)
    if codebooks not in ("raw", "dual"):
        raise BirthlensError(f"codebooks = {codebooks!r} is unknown; valid are raw and dual.")
    if bigram is not None and config.feed_forward != "linear":
        raise BirthlensError(f"model.feed_forward = {config.feed_forward!r}: a bigram table needs the linear W_F.")
    strengths = strengths or Strengths()
    exact = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
    embed = exact["W_E"]
    position = exact["W_pos"]
    remapped = embed @ exact["L0.W_V"][0] @ exact["L0.W_O"][0]
    # What the input of each layer consists of; the key side of layer 1 also contains what layer 0 wrote.
    token0, position0 = _readers([embed, position], codebooks)
    token1, position1, remapped1 = _readers([embed, position, remapped], codebooks)
    (value1,) = _readers([embed @ exact["L1.W_V"][0]], codebooks)
    (readout,) = _readers([exact["W_U"].T], codebooks)
    chosen = list(range(len(embed))) if triggers is None else list(triggers)
    scale = weights.score_scale
    match = token1[chosen].T @ remapped1[chosen]
    first = np.outer(token1[chosen].sum(0), position1[0])
    written = {
        "L0.W_K": (strengths.prev_token / scale * position0[1:].T @ position0[:-1]).T[None],
        "L1.W_K": ((strengths.trigger * match - strengths.avoid_first * first) / scale).T[None],
        "L1.W_O": (strengths.output * value1.T @ readout)[None],
    }
    if bigram is not None:
        written["L1.W_F"] = token0.T @ log_bigram(bigram) @ readout
    elif "L1.W_F" in weights:
        written["L1.W_F"] = np.zeros_like(exact["L1.W_F"])
    return written


def _check_model(config: ModelConfig) -> None:
    if config.family != "simplified" or config.n_layers != 2 or config.positions == "rotary":
        raise BirthlensError(
            f"model: family {config.family!r}, n_layers {config.n_layers}, positions {config.positions!r}; ideal weights "
            "exist for the simplified model with 2 layers and absolute positions."
        )


def _readers(books: Sequence[Array], codebooks: Codebooks) -> list[Array]:
    """Return, for each codebook, the vectors that read 1 from their own entry (raw: v/|v|^2; dual: 0 from all others)."""
    if codebooks == "raw":
        return [book / (book**2).sum(1, keepdims=True) for book in books]
    joint = dual_vectors(np.concatenate(books))
    return np.split(joint, np.cumsum([len(book) for book in books])[:-1])
