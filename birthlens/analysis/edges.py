"""Edges: what one component writes, as one other component reads it.

Definition. Write S for what a sender adds to the residual stream, x for what a receiver reads. Replacing a set of edges
S -> R by a source run's S' means, in one run,

    x_R <- x_R + sum over its replaced edges of ( S' - S ),      S as it is in this very run.

Only these edges change: the senders themselves, and what all other components read of them, do not. What the receiver
then computes is passed on along every path that leaves it. With all edges into a receiver replaced it reads exactly what
it reads in the source run. A head has three receivers, its queries, keys and values; LayerNorm is applied to the new x,
unless the divisors are frozen (`interventions.frozen_norms`), which makes every edge of one layer additive.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from birthlens.analysis.batches import positions_mask
from birthlens.analysis.interventions import EdgeIntervention, Sizes, all_heads, has_mlp, precedes
from birthlens.analysis.layout import Edit, Edits, Rows
from birthlens.analysis.sources import Sources
from birthlens.sites import Edge, Embedding, Head, HeadInput, Logits, Mlp, Point, Receiver, Sender

if TYPE_CHECKING:
    from birthlens.model import HookedTransformer


def edges_of(sizes: Sizes, receivers: Iterable[Receiver] | None = None) -> list[Edge]:
    """List every edge of a model (a ModelConfig or a TransformerLens config), or those into some receivers.

    Example:
        >>> from birthlens.architecture import ModelConfig
        >>> edges = edges_of(ModelConfig(n_layers=2))
        >>> len(edges), [str(edge) for edge in edges[-4:]]
        (19, ['embed->logits', 'pos_embed->logits', 'L0H0->logits', 'L1H0->logits'])
    """
    parallel = bool(getattr(sizes, "parallel_attn_mlp", getattr(sizes, "family", None) == "full"))
    rotary = "rotary" in (getattr(sizes, "positional_embedding_type", None), getattr(sizes, "positions", None))
    senders: list[Sender] = [Embedding("embed"), *([] if rotary else [Embedding("pos_embed")])]
    readers: list[Receiver] = []
    for layer in range(sizes.n_layers):
        heads = [head for head in all_heads(sizes) if head.layer == layer]
        senders += heads
        readers += [HeadInput(head, letter) for head in heads for letter in "qkv"]
        if has_mlp(sizes, layer):
            senders.append(Mlp(layer))
            readers.append(Mlp(layer))
    readers.append(Logits())
    chosen = readers if receivers is None else list(receivers)
    edges = [Edge(sender, receiver) for receiver in chosen for sender in senders]
    return [edge for edge in edges if precedes(edge, parallel)]


def written(model: HookedTransformer, sender: Sender, value: Tensor) -> Float[Tensor, "batch pos d_model"]:
    """Return what a sender adds to the residual stream, from the activation at its point (z, for a head).

    A head's share of the output bias belongs to no head and is left out.
    """
    if not isinstance(sender, Head):
        return value
    return value[:, :, sender.head] @ model.blocks[sender.layer].attn.W_O[sender.head]


def receiver_point(receiver: Receiver, n_layers: int) -> Point:
    """Return where a receiver's input is seen."""
    if isinstance(receiver, HeadInput):
        return Point(f"{receiver.letter}_input", receiver.layer)
    if isinstance(receiver, Mlp):
        return Point("mlp_in", receiver.layer)
    return Point("resid_post", n_layers - 1)


def edge_edits(model: HookedTransformer, edges: Sequence[EdgeIntervention], sources: Sources) -> Edits:
    """Return hooks that note what senders write, and hooks that change what receivers read."""
    current: dict[Point, Tensor] = {}
    edits: dict[Point, list[Edit]] = {point: [_noting(current, point)] for point in {one.point for one in edges}}
    by_point: dict[Point, list[EdgeIntervention]] = {}
    for one in edges:
        by_point.setdefault(receiver_point(one.edge.receiver, model.cfg.n_layers), []).append(one)
    for point, group in by_point.items():
        edits.setdefault(point, []).append(_reading(model, group, sources, current))
    return edits


def _noting(current: dict[Point, Tensor], point: Point) -> Edit:
    def note(value: Tensor, rows: Rows | None) -> Tensor:
        current[point] = value
        return value

    return note


def _reading(
    model: HookedTransformer, group: Sequence[EdgeIntervention], sources: Sources, current: dict[Point, Tensor]
) -> Edit:
    def read(x: Tensor, rows: Rows | None) -> Tensor:
        added = torch.zeros_like(x)
        for one in group:
            now = current[one.point]
            new = sources.replacement(one, now, None).expand_as(now)
            delta = written(model, one.edge.sender, new - now)
            delta = delta * positions_mask(sources.batch, one.positions)[..., None]
            if isinstance(one.edge.receiver, HeadInput):
                added[:, :, one.edge.receiver.head.head] += delta
            else:
                added += delta
        return x + added

    return read
