"""Which part of the data each position counts under: its role, its token, its place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from birthlens.shapes import Bool
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.roles import role_masks

By = Literal["role", "occurrence", "token", "target", "position", "sequence", "step"]
GROUPINGS: tuple[By, ...] = get_args(By)
NUMBERED = ("occurrence", "position", "step")
"""Groupings whose parts are numbers."""

Chosen = tuple[TokenBatch, Bool[Tensor, "batch pos"]]
"""A batch, and those of its positions that count."""


class RarestRoles:
    """The rarest role of each position, over all positions that count in some batches."""

    def __init__(self, batches: Sequence[Chosen]) -> None:
        counts: dict[str, int] = {}
        for batch, chosen in batches:
            for role, mask in role_masks(batch).items():
                counts[role] = counts.get(role, 0) + int((mask & chosen).sum())
        self._roles = sorted((role for role in counts if role != "all"), key=lambda role: counts[role])
        shared = {role for each in batches for role, whole, own in self._taken(*each) if bool((whole & ~own).any())}
        self._names = {role: f"{role} (rest)" if role in shared else role for role in self._roles}

    def _taken(self, batch: TokenBatch, chosen: Bool[Tensor, "batch pos"]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield each role, starting with the rarest, its chosen positions, and those of them without rarer roles."""
        free = chosen.clone()
        masks = role_masks(batch)
        for role in self._roles:
            whole = masks.get(role, torch.zeros_like(free)) & chosen
            yield role, whole, whole & free
            free = free & ~whole

    def names(self, batch: TokenBatch, chosen: Bool[Tensor, "batch pos"]) -> list[str]:
        """Return the role of each chosen position, in row-major order."""
        found = np.full(tuple(chosen.shape), "no role", dtype=object)
        for role, _, own in self._taken(batch, chosen):
            found[own.numpy()] = self._names[role]
        return list(found[chosen.numpy()])


def part_names(
    by: By, step: int, batch: TokenBatch, chosen: Bool[Tensor, "batch pos"], labels: Sequence[str]
) -> list[str]:
    """Return the part that each chosen position counts under, in row-major order; for roles see `RarestRoles`.

    `step` is that of the batch, `labels` are the tokens as they are shown.
    """
    if by == "occurrence":
        return [str(number) for number in batch.occurrence[chosen].tolist()]
    if by in ("token", "target"):
        ids = batch.tokens if by == "token" else batch.targets
        return [labels[number] for number in ids[chosen].tolist()]
    rows, columns = (places.tolist() for places in torch.nonzero(chosen, as_tuple=True))
    if by == "position":
        return [str(column) for column in columns]
    return [str(step) if by == "step" else f"step {step} sequence {row}" for row in rows]
