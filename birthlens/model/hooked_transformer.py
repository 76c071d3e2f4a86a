"""`HookedTransformer` for TransformerLens 4, which no longer contains it, on the hook points that both versions have.

It has the modules, weights, hook points, flags and methods of TransformerLens 3.9's class that need no tokenizer, and
computes the same numbers. It reads whole sequences of ids; it has no cache of keys and values, and does not generate. With
TransformerLens 3.9, that library's own class is used, and the tests compare the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.FactoredMatrix import FactoredMatrix
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule

from birthlens.errors import BirthlensError
from birthlens.model.hooked_parts import MLP, Attention, Embed, HookedTransformerConfig, LayerNorm, PosEmbed, Unembed
from birthlens.shapes import Float, Int

_RETURNED = (None, "logits", "loss", "both")
_FLAGS = {
    "hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
}
"""The flag of the config that enables a hook point."""


class TransformerBlock(nn.Module):
    """Attention and a feed-forward, one after the other or both on the block's input."""

    def __init__(self, cfg: HookedTransformerConfig, layer: int) -> None:
        super().__init__()
        self.cfg = cfg
        normed = cfg.normalization_type is not None
        self.ln1 = LayerNorm(cfg) if normed else nn.Identity()
        self.attn = Attention(cfg, "global", layer)
        if not cfg.attn_only:
            self.ln2 = LayerNorm(cfg) if normed else nn.Identity()
            self.mlp = MLP(cfg)
        self.hook_q_input = HookPoint()
        self.hook_k_input = HookPoint()
        self.hook_v_input = HookPoint()
        self.hook_mlp_in = HookPoint()
        self.hook_attn_out = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_pre = HookPoint()
        if not (cfg.attn_only or cfg.parallel_attn_mlp):
            self.hook_resid_mid = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream after the block."""
        x = self.hook_resid_pre(x)
        reads = [x, x, x]
        if self.cfg.use_split_qkv_input:
            hooks = (self.hook_q_input, self.hook_k_input, self.hook_v_input)
            reads = [hook(x[:, :, None].repeat(1, 1, self.cfg.n_heads, 1)) for hook in hooks]
        written = self.hook_attn_out(self.attn(*(self.ln1(read) for read in reads)))
        if self.cfg.attn_only:
            return self.hook_resid_post(x + written)
        middle = x + written if self.cfg.parallel_attn_mlp else self.hook_resid_mid(x + written)
        read = x if self.cfg.parallel_attn_mlp else middle
        if self.cfg.use_hook_mlp_in:
            read = self.hook_mlp_in(read.clone())
        return self.hook_resid_post(middle + self.hook_mlp_out(self.mlp(self.ln2(read))))


class HookedTransformer(HookedRootModule):  # type: ignore[misc]
    """A transformer with TransformerLens's hook points."""

    def __init__(self, cfg: HookedTransformerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = Embed(cfg)
        self.hook_embed = HookPoint()
        if cfg.positional_embedding_type == "standard":
            self.pos_embed = PosEmbed(cfg)
            self.hook_pos_embed = HookPoint()
        self.blocks: Any = nn.ModuleList(TransformerBlock(cfg, layer) for layer in range(cfg.n_layers))
        if cfg.normalization_type is not None:
            self.ln_final = LayerNorm(cfg)
        self.unembed = Unembed(cfg)
        self.tokenizer = None
        self.setup()

    def forward(
        self,
        input: Int[Tensor, "batch pos"] | Int[Tensor, " pos"] | Float[Tensor, "batch pos d_model"],
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        start_at_layer: int | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        stop_at_layer: int | None = None,
    ) -> Any:
        """Return the logits, the mean loss of the next token, both, or the residual stream before `stop_at_layer`.

        `input` are ids, or with `start_at_layer` the residual stream before that layer; its loss needs the `tokens`.

        Raises:
            BirthlensError: for another `return_type`, or a loss without tokens.
        """
        if return_type not in _RETURNED:
            raise BirthlensError(f"return_type = {return_type!r} is unknown; valid are {_RETURNED}.")
        if start_at_layer is None:
            tokens = (input[None] if input.dim() == 1 else input).to(self.cfg.device)
            x = self.hook_embed(self.embed(tokens))
            if self.cfg.positional_embedding_type == "standard":
                x = x + self.hook_pos_embed(self.pos_embed(tokens))
        else:
            x = input
        for block in list(self.blocks)[start_at_layer:stop_at_layer]:
            x = block(x)
        if stop_at_layer is not None:
            return x
        if self.cfg.normalization_type is not None:
            x = self.ln_final(x)
        if return_type is None:
            return None
        logits = self.unembed(x)
        if return_type == "logits":
            return logits
        if tokens is None:
            raise BirthlensError(f"return_type = {return_type!r}: with start_at_layer, give the tokens too.")
        loss = self.loss_fn(logits, tokens, per_token=loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def loss_fn(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"], per_token: bool = False
    ) -> Float[Tensor, ""] | Float[Tensor, "batch next"]:
        """Return the cross-entropy of the next token, its mean or at every position."""
        losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        return losses if per_token else losses.mean()

    def run_with_cache(
        self, *arguments: Any, return_cache_object: bool = True, remove_batch_dim: bool = False, **options: Any
    ) -> Any:
        """Run the model; return what it returns, and an ActivationCache or a dict of activations."""
        out, found = super().run_with_cache(*arguments, remove_batch_dim=remove_batch_dim, **options)
        return out, ActivationCache(found, self, has_batch_dim=not remove_batch_dim) if return_cache_object else found

    def check_hooks_to_add(self, hook_point: object, hook_point_name: str, *arguments: Any, **options: Any) -> None:
        """Raise BirthlensError for a hook at a point that needs a flag which is not set."""
        flag = _FLAGS.get(hook_point_name.split(".")[-1])
        if flag and not getattr(self.cfg, flag):
            raise BirthlensError(f"hook {hook_point_name}: the model does not use it until set_{flag}(True) is called.")

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Choose whether passes compute what each head writes (hook_result)."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Choose whether queries, keys and values have inputs of their own (hook_q_input, hook_k_input, hook_v_input)."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Choose whether the input of MLPs has a hook (hook_mlp_in)."""
        if self.cfg.attn_only:
            raise BirthlensError("hook_mlp_in: the model has no MLP.")
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    def _apply(self, fn: Any, recurse: bool = True) -> HookedTransformer:
        """Move or convert the tensors, and let the config say where and what they are."""
        super()._apply(fn, recurse)
        self.cfg.device = str(self.embed.W_E.device)
        self.cfg.dtype = self.embed.W_E.dtype
        return self

    def __getattr__(self, name: str) -> Any:
        """Return W_E, W_pos, W_U and b_U; and weights of attention and MLPs, one of every layer, stacked."""
        if name in ("W_E", "W_pos", "W_U", "b_U"):
            room = {"W_E": "embed", "W_pos": "pos_embed"}.get(name, "unembed")
            return getattr(super().__getattr__(room), name)
        if name in _IN_LAYERS:
            return torch.stack([getattr(getattr(block, _IN_LAYERS[name]), name) for block in self.blocks])
        return super().__getattr__(name)

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_K^T of every head of every layer."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O of every head of every layer."""
        return FactoredMatrix(self.W_V, self.W_O)

    def all_head_labels(self) -> list[str]:
        """Return the addresses of all heads, such as L0H0."""
        return [f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads)]

    def tokens_to_residual_directions(self, tokens: Int[Tensor, "*shape"] | int) -> Float[Tensor, "*shape d_model"]:
        """Return the column of W_U of each token."""
        ids = torch.as_tensor(tokens)
        return self.W_U.T[int(ids) if ids.numel() == 1 else ids]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Return the sum of the biases that were written before a layer, or before its MLP."""
        total = torch.zeros_like(self.W_E[0])
        for block in list(self.blocks)[:layer]:
            total = total + block.attn.b_O
            if include_mlp_biases:
                total = total + block.mlp.b_out
        return total + self.blocks[layer].attn.b_O if mlp_input else total


_IN_LAYERS = {
    **dict.fromkeys(("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"), "attn"),
    **dict.fromkeys(("W_in", "W_out", "b_in", "b_out"), "mlp"),
}
"""Weights of attention and MLPs, and the module of a block that holds them."""
