"""Token batches for analysis: roles of positions, selected rows, repeated random tokens, and a user's own tokens.

The roles of `roles.role_masks` belong to the token at a position. Here there are also roles of the next position:

    first_successor    the position after a trigger's first occurrence, where the output occurs for the first time
    later_successor    the position after a later occurrence
    other              neither a trigger nor right after one
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from birthlens.errors import BirthlensError
from birthlens.shapes import Bool, Int
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.roles import role_masks

POSITION_ROLES = ("first_occurrence", "first_successor", "in_context", "later_successor", "other")
"""Roles that together cover every position (successors may be triggers themselves)."""


def role_masks_with_successors(batch: TokenBatch) -> dict[str, Bool[Tensor, "batch pos"]]:
    """Return the mask of every role by name: those of `roles.role_masks`, and those of the positions after triggers."""
    masks = role_masks(batch)
    for role, occurrences in (("first_successor", masks["first_occurrence"]), ("later_successor", masks["in_context"])):
        masks[role] = torch.nn.functional.pad(occurrences[:, :-1], (1, 0))
    masks["other"] = ~(masks["trigger"] | masks["first_successor"] | masks["later_successor"])
    return masks


def chosen_positions(batch: TokenBatch, positions: str | Sequence[int]) -> Bool[Tensor, "batch pos"]:
    """Return the mask of 'all', a role, or a list of position indices.

    Raises:
        BirthlensError: for an unknown role (the message lists the valid ones) or a position outside the context.
    """
    if isinstance(positions, str):
        masks = role_masks_with_successors(batch)
        if positions not in masks:
            raise BirthlensError(f"positions = {positions!r} is not a role; valid are {', '.join(masks)}, or indices.")
        return masks[positions]
    length = batch.tokens.shape[1]
    if wrong := [p for p in positions if not 0 <= p < length]:
        raise BirthlensError(f"positions = {wrong} are outside the context; valid are 0 to {length - 1}.")
    mask = torch.zeros_like(batch.tokens, dtype=torch.bool)
    mask[:, list(positions)] = True
    return mask


def token_roles(batch: TokenBatch) -> Int[Tensor, "batch pos"]:
    """Return 0 for a token that is not a trigger, 1 for a trigger's first occurrence, 2 for a later one."""
    return batch.occurrence.clamp(max=2)


def take(batch: TokenBatch, rows: Int[Tensor, "row"]) -> TokenBatch:
    """Return some sequences of a batch, in the given order."""
    return batch.taken(rows)


def batch_of_tokens(
    sequences: Int[Tensor, "batch pos_plus_one"], scored: Bool[Tensor, "batch pos"] | None = None
) -> TokenBatch:
    """Make a TokenBatch of any token sequences, for models without a task.

    Each sequence contains the inputs and, shifted by one place, the targets. `scored` marks the positions that count as
    in-context; by default they are those whose token occurred before with the same successor as now.

    Example:
        >>> batch = batch_of_tokens(torch.tensor([[3, 1, 3, 1]]))
        >>> batch.in_context.tolist()
        [[False, False, True]]
    """
    tokens = sequences[:, :-1]
    targets = sequences[:, 1:]
    if scored is None:
        same = (tokens[:, :, None] == tokens[:, None]) & (targets[:, :, None] == targets[:, None])
        scored = same.tril(-1).any(-1)
    occurrence = torch.where(scored, 2, 0)
    nothing = tokens.new_zeros(len(tokens), 0)
    return TokenBatch(tokens, targets, nothing, nothing, occurrence, torch.zeros_like(scored))


def repeated_tokens(
    n: int, length: int, d_vocab: int, generator: np.random.Generator, distinct: bool = False, repeats: int = 2
) -> TokenBatch:
    """Draw random sequences that repeat: `length` uniform tokens, `repeats` times over.

    Every token of the first copy counts as a first occurrence (1), of the second as 2, and so on. The last position is left
    out, because its target is unknown. `distinct` draws the tokens of a sequence without replacement.

    Raises:
        BirthlensError: if `distinct` asks for more tokens than the vocabulary has.
    """
    if distinct and length > d_vocab:
        raise BirthlensError(f"length = {length}: only {d_vocab} distinct tokens exist; use at most that many.")
    if distinct:
        once = np.argsort(generator.random((n, d_vocab)), axis=1)[:, :length]
    else:
        once = generator.integers(d_vocab, size=(n, length))
    sequences = torch.from_numpy(np.tile(once, (1, repeats)))
    tokens = sequences[:, :-1]
    targets = sequences[:, 1:]
    occurrence = torch.arange(repeats).repeat_interleave(length)[:-1].expand_as(tokens) + 1
    nothing = tokens.new_zeros(n, 0)
    return TokenBatch(tokens, targets, nothing, nothing, occurrence, torch.zeros_like(tokens, dtype=torch.bool))


def check_tokens(batch: TokenBatch, d_vocab: int, n_ctx: int, name: str = "the batch") -> None:
    """Raise BirthlensError if a batch does not fit a model's vocabulary or context."""
    for field, ids in (("tokens", batch.tokens), ("targets", batch.targets)):
        if ids.numel() == 0:
            raise BirthlensError(f"{name} holds no {field}; give at least one sequence of at least one position.")
        lowest = int(ids.min())
        highest = int(ids.max())
        if lowest < 0 or highest >= d_vocab:
            wrong = lowest if lowest < 0 else highest
            raise BirthlensError(
                f"{field} of {name} hold id {wrong}; the model's vocabulary ends at {d_vocab - 1}, and starts at 0."
            )
    if batch.tokens.shape[1] > n_ctx:
        raise BirthlensError(f"{name} has {batch.tokens.shape[1]} positions; the model has {n_ctx}.")
