"""Attribution patching: the effect of patching every edge, estimated from gradients (first order in the edge).

A sender S writes to the residual stream, and a receiver R reads it. The effect of replacing S, as R reads it, by the source
run's S' is estimated as

    m(patched) - m(base)  ~  sum over batch, position, d_model of  ( S' - S ) * average over steps of  dm / dx_R

where x_R is what R reads. With `steps=0` the gradient is that of the base run (attribution patching). With m = `steps` >= 1
it is averaged over m midpoints of the straight line from the base run's embeddings to the source run's (integrated
gradients). The estimates of all edges that leave the embeddings then add up to m(source) - m(base) as m grows.
One forward and backward pass for each step serves all edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from birthlens.analysis.interventions.edges import receiver_point, written
from birthlens.analysis.interventions.runner import CHUNK
from birthlens.analysis.interventions.scoring import Scoring
from birthlens.analysis.interventions.spec import EdgeIntervention
from birthlens.errors import BirthlensError
from birthlens.model.components import has_positions
from birthlens.model.hooks import captured, edited
from birthlens.model.layout import Edit, Rows
from birthlens.model.sites import FINAL_NORM, NORM_SITES, Edge, HeadInput, Point
from birthlens.shapes import Float
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.positions import take

if TYPE_CHECKING:
    from birthlens.model.hooked import HookedModel


def edge_attributions(
    model: HookedModel,
    edges: Sequence[Edge],
    base: TokenBatch,
    source: TokenBatch,
    scoring: Scoring,
    steps: int = 0,
    norms: Sequence[Point] = (),
    chunk: int = CHUNK,
) -> Float[np.ndarray, "edge metric"]:
    """Estimate how much each metric changes if an edge is replaced by the source run's, for every edge.

    `norms` are LayerNorm divisors to keep at the base run's values.

    Raises:
        BirthlensError: if `steps` is negative.
    """
    if steps < 0:
        raise BirthlensError(f"steps = {steps}: use 0 for the plain gradient, or at least 1 to integrate.")
    total = torch.zeros(len(edges), len(scoring.metrics), dtype=torch.float64)
    for index in torch.split(torch.arange(len(base), device=base.device), chunk):
        total += _chunk(model, edges, take(base, index), take(source, index), scoring[index], steps, norms)
    return np.asarray(total / scoring.counts().sum(0))


def norm_points(interventions: Sequence[object]) -> list[Point]:
    """Return the LayerNorm divisors among some interventions (those of `interventions.frozen_norms`)."""
    sites = (*NORM_SITES, FINAL_NORM)
    points = [getattr(one, "point", None) for one in interventions]
    return [point for point in points if isinstance(point, Point) and point.site in sites]


def _chunk(
    model: HookedModel,
    edges: Sequence[Edge],
    base: TokenBatch,
    source: TokenBatch,
    scoring: Scoring,
    steps: int,
    norms: Sequence[Point],
) -> Float[Tensor, "edge metric"]:
    senders = {edge: EdgeIntervention(edge, "patch").point for edge in edges}
    inputs = [Point("embed"), *([Point("pos_embed")] if has_positions(model.cfg) else [])]
    points = {*senders.values(), *inputs}
    before = captured(model, base.tokens, points | set(norms))
    after = captured(model, source.tokens, points)
    receivers = {edge: receiver_point(edge.receiver, model.cfg.n_layers) for edge in edges}
    gradients: dict[Point, list[Tensor]] = {}
    shares = [0.0] if steps == 0 else [(number + 0.5) / steps for number in range(steps)]
    for share in shares:
        moved = {point: before[point] + share * (after[point] - before[point]) for point in inputs}
        held = moved | {point: before[point] for point in norms}
        for point, found in metric_gradients(model, base, scoring, held, set(receivers.values())).items():
            known = gradients.get(point)
            gradients[point] = found if known is None else [a + b for a, b in zip(known, found, strict=True)]
    out = torch.zeros(len(edges), len(scoring.metrics), dtype=torch.float64)
    for row, edge in enumerate(edges):
        with torch.no_grad():
            delta = written(model, edge.sender, after[senders[edge]] - before[senders[edge]])
        for column, gradient in enumerate(gradients[receivers[edge]]):
            if isinstance(edge.receiver, HeadInput):
                gradient = gradient[:, :, edge.receiver.head.head]
            out[row, column] = (delta.cpu().double() * gradient.cpu().double()).sum() / len(shares)
    return out


def metric_gradients(
    model: HookedModel, batch: TokenBatch, scoring: Scoring, held: dict[Point, Tensor], receivers: set[Point]
) -> dict[Point, list[Tensor]]:
    """Return, for each receiver's input, the gradient of each metric's sum, with some activations held fixed."""
    probes: dict[Point, Tensor] = {}

    def probing(point: Point) -> Edit:
        def probe(value: Tensor, rows: Rows | None) -> Tensor:
            probes[point] = torch.zeros_like(value, requires_grad=True)
            return value + probes[point]

        return probe

    def holding(point: Point) -> Edit:
        def hold(value: Tensor, rows: Rows | None) -> Tensor:
            fixed = held[point]
            return (fixed.unsqueeze(2) if fixed.ndim < value.ndim else fixed).expand_as(value)

        return hold

    edits = {point: [holding(point)] for point in held} | {point: [probing(point)] for point in receivers}
    with torch.enable_grad(), edited(model, edits):
        sums = scoring.sums(model(batch.tokens)).sum(0)
    ordered = list(probes)
    out: dict[Point, list[Tensor]] = {point: [] for point in ordered}
    for number in range(len(sums)):
        last = number == len(sums) - 1
        found = torch.autograd.grad(
            sums[number], [probes[point] for point in ordered], retain_graph=not last, allow_unused=True
        )
        for point, gradient in zip(ordered, found, strict=True):
            out[point].append(torch.zeros_like(probes[point]) if gradient is None else gradient)
    return out
