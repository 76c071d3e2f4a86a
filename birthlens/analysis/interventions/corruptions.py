"""Corruptions of a TokenBatch: the same sequences with one thing changed, and the positions where the answer should change.

    other_outputs      every output that follows a trigger is replaced by another token, one for each trigger
    first_replaced     each trigger's first occurrence becomes a token that is not a trigger, so its output has no cause
    triggers_swapped   the first occurrences of the triggers are exchanged, so that each precedes another trigger's output
    shifted            everything happens `by` positions later

Each returns a `Pair`: the clean and the corrupted batch, the scored positions (in-context in both, not absorbed, with the
same query token except when shifted), the clean answer at these positions and, if it has one, the corrupted answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from birthlens.analysis.interventions.metrics import Metric
from birthlens.analysis.interventions.scoring import Scoring
from birthlens.errors import BirthlensError
from birthlens.shapes import Bool, Int
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.positions import role_masks_with_successors
from birthlens.tasks.prompts import PromptBatch
from birthlens.tasks.roles import role_masks
from birthlens.tasks.task import Task


@dataclass(frozen=True, eq=False)
class Pair:
    """A clean and a corrupted batch with matching rows; `scored` marks the positions where metrics are read.

    `alternatives` are the corrupted answers, or None if the corrupted sequences have no answers of their own.

    Raises:
        BirthlensError: if the batches differ in shape, or no position is scored.
    """

    clean: TokenBatch
    corrupted: TokenBatch
    scored: Bool[Tensor, "batch pos"]
    alternatives: Int[Tensor, "batch pos"] | None = None

    def __post_init__(self) -> None:
        clean = tuple(self.clean.tokens.shape)
        corrupted = tuple(self.corrupted.tokens.shape)
        if clean != corrupted:
            raise BirthlensError(f"the corrupted batch has shape {corrupted}, the clean one {clean}; they must agree.")
        if not self.scored.any():
            raise BirthlensError(
                "the pair has no scored position: nowhere can the answers of a clean and a corrupted sequence be compared; "
                "use more sequences, a longer context, or another corruption."
            )

    def to(self, device: str | torch.device) -> Pair:
        """Return the pair on a device."""
        answers = None if self.alternatives is None else self.alternatives.to(device)
        return Pair(self.clean.to(device), self.corrupted.to(device), self.scored.to(device), answers)

    @property
    def default_metric(self) -> str:
        """The logit difference if there are two answers, otherwise the answer's logit."""
        return "logit_difference" if self.alternatives is not None else "logit"

    def scoring(self, quantities: Sequence[str] = ()) -> Scoring:
        """Score the clean answers at the scored positions (role 'scored')."""
        metrics = tuple(Metric("scored", quantity) for quantity in (quantities or (self.default_metric,)))
        return Scoring(metrics, {"scored": self.scored}, self.clean.targets, self.alternatives, self.clean.tokens)


def pair_of(
    clean: TokenBatch, corrupted: TokenBatch, scored: Bool[Tensor, "batch pos"] | None = None, two_answers: bool = True
) -> Pair:
    """Pair any two batches; by default the in-context positions of the clean one are scored."""
    where = clean.in_context if scored is None else scored
    if two_answers:
        where = where & (clean.targets != corrupted.targets)
    return Pair(clean, corrupted, where, corrupted.targets if two_answers else None)


def pair_of_prompts(prompts: PromptBatch) -> Pair:
    """Pair prompts with their corrupted versions, scored at the last token of each.

    Raises:
        BirthlensError: if not every prompt has a corrupted version, or one is the prompt itself.
    """
    if prompts.corrupted is None:
        raise BirthlensError(
            "not every prompt has a corrupted version, and patches take values from one run into the other; add them."
        )
    same = (prompts.clean.tokens == prompts.corrupted.tokens).all(1)
    if same.any():
        raise BirthlensError(f"prompt {int(same.int().argmax()) + 1} and its corrupted version are the same.")
    return Pair(prompts.clean, prompts.corrupted, prompts.clean.marks["answer"], prompts.wrong)


