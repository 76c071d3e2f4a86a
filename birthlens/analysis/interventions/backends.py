"""Two ways to run a model under interventions: the functional pass over weights, and hooks on a live model.

Weights use the functional pass, with all its shortcuts, whenever it supports the interventions. It does not support edges,
LayerNorm divisors and attention without a softmax; for these, weights are loaded into a hooked model automatically.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from birthlens.analysis.interventions.edges import edge_edits, receiver_point
from birthlens.analysis.interventions.replacements import Sources, Unedited
from birthlens.analysis.interventions.spec import AnyIntervention, Cases, EdgeIntervention, Intervention
from birthlens.model.components import Sizes
from birthlens.model.effects import check_edges, check_effect, check_reading
from birthlens.model.hooks import HookedTrace, device_of, moved
from birthlens.model.incremental import FROM_QUERIES, Trace
from birthlens.model.layout import Edit, PointEdits, PreparedWeights, Rows
from birthlens.model.sites import INTERVENTION_SITES, Point
from birthlens.model.weights import Weights
from birthlens.shapes import Int

if TYPE_CHECKING:
    from birthlens.model.hooked import HookedModel


@runtime_checkable
class Backend(Protocol):
    """A model to run: its sizes, and unedited passes over tokens."""

    sizes: Any
    d_vocab: int
    n_ctx: int
    device: torch.device
    picks_rows: bool

    def open(self, tokens: Int[Tensor, "batch pos"], rows: Rows | None, points: Iterable[Point]) -> Unedited:
        """Open an unedited pass in which `points` will be read."""

    def restricts(self, point: Point) -> bool:
        """Return whether a point's activation exists only at the rows that are read."""

    def edits(self, case: Iterable[AnyIntervention], sources: Sources) -> PointEdits:
        """Turn one case's interventions into edits."""


class FunctionalBackend:
    """The functional pass over `Weights`, on a device."""

    picks_rows = True

    def __init__(self, weights: Weights, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.model = PreparedWeights(weights, self.device)
        self.sizes: Sizes = weights.config
        self.d_vocab = self.model.d_vocab
        self.n_ctx = self.model.n_ctx

    def open(self, tokens: Int[Tensor, "batch pos"], rows: Rows | None, points: Iterable[Point]) -> Unedited:
        """Open a lazy trace."""
        return Trace(self.model, tokens, rows, wanted=points)

    def restricts(self, point: Point) -> bool:
        """Queries of the last layer, and everything computed from them, exist only at the rows that are read."""
        return point.layer == self.sizes.n_layers - 1 and point.site in FROM_QUERIES

    def edits(self, case: Iterable[AnyIntervention], sources: Sources) -> PointEdits:
        """Turn node interventions into edits."""
        return node_edits(case, sources, self.sizes.n_heads)


class HookedBackend:
    """A live TransformerLens model."""

    picks_rows = False

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self.device = device_of(model)
        self.sizes: Sizes = model.cfg
        self.d_vocab = int(model.cfg.d_vocab)
        self.n_ctx = int(model.cfg.n_ctx)

    def open(self, tokens: Int[Tensor, "batch pos"], rows: Rows | None, points: Iterable[Point]) -> Unedited:
        """Run once and keep the activations at the points."""
        return HookedTrace(self.model, tokens, points)

    def restricts(self, point: Point) -> bool:
        """Return False: under hooks, activations exist at all rows."""
        return False

    def edits(self, case: Iterable[AnyIntervention], sources: Sources) -> PointEdits:
        """Turn node and edge interventions into edits; edges read the senders after the node edits.

        Raises:
            BirthlensError: if the model does not react to such an edit (`model.effects`).
        """
        case = list(case)
        for one in case:
            if isinstance(one, EdgeIntervention):
                check_edges(self.model)
                read = receiver_point(one.edge.receiver, self.sizes.n_layers)
                check_effect(self.model, read)
                check_reading(self.model, read)
            else:
                check_effect(self.model, one.point)
        edits: dict[Point, list[Edit]] = {
            point: list(chain) for point, chain in node_edits(case, sources, self.sizes.n_heads).items()
        }
        edges = [one for one in case if isinstance(one, EdgeIntervention)]
        for point, chain in edge_edits(self.model, edges, sources).items():
            edits.setdefault(point, []).extend(chain)
        return edits


def node_edits(case: Iterable[AnyIntervention], sources: Sources, n_heads: int) -> PointEdits:
    """Return the edits of the interventions on activations."""
    edits: dict[Point, list[Edit]] = {}
    for one in case:
        if isinstance(one, Intervention):
            edits.setdefault(one.point, []).append(sources.edit(one, n_heads))
    return edits


def backend_of(
    model: Weights | HookedModel | Backend, cases: Cases | None = None, device: str | torch.device = "cpu"
) -> Backend:
    """Choose the fastest way to run the cases: functional for weights, hooks for live models, edges and LayerNorms.

    Weights are loaded to the device; a live model is used where it is.
    """
    if isinstance(model, FunctionalBackend | HookedBackend):
        return model
    if not isinstance(model, Weights):
        return HookedBackend(model)
    shortcuts = all(has_shortcut(one) for case in (cases or {}).values() for one in case)
    if not (shortcuts and model.config.standard_attention):
        from birthlens.model.hooked import build

        return HookedBackend(moved(build(model), device))
    return FunctionalBackend(model, device)


def has_shortcut(one: AnyIntervention) -> bool:
    """Return whether the functional pass supports an intervention."""
    return isinstance(one, Intervention) and one.site in INTERVENTION_SITES
