"""Attention sinks on the first token, by head, and the effects that accompany them (Guo et al. 2024).

    attention_to_first     mean attention to position 0
    attention_to_previous  mean attention to the previous position
    first_value            |v_0|
    value_ratio            |v_0| over the mean |v| of the other positions of the group (small: value-state drain)
    sink_logit             score(t, 0) minus the mean of score(t, s) over 1 <= s <= t (for a model from a directory: of
                           q_t . k_s / sqrt(d_head), which leaves out what positions add to the scores)
    residual_ratio         |x_0| over the mean |x_t| of the other positions, at the input of the layer (residual-state peak)

Queries are grouped by role: `in_context` (the head has something to copy: active) and `other` (dormant). For a model without
a task, all positions are `other`. Position 0 itself does not count as a query.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from birthlens.errors import BirthlensError
from birthlens.model.effects import BUILT
from birthlens.model.hooked import build
from birthlens.model.hooks import captured, moved
from birthlens.model.sites import Head, Point
from birthlens.model.weights import Weights
from birthlens.shapes import Bool, Float
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.positions import check_tokens

if TYPE_CHECKING:
    import pandas as pd

    from birthlens.analysis.interventions.ablation import Models
    from birthlens.model.hooked import HookedModel

COLUMNS = ["step", "layer", "head", "measure", "group", "value", "n"]


def sink_table(models: Models, batch: TokenBatch, chunk: int = 16) -> pd.DataFrame:
    """Measure the sinks of every head at each checkpoint, and the residual norms of every layer (head None).

    Columns: step, layer, head, measure, group, value, n (queries, or values that are compared). Groups without positions
    are left out.

    Raises:
        BirthlensError: if the batch does not fit the model, or has only one position.
    """
    import pandas as pd

    if batch.tokens.shape[1] < 2:
        raise BirthlensError("the batch has one position; a sink is measured from at least two.")
    rows: list[tuple[object, ...]] = []
    for step, model in models:
        built = build(model, n_ctx=batch.tokens.shape[1]) if isinstance(model, Weights) else model
        hooked = moved(built, batch.device)
        check_tokens(batch, hooked.cfg.d_vocab, hooked.cfg.n_ctx)
        sums: dict[tuple[object, ...], list[float]] = {}
        for part in batch.chunks(chunk):
            for key, total, n in _measured(hooked, part):
                known = sums.setdefault(key, [0.0, 0.0])
                known[0] += total
                known[1] += n
        rows += [(step, *key, total / n, int(n)) for key, (total, n) in sums.items() if n]
    return pd.DataFrame(rows, columns=COLUMNS)


def groups_of(batch: TokenBatch) -> dict[str, Bool[Tensor, "batch pos"]]:
    """Return the masks of the groups of queries; position 0 is in no group."""
    later = torch.ones_like(batch.in_context)
    later[:, 0] = False
    return {"in_context": batch.in_context & later, "other": ~batch.in_context & later}


@torch.no_grad()
def _measured(model: HookedModel, batch: TokenBatch) -> Iterator[tuple[tuple[object, ...], float, float]]:
    """Yield (layer, head, measure, group), a sum, and the number of values in it."""
    layers = range(model.cfg.n_layers)
    shows_scores = type(model).__name__ == BUILT  # a model of another library need not
    sites = ("pattern", "v", "resid_pre", *(("attn_scores",) if shows_scores else ("q", "k")))
    points = [Point(site, layer) for layer in layers for site in sites]
    found = {point: value.cpu() for point, value in captured(model, batch.tokens, points).items()}
    groups = groups_of(batch.to("cpu"))
    for layer in layers:
        pattern = found[Point("pattern", layer)]
        heads = pattern.shape[1]
        values = _per_head(found[Point("v", layer)], heads).norm(dim=-1)
        if shows_scores:
            logits = above_the_others(found[Point("attn_scores", layer)])
        else:
            logits = sink_logits(*(_per_head(found[Point(site, layer)], heads) for site in ("q", "k")))
        residual = found[Point("resid_pre", layer)].norm(dim=-1)
        previous = torch.nn.functional.pad(pattern.diagonal(-1, -2, -1), (1, 0))
        for group, mask in groups.items():
            n = float(mask.sum())
            for head in range(heads):
                key = layer, str(Head(layer, head))
                yield (*key, "attention_to_first", group), float(pattern[:, head, :, 0][mask].sum()), n
                yield (*key, "attention_to_previous", group), float(previous[:, head][mask].sum()), n
                yield (*key, "sink_logit", group), float(logits[:, head][mask].sum()), n
                yield (*key, "first_value", group), *_first(values[:, :, head], mask)
                yield (*key, "value_ratio", group), *_ratio(values[:, :, head], mask)
            yield (layer, None, "residual_ratio", group), *_ratio(residual, mask)


def _per_head(
    activation: Float[Tensor, "batch pos group d_head"], heads: int
) -> Float[Tensor, "batch pos head d_head"]:
    """Repeat keys and values that several heads share."""
    return activation.repeat_interleave(heads // activation.shape[2], dim=2)


def sink_logits(
    queries: Float[Tensor, "batch pos head d_head"], keys: Float[Tensor, "batch pos head d_head"]
) -> Float[Tensor, "batch head pos"]:
    """Return the sink logits of queries and keys, with scores divided by sqrt(d_head)."""
    return above_the_others(torch.einsum("bthd,bshd->bhts", queries, keys) / queries.shape[-1] ** 0.5)


def above_the_others(scores: Float[Tensor, "batch head query_pos key_pos"]) -> Float[Tensor, "batch head query_pos"]:
    """Return score(t, 0) minus the mean score(t, s) over 1 <= s <= t; 0 at t = 0. Scores of later keys are not read."""
    visible = torch.ones(scores.shape[-2:]).tril()
    visible[:, 0] = 0
    mean = torch.where(visible > 0, scores, 0).sum(-1) / visible.sum(-1).clamp(min=1)
    return (scores[..., 0] - mean) * (visible.sum(-1) > 0)


def _first(norms: Float[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]) -> tuple[float, float]:
    """Return the norm at position 0 summed over the sequences that have the group, and their number."""
    some = mask.any(1)
    return float(norms[some, 0].sum()), float(some.sum())


def _ratio(norms: Float[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]) -> tuple[float, float]:
    """Return the norm at position 0 over the mean norm of a group of each sequence, summed, and the number of sequences."""
    counts = mask.sum(1)
    some = counts > 0
    means = torch.where(mask, norms, 0.0).sum(1)[some] / counts[some]
    return float((norms[some, 0] / means).sum()), float(some.sum())
