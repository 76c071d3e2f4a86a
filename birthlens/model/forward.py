"""The forward pass as a function of named tensors, with fused attention: a fast equivalent of the HookedTransformer.

Simplified model (paper section 4.2; superscripts 1, 2 are layers 0, 1), with h = number of the layer:

    x_t      = W_E[z_t] + W_pos[t]
    x_t     += sum_{s<=t} softmax_s( scale * (x_t W_Q) . (x_s W_K) ) x_s W_V W_O        for each layer
    logits_t = (x_t + x_t W_F) W_U

The full model adds LayerNorm, heads, biases, and a ReLU feed-forward that reads the block's input (section 3.2), or that
input plus the output of its attention. Its attention can do without a softmax, and have relative positions (`attention`).
A tied W_U is read from W_E, so that the gradients of both uses add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional

from birthlens.config.model import ModelConfig
from birthlens.model.attention import attention_pattern, relative_scores
from birthlens.model.weights import Weights
from birthlens.shapes import Bool, Float, Int

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Activations:
    """Logits with the attention pattern of each layer."""

    logits: Float[Tensor, "batch pos d_vocab"]
    patterns: list[Float[Tensor, "batch head query_pos key_pos"]]


def tensors_of(
    weights: Weights, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Return the weights as torch tensors on a device (on the CPU they share memory where the dtype is theirs)."""
    return {name: torch.from_numpy(weights[name]).to(device, dtype) for name in weights}


def logits(
    tensors: Tensors, config: ModelConfig, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Return the logits; equal to the HookedTransformer's up to rounding, and differentiable in every tensor."""
    return unembed(tensors, config, residual(tensors, config, tokens))


def logits_at(
    tensors: Tensors, config: ModelConfig, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "row d_vocab"]:
    """Return the logits at the positions of the mask only, in row-major order.

    After the last layer's attention no position reads another, so the other positions are dropped there.
    """
    return unembed(tensors, config, residual(tensors, config, tokens, mask))


def residual(
    tensors: Tensors,
    config: ModelConfig,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "*rows d_model"]:
    """Return the residual stream after the last layer, at every position or at those of the mask only."""
    x = _embed(tensors, tokens)
    for layer in range(config.n_layers):
        q, k, v = _queries_keys_values(tensors, config, layer, x)
        z = _attended(tensors, config, layer, q, k, v).transpose(1, 2)
        if mask is not None and layer == config.n_layers - 1:
            x, z = (part.flatten(0, 1) if mask.all() else part[mask] for part in (x, z))
        x = _write(tensors, config, layer, x, z)
    return x


def activations(tensors: Tensors, config: ModelConfig, tokens: Int[Tensor, "batch pos"]) -> Activations:
    """Return logits and attention patterns, which fused attention never forms."""
    x = _embed(tensors, tokens)
    patterns = []
    for layer in range(config.n_layers):
        q, k, v = _queries_keys_values(tensors, config, layer, x)
        pattern = attention_pattern(config, _scores(tensors, config, layer, q, k))
        patterns.append(pattern)
        x = _write(tensors, config, layer, x, (pattern @ v).transpose(1, 2))
    return Activations(unembed(tensors, config, x), patterns)


def _attended(
    tensors: Tensors,
    config: ModelConfig,
    layer: int,
    q: Float[Tensor, "batch head pos d_head"],
    k: Float[Tensor, "batch head pos d_head"],
    v: Float[Tensor, "batch head pos d_head"],
) -> Float[Tensor, "batch head pos d_head"]:
    """Average values by attention; with a softmax and no relative positions, the pattern is never formed."""
    if config.standard_attention:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=score_scale(config))
    return attention_pattern(config, _scores(tensors, config, layer, q, k)) @ v


def _scores(
    tensors: Tensors,
    config: ModelConfig,
    layer: int,
    q: Float[Tensor, "batch head pos d_head"],
    k: Float[Tensor, "batch head pos d_head"],
) -> Float[Tensor, "batch head query_pos key_pos"]:
    scores = score_scale(config) * q @ k.transpose(-1, -2)
    if config.positions != "relative":
        return scores
    return scores + score_scale(config) * relative_scores(q, tensors[f"L{layer}.W_R"])


def score_scale(config: ModelConfig) -> float:
    """Return the factor of attention scores."""
    return float(config.d_head**-0.5) if config.scaled_scores else 1.0


