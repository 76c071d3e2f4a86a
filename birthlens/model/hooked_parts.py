"""The config and the parts of a `HookedTransformer` for TransformerLens 4 (`hooked_transformer`).

Names, hook points, operations and their order are those of TransformerLens 3.9, for the options that a model of birthlens
can have; other options are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn import functional
from transformer_lens.FactoredMatrix import FactoredMatrix
from transformer_lens.hook_points import HookPoint

from birthlens.errors import BirthlensError
from birthlens.shapes import Float, Int

_VALID: dict[str, tuple[object, ...]] = {
    "normalization_type": (None, "LN"),
    "positional_embedding_type": ("standard", "rotary", "alibi"),
    "act_fn": (None, "relu", "gelu"),
    "init_weights": (False,),
    "seed": (None,),
    "default_prepend_bos": (False,),
    "n_key_value_heads": (None,),
}


@dataclass
class HookedTransformerConfig:
    """The options of a model, named as in TransformerLens 3.9.

    Weights start at zero and are filled by the caller; rotary positions turn adjacent pairs of all axes of a head. The
    biases of alibi are not here: a model with it needs attention of its own.

    Raises:
        BirthlensError: for an option that only TransformerLens 3.9 has.
    """

    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    n_ctx: int
    d_vocab: int
    d_mlp: int | None = None
    attn_only: bool = False
    act_fn: str | None = None
    normalization_type: str | None = "LN"
    eps: float = 1e-5
    parallel_attn_mlp: bool = False
    use_attn_scale: bool = True
    positional_embedding_type: str = "standard"
    rotary_dim: int | None = None
    rotary_adjacent_pairs: bool = False
    n_key_value_heads: int | None = None
    default_prepend_bos: bool = False
    init_weights: bool = False
    seed: int | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    use_attn_result: bool = False
    use_split_qkv_input: bool = False
    use_hook_mlp_in: bool = False

    def __post_init__(self) -> None:
        for name, valid in _VALID.items():
            if getattr(self, name) not in valid:
                raise BirthlensError(
                    f"{name} = {getattr(self, name)!r}: with TransformerLens 4, valid is "
                    f"{' or '.join(map(repr, valid))}; other values need TransformerLens 3.9."
                )
        rotary = self.positional_embedding_type == "rotary"
        if rotary and not (self.rotary_adjacent_pairs and self.rotary_dim == self.d_head and self.d_head % 2 == 0):
            raise BirthlensError(
                f"rotary_dim = {self.rotary_dim}: with TransformerLens 4, rotary positions turn adjacent pairs "
                f"(rotary_adjacent_pairs = True) of all d_head = {self.d_head} axes, an even number."
            )
        if not self.attn_only and (self.d_mlp is None or self.act_fn is None):
            raise BirthlensError("attn_only = False: give the MLP its d_mlp and act_fn.")

    @property
    def attn_scale(self) -> float:
        """The divisor of attention scores, if `use_attn_scale`: the square root of d_head."""
        return sqrt(self.d_head)


def _zeros(cfg: HookedTransformerConfig, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=cfg.dtype, device=cfg.device))


class Embed(nn.Module):
    """The embedding of tokens, W_E[token]."""

    def __init__(self, cfg: HookedTransformerConfig) -> None:
        super().__init__()
        self.W_E = _zeros(cfg, cfg.d_vocab, cfg.d_model)

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the embeddings."""
        return self.W_E[tokens, :]


