"""A batch of sequences, with everything that the task knows about each position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from torch import Tensor

from birthlens.shapes import Bool, Int


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """A batch of sequences with everything that is known about them.

    `occurrence` is 0 where the token is no trigger, else how many times that trigger has occurred up to and including the
    position. `absorbed` marks triggers from which the sequence runs through triggers for ever. The list of triggers in
    front (show_latents) carries no count and is never absorbed.
    """

    tokens: Int[Tensor, "batch pos"]
    targets: Int[Tensor, "batch pos"]
    triggers: Int[Tensor, "batch n_triggers"]
    outputs: Int[Tensor, "batch n_triggers"]
    occurrence: Int[Tensor, "batch pos"]
    absorbed: Bool[Tensor, "batch pos"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> TokenBatch:
        return TokenBatch(*(getattr(self, field.name)[rows] for field in fields(self)))

    @property
    def in_context(self) -> Bool[Tensor, "batch pos"]:
        """Positions whose target can be predicted from the context and from nothing else: occurrence >= 2."""
        return self.occurrence >= 2

    @property
    def listed(self) -> Bool[Tensor, "batch pos"]:
        """Positions of the list of triggers in front (show_latents): triggers that carry no count."""
        return (self.occurrence == 0) & (self.tokens[..., None] == self.triggers[:, None]).any(-1)

    @property
    def is_global(self) -> Bool[Tensor, "batch pos"]:
        """Positions whose target follows the global bigrams: the token is no trigger."""
        return (self.occurrence == 0) & ~self.listed

    def chunks(self, size: int) -> Iterator[TokenBatch]:
        """Yield the batch in consecutive parts of at most `size` sequences."""
        for first in range(0, len(self), size):
            yield self[first : first + size]
