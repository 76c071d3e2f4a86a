"""Two checkpoints in one basis: orthogonal Procrustes between their codebooks, for models with trained embeddings.

A model has the same meaning in every orthonormal basis of its residual stream: with x' = x R,

    W_E' = W_E R,   W_pos' = W_pos R,   W_Q' = R^T W_Q  (W_K, W_V, W_in, W_U alike),   W_O' = W_O R  (W_out, b_O alike)

gives the same logits, and so does rotating the d_head axis of a head, W_Q' = W_Q S and W_K' = W_K S. An axis of one
checkpoint therefore need not be the same axis of another. `rotation` is the R that brings the donor's codebooks closest
to the recipient's, argmin || A R - B || over orthogonal R. S follows from the partner (W_Q of W_K, W_V of W_O) in the
same way. Layer norms depend on the axes only through their gains and the mean: fold the gains first; R then keeps the
mean's direction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from birthlens.errors import BirthlensError
from birthlens.model.weights import Weights
from birthlens.shapes import Float

Array = np.ndarray

_READERS = ("W_Q", "W_K", "W_V", "W_in", "W_F")
_WRITERS = ("W_O", "W_out", "b_O", "b_out", "W_F")
_PARTNERS = {"W_Q": "W_K", "W_K": "W_Q", "b_Q": "W_K", "b_K": "W_Q", "W_V": "W_O", "b_V": "W_O", "W_O": "W_V"}


def partner_of(name: str) -> str | None:
    """Return the matrix that shares the d_head axis of a parameter; None if it has no such axis.

    Example:
        >>> partner_of("L0.W_Q"), partner_of("L1.W_F")
        ('L0.W_K', None)
    """
    layer, _, short = name.rpartition(".")
    return f"{layer}.{_PARTNERS[short]}" if short in _PARTNERS else None


def codebooks(weights: Weights, like: Weights | None = None) -> Float[Array, "entry d_model"]:
    """Stack token, position and unembedding vectors, each family scaled to mean square 1 (in `like`, by default itself)."""
    scale = like or weights
    found = []
    for name in ("W_E", "W_pos", "W_U"):
        if name in weights:
            size = np.sqrt((scale[name].astype(np.float64) ** 2).mean())
            rows = weights[name].astype(np.float64) / size
            found.append(rows.T if name == "W_U" else rows)
    return np.concatenate(found)


def drift(donor: Weights, recipient: Weights) -> float:
    """Return how far apart two checkpoints' codebooks are: ||A - B|| / ||B||, 0 if embeddings are frozen."""
    target = codebooks(recipient)
    return float(np.linalg.norm(codebooks(donor, recipient) - target) / np.linalg.norm(target))


def rotation(donor: Weights, recipient: Weights) -> Float[Array, "d_model d_model"]:
    """Return the orthogonal R that brings the donor's codebooks closest to the recipient's: x_donor R ~ x_recipient.

    Raises:
        BirthlensError: if the two are not the same model.
    """
    if donor.config != recipient.config:
        raise BirthlensError("alignment: donor and recipient are different models; their configs must agree.")
    a = codebooks(donor, recipient)
    b = codebooks(recipient)
    if not _has_norms(donor):
        return _procrustes(a, b)
    a, b = (rows - rows.mean(1, keepdims=True) for rows in (a, b))
    d = a.shape[1]
    return _procrustes(a, b, np.ones((d, d)) * np.linalg.norm(a) * np.linalg.norm(b) / d)


def rotated_weights(weights: Weights, turn: Float[Array, "d_model d_model"]) -> Weights:
    """Return the same function written in another basis of the residual stream, x' = x @ turn.

    Raises:
        BirthlensError: if layer norms still have gains, or `turn` moves the mean that they subtract.

    Example:
        >>> from birthlens.config.model import ModelConfig
        >>> from birthlens.model.initialisation import initial_weights, random_orthogonal
        >>> generator = np.random.default_rng(0)
        >>> weights = initial_weights(ModelConfig(d_model=8), 5, 4, generator)
        >>> turn = random_orthogonal(8, generator)
        >>> bool(np.allclose(rotation(weights, rotated_weights(weights, turn)), turn, atol=1e-5))
        True
    """
    ones = np.ones(len(turn))
    gains = [weights[name] for name in weights if name.endswith(".w")]
    offsets = [weights[name] for name in weights if name.endswith(".b")]
    if any((gain != 1).any() for gain in gains) or any(offset.any() for offset in offsets):
        raise BirthlensError("rotation: layer norms see single axes; fold them first (layer_norms.fold_layer_norms).")
    if gains and not np.allclose(ones @ turn, ones, atol=1e-4):
        raise BirthlensError("rotation: behind layer norms the direction of the mean, (1, ..., 1), must stay.")
    changed: dict[str, Array] = {}
    for name in weights:
        short = name.split(".")[-1]
        tensor = weights[name]
        if short in _READERS or short == "W_U":
            tensor = turn.T @ tensor
        if short in _WRITERS or short in ("W_E", "W_pos"):
            tensor = tensor @ turn
        changed[name] = tensor.astype(weights[name].dtype)
    return weights.replaced(changed)


def aligned(donor: Weights, recipient: Weights, names: Sequence[str]) -> dict[str, Float[Array, "..."]]:
    """Return some tensors of the donor in the recipient's bases, those of the residual stream and of each head.

    A head's own axes follow the partner that stays behind; if both are replaced, they are not rotated. The hidden axis of a
    ReLU feed-forward is not changed.
    """
    turned = rotated_weights(donor, rotation(donor, recipient))
    found = {}
    for name in names:
        short = name.split(".")[-1]
        partner = partner_of(name)
        tensor = turned[name]
        if partner is not None and partner in recipient and partner not in names:
            axis = -2 if partner.endswith("W_O") else -1  # of d_head in the partner
            inner = [np.moveaxis(weights[partner], axis, -1) for weights in (turned, recipient)]
            turns = np.stack([_procrustes(*pair) for pair in zip(*inner, strict=True)])
            if short == "W_O":
                tensor = turns.swapaxes(-1, -2) @ tensor
            elif short.startswith("b_"):
                tensor = np.einsum("hi,hij->hj", tensor, turns)
            else:
                tensor = tensor @ turns
        found[name] = tensor.astype(recipient[name].dtype)
    return found


def _has_norms(weights: Weights) -> bool:
    return "ln_final.w" in weights


def _procrustes(a: Array, b: Array, bias: Array | None = None) -> Float[Array, "d d"]:
    """Return argmin || a R - b || over orthogonal R: the polar factor of a^T b."""
    overlap = a.astype(np.float64).T @ b.astype(np.float64)
    left, _, right = np.linalg.svd(overlap if bias is None else overlap + bias)
    return np.asarray(left @ right)
