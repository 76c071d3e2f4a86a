"""What interventions put in place of an activation: activations of other runs, their averages, and ideal patterns.

Every `mean*` averages over all sequences of its source batch. `resample` takes whole sequences, drawn without replacement,
and all interventions of a suite use the same draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from birthlens.analysis.interventions.spec import MEANS, AnyIntervention, Intervention
from birthlens.errors import BirthlensError
from birthlens.model.layout import Edit, PointEdits, Rows, Whole
from birthlens.model.sites import ATTENTION_SITES, Point
from birthlens.shapes import Bool, Float, Int
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.positions import chosen_positions, token_roles


@runtime_checkable
class Unedited(Protocol):
    """A pass without edits: its activations, and its logits after edits."""

    def value(self, point: Point) -> Tensor:
        """Return an activation."""

    def logits(self, edits: PointEdits | None = None) -> Tensor:
        """Return the logits after `edits`."""


Need = tuple[str, str]
"""(source, method), for instance ('reference', 'resample')."""


def needs(interventions: Iterable[AnyIntervention]) -> dict[Need, set[Point]]:
    """Collect the points that are needed from each kind of source."""
    wanted: dict[Need, set[Point]] = {}
    for one in interventions:
        if one.needs_source:
            wanted.setdefault((one.source, one.method), set()).add(one.point)
    return wanted


def points_to_average(wanted: Mapping[Need, set[Point]], source: str) -> set[Point]:
    """Return the points at which a mean over a source is needed."""
    return {point for method in MEANS for point in wanted.get((source, method), ())}


def resampled_rows(n: int, source: str, available: int, generator: np.random.Generator) -> Int[Tensor, "batch"]:
    """Draw, for each of n sequences, the one that replaces it: without replacement, and never itself in the same batch.

    Raises:
        BirthlensError: if the batch is too small to resample from.
    """
    if source == "reference":
        if available < n:
            raise BirthlensError(
                f"the reference batch has {available} sequences, the evaluated one {n}; resampling needs at least as many."
            )
        return torch.from_numpy(generator.permutation(available)[:n])
    if n < 2:
        raise BirthlensError(f"the batch has {n} sequences; resampling from the batch itself needs at least 2.")
    order = generator.permutation(n)
    rows = np.empty(n, dtype=np.int64)
    rows[order] = np.roll(order, -1)
    return torch.from_numpy(rows)


class Kept:
    """Activations of a whole batch from an earlier pass, restricted to the rows that now replace others."""

    def __init__(
        self, values: Mapping[Point, Tensor], index: Int[Tensor, "batch"], rows: Rows | None, restricted: set[Point]
    ) -> None:
        self._values = values
        self._index = index
        self._rows = rows
        self._restricted = restricted

    def value(self, point: Point) -> Tensor:
        """Return the chosen sequences' activation (at the rows, if the point exists only there)."""
        value = self._values[point]
        index = self._index
        rows = self._rows
        if rows is None or point not in self._restricted:
            return value[index]
        if point.site == "pattern":
            return value[index[:, None], :, rows.index].transpose(1, 2)
        return value[index[:, None], rows.index]

    def logits(self, edits: PointEdits | None = None) -> Tensor:
        """Raise BirthlensError: only activations were kept."""
        raise BirthlensError("only activations were kept from this pass; its logits are unavailable.")


