"""Attention patterns of one sequence over checkpoints and heads, with its tokens and their roles: the data of a picture.

Roles of a position (several may hold):

    trigger       a trigger's first occurrence: what follows cannot be predicted
    in_context    a later occurrence: what follows can be copied from the context
    output        right after a trigger
    absorbed      a trigger whose outputs are triggers again, so that the sequence never leaves the triggers
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from birthlens.errors import BirthlensError
from birthlens.labels import legible
from birthlens.model import forward
from birthlens.model.sites import Head, Point
from birthlens.runs.evaluation import evaluation_batch
from birthlens.runs.run import Run
from birthlens.shapes import Float, Int
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.tokenizing import encoded

if TYPE_CHECKING:
    from birthlens.model.hooked import HookedModel

ROLE_MARKS = {
    "trigger": ("▷", "trigger, first time"),
    "in_context": ("▶", "trigger seen before: in-context target follows"),
    "output": ("◆", "output of a trigger"),
    "absorbed": ("∞", "absorbed"),
}
"""For each role of a position, in display order: the mark before its token, and the mark's meaning."""

LEVELS = 65535


@dataclass(frozen=True, eq=False)
class AttentionFrames:
    """Patterns of one sequence; `steps` are checkpoints, `tokens` are readable labels, `roles` has a tuple per position."""

    steps: tuple[int, ...]
    heads: tuple[str, ...]
    tokens: tuple[str, ...]
    roles: tuple[tuple[str, ...], ...]
    patterns: Float[np.ndarray, "step head query_pos key_pos"]

    def __post_init__(self) -> None:
        shape = (len(self.steps), len(self.heads), len(self.tokens), len(self.tokens))
        if self.patterns.shape != shape:
            raise BirthlensError(f"patterns have shape {self.patterns.shape}; steps, heads and tokens need {shape}.")
        if len(self.roles) != len(self.tokens):
            raise BirthlensError(
                f"roles = {len(self.roles)} entries; give one tuple for each of {len(self.tokens)} tokens."
            )
        if not np.isfinite(self.patterns).all():
            raise BirthlensError(
                "the attention patterns contain values that are not finite; the checkpoint has diverged."
            )

    @property
    def marked(self) -> tuple[str, ...]:
        """Tokens with the marks of their roles before them."""
        return tuple(
            "".join(ROLE_MARKS[role][0] for role in roles) + token
            for token, roles in zip(self.tokens, self.roles, strict=True)
        )

    @property
    def causal(self) -> bool:
        """Whether every query attends only to itself and earlier keys."""
        return not np.triu(self.patterns, 1).any()

    def payload(self) -> dict[str, Any]:
        """Return JSON-ready data: patterns as 16-bit levels in base64, and only the lower triangle if they are causal.

        A level is 1/65535, which preserves four decimals. Two heads, 64 tokens and 20 steps need a quarter of a megabyte.
        """
        n = len(self.tokens)
        levels = np.rint(self.patterns.clip(0, 1) * LEVELS).astype("<u2")
        rows, columns = np.tril_indices(n) if self.causal else np.indices((n, n)).reshape(2, -1)
        return {
            "steps": list(self.steps),
            "heads": list(self.heads),
            "tokens": list(self.tokens),
            "marked": list(self.marked),
            "causal": self.causal,
            "levels": LEVELS,
            "patterns": base64.b64encode(levels[:, :, rows, columns].tobytes()).decode("ascii"),
        }


def run_frames(
    run: Run,
    steps: Sequence[int],
    tokens: object = None,
    row: int = 0,
    heads: Sequence[Head] | None = None,
    length: int = 64,
    device: str = "cpu",
) -> AttentionFrames:
    """Run one sequence through the model at each step, on a device.

    `tokens` is a batch (whose row `row` is used), a text, or token ids; by default a held-out batch of the run's task. The
    first `length` positions are kept.

    Raises:
        BirthlensError: for a row, head or token that does not exist.
    """
    _check_length(length)
    ids, roles = _sequence(run, tokens, row)
    ids = ids[:length]
    roles = roles[:length]
    chosen = _checked(heads, run.config.model.n_layers, run.config.model.n_heads)
    patterns = []
    for _, weights in run.checkpoints(steps):
        with torch.no_grad():
            tensors = forward.tensors_of(weights, device=device)
            found = forward.activations(tensors, weights.config, ids[None].to(device)).patterns
        patterns.append(np.stack([found[head.layer][0, head.head].cpu().numpy() for head in chosen]))
    labels = tuple(legible(run.statistics.vocab[i]) for i in ids.tolist())
    return AttentionFrames(tuple(steps), tuple(map(str, chosen)), labels, roles, np.stack(patterns))


