"""The forward pass of many models of one shape at once: every tensor has a leading axis of runs.

The equations are those of `forward`, run by run. Products with weights become batched products over the runs. Attention
has no weights, so it takes all sequences of all runs as one batch. No run reads another.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from birthlens.config.model import ModelConfig
from birthlens.model.forward import feed_forward, has_feed_forward, readout, rotated, score_scale
from birthlens.shapes import Float, Int

Tensors = Mapping[str, Tensor]


def stacked_logits(
    tensors: Tensors,
    config: ModelConfig,
    tokens: Int[Tensor, "run batch pos"],
    rows: Int[Tensor, "run row"] | None = None,
) -> Float[Tensor, "run row d_vocab"]:
    """Return the logits of every run at the given rows of its flattened positions (batch x pos), or at all of them.

    After the last layer's attention no position reads another, so the other positions are dropped there.
    """
    runs, batch, pos = tokens.shape
    # Vectors get an axis of rows, so that they broadcast like those of one model.
    tensors = {name: value[:, None] if value.ndim == 2 else value for name, value in tensors.items()}
    x = _embedded(tensors, tokens)
    for layer in range(config.n_layers):
        z = _attended(tensors, config, layer, x, batch)
        if rows is not None and layer == config.n_layers - 1:
            offsets = torch.arange(runs, device=tokens.device)[:, None] * (batch * pos)
            chosen = rows + offsets
            x = x.flatten(0, 1)[chosen]
            z = z.flatten(0, 1)[chosen]
        x = _written(tensors, config, layer, x, z)
    out = _normed(tensors, "ln_final", x) @ readout(tensors, config)
    return out + tensors["b_U"] if "b_U" in tensors else out


def _embedded(tensors: Tensors, tokens: Int[Tensor, "run batch pos"]) -> Float[Tensor, "run row d_model"]:
    table = tensors["W_E"]
    runs, d_vocab, _ = table.shape
    offsets = torch.arange(runs, device=tokens.device)[:, None, None] * d_vocab
    x = functional.embedding(tokens + offsets, table.flatten(0, 1))
    if "W_pos" in tensors:
        x = x + tensors["W_pos"][:, None, : tokens.shape[2]]
    return x.flatten(1, 2)


def _normed(tensors: Tensors, name: str, x: Float[Tensor, "run row d_model"]) -> Float[Tensor, "run row d_model"]:
    """Apply each run's LayerNorm, if the model has it."""
    if f"{name}.w" not in tensors:
        return x
    normed = functional.layer_norm(x, x.shape[-1:], eps=1e-5)
    return normed * tensors[f"{name}.w"] + tensors[f"{name}.b"]


def _attended(
    tensors: Tensors, config: ModelConfig, layer: int, x: Float[Tensor, "run row d_model"], batch: int
) -> Float[Tensor, "run row head_and_width"]:
    """Return z of `forward` for all heads, with heads and widths in one axis."""
    runs, n_rows, d_model = x.shape
    pos = n_rows // batch
    x = _normed(tensors, f"L{layer}.ln1", x)
    parts = []
    for letter in "QKV":
        weight = tensors[f"L{layer}.W_{letter}"].transpose(1, 2).reshape(runs, d_model, d_model)
        heads = x @ weight
        if f"L{layer}.b_{letter}" in tensors:
            heads = heads + tensors[f"L{layer}.b_{letter}"].reshape(runs, 1, d_model)
        heads = heads.view(runs * batch, pos, config.n_heads, config.d_head).transpose(1, 2)
        if config.is_rotary(layer) and letter in "QK":
            heads = rotated(heads)
        parts.append(heads)
    q, k, v = parts
    z = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=score_scale(config))
    return z.transpose(1, 2).reshape(runs, n_rows, d_model)


def _written(
    tensors: Tensors,
    config: ModelConfig,
    layer: int,
    x: Float[Tensor, "run row d_model"],
    z: Float[Tensor, "run row head_and_width"],
) -> Float[Tensor, "run row d_model"]:
    """Add the outputs of attention and feed-forward; in a parallel block the feed-forward reads the block's input."""
    after = x + z @ tensors[f"L{layer}.W_O"].flatten(1, 2)
    if f"L{layer}.b_O" in tensors:
        after = after + tensors[f"L{layer}.b_O"]
    if not has_feed_forward(tensors, layer):
        return after
    read = _normed(tensors, f"L{layer}.ln2", x if config.parallel_attn_mlp else after)
    return feed_forward(tensors, config, layer, read, after)
