"""A batch of sequences, with everything that the task knows about each position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from birthlens.shapes import Bool, Int


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """A batch of sequences with everything that is known about them.

    `occurrence` is 0 if the token is not a trigger, otherwise how many times that trigger has occurred up to and including
    the position. `absorbed` marks triggers from which the sequence never leaves the triggers. The list of triggers in front
    (show_latents) is not counted and is never absorbed.

    `marks` are the masks of the roles that the task defines itself; they take precedence over those that are derived from
    `occurrence` and `absorbed` (`roles.role_masks`). A mark "all" says which positions have a target at all.
    """

    tokens: Int[Tensor, "batch pos"]
    targets: Int[Tensor, "batch pos"]
    triggers: Int[Tensor, "batch n_triggers"]
    outputs: Int[Tensor, "batch n_triggers"]
    occurrence: Int[Tensor, "batch pos"]
    absorbed: Bool[Tensor, "batch pos"]
    marks: Mapping[str, Bool[Tensor, "batch pos"]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> TokenBatch:
        return self.taken(rows)

    @property
    def device(self) -> torch.device:
        """The device of the batch; an analysis runs its model there."""
        return self.tokens.device

    def to(self, device: str | torch.device) -> TokenBatch:
        """Return the batch on a device."""
        return self._mapped(lambda tensor: tensor.to(device))

    def taken(self, rows: slice | Int[Tensor, "row"]) -> TokenBatch:
        """Return some sequences of the batch: a slice of them, or those with the given indices in that order."""
        return self._mapped(lambda tensor: tensor[rows])

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        tensors = {each.name: change(getattr(self, each.name)) for each in fields(self) if each.name != "marks"}
        return TokenBatch(**tensors, marks={role: change(mask) for role, mask in self.marks.items()})

    @property
    def in_context(self) -> Bool[Tensor, "batch pos"]:
        """Positions whose target can be predicted from the context only: occurrence >= 2, or marked so by the task."""
        return self.marks.get("in_context", self.occurrence >= 2)

    @property
    def listed(self) -> Bool[Tensor, "batch pos"]:
        """Positions of the list of triggers in front (show_latents): triggers that are not counted."""
        return (self.occurrence == 0) & (self.tokens[..., None] == self.triggers[:, None]).any(-1)

    @property
    def is_global(self) -> Bool[Tensor, "batch pos"]:
        """Positions whose target follows the global bigrams: the token is not a trigger, or is marked so by the task."""
        return self.marks.get("global", (self.occurrence == 0) & ~self.listed)

    def chunks(self, size: int) -> Iterator[TokenBatch]:
        """Yield the batch in consecutive parts of at most `size` sequences."""
        for first in range(0, len(self), size):
            yield self[first : first + size]
