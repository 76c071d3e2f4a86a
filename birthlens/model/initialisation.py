"""Initial weights, with every tensor from one explicit generator; TransformerLens's own are never used (section 4.2).

authors     w_E, p ~ N(0, 1); linear maps and W_U uniform in +-1/sqrt(d_model); W_Q = identity in the simplified model
scaled      the same, with embeddings divided by sqrt(d_model)
orthogonal  tokens, positions, remapped tokens w_1(k) = w_E(k) W_V W_O of layer 0, and the unembedding on mutually
            orthogonal directions, with the norms that `authors` has on average: the large-d limit at small d
"""

from __future__ import annotations

import math

import numpy as np

from birthlens.config.model import ModelConfig, parameter_shapes
from birthlens.model.weights import Weights
from birthlens.shapes import Float

Array = np.ndarray


def initial_weights(
    config: ModelConfig, d_vocab: int, n_ctx: int, generator: np.random.Generator, dtype: type = np.float32
) -> Weights:
    """Draw the weights of step 0.

    Example:
        >>> weights = initial_weights(ModelConfig(d_model=8), 5, 4, np.random.default_rng(0))
        >>> weights["W_E"].shape, bool((weights["L0.W_Q"][0] == np.eye(8)).all())
        ((5, 8), True)
    """
    tensors: dict[str, Array] = {}
    for name, shape in parameter_shapes(config, d_vocab, n_ctx).items():
        if not (config.tied and name == "W_U"):
            tensors[name] = _draw(name, shape, config, generator)
    if config.positions == "sinusoidal":
        tensors["W_pos"] = sinusoidal_positions(n_ctx, config.d_model)
    if config.init == "scaled":
        for name in {"W_E", "W_pos"} & tensors.keys():
            tensors[name] = tensors[name] / math.sqrt(config.d_model)
    if config.init == "orthogonal":
        tensors |= _orthogonal(config, d_vocab, n_ctx, tensors, generator)
    for name in config.zeroed:
        tensors[name] = np.zeros_like(tensors[name])
    return Weights(config, {name: tensor.astype(dtype) for name, tensor in tensors.items()})


def sinusoidal_positions(n_ctx: int, d_model: int) -> Float[Array, "n_ctx d_model"]:
    """Return sine (even axes) and cosine (odd axes) of pos / 10000^(2i/d_model), as in the original Transformer."""
    angles = np.arange(n_ctx)[:, None] / 10000 ** (np.arange(0, d_model, 2) / d_model)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(n_ctx, d_model)


def orthonormal_frames(
    count: int, basis: Float[Array, "dimension d_model"], generator: np.random.Generator
) -> Float[Array, "count d_model"]:
    """Return `count` unit vectors in the span of `basis`, orthogonal as far as its dimension allows.

    The first `dimension` vectors are orthonormal; each further group of this size is another random orthonormal frame.
    """
    frames: list[Array] = []
    while sum(map(len, frames)) < count:
        frames.append(random_orthogonal(len(basis), generator) @ basis)
    return np.concatenate(frames)[:count] if frames else np.zeros((0, basis.shape[1]))


def random_orthogonal(d: int, generator: np.random.Generator) -> Float[Array, "d d"]:
    """Draw an orthogonal matrix from the Haar measure."""
    q, r = np.linalg.qr(generator.standard_normal((d, d)))
    return np.asarray(q * np.sign(np.diag(r)))


def _draw(name: str, shape: tuple[int, ...], config: ModelConfig, generator: np.random.Generator) -> Array:
    matrix = name.split(".", 1)[-1]
    if name in ("W_E", "W_pos"):
        return generator.standard_normal(shape)
    if name.startswith("ln") or matrix.startswith("ln"):
        return np.ones(shape) if name.endswith(".w") else np.zeros(shape)
    if matrix.startswith("b_"):
        return np.zeros(shape)
    if matrix == "W_Q" and config.family == "simplified":
        return np.eye(config.d_model)[None]
    bound = 1 / math.sqrt(shape[0] if matrix == "W_out" else config.d_model)
    return generator.uniform(-bound, bound, shape)


def _orthogonal(
    config: ModelConfig, d_vocab: int, n_ctx: int, tensors: dict[str, Array], generator: np.random.Generator
) -> dict[str, Array]:
    """Place the codebooks on one random orthonormal basis; what no longer fits goes where it interferes least."""
    d = config.d_model
    basis = random_orthogonal(d, generator)
    used = 0

    def directions(count: int, avoid: int) -> Array:
        """Take `count` new directions; if too few are left, take frames outside the first `avoid` directions."""
        nonlocal used
        if used + count <= d:
            used += count
            return basis[used - count : used]
        return orthonormal_frames(count, basis[avoid:] if avoid < d else basis, generator)

    tokens = directions(d_vocab, 0)
    positions = directions(n_ctx, min(d_vocab, d)) if "W_pos" in tensors else np.zeros((0, d))
    remapped = directions(min(d_vocab, d), min(d_vocab, d) if 2 * d_vocab <= d else 0)
    unembedding = directions(d_vocab, min(d_vocab, d))

    chosen = {"W_E": math.sqrt(d) * tokens, "W_U": unembedding.T / math.sqrt(3)}
    if "W_pos" in tensors and config.positions != "sinusoidal":
        chosen["W_pos"] = math.sqrt(d) * positions
    gain = 1 / math.sqrt(3)  # the root mean square gain of a map with entries uniform in +-1/sqrt(d)
    for layer in range(config.n_layers):
        chosen[f"L{layer}.W_V"] = gain * random_orthogonal(d, generator)[None]
        chosen[f"L{layer}.W_O"] = gain * random_orthogonal(d, generator)[None]
    if config.n_layers > 1:
        rotation = _rotation(tokens[: len(remapped)], remapped, generator)
        chosen["L0.W_O"] = chosen["L0.W_V"].transpose(0, 2, 1) @ rotation
    return chosen


def _rotation(
    sources: Float[Array, "n d"], images: Float[Array, "n d"], generator: np.random.Generator
) -> Float[Array, "d d"]:
    """Return an orthogonal matrix R with sources @ R = images, for orthonormal rows; random on the complement."""
    complement = [_completed(rows, generator)[len(rows) :] for rows in (sources, images)]
    return np.asarray(sources.T @ images + complement[0].T @ complement[1])


def _completed(rows: Float[Array, "n d"], generator: np.random.Generator) -> Float[Array, "d d"]:
    """Complete orthonormal rows to an orthonormal basis with random directions."""
    n, d = rows.shape
    if n == d:
        return rows
    fresh = generator.standard_normal((d - n, d))
    fresh -= fresh @ rows.T @ rows
    q, _ = np.linalg.qr(fresh.T)
    return np.concatenate([rows, q.T])