class PosEmbed(nn.Module):
    """The embedding of positions, W_pos[pos]."""

    def __init__(self, cfg: HookedTransformerConfig) -> None:
        super().__init__()
        self.W_pos = _zeros(cfg, cfg.n_ctx, cfg.d_model)

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the same embeddings for every sequence."""
        return self.W_pos[: tokens.shape[1]].expand(*tokens.shape, -1).clone()


class LayerNorm(nn.Module):
    """LayerNorm, (x - mean) / sqrt(variance + eps) * w + b."""

    def __init__(self, cfg: HookedTransformerConfig) -> None:
        super().__init__()
        self.eps = cfg.eps
        self.w = nn.Parameter(torch.ones(cfg.d_model, dtype=cfg.dtype, device=cfg.device))
        self.b = _zeros(cfg, cfg.d_model)
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos *head d_model"]) -> Float[Tensor, "batch pos *head d_model"]:
        """Return the normalised input."""
        centred = x - x.mean(-1, keepdim=True)
        scale = self.hook_scale((centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        return self.hook_normalized(centred / scale) * self.w + self.b


class Attention(nn.Module):
    """Causal attention with a softmax."""

    def __init__(self, cfg: HookedTransformerConfig, attn_type: str = "global", layer_id: int | None = None) -> None:
        super().__init__()
        if attn_type != "global":
            raise BirthlensError(f"attn_type = {attn_type!r}: with TransformerLens 4, attention is global.")
        self.cfg = cfg
        self.layer_id = layer_id
        self.attn_scale = cfg.attn_scale if cfg.use_attn_scale else 1.0
        self.W_Q = _zeros(cfg, cfg.n_heads, cfg.d_model, cfg.d_head)
        self.W_K = _zeros(cfg, cfg.n_heads, cfg.d_model, cfg.d_head)
        self.W_V = _zeros(cfg, cfg.n_heads, cfg.d_model, cfg.d_head)
        self.W_O = _zeros(cfg, cfg.n_heads, cfg.d_head, cfg.d_model)
        self.b_Q = _zeros(cfg, cfg.n_heads, cfg.d_head)
        self.b_K = _zeros(cfg, cfg.n_heads, cfg.d_head)
        self.b_V = _zeros(cfg, cfg.n_heads, cfg.d_head)
        self.b_O = _zeros(cfg, cfg.d_model)
        self.hook_q = HookPoint()
        self.hook_k = HookPoint()
        self.hook_v = HookPoint()
        self.hook_z = HookPoint()
        self.hook_attn_scores = HookPoint()
        self.hook_pattern = HookPoint()
        self.hook_result = HookPoint()
        if cfg.positional_embedding_type == "rotary":
            self.hook_rot_q = HookPoint()
            self.hook_rot_k = HookPoint()

    def forward(
        self,
        query_input: Float[Tensor, "batch pos *head d_model"],
        key_input: Float[Tensor, "batch pos *head d_model"],
        value_input: Float[Tensor, "batch pos *head d_model"],
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return what the heads write."""
        if self.cfg.positional_embedding_type == "alibi":
            raise BirthlensError("positional_embedding_type = 'alibi': its biases need TransformerLens 3.9.")
        q, k, v = self.calculate_qkv_matrices(query_input, key_input, value_input)
        if self.cfg.positional_embedding_type == "rotary":
            q = self.hook_rot_q(self.apply_rotary(q))
            k = self.hook_rot_k(self.apply_rotary(k))
        scores = self.hook_attn_scores(self.apply_causal_mask(self.calculate_attention_scores(q, k)))
        z = self.calculate_z_scores(v, self.hook_pattern(scores.softmax(-1)))
        if self.cfg.use_attn_result:
            return self.hook_result((z[..., None] * self.W_O).sum(-2)).sum(2) + self.b_O
        W_O = rearrange(self.W_O, "head d_head d_model -> d_model (head d_head)").contiguous()
        return functional.linear(z.flatten(2), W_O, self.b_O)

    def calculate_qkv_matrices(
        self,
        query_input: Float[Tensor, "batch pos *head d_model"],
        key_input: Float[Tensor, "batch pos *head d_model"],
        value_input: Float[Tensor, "batch pos *head d_model"],
    ) -> tuple[
        Float[Tensor, "batch pos head d_head"],
        Float[Tensor, "batch pos head d_head"],
        Float[Tensor, "batch pos head d_head"],
    ]:
        """Return queries, keys and values; inputs may differ between heads."""
        q = self.hook_q(_projected(query_input, self.W_Q, self.b_Q))
        k = self.hook_k(_projected(key_input, self.W_K, self.b_K))
        return q, k, self.hook_v(_projected(value_input, self.W_V, self.b_V))

    def calculate_attention_scores(
        self, q: Float[Tensor, "batch pos head d_head"], k: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch head query_pos key_pos"]:
        """Return q . k / attn_scale."""
        return q.transpose(1, 2) @ rearrange(k, "batch pos head d_head -> batch head d_head pos") / self.attn_scale

    def apply_causal_mask(
        self, scores: Float[Tensor, "batch head query_pos key_pos"]
    ) -> Float[Tensor, "batch head query_pos key_pos"]:
        """Set the scores of later keys to minus infinity."""
        n = scores.shape[-1]
        future = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill(future, float("-inf"))

    def calculate_z_scores(
        self, v: Float[Tensor, "batch pos head d_head"], pattern: Float[Tensor, "batch head query_pos key_pos"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Return the values, averaged by the pattern."""
        return self.hook_z((pattern @ v.transpose(1, 2)).transpose(1, 2))

    def apply_rotary(self, x: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos head d_head"]:
        """Turn adjacent pairs of axes (2i, 2i+1) by the angle pos / 10000^(2i/d_head)."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        half = x.shape[-1] // 2
        period = (10000 ** (torch.arange(half, dtype=wide, device=x.device) / half)).repeat_interleave(2)
        angles = (torch.arange(x.shape[1], dtype=wide, device=x.device)[:, None] / period)[:, None]
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_K^T of every head."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-1, -2))

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O of every head."""
        return FactoredMatrix(self.W_V, self.W_O)


def _projected(
    x: Float[Tensor, "batch pos *head d_model"],
    weight: Float[Tensor, "head d_model d_head"],
    bias: Float[Tensor, "head d_head"],
) -> Float[Tensor, "batch pos head d_head"]:
    if x.dim() == 4:
        return einsum(x, weight, "batch pos head d_model, head d_model d_head -> batch pos head d_head") + bias
    flat = rearrange(weight, "head d_model d_head -> (head d_head) d_model")
    return functional.linear(x, flat, bias.flatten()).reshape(*x.shape[:2], *bias.shape)


class CanBeUsedAsMLP(nn.Module):
    """A feed-forward, by its config."""

    def __init__(self, cfg: HookedTransformerConfig) -> None:
        super().__init__()
        self.cfg = cfg


class MLP(CanBeUsedAsMLP):
    """A feed-forward, act_fn(x W_in + b_in) W_out + b_out."""

    def __init__(self, cfg: HookedTransformerConfig) -> None:
        super().__init__(cfg)
        assert cfg.d_mlp is not None
        self.act_fn: Callable[[Tensor], Tensor] = functional.gelu if cfg.act_fn == "gelu" else functional.relu
        self.W_in = _zeros(cfg, cfg.d_model, cfg.d_mlp)
        self.b_in = _zeros(cfg, cfg.d_mlp)
        self.W_out = _zeros(cfg, cfg.d_mlp, cfg.d_model)
        self.b_out = _zeros(cfg, cfg.d_model)
        self.hook_pre = HookPoint()
        self.hook_post = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return what the MLP writes."""
        active = self.hook_post(self.act_fn(self.hook_pre(_affine(x, self.W_in, self.b_in))))
        return _affine(active, self.W_out, self.b_out)


def _affine(
    x: Float[Tensor, "batch pos d_in"], weight: Float[Tensor, "d_in d_out"], bias: Float[Tensor, " d_out"]
) -> Float[Tensor, "batch pos d_out"]:
    return torch.addmm(bias, x.flatten(0, 1), weight).reshape(*x.shape[:2], -1)


class Unembed(nn.Module):
    """The unembedding, x W_U + b_U."""

    def __init__(self, cfg: HookedTransformerConfig) -> None:
        super().__init__()
        self.W_U = _zeros(cfg, cfg.d_model, cfg.d_vocab)
        self.b_U = _zeros(cfg, cfg.d_vocab)
        self.hook_in = HookPoint()
        self.hook_out = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Return the logits."""
        return self.hook_out(functional.linear(self.hook_in(x), self.W_U.T.contiguous(), self.b_U))
