"""Layer norms folded into the matrices that read behind them.

A layer norm is y = w (x - mean x) / s(x) + b with s(x) = sqrt(var x + eps). Everything but s(x) is affine, so it goes into
each reading matrix M (W_Q, W_K, W_V behind ln1, W_in behind ln2, W_U behind ln_final) and its bias:

    y M + c = (x / s(x)) M' + c'     M' = (I - 11^T / d) diag(w) M,   c' = b M + c

Folded: the gain w, the bias b, the centring. Not folded: the scale 1 / s(x), which depends on the whole residual stream at
that position. Raw scores of a folded QK circuit are therefore right up to a positive factor for each query (which moves no
argmax over keys) and one for each key (which can).
"""

from __future__ import annotations

import numpy as np

from birthlens.analysis.memories.memory import Array
from birthlens.errors import BirthlensError
from birthlens.model.weights import Weights


def fold_layer_norms(weights: Weights) -> Weights:
    """Return weights of the same function whose layer norms have gain 1 and bias 0; without layer norms, the same ones."""
    changed: dict[str, Array] = {}
    for layer in range(weights.n_layers):
        for norm, readers in (("ln1", ("W_Q", "W_K", "W_V")), ("ln2", ("W_in",))):
            for reader in readers:
                bias = reader.replace("W_", "b_")
                changed |= _folded(weights, f"L{layer}.{norm}", f"L{layer}.{reader}", f"L{layer}.{bias}")
    changed |= _folded(weights, "ln_final", "W_U", "b_U")
    for name in [name for name in weights if name.endswith((".w", ".b"))]:
        changed[name] = np.ones_like(weights[name]) if name.endswith(".w") else np.zeros_like(weights[name])
    return weights.replaced(changed) if changed else weights


def folded(weights: Weights) -> Weights:
    """Fold the layer norms as `fold_layer_norms` does, for a caller who asked for it; raise BirthlensError without any."""
    if not any(name.endswith(".w") for name in weights):
        raise BirthlensError("fold: this model has no layer norms to fold; read it as it is.")
    return fold_layer_norms(weights)


def _folded(weights: Weights, norm: str, matrix: str, bias: str) -> dict[str, Array]:
    if f"{norm}.w" not in weights or matrix not in weights:
        return {}
    read = weights[matrix]
    scaled = weights[f"{norm}.w"][:, None] * read
    return {
        matrix: scaled - scaled.mean(-2, keepdims=True),
        bias: weights[bias] + weights[f"{norm}.b"] @ read,
    }