def _embed(tensors: Tensors, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
    x = functional.embedding(tokens, tensors["W_E"])
    return x + tensors["W_pos"][: tokens.shape[1]] if "W_pos" in tensors else x


def normed(tensors: Tensors, name: str, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
    """Apply a LayerNorm, if the model has it."""
    if f"{name}.w" not in tensors:
        return x
    return functional.layer_norm(x, x.shape[-1:], tensors[f"{name}.w"], tensors[f"{name}.b"], eps=1e-5)


def _queries_keys_values(
    tensors: Tensors, config: ModelConfig, layer: int, x: Float[Tensor, "batch pos d_model"]
) -> list[Float[Tensor, "batch head pos d_head"]]:
    x = normed(tensors, f"L{layer}.ln1", x)
    out = []
    for letter in "QKV":
        heads = einsum(
            x, tensors[f"L{layer}.W_{letter}"], "batch pos d_model, head d_model d_head -> batch head pos d_head"
        )
        if f"L{layer}.b_{letter}" in tensors:
            heads = heads + tensors[f"L{layer}.b_{letter}"][:, None]
        if config.is_rotary(layer) and letter in "QK":
            heads = rotated(heads)
        out.append(heads)
    return out


def rotated(x: Float[Tensor, "batch head pos d_head"]) -> Float[Tensor, "batch head pos d_head"]:
    """Rotate adjacent pairs of axes (2i, 2i+1) by the angle pos / 10000^(2i/d_head)."""
    d = x.shape[-1]
    n = x.shape[-2]
    frequency = 10000 ** (torch.arange(0, d, 2, dtype=x.dtype, device=x.device) / d)
    angle = torch.arange(n, dtype=x.dtype, device=x.device)[:, None] / frequency
    even = x[..., 0::2]
    odd = x[..., 1::2]
    turned = torch.stack([even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], dim=-1)
    return rearrange(turned, "batch head pos half two -> batch head pos (half two)")


def _write(
    tensors: Tensors,
    config: ModelConfig,
    layer: int,
    x: Float[Tensor, "*rows d_model"],
    z: Float[Tensor, "*rows head d_head"],
) -> Float[Tensor, "*rows d_model"]:
    """Add the outputs of attention and feed-forward; in a parallel block the feed-forward reads the block's input."""
    after = x + einsum(z, tensors[f"L{layer}.W_O"], "... head d_head, head d_head d_model -> ... d_model")
    if f"L{layer}.b_O" in tensors:
        after = after + tensors[f"L{layer}.b_O"]
    if not has_feed_forward(tensors, layer):
        return after
    read = normed(tensors, f"L{layer}.ln2", x if config.parallel_attn_mlp else after)
    return feed_forward(tensors, config, layer, read, after)


def has_feed_forward(tensors: Tensors, layer: int) -> bool:
    """Return whether a layer has a feed-forward: the linear W_F, or an MLP."""
    return f"L{layer}.W_F" in tensors or f"L{layer}.W_in" in tensors


def feed_forward(
    tensors: Tensors,
    config: ModelConfig,
    layer: int,
    read: Float[Tensor, "*rows d_model"],
    onto: Float[Tensor, "*rows d_model"] | None = None,
) -> Float[Tensor, "*rows d_model"]:
    """Return what a layer's feed-forward writes when it reads `read`, added to `onto` if it is given.

    The linear one writes read W_F, the MLP f(read W_in + b_in) W_out + b_out with f ReLU or GELU (x times the normal
    distribution function of x); simplified models have no biases.
    """
    if f"L{layer}.W_F" in tensors:
        written = read @ tensors[f"L{layer}.W_F"]
        return written if onto is None else onto + written
    hidden = read @ tensors[f"L{layer}.W_in"]
    if f"L{layer}.b_in" in tensors:
        hidden = hidden + tensors[f"L{layer}.b_in"]
    active = functional.gelu(hidden) if config.feed_forward == "gelu" else hidden.relu()
    written = active @ tensors[f"L{layer}.W_out"]
    # The order of these sums affects the last bits of what a run computes.
    written = written if onto is None else onto + written
    return written + tensors[f"L{layer}.b_out"] if f"L{layer}.b_out" in tensors else written


def unembed(tensors: Tensors, config: ModelConfig, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
    """Return the logits of a residual stream."""
    out = normed(tensors, "ln_final", x) @ readout(tensors, config)
    return out + tensors["b_U"] if "b_U" in tensors else out


def readout(tensors: Tensors, config: ModelConfig) -> Float[Tensor, "*run d_model d_vocab"]:
    """Return the unembedding: W_U, or W_E transposed where both are one matrix."""
    return tensors["W_E"].transpose(-1, -2) if config.tied else tensors["W_U"]