def model_frames(
    model: HookedModel,
    tokens: object,
    labels: Sequence[str] | None = None,
    heads: Sequence[Head] | None = None,
    length: int = 64,
) -> AttentionFrames:
    """Run one sequence of ids through any TransformerLens model; labels default to its tokenizer's, or to the ids.

    Raises:
        BirthlensError: if `tokens` are not the ids of one sequence, or are outside the model's vocabulary or context.
    """
    from birthlens.model.hooks import captured, device_of

    _check_length(length)
    ids = one_sequence(tokens)[:length]
    if wrong := [i for i in ids.tolist() if not 0 <= i < model.cfg.d_vocab]:
        raise BirthlensError(f"tokens = {wrong[:5]} are not ids; the vocabulary has 0 to {model.cfg.d_vocab - 1}.")
    if len(ids) > model.cfg.n_ctx:
        raise BirthlensError(f"{len(ids)} tokens were given; the model's context has room for 1 to {model.cfg.n_ctx}.")
    chosen = _checked(heads, model.cfg.n_layers, model.cfg.n_heads)
    points = {head.layer: Point("pattern", head.layer) for head in chosen}
    found = captured(model, ids[None].to(device_of(model)), points.values())
    patterns = np.stack([found[points[head.layer]][0, head.head].float().cpu().numpy() for head in chosen])
    if labels is None:
        known = getattr(model, "tokenizer", None)
        if known is not None and len(known) < 2:  # a directory without a tokenizer gets an empty one
            known = None
        labels = [str(i) if known is None else known.decode([i]) for i in ids.tolist()]
    if len(labels) < len(ids):
        raise BirthlensError(f"labels = {len(labels)} strings; give one for each of {len(ids)} tokens.")
    shown = tuple(legible(label) for label in labels[: len(ids)])
    return AttentionFrames((0,), tuple(map(str, chosen)), shown, ((),) * len(ids), patterns[None])


def series_frames(
    models: Iterable[tuple[int, HookedModel]],
    sequences: Sequence[object],
    heads: Sequence[Head] | None = None,
    length: int = 64,
) -> list[AttentionFrames]:
    """Run sequences of ids through each model of a series, one model after another: the frames of each sequence."""
    steps = []
    found: list[list[AttentionFrames]] = []
    for step, model in models:
        steps.append(step)
        found.append([model_frames(model, ids, None, heads, length) for ids in sequences])
    return [
        replace(frames[0], steps=tuple(steps), patterns=np.concatenate([one.patterns for one in frames]))
        for frames in zip(*found, strict=True)
    ]


def batch_roles(batch: TokenBatch, row: int = 0) -> tuple[tuple[str, ...], ...]:
    """Return the names of the roles of each position of one sequence."""
    return _roles(batch.occurrence[row].tolist(), batch.absorbed[row].tolist())


def one_sequence(tokens: object) -> Int[Tensor, "pos"]:
    """Convert the ids of one sequence: a list, an array, or a tensor of shape [pos] or [1, pos].

    Raises:
        BirthlensError: for several sequences, values that are not whole numbers, or no ids at all.

    Example:
        >>> one_sequence([[3, 1, 2]]).tolist()
        [3, 1, 2]
    """
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError):
        raise BirthlensError(
            f"tokens = {tokens!r}: give the ids of one sequence, as a list of whole numbers."
        ) from None
    if ids.numel() == 0:
        raise BirthlensError("tokens = []: give at least one id.")
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise BirthlensError(
            f"tokens have shape {list(ids.shape)}: give the ids of one sequence, of shape [pos] or [1, pos]. "
            "For a batch, choose one row."
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise BirthlensError(f"tokens are of type {ids.dtype}: ids are whole numbers.")
    return ids.cpu().long()


def _sequence(run: Run, tokens: object, row: int) -> tuple[Int[Tensor, "pos"], tuple[tuple[str, ...], ...]]:
    batch = evaluation_batch(run, max(row + 1, 8)) if tokens is None else tokens
    if isinstance(batch, TokenBatch):
        if not 0 <= row < len(batch):
            raise BirthlensError(f"row = {row}: the batch has rows 0 to {len(batch) - 1}.")
        return batch.tokens[row], batch_roles(batch, row)
    vocab = run.statistics.vocab
    context = run.config.task.context
    ids = encoded(run.statistics, batch) if isinstance(batch, str) else one_sequence(batch).tolist()
    if not 0 < len(ids) <= context:
        raise BirthlensError(f"{len(ids)} tokens were given; the run's context has room for 1 to {context}.")
    if wrong := [i for i in ids if not 0 <= i < len(vocab)]:
        raise BirthlensError(f"tokens = {wrong[:5]} are not ids; the vocabulary has 0 to {len(vocab) - 1}.")
    triggers = set(run.triggers or ())
    seen = [ids[: t + 1].count(i) if i in triggers else 0 for t, i in enumerate(ids)]
    return torch.tensor(ids), _roles(seen, [False] * len(ids))


def _roles(seen: Sequence[int], absorbed: Sequence[bool]) -> tuple[tuple[str, ...], ...]:
    found = []
    for t, count in enumerate(seen):
        named = {"trigger": count == 1, "in_context": count >= 2, "absorbed": absorbed[t]}
        named["output"] = t > 0 and seen[t - 1] > 0
        found.append(tuple(role for role in ROLE_MARKS if named[role]))
    return tuple(found)


def _check_length(length: int) -> None:
    if length < 1:
        raise BirthlensError(f"length = {length}: show at least 1 position.")


def _checked(heads: Sequence[Head] | None, n_layers: int, n_heads: int) -> list[Head]:
    every = [Head(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    for head in heads or ():
        if head not in every:
            raise BirthlensError(
                f"head = {head} does not exist in this model; valid heads are {', '.join(map(str, every))}."
            )
    return every if heads is None else list(heads)
