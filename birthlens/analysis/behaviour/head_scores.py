"""Standard scores of attention heads, computed from patterns on a batch, each with its chance level.

Each score is mean attention, over the queries t that have something to attend to, on

    previous_token    t - 1
    duplicate_token   earlier positions with the token z_t
    induction         successors of earlier positions with the token z_t (prefix matching)

Chance is the same mean for uniform attention over the positions visible to the query. The in-context learning score is the
loss late in the context minus the loss early in it (negative if context helps).

The **transfer test** asks whether a head matches prefixes for tokens in general. It uses repeated random sequences and
scores the later copies only. `strict` is attention on the one right position, the successor of the same place in the copy
before.
`any_successor` is attention on the successor of any earlier equal token, because rows of repeated letters make the strict
score ambiguous. A model trained on fixed triggers may match only those, so scores are split into triggers and other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from birthlens.analysis.behaviour.attention import CHUNK, QueryShares, watch
from birthlens.analysis.interventions.ablation import Models
from birthlens.errors import BirthlensError
from birthlens.model.weights import Weights
from birthlens.shapes import Bool
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.positions import repeated_tokens
from birthlens.tasks.roles import correct, losses

if TYPE_CHECKING:
    import pandas as pd

PATTERN_SCORES = ("previous_token", "duplicate_token", "induction")


def pattern_targets(batch: TokenBatch) -> dict[str, Bool[Tensor, "batch query_pos key_pos"]]:
    """Return, for each score, the positions that each query should attend to."""
    tokens = batch.tokens
    n = tokens.shape[1]
    earlier = (tokens[:, :, None] == tokens[:, None]).tril(-1)
    # The successor of s is s + 1, which can be the query itself.
    successors = torch.nn.functional.pad(earlier[:, :, :-1], (1, 0)).tril()
    previous = torch.ones(n, n, dtype=torch.bool).tril(-1).triu(-1).expand(len(tokens), n, n)
    return {"previous_token": previous, "duplicate_token": earlier, "induction": successors}


def scores_table(models: Models, batch: TokenBatch, chunk: int = CHUNK) -> pd.DataFrame:
    """Score every head on a batch at each checkpoint: columns step, layer, head, score, value, chance, n (queries)."""
    import pandas as pd

    rows = []
    for step, model in models:
        shares = QueryShares()
        for seen in watch(model, batch, chunk):
            visible = torch.arange(1, batch.tokens.shape[1] + 1)
            for score, targets in pattern_targets(seen.batch).items():
                chance = targets.sum(-1) / visible
                there = targets.any(-1)
                for head, pattern in seen.heads:
                    shares.add((head.layer, str(head), score), (pattern * targets).sum(-1), chance, there)
        rows += [(step, *row) for row in shares.rows()]
    return pd.DataFrame(rows, columns=["step", "layer", "head", "score", "value", "chance", "n"])


def in_context_learning_table(
    models: Models, batch: TokenBatch, early: slice | None = None, late: slice | None = None
) -> pd.DataFrame:
    """Compare the loss late and early in the context: columns step, early, late, value (late minus early), n (sequences).

    By default, early is the second eighth of the context and late is the last eighth.

    Raises:
        BirthlensError: if the context is too short for an early and a late part.
    """
    import pandas as pd

    n = batch.tokens.shape[1]
    width = max(n // 8, 1)
    early = early or slice(width, 2 * width)
    late = late or slice(n - width, n)
    if n < 3:
        raise BirthlensError(f"context = {n} positions: an early and a late part to compare need at least 3.")
    rows = []
    for step, model in models:
        found = torch.cat([losses(seen.logits, seen.batch.targets) for seen in watch(model, batch)])
        first, last = (float(found[:, part].double().mean()) for part in (early, late))
        rows.append((step, first, last, last - first, len(batch)))
    return pd.DataFrame(rows, columns=["step", "early", "late", "value", "n"])


def transfer_table(
    models: Models,
    generator: np.random.Generator,
    n: int = 64,
    length: int | None = None,
    triggers: Sequence[int] | None = None,
    distinct: bool = False,
    chunk: int = CHUNK,
    device: str = "cpu",
) -> pd.DataFrame:
    """Test every head, and the model, on repeated random sequences at each checkpoint.

    Columns: step, layer, head (None for the model), group ('all', and with `triggers` also 'trigger' and 'other', for the
    query's token), score, value, chance, n (queries). Scores are strict and any_successor (heads), and accuracy and loss
    (the model; their chance is that of uniform guessing). All checkpoints with one vocabulary see the same sequences.
    `length` is the length of one copy, by default the largest that fits twice into the context, up to 64. Weights run on
    `device`, where a live model must be.

    Raises:
        BirthlensError: if two copies do not fit the model's context.
    """
    import pandas as pd

    rows: list[tuple[object, ...]] = []
    batch: TokenBatch | None = None
    for step, model in models:
        d_vocab, n_ctx = vocabulary_and_context(model)
        if n_ctx < 3:
            raise BirthlensError(f"context = {n_ctx} positions: two copies of a sequence need at least 3.")
        copy = min(64, (n_ctx + 1) // 2) if length is None else length
        if 2 * copy - 1 > n_ctx or copy < 2:
            raise BirthlensError(f"length = {copy}: two copies must fit the context; use 2 to {(n_ctx + 1) // 2}.")
        if batch is None or int(batch.tokens.max()) >= d_vocab:
            batch = repeated_tokens(n, copy, d_vocab, generator, distinct).to(device)
        shares = QueryShares()
        for seen in watch(model, batch, chunk):
            tokens = seen.batch.tokens
            right = _same_place(tokens.shape[1], copy)
            targets = {
                "strict": right.expand(len(tokens), -1, -1),
                "any_successor": pattern_targets(seen.batch)["induction"],
            }
            groups = _groups(seen.batch, copy, triggers)
            visible = torch.arange(1, tokens.shape[1] + 1)
            loss = losses(seen.logits, seen.batch.targets)
            right_answers = correct(seen.logits, seen.batch.targets)
            for group, where in groups.items():
                for head, pattern in seen.heads:
                    for score, wanted in targets.items():
                        value = (pattern * wanted).sum(-1)
                        chance = wanted.sum(-1) / visible
                        shares.add((head.layer, str(head), group, score), value, chance, where)
                even = torch.full(loss.shape, 1 / d_vocab)
                shares.add((None, None, group, "accuracy"), right_answers, even, where)
                shares.add((None, None, group, "loss"), loss, -even.log(), where)
        rows += [(step, *row) for row in shares.rows()]
    return pd.DataFrame(rows, columns=["step", "layer", "head", "group", "score", "value", "chance", "n"])


def vocabulary_and_context(model: object) -> tuple[int, int]:
    """Return d_vocab and n_ctx of weights or a TransformerLens model (1024 for rotary weights, which have no limit)."""
    if isinstance(model, Weights):
        return len(model["W_E"]), model.n_ctx or 1024
    cfg = getattr(model, "cfg", None)
    if cfg is None:
        raise BirthlensError(f"model = {type(model).__name__}: give Weights or a TransformerLens model.")
    return int(cfg.d_vocab), int(cfg.n_ctx)


def _same_place(n: int, copy: int) -> Bool[Tensor, "query_pos key_pos"]:
    """Mark, for each query in a later copy, the successor of its place in the previous copy."""
    queries = torch.arange(n)[:, None]
    keys = torch.arange(n)
    return keys == queries - copy + 1


def _groups(batch: TokenBatch, copy: int, triggers: Sequence[int] | None) -> dict[str, Bool[Tensor, "batch pos"]]:
    later = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens) >= copy
    if triggers is None:
        return {"all": later}
    is_trigger = torch.isin(batch.tokens, torch.as_tensor(list(triggers), dtype=torch.long))
    return {"all": later, "trigger": later & is_trigger, "other": later & ~is_trigger}