def other_outputs(batch: TokenBatch, generator: np.random.Generator, d_vocab: int) -> Pair:
    """Give every trigger another output, one that is not a trigger of the sequence, wherever the old one followed it."""
    _needs_triggers(batch)
    fresh = _other_tokens(batch, batch.outputs, generator, d_vocab)
    sequence = _sequence(batch)
    index = _trigger_index(batch)
    follows = torch.where(index >= 0, fresh.gather(1, index.clamp(min=0)), sequence[:, 1:])
    changed = sequence.clone()
    changed[:, 1:] = follows
    # An output that was itself a trigger no longer is one. What followed it stays, and is not scored.
    corrupted = _relabelled(batch, changed, fresh)
    return pair_of(batch, corrupted, _same_query(batch, corrupted))


def first_replaced(batch: TokenBatch, generator: np.random.Generator, d_vocab: int) -> Pair:
    """Replace each trigger's first occurrence by a token that is not a trigger; score the second occurrence."""
    _needs_triggers(batch)
    fresh = _other_tokens(batch, batch.outputs, generator, d_vocab)
    sequence = _sequence(batch)
    index = _trigger_index(batch)
    first = batch.occurrence == 1
    sequence[:, :-1] = torch.where(first, fresh.gather(1, index.clamp(min=0)), batch.tokens)
    corrupted = _relabelled(batch, sequence, batch.outputs)
    scored = (batch.occurrence == 2) & ~batch.absorbed & (corrupted.occurrence == 1)
    return Pair(batch, corrupted, scored & (batch.tokens == corrupted.tokens))


def triggers_swapped(batch: TokenBatch, generator: np.random.Generator, d_vocab: int) -> Pair:
    """Exchange the first occurrences of a sequence's triggers, in a cycle; score the second occurrences.

    Raises:
        BirthlensError: if a sequence has fewer than two triggers.
    """
    _needs_triggers(batch)
    if batch.triggers.shape[1] < 2:
        raise BirthlensError(
            "corruption = 'triggers_swapped': it exchanges two triggers, and each sequence has one; use other_outputs or "
            "first_replaced."
        )
    sequence = _sequence(batch)
    announced = torch.full_like(batch.tokens, -1)
    for row, (occurrence, tokens) in enumerate(zip(batch.occurrence, batch.tokens, strict=True)):
        firsts = (occurrence == 1).nonzero()[:, 0]
        if len(firsts) < 2:
            continue
        order = torch.from_numpy(generator.permutation(len(firsts)))
        places = firsts[order]
        moved = tokens[firsts[order.roll(1)]]
        sequence[row, places] = moved
        for place, token in zip(places, moved, strict=True):
            # The token now at `place` is followed by what follows that place; its second occurrence should predict this.
            later = (tokens == token) & (occurrence == 2) & (torch.arange(len(tokens)) > place)
            announced[row, later] = place
    corrupted = _relabelled(batch, sequence, batch.outputs)
    # This is not the clean sequence's successor: if that was a trigger's first occurrence, it has moved as well.
    alternatives = torch.where(announced >= 0, corrupted.targets.gather(1, announced.clamp(min=0)), batch.targets)
    scored = ~batch.absorbed & (corrupted.tokens == batch.tokens) & (alternatives != batch.targets)
    return Pair(batch, corrupted, scored, alternatives)


def shifted(batch: TokenBatch, generator: np.random.Generator, d_vocab: int, by: int = 1) -> Pair:
    """Shift everything `by` positions later; new tokens that are not triggers come first, and the end is dropped."""
    _needs_triggers(batch)
    length = batch.tokens.shape[1]
    if not 0 < by < length:
        raise BirthlensError(f"by = {by}: shift by at least 1 and fewer than {length} positions.")
    sequence = _sequence(batch)
    start = _other_tokens(batch, batch.tokens[:, :by], generator, d_vocab)
    listed = torch.nn.functional.pad(batch.listed[:, :-by], (by, 0))
    corrupted = _relabelled(batch, torch.cat([start, sequence[:, :-by]], 1), batch.outputs, listed)
    return pair_of(batch, corrupted, batch.in_context & ~batch.absorbed)


CORRUPTIONS: dict[str, Callable[[TokenBatch, np.random.Generator, int], Pair]] = {
    "other_outputs": other_outputs,
    "first_replaced": first_replaced,
    "triggers_swapped": triggers_swapped,
    "shifted": shifted,
}


