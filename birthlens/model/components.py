"""The components of a model: layers and heads, feed-forwards, positions, LayerNorms, and the edges between them.

Everything is read from its config: a ModelConfig, or the config of a TransformerLens model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from birthlens.config.model import ModelConfig
from birthlens.errors import BirthlensError
from birthlens.model.sites import Edge, Embedding, Head, HeadInput, Logits, Mlp, Receiver, Sender


@runtime_checkable
class Sizes(Protocol):
    """What an intervention is checked against: a ModelConfig or a TransformerLens config."""

    @property
    def n_layers(self) -> int:
        """Number of layers."""

    @property
    def n_heads(self) -> int:
        """Number of heads in each layer."""


def all_heads(sizes: Sizes) -> list[Head]:
    """Return every head, by layer and number."""
    return [Head(layer, head) for layer in range(sizes.n_layers) for head in range(sizes.n_heads)]


def heads_at(sizes: Sizes, site: str) -> int:
    """Return how many heads a site has: grouped-query attention has fewer keys and values than queries."""
    grouped = getattr(sizes, "n_key_value_heads", None)
    return int(grouped) if grouped and site in ("k", "v") else sizes.n_heads


def has_norms(sizes: Sizes) -> bool:
    """Return whether a model normalises its residual stream."""
    return getattr(sizes, "family", None) == "full" or getattr(sizes, "normalization_type", None) is not None


def has_mlp(sizes: Sizes, layer: int) -> bool:
    """Return whether a layer has a feed-forward."""
    if not isinstance(sizes, ModelConfig):
        return not getattr(sizes, "attn_only", False)
    return bool(sizes.has_feed_forward(layer))


def has_positions(sizes: Sizes) -> bool:
    """Return whether positions enter the residual stream (rotary, ALiBi and similar ones act on the attention instead)."""
    kind = getattr(sizes, "positional_embedding_type", None)
    return getattr(sizes, "positions", None) not in ("rotary", "relative") if kind is None else kind == "standard"


def is_parallel(sizes: Sizes) -> bool:
    """Return whether attention and feed-forward of a block read the same input."""
    return bool(getattr(sizes, "parallel_attn_mlp", False))


def precedes(edge: Edge, parallel: bool) -> bool:
    """Return whether the sender writes before the receiver reads (`parallel` blocks feed both halves the block's input)."""
    sender = edge.sender
    receiver = edge.receiver
    if isinstance(sender, Embedding) or not isinstance(receiver, HeadInput | Mlp):
        return True
    if isinstance(sender, Head) and isinstance(receiver, Mlp) and not parallel:
        return sender.layer <= receiver.layer
    return sender.layer < receiver.layer


def senders_of(sizes: Sizes) -> list[Sender]:
    """List the components that write to the residual stream, in the order of the pass."""
    out: list[Sender] = [Embedding("embed"), *([Embedding("pos_embed")] if has_positions(sizes) else [])]
    for layer in range(sizes.n_layers):
        out += [Head(layer, number) for number in range(sizes.n_heads)]
        if has_mlp(sizes, layer):
            out.append(Mlp(layer))
    return out


def receivers_of(sizes: Sizes) -> list[Receiver]:
    """List the inputs that read the residual stream, in the order of the pass."""
    out: list[Receiver] = []
    for layer in range(sizes.n_layers):
        for number in range(sizes.n_heads):
            letters = [letter for letter in "qkv" if number < heads_at(sizes, letter)]
            out += [HeadInput(Head(layer, number), letter) for letter in letters]
        if has_mlp(sizes, layer):
            out.append(Mlp(layer))
    return [*out, Logits()]


def edges_of(sizes: Sizes, receivers: Iterable[Receiver] | None = None) -> list[Edge]:
    """List every edge of a model (a ModelConfig or a TransformerLens config), or those into some receivers.

    Example:
        >>> from birthlens.config.model import ModelConfig
        >>> edges = edges_of(ModelConfig(n_layers=2))
        >>> len(edges), [str(edge) for edge in edges[-4:]]
        (19, ['embed->logits', 'pos_embed->logits', 'L0H0->logits', 'L1H0->logits'])
    """
    chosen = receivers_of(sizes) if receivers is None else list(receivers)
    senders = senders_of(sizes)
    parallel = is_parallel(sizes)
    edges = [Edge(sender, receiver) for receiver in chosen for sender in senders]
    return [edge for edge in edges if precedes(edge, parallel)]


def check_layer(layer: int, sizes: Sizes) -> None:
    """Raise BirthlensError, listing the valid ones, for a layer that does not exist."""
    if not 0 <= layer < sizes.n_layers:
        raise BirthlensError(f"layer = {layer} does not exist; valid layers are 0 to {sizes.n_layers - 1}.")


def check_head(head: Head, sizes: Sizes, site: str = "z") -> None:
    """Raise BirthlensError, listing the valid ones, for a head that a site does not have."""
    count = heads_at(sizes, site)
    if not (0 <= head.layer < sizes.n_layers and 0 <= head.head < count):
        valid = ", ".join(str(one) for one in all_heads(sizes) if one.head < count)
        where = f" at site {site}, whose heads are shared" if count < sizes.n_heads else ""
        raise BirthlensError(f"head = {head} does not exist{where}; valid heads are {valid}.")


def check_edge(edge: Edge, sizes: Sizes) -> None:
    """Raise BirthlensError, listing the valid ones, if an end does not exist or the sender comes after the receiver."""
    for end in (edge.sender, edge.receiver):
        if isinstance(end, Head):
            check_head(end, sizes)
        elif isinstance(end, HeadInput):
            check_head(end.head, sizes, end.letter)
        elif isinstance(end, Mlp):
            check_layer(end.layer, sizes)
    if not _exists(edge.sender, sizes):
        _refuse(edge, edge.sender, "senders", senders_of(sizes))
    if not _exists(edge.receiver, sizes):
        _refuse(edge, edge.receiver, "receivers", receivers_of(sizes))
    if not precedes(edge, is_parallel(sizes)):
        before = [str(one.sender) for one in edges_of(sizes, [edge.receiver])]
        raise BirthlensError(
            f"edge = {edge}: the sender must come before the receiver; valid senders are {', '.join(before)}."
        )


def _refuse(edge: Edge, end: Sender | Receiver, kind: str, valid: Iterable[Sender | Receiver]) -> None:
    raise BirthlensError(f"edge = {edge}: the model has no {end}; valid {kind} are {', '.join(map(str, valid))}.")


def _exists(end: Sender | Receiver, sizes: Sizes) -> bool:
    if isinstance(end, Mlp):
        return has_mlp(sizes, end.layer)
    return not (isinstance(end, Embedding) and end.name == "pos_embed") or has_positions(sizes)
