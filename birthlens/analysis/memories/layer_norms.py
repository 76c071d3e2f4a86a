"""Layer norms folded into the matrices that read their output.

A layer norm is y = w (x - mean x) / s(x) + b with s(x) = sqrt(var x + eps). All of it except s(x) is affine, so it can be
folded into each reading matrix M (W_Q, W_K, W_V after ln1, W_in after ln2, W_U after ln_final) and its bias:

    y M + c = (x / s(x)) M' + c'     M' = (I - 11^T / d) diag(w) M,   c' = b M + c

The gain w, the bias b and the centring are folded. The scale 1 / s(x) is not, because it depends on the whole residual
stream at that position. Raw scores of a folded QK circuit are therefore correct up to a positive factor for each query
(which does not change the argmax over keys) and one for each key (which can change it).
"""

from __future__ import annotations

import numpy as np

from birthlens.analysis.memories.memory import Array
from birthlens.errors import BirthlensError
from birthlens.model.weights import Weights


def fold_layer_norms(weights: Weights) -> Weights:
    """Return weights of the same function whose layer norms have gain 1 and bias 0; unchanged without layer norms.

    The gain of the last norm goes into W_U alone: a tied unembedding becomes a matrix of its own.
    """
    changed: dict[str, Array] = {}
    for layer in range(weights.n_layers):
        for norm, readers in (("ln1", ("W_Q", "W_K", "W_V")), ("ln2", ("W_in",))):
            for reader in readers:
                bias = reader.replace("W_", "b_")
                changed |= _folded(weights, f"L{layer}.{norm}", f"L{layer}.{reader}", f"L{layer}.{bias}")
    changed |= _folded(weights, "ln_final", "W_U", "b_U")
    for name in [name for name in weights if name.endswith((".w", ".b"))]:
        changed[name] = np.ones_like(weights[name]) if name.endswith(".w") else np.zeros_like(weights[name])
    return weights.untied().replaced(changed) if changed else weights


def folded(weights: Weights) -> Weights:
    """Fold the layer norms as `fold_layer_norms` does; raise BirthlensError if there are none."""
    if not any(name.endswith(".w") for name in weights):
        raise BirthlensError("fold: this model has no layer norms to fold; read it without folding.")
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