def task_pair(task: Task, name: str, batch: TokenBatch, generator: np.random.Generator) -> Pair:
    """Apply a corruption that a task defines.

    One that is not listed here is the task's own (`Task.corrupted`). Then the positions of the task's headline are scored
    that have the same token in both sequences, and different answers.

    Raises:
        BirthlensError: for a corruption that the task does not define; the message lists those it does.
    """
    if name not in task.corruptions:
        valid = ", ".join(task.corruptions) or "none"
        raise BirthlensError(f"corruption = {name!r} is not defined for the run's task; it defines {valid}.")
    if name in CORRUPTIONS:
        return corrupt(name, batch, generator, len(task.statistics))
    corrupted = task.corrupted(name, batch, generator)
    roles = [role_masks(each)[task.headline] for each in (batch, corrupted)]
    return pair_of(batch, corrupted, roles[0] & roles[1] & (batch.tokens == corrupted.tokens))


def corrupt(name: str, batch: TokenBatch, generator: np.random.Generator, d_vocab: int) -> Pair:
    """Apply a corruption by name; raise BirthlensError, listing the valid ones, for an unknown name."""
    if name not in CORRUPTIONS:
        raise BirthlensError(f"corruption = {name!r} is unknown; valid are {', '.join(CORRUPTIONS)}.")
    return CORRUPTIONS[name](batch, generator, d_vocab)


def _needs_triggers(batch: TokenBatch) -> None:
    if batch.triggers.shape[1] == 0:
        raise BirthlensError("the batch has no triggers; corruptions act on them. Pair your own batches with pair_of.")


def _sequence(batch: TokenBatch) -> Int[Tensor, "batch pos_plus_one"]:
    return torch.cat([batch.tokens, batch.targets[:, -1:]], 1)


def _trigger_index(batch: TokenBatch) -> Int[Tensor, "batch pos"]:
    """Return the index, among its sequence's triggers, of each token of the chain, or -1."""
    match = (batch.tokens[:, :, None] == batch.triggers[:, None]) & ~batch.listed[..., None]
    return torch.where(match.any(-1), match.int().argmax(-1), -1)


def _other_tokens(
    batch: TokenBatch, current: Int[Tensor, "batch k"], generator: np.random.Generator, d_vocab: int
) -> Int[Tensor, "batch k"]:
    """Draw, for each entry, another token that is not a trigger of its sequence."""
    if (highest := int(max(batch.tokens.max(), batch.targets.max(), batch.triggers.max()))) >= d_vocab:
        raise BirthlensError(f"d_vocab = {d_vocab}: the batch holds token {highest}; give the model's vocabulary size.")
    allowed = torch.ones(len(batch), current.shape[1], d_vocab, dtype=torch.bool)
    allowed.scatter_(2, current[..., None], False)
    allowed &= ~torch.zeros(len(batch), 1, d_vocab, dtype=torch.bool).scatter_(2, batch.triggers[:, None], True)
    if not allowed.any(-1).all():
        raise BirthlensError(
            f"a vocabulary of {d_vocab} tokens leaves no other token that is not a trigger; use a larger one."
        )
    keys = torch.from_numpy(generator.random(allowed.shape))
    return torch.where(allowed, keys, -1.0).argmax(-1)


def _relabelled(
    batch: TokenBatch,
    sequence: Int[Tensor, "batch pos_plus_one"],
    outputs: Int[Tensor, "batch k"],
    listed: Bool[Tensor, "batch pos"] | None = None,
) -> TokenBatch:
    """Make a batch of changed sequences; occurrences are counted anew, after the list of triggers if there is one."""
    tokens = sequence[:, :-1].contiguous()
    targets = sequence[:, 1:].contiguous()
    listed = batch.listed if listed is None else listed
    is_trigger = (tokens[:, :, None] == batch.triggers[:, None]) & ~listed[..., None]
    occurrence = (is_trigger.cumsum(1) * is_trigger).sum(-1)
    return TokenBatch(tokens, targets, batch.triggers, outputs, occurrence, torch.zeros_like(batch.absorbed))


def _same_query(batch: TokenBatch, corrupted: TokenBatch) -> Bool[Tensor, "batch pos"]:
    same = batch.tokens == corrupted.tokens
    return same & role_masks_with_successors(batch)["in_context_unabsorbed"] & corrupted.in_context
