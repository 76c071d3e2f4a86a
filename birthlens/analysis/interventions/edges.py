"""Edges: what one component writes, as one other component reads it.

Let S be what a sender adds to the residual stream, and x what a receiver reads. Replacing a set of edges S -> R by a source
run's S' means, within one run,

    x_R <- x_R + sum over its replaced edges of ( S' - S ),      with S as it is in this very run.

Only these edges change. The senders, and what all other components read from them, do not. What the receiver then computes
is passed on along every path that leaves it. If all edges into a receiver are replaced, it reads exactly what it reads in
the source run. A head has three receivers: its queries, keys and values. LayerNorm is applied to the new x, unless its
divisors are frozen (`spec.frozen_norms`), which makes all edges within a layer additive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from birthlens.analysis.interventions.replacements import Sources
from birthlens.analysis.interventions.spec import EdgeIntervention
from birthlens.model.layout import Edit, PointEdits, Rows
from birthlens.model.sites import Head, HeadInput, Mlp, Point, Receiver, Sender
from birthlens.shapes import Float
from birthlens.tasks.positions import chosen_positions

if TYPE_CHECKING:
    from birthlens.model.hooked import HookedModel


def written(model: HookedModel, sender: Sender, value: Tensor) -> Float[Tensor, "batch pos d_model"]:
    """Return what a sender adds to the residual stream, given the activation at its point (z, for a head).

    The output bias belongs to no head and is left out.
    """
    if not isinstance(sender, Head):
        return value
    return value[:, :, sender.head] @ model.blocks[sender.layer].attn.W_O[sender.head]


def receiver_point(receiver: Receiver, n_layers: int) -> Point:
    """Return the point of a receiver's input."""
    if isinstance(receiver, HeadInput):
        return Point(f"{receiver.letter}_input", receiver.layer)
    if isinstance(receiver, Mlp):
        return Point("mlp_in", receiver.layer)
    return Point("resid_post", n_layers - 1)


def edge_edits(model: HookedModel, edges: Sequence[EdgeIntervention], sources: Sources) -> PointEdits:
    """Return hooks that record what senders write, and hooks that change what receivers read."""
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
    model: HookedModel, group: Sequence[EdgeIntervention], sources: Sources, current: dict[Point, Tensor]
) -> Edit:
    def read(x: Tensor, rows: Rows | None) -> Tensor:
        added = torch.zeros_like(x)
        for one in group:
            now = current[one.point]
            new = sources.replacement(one, now, None).expand_as(now)
            delta = written(model, one.edge.sender, new - now)
            delta = delta * chosen_positions(sources.batch, one.positions)[..., None]
            if isinstance(one.edge.receiver, HeadInput):
                added[:, :, one.edge.receiver.head.head] += delta
            else:
                added += delta
        return x + added

    return read