class Averages:
    """Means of activations over a source batch, summed by chunks in float64, which not every device has, on the CPU."""

    def __init__(self, by_role: bool) -> None:
        self._by_role = by_role
        self._sums: dict[Point, Tensor] = {}
        self._role_sums: dict[Point, Tensor] = {}
        self._counts = torch.zeros(3, dtype=torch.float64)
        self._n = 0

    def add(self, values: Mapping[Point, Tensor], batch: TokenBatch) -> None:
        """Add one chunk's activations."""
        roles = torch.nn.functional.one_hot(token_roles(batch), 3).float()
        self._n += len(batch)
        self._counts += roles.cpu().double().sum((0, 1))
        for point, value in values.items():
            total = value.sum(0).cpu().double()
            self._sums[point] = self._sums[point] + total if point in self._sums else total
            if self._by_role and point.site != "pattern":
                by_role = torch.tensordot(roles, value, dims=([0, 1], [0, 1])).cpu().double()
                self._role_sums[point] = self._role_sums[point] + by_role if point in self._role_sums else by_role

    def mean(self, point: Point, method: str, rows: Rows | None, roles: Int[Tensor, "batch pos"]) -> Tensor:
        """Return the mean as a tensor that broadcasts against the activation (at its rows, if there are any)."""
        table = self._sums[point] / self._n
        if method == "mean":
            return table.mean(0).float().to(roles.device)
        if method == "mean_role":
            if missing := [r for r in range(3) if not self._counts[r] and bool((roles == r).any())]:
                names = [("no trigger", "first occurrence", "later occurrence")[role] for role in missing]
                raise BirthlensError(f"mean_role: the source batch has no token of role {', '.join(names)}; use more.")
            counts = self._counts.clamp(min=1).view(-1, *[1] * (self._role_sums[point].ndim - 1))
            means = (self._role_sums[point] / counts).float().to(roles.device)
            return means[rows.of_positions(roles) if rows is not None else roles]
        means = table.float().to(roles.device)
        if point.site == "pattern":
            return means[None] if rows is None else means.transpose(0, 1)[rows.index].transpose(1, 2)
        return means[None] if rows is None else means[rows.index]


@dataclass(frozen=True, eq=False)
class Sources:
    """All sources that the interventions on one chunk of a batch may use."""

    batch: TokenBatch
    runs: Mapping[Need, Unedited] = field(default_factory=dict)
    averages: Mapping[str, Averages] = field(default_factory=dict)

    def replacement(self, one: AnyIntervention, current: Tensor, rows: Rows | None) -> Tensor:
        """Return what replaces `current`; it broadcasts against it."""
        if one.method == "zero":
            return current.new_zeros(())
        if one.method in MEANS:
            return self.averages[one.source].mean(one.point, one.method, rows, token_roles(self.batch))
        if one.method in ("resample", "patch"):
            value = self.runs[one.source, one.method].value(one.point)
            # A LayerNorm's divisor gets a head axis when queries, keys and values are read separately.
            return value.unsqueeze(2) if value.ndim < current.ndim else value
        return ideal_pattern(one.method, current, rows)

    def edit(self, one: Intervention, n_heads: int | None = None) -> Edit:
        """Return the intervention as a function of the activation; `n_heads` shows whether it covers all heads."""
        if one.positions == "all" and (one.heads is None or len(set(one.heads)) == n_heads):
            return Whole(lambda current, rows: self.replacement(one, current, rows).expand_as(current))

        def replace(current: Tensor, rows: Rows | None) -> Tensor:
            new = self.replacement(one, current, rows)
            chosen = chosen_positions(self.batch, one.positions)
            where = chosen if rows is None else rows.of_positions(chosen)
            return torch.where(_selected(one, current, where), new, current)

        return replace


def ideal_pattern(
    method: str, pattern: Float[Tensor, "batch head query_pos key_pos"], rows: Rows | None
) -> Float[Tensor, "#batch 1 query_pos key_pos"]:
    """Return the uniform causal pattern, or full attention to the previous position (the first attends to itself)."""
    keys = torch.arange(pattern.shape[-1], device=pattern.device)
    queries = (torch.arange(pattern.shape[-2], device=pattern.device)[None] if rows is None else rows.index)[..., None]
    uniform = (keys <= queries) / (queries + 1)
    previous = keys == (queries - 1).clamp(min=0)
    return (uniform if method == "uniform" else previous).to(pattern.dtype)[:, None]


def _head_axis(site: str) -> int:
    return 1 if site == "pattern" else 2


def _selected(one: Intervention, current: Tensor, where: Bool[Tensor, "batch row"]) -> Bool[Tensor, "..."]:
    """Return the mask of the chosen positions and heads, which broadcasts against the activation."""
    if one.site not in ATTENTION_SITES:
        return where[..., None]
    heads = torch.ones(current.shape[_head_axis(one.site)], dtype=torch.bool, device=current.device)
    if one.heads is not None:
        heads[:] = False
        heads[[head.head for head in one.heads]] = True
    if one.site == "pattern":
        return where[:, None, :, None] & heads[:, None, None]
    return where[..., None, None] & heads[:, None]
