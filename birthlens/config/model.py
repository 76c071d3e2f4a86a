"""The config of a model, and the names and shapes of its parameters.

Names are `W_E`, `W_pos`, `W_U`, and `L{layer}.{matrix}` with layers from 0 (the paper's superscripts 1 and 2 are layers 0
and 1). Shapes are TransformerLens's: row vectors, `x @ W`, one leading head axis in attention.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from birthlens.config.base import Positive, Section
from birthlens.errors import BirthlensError


class ModelConfig(Section):
    """A transformer of the paper: `simplified` (section 4.2, frozen random maps) or `full` (section 3.2).

    `init="authors"` has embeddings N(0, 1) and linear maps uniform in +-1/sqrt(d_model); `scaled` divides the embeddings
    by sqrt(d_model); `orthogonal` makes tokens, positions, remapped tokens and the unembedding jointly orthogonal as far
    as d_model allows. `zeroed` names matrices that start at zero instead. `n_layers=1` is the one-layer control.
    """

    section: ClassVar[str] = "model"
    family: Literal["simplified", "full"] = "simplified"
    """simplified has frozen random maps (paper section 4.2); full trains everything (section 3.2)."""
    d_model: Positive = 128
    """Width of the residual stream."""
    n_layers: Annotated[int, Meta(ge=1, le=1000)] = 2
    """Number of layers; 1 is the one-layer control."""
    n_heads: Positive = 1
    """Heads in each layer; the simplified model has one."""
    d_mlp: Positive | None = None
    """Hidden width of an MLP; null means 4 d_model."""
    feed_forward: Literal["none", "linear", "relu", "gelu"] = "none"
    """No MLP, the linear W_F of the paper in the last layer, or an MLP with ReLU or (full model only) GELU."""
    positions: Literal["random", "sinusoidal", "rotary", "relative"] = "random"
    """Random (or learned) embeddings, sinusoids, rotary (simplified: in layer 0), or (full) learned relative terms."""
    scaled_scores: bool = True
    """Whether attention scores are divided by the square root of d_head."""
    init: Literal["authors", "scaled", "orthogonal"] = "authors"
    """Initial values of embeddings and maps: the authors', with embeddings divided by sqrt(d_model), or orthogonal."""
    zeroed: tuple[str, ...] = ()
    """Names of matrices that start at zero."""
    attention: Literal["softmax", "relu", "linear"] = "softmax"
    """Weights of the keys: a softmax of the scores; max(score, 0) or the score, divided by the query's position from 1."""
    feed_forward_layers: tuple[Annotated[int, Meta(ge=0)], ...] | None = None
    """Layers of the full model that have an MLP; null means all of them."""
    block: Literal["parallel", "sequential"] = "parallel"
    """Whether the MLP of the full model reads the input of its layer, or that with what its attention has written."""
    unembedding: Literal["own", "tied"] = "own"
    """Whether W_U of the full model is a matrix of its own, or W_E transposed: then both are trained as one matrix."""

    added: ClassVar[frozenset[str]] = frozenset({"zeroed", "attention", "feed_forward_layers", "block", "unembedding"})

    def _check(self) -> None:
        if self.d_model % self.n_heads:
            raise BirthlensError(
                f"model.n_heads = {self.n_heads}: it must divide model.d_model = {self.d_model}; "
                f"{_divisors(self.d_model)} do."
            )
        if self.family == "simplified" and self.n_heads != 1:
            raise BirthlensError(
                f"model.n_heads = {self.n_heads}: the simplified model has one head in each layer; use family: full."
            )
        if self.family == "simplified" and self.d_mlp is not None and self.feed_forward != "relu":
            raise BirthlensError(
                f"model.d_mlp = {self.d_mlp}: only feed_forward: relu has a hidden width; leave it out otherwise."
            )
        if self.family == "full" and self.feed_forward == "linear":
            raise BirthlensError("model.feed_forward = 'linear': the full model has an MLP; use relu, gelu or none.")
        if self.family == "simplified" and self.feed_forward == "gelu":
            raise BirthlensError("model.feed_forward = 'gelu': only the full model has this option; use family: full.")
        if self.family == "full" and self.positions == "sinusoidal":
            raise BirthlensError(
                "model.positions = 'sinusoidal': the full model has none of these; use random, rotary or relative."
            )
        if self.family != "full" and self.positions == "relative":
            raise BirthlensError("model.positions = 'relative': only the full model has this option; use family: full.")
        if self.family == "full" and self.init == "orthogonal":
            raise BirthlensError("model.init = 'orthogonal': it needs the frozen maps of family: simplified.")
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise BirthlensError(f"model.d_model = {self.d_model}: sinusoidal positions need an even number.")
        if self.positions == "rotary" and self.d_head % 2:
            raise BirthlensError(
                f"model.d_model = {self.d_model}: rotary positions need heads of even width, not {self.d_head}."
            )
        self._check_options_of_full()

    def _check_options_of_full(self) -> None:
        for name in ("attention", "feed_forward_layers", "block", "unembedding"):
            value = getattr(self, name)
            if self.family != "full" and value != getattr(type(self), name):
                raise BirthlensError(
                    f"model.{name} = {value!r}: only the full model has this option; use family: full."
                )
        if self.feed_forward == "none" and self.block != "parallel":
            raise BirthlensError(f"model.block = {self.block!r}: there is no MLP; use feed_forward: relu.")
        layers = self.feed_forward_layers
        if layers is None:
            return
        if self.feed_forward == "none":
            raise BirthlensError(
                f"model.feed_forward_layers = {list(layers)}: there is no MLP; use feed_forward: relu."
            )
        if not layers or list(layers) != sorted(set(layers)) or layers[-1] >= self.n_layers:
            raise BirthlensError(
                f"model.feed_forward_layers = {list(layers)}: give at least one layer from 0 to {self.n_layers - 1}, each "
                "once and in order."
            )

    def has_feed_forward(self, layer: int) -> bool:
        """Return whether a layer has a feed-forward: the last one of a simplified model, the chosen ones of a full one."""
        if self.feed_forward == "none":
            return False
        if self.family == "simplified":
            return layer == self.n_layers - 1
        return self.feed_forward_layers is None or layer in self.feed_forward_layers

    @property
    def standard_attention(self) -> bool:
        """Whether attention is a softmax of products of queries and keys alone, which the fast passes compute."""
        return self.attention == "softmax" and self.positions != "relative"

    def is_rotary(self, layer: int) -> bool:
        """Return whether a layer rotates its queries and keys: every layer of the full model, layer 0 of the simplified."""
        return self.positions == "rotary" and (self.family == "full" or layer == 0)

    @property
    def tied(self) -> bool:
        """Whether W_U is W_E transposed."""
        return self.unembedding == "tied"

    def check_named(self, place: str, names: Iterable[object]) -> None:
        """Raise BirthlensError if a tied W_U is named where a matrix of its own is meant."""
        if self.tied and "W_U" in names:
            raise BirthlensError(
                f"{place}: W_U is W_E transposed in a model with unembedding: tied; name W_E, and W_U follows."
            )

    @property
    def parallel_attn_mlp(self) -> bool:
        """Whether attention and MLP of a layer read the same input (the name is TransformerLens's)."""
        return self.family == "full" and self.block == "parallel"

    @property
    def d_head(self) -> int:
        """Width of one head: d_model / n_heads."""
        return self.d_model // self.n_heads

    @property
    def hidden(self) -> int:
        """Width of an MLP: d_mlp, or 4 d_model if it is not given."""
        return self.d_mlp if self.d_mlp is not None else 4 * self.d_model


