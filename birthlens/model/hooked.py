"""Models as `HookedTransformer`s, filled from `Weights` and read back.

TransformerLens's own initialisation and seeding are never used (`seed=None, init_weights=False`): every tensor comes from
`Weights`. Biases that TransformerLens always has and the paper does not have are frozen at zero. `lens` says which class is
used with which version of TransformerLens.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import einsum
from torch import Tensor, nn

from birthlens.config.model import ModelConfig, parameter_names
from birthlens.errors import BirthlensError
from birthlens.model.attention import attention_pattern, relative_scores
from birthlens.model.directory import load_causal, load_tokenizer, quiet
from birthlens.model.lens import Attention, CanBeUsedAsMLP, Embed, HookPoint, TransformerBridge, Unembed
from birthlens.model.lens import HookedModel as HookedModel
from birthlens.model.lens import HookedTransformer as HookedTransformer
from birthlens.model.lens import HookedTransformerConfig as HookedTransformerConfig
from birthlens.model.weights import Weights
from birthlens.shapes import Float

_TOLERANCE = 1e-3
"""How far logits of a loaded model may be from the original's, as a share of the largest."""


class PlainAttention(Attention):  # type: ignore[misc]
    """The attention of `attention`, without a softmax or with relative positions, with TransformerLens's hook points.

    It runs whole sequences; a cache of keys and values is refused.
    """

    def __init__(self, cfg: HookedTransformerConfig, layer: int, config: ModelConfig) -> None:
        super().__init__(cfg, "global", layer)
        self.config = config
        if config.positions == "relative":
            self.W_R = nn.Parameter(torch.zeros(cfg.n_heads, cfg.n_ctx, cfg.d_head, dtype=cfg.dtype))

    def forward(
        self,
        query_input: Float[Tensor, "batch pos *head d_model"],
        key_input: Float[Tensor, "batch pos *head d_model"],
        value_input: Float[Tensor, "batch pos *head d_model"],
        past_kv_cache_entry: object = None,
        **options: Any,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return what the heads write."""
        if past_kv_cache_entry is not None or any(option is not None for option in options.values()):
            raise BirthlensError(
                f"attention = {self.config.attention!r}, positions = {self.config.positions!r}: the model runs whole "
                "sequences, without caches, masks or biases."
            )
        q, k, v = self.calculate_qkv_matrices(query_input, key_input, value_input)
        if self.config.positions == "rotary":
            q = self.hook_rot_q(self.apply_rotary(q))
            k = self.hook_rot_k(self.apply_rotary(k))
        scores = self.calculate_attention_scores(q, k)
        if self.config.positions == "relative":
            scores = scores + relative_scores(q.transpose(1, 2), self.W_R) / self.attn_scale
        scores = self.hook_attn_scores(self.apply_causal_mask(scores))
        z = self.calculate_z_scores(v, self.hook_pattern(attention_pattern(self.config, scores)))
        if not self.cfg.use_attn_result:
            return einsum(z, self.W_O, "batch pos head d_head, head d_head d_model -> batch pos d_model") + self.b_O
        written = einsum(z, self.W_O, "batch pos head d_head, head d_head d_model -> batch pos head d_model")
        return self.hook_result(written).sum(2) + self.b_O


class TiedUnembed(Unembed):  # type: ignore[misc]
    """An unembedding that reads the embedding's matrix transposed, so that both train as one."""

    def __init__(self, cfg: HookedTransformerConfig, embed: Embed) -> None:
        super().__init__(cfg)
        del self._parameters["W_U"]
        self._source = (embed,)  # in a tuple, so that the embedding is not registered a second time

    def __getattr__(self, name: str) -> Any:
        return self._source[0].W_E.T if name == "W_U" else super().__getattr__(name)


class LinearFeedForward(CanBeUsedAsMLP):  # type: ignore[misc]
    """The paper's W_F as a TransformerLens MLP: mlp_out = x @ W_F (`W_in`), with an identity `W_out` that never moves.

    `active=False` writes zeros: TransformerLens needs an MLP in every block, and a model here may have blocks without one.
    """

    def __init__(self, cfg: HookedTransformerConfig, active: bool) -> None:
        super().__init__(cfg)
        d = cfg.d_model
        weight = torch.zeros(d, d, dtype=cfg.dtype)
        if active:
            self.W_in = nn.Parameter(weight)
        else:
            self.register_buffer("W_in", weight)
        self.register_buffer("W_out", torch.eye(d, dtype=cfg.dtype))
        self.register_buffer("b_in", torch.zeros(d, dtype=cfg.dtype))
        self.register_buffer("b_out", torch.zeros(d, dtype=cfg.dtype))
        self.hook_pre = HookPoint()
        self.hook_post = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return x @ W_F."""
        return self.hook_post(self.hook_pre(x @ self.W_in)) @ self.W_out


def hooked_config(config: ModelConfig, d_vocab: int, n_ctx: int, dtype: torch.dtype) -> HookedTransformerConfig:
    """Convert a ModelConfig to a TransformerLens config.

    The full model uses `parallel_attn_mlp` by default: the authors' pre-norm block feeds both halves the same input.
    """
    full = config.family == "full"
    has_mlp = config.feed_forward != "none"
    kinds = {"rotary": "rotary", "relative": "alibi"}  # of TransformerLens's, those that add nothing to the stream
    return HookedTransformerConfig(
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        d_model=config.d_model,
        d_head=config.d_head,
        d_mlp=(config.d_model if config.feed_forward == "linear" else config.hidden) if has_mlp else None,
        n_ctx=n_ctx,
        d_vocab=d_vocab,
        attn_only=not has_mlp,
        act_fn=("gelu" if config.feed_forward == "gelu" else "relu") if has_mlp else None,
        normalization_type="LN" if full else None,
        eps=1e-5,
        parallel_attn_mlp=config.parallel_attn_mlp and has_mlp,
        use_attn_scale=config.scaled_scores,
        positional_embedding_type=kinds.get(config.positions, "standard"),
        rotary_dim=config.d_head if config.positions == "rotary" else None,
        rotary_adjacent_pairs=config.positions == "rotary",
        default_prepend_bos=False,
        init_weights=False,
        seed=None,
        device="cpu",
        dtype=dtype,
    )


def build(
    weights: Weights,
    trained: Iterable[str] = (),
    n_ctx: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> HookedTransformer:
    """Build the HookedTransformer of some weights; only the parameters in `trained` require gradients.

    `n_ctx` matters for rotary positions only, whose weights do not determine it. If W_E is trained, a tied unembedding
    is the same tensor.

    Raises:
        BirthlensError: if `trained` holds a name that is not a parameter of the model, or a tied W_U.

    Example:
        >>> from birthlens.model.initialisation import initial_weights
        >>> model = build(initial_weights(ModelConfig(d_model=8), 5, 4, np.random.default_rng(0)))
        >>> tuple(model(torch.tensor([[0, 1, 2]])).shape)
        (1, 3, 5)
    """
    config = weights.config
    trained = tuple(trained)
    if config.tied and "W_U" in trained:
        raise BirthlensError("trained = ['W_U']: this model has a tied unembedding, W_U is W_E transposed; name W_E.")
    n_ctx = weights.n_ctx or n_ctx or 1024
    cfg = hooked_config(config, weights["W_E"].shape[0], n_ctx, dtype)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        model = HookedTransformer(cfg)
    if config.feed_forward != "none":
        for layer, block in enumerate(model.blocks):
            if config.feed_forward == "linear" or not config.has_feed_forward(layer):
                block.mlp = LinearFeedForward(cfg, active=config.has_feed_forward(layer))
    plain = cfg
    if config.positions in ("rotary", "relative"):
        plain = hooked_config(config.changed(positions="random"), cfg.d_vocab, n_ctx, dtype)
    for layer, block in enumerate(model.blocks):
        own = cfg if config.is_rotary(layer) else plain
        if not config.standard_attention:
            block.attn = PlainAttention(own, layer, config)
        elif own is not cfg:
            block.attn = Attention(own, "global", layer)
    if config.tied and "W_E" in trained:
        model.unembed = TiedUnembed(cfg, model.embed)
    model.setup()
    model.register_forward_pre_hook(_check_tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
            parameter.requires_grad_(False)
    load_weights(model, weights)
    wanted = set(trained)
    valid = parameters(model, config)
    if unknown := sorted(wanted - valid.keys()):
        raise BirthlensError(f"trained = {unknown}: the model has no such parameter; valid are {', '.join(valid)}.")
    for name in wanted:
        valid[name].requires_grad_(True)
    return model.eval()  # tools of TransformerLens 4 ask for it; there is no dropout, so nothing else depends on it


def _check_tokens(model: nn.Module, arguments: tuple[object, ...]) -> None:
    """Refuse a whole TokenBatch, for which the model would raise an AttributeError."""
    if arguments and hasattr(arguments[0], "tokens") and hasattr(arguments[0], "targets"):
        raise BirthlensError(
            f"input = a {type(arguments[0]).__name__}: give the model its tokens, as model(batch.tokens)."
        )


def load_pretrained(path: str | Path) -> TransformerBridge:
    """Load a Hugging Face causal language model (GPT-2, GPT-NeoX, Llama and similar) from a local directory.

    Nothing is fetched. The result is TransformerLens's bridge to the model, which has the hook points and weights of a
    HookedTransformer. It computes in float32, whatever the files contain. Token ids are enough: if the directory has no
    tokenizer, the model's `tokenizer` is empty.

    Raises:
        BirthlensError: if the directory contains no such model, or one that TransformerLens cannot read.
    """
    theirs = load_causal(path)
    tokenizer = load_tokenizer(path) or _empty_tokenizer()
    tokens = torch.randint(int(theirs.config.vocab_size), (1, 4), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad(), quiet():
            expected = theirs(tokens, use_cache=False).logits
            model = TransformerBridge.boot_transformers(
                str(Path(path).absolute()), hf_model=theirs, tokenizer=tokenizer, device="cpu"
            )
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BirthlensError(
            f"model = {str(path)!r} ({type(theirs).__name__}) cannot be read by TransformerLens: {reason}"
        ) from None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    try:
        with torch.no_grad(), quiet():
            logits = model(tokens)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BirthlensError(
            f"model = {str(path)!r} ({type(theirs).__name__}) cannot be run by TransformerLens: {reason}"
        ) from None
    if not torch.allclose(logits, expected, atol=_TOLERANCE * float(expected.abs().max())):
        raise BirthlensError(
            f"model = {str(path)!r} ({type(theirs).__name__}) has other logits as TransformerLens runs it than by itself, "
            "so nothing measured on it would be true of the model."
        )
    return model


def _empty_tokenizer() -> Any:
    """Return a tokenizer without tokens; without one, TransformerLens would look for one elsewhere."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    fast: Any = import_module("transformers").PreTrainedTokenizerFast
    return fast(tokenizer_object=Tokenizer(WordLevel({"<none>": 0}, unk_token="<none>")))


def parameters(model: HookedTransformer, config: ModelConfig) -> dict[str, Tensor]:
    """Return the model's live parameters by birthlens name."""
    return {name: _parameter(model, name) for name in parameter_names(config)}


def load_weights(model: HookedTransformer, weights: Weights) -> None:
    """Copy weights into a model of the same config, in place."""
    with torch.no_grad():
        for name, parameter in parameters(model, weights.config).items():
            parameter.copy_(torch.from_numpy(np.array(weights[name])))


def weights_of(model: HookedTransformer, config: ModelConfig) -> Weights:
    """Return a copy of a model's parameters, bit for bit."""
    return Weights(config, {name: t.detach().numpy().copy() for name, t in parameters(model, config).items()})


def _parameter(model: HookedTransformer, name: str) -> Tensor:
    layer, dot, matrix = name.partition(".")
    if not dot:
        room = {"W_E": "embed", "W_pos": "pos_embed"}.get(name, "unembed")
        return getattr(getattr(model, room), name)
    if layer == "ln_final":
        return getattr(model.ln_final, matrix)
    block = model.blocks[int(layer[1:])]
    if matrix == "W_F":
        return block.mlp.W_in
    if matrix.startswith("ln"):
        norm, _, part = matrix.partition(".")
        return getattr(getattr(block, norm), part)
    room = block.mlp if matrix in ("W_in", "b_in", "W_out", "b_out") else block.attn
    return getattr(room, matrix)