def parameter_shapes(config: ModelConfig, d_vocab: int, n_ctx: int) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every parameter of the model, in the order of the forward pass.

    Example:
        >>> list(parameter_shapes(ModelConfig(d_model=8, n_layers=1), d_vocab=5, n_ctx=4))
        ['W_E', 'W_pos', 'L0.W_Q', 'L0.W_K', 'L0.W_V', 'L0.W_O', 'W_U']
    """
    d_model = config.d_model
    heads = config.n_heads
    width = config.d_head
    full = config.family == "full"
    shapes: dict[str, tuple[int, ...]] = {"W_E": (d_vocab, d_model)}
    if config.positions in ("random", "sinusoidal"):
        shapes["W_pos"] = (n_ctx, d_model)
    for layer in range(config.n_layers):
        block: dict[str, tuple[int, ...]] = {}
        if full:
            block |= {"ln1.w": (d_model,), "ln1.b": (d_model,)}
        block |= dict.fromkeys(("W_Q", "W_K", "W_V"), (heads, d_model, width))
        block |= {"W_O": (heads, width, d_model)}
        if config.positions == "relative":
            block |= {"W_R": (heads, n_ctx, width)}
        if full:
            block |= dict.fromkeys(("b_Q", "b_K", "b_V"), (heads, width)) | {"b_O": (d_model,)}
        has_feed_forward = config.has_feed_forward(layer)
        if full and has_feed_forward:
            block |= {"ln2.w": (d_model,), "ln2.b": (d_model,)}
        if config.feed_forward == "linear" and has_feed_forward:
            block |= {"W_F": (d_model, d_model)}
        if config.feed_forward in ("relu", "gelu") and has_feed_forward:
            block |= {"W_in": (d_model, config.hidden), "W_out": (config.hidden, d_model)}
            if full:
                block |= {"b_in": (config.hidden,), "b_out": (d_model,)}
        shapes |= {f"L{layer}.{name}": shape for name, shape in block.items()}
    if full:
        shapes |= {"ln_final.w": (d_model,), "ln_final.b": (d_model,)}
    shapes["W_U"] = (d_model, d_vocab)
    if full:
        shapes["b_U"] = (d_vocab,)
    return shapes


def parameter_names(config: ModelConfig) -> tuple[str, ...]:
    """List the names of `parameter_shapes`, which depend only on the model."""
    return tuple(parameter_shapes(config, d_vocab=1, n_ctx=1))


def trained_by_default(config: ModelConfig) -> tuple[str, ...]:
    """List the matrices that the paper trains: every W_K, the last W_O, and W_F or the MLP (simplified); or all (full).

    A tied W_U is not among them, because it is W_E.

    Example:
        >>> trained_by_default(ModelConfig(feed_forward="linear"))
        ('L0.W_K', 'L1.W_K', 'L1.W_O', 'L1.W_F')
    """
    if config.family == "full":
        return tuple(name for name in parameter_names(config) if not (config.tied and name == "W_U"))
    last = f"L{config.n_layers - 1}"
    moving = {f"{last}.{name}" for name in ("W_O", "W_F", "W_in", "W_out")}
    return tuple(name for name in parameter_names(config) if name.endswith(".W_K") or name in moving)


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, min(number, 64) + 1) if number % n == 0)
