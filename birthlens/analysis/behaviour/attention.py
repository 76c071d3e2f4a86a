"""What heads attend to on a batch: the paper's behavioural probes (section 5), for every head, with chance levels.

For a head with pattern A, a_t = argmax_s A[t, s] is the position with the most attention from t. Each probe is a share of
queries:

    previous_token          t right after a trigger          a_t = t - 1
    induction_match         t in context                     the token before a_t is z_t itself
    attended_is_predicted   t in context                     z at a_t is the model's prediction at t
    previous_where_attended s = a_t of a later head, t in context    the earlier head's a_s = s - 1
    repeats                 t in context                     the target equals z_t (a fact about the batch)

Chance is the same share for a position drawn uniformly from those visible to the query.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from birthlens.analysis.interventions.ablation import Models
from birthlens.model.forward import activations, tensors_of
from birthlens.model.hooks import captured_with_logits
from birthlens.model.live import LiveModel
from birthlens.model.sites import Head, Point
from birthlens.model.weights import Weights
from birthlens.shapes import Bool, Float, Int
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.positions import check_tokens, role_masks_with_successors

if TYPE_CHECKING:
    import pandas as pd

    from birthlens.model.hooked import HookedModel

CHUNK = 32
"""Number of sequences whose patterns are in memory at once."""


@dataclass(frozen=True, eq=False)
class Watched:
    """Part of a batch, with each layer's pattern and the logits."""

    batch: TokenBatch
    patterns: list[Float[Tensor, "batch head query_pos key_pos"]]
    logits: Float[Tensor, "batch pos d_vocab"]

    @property
    def heads(self) -> Iterator[tuple[Head, Float[Tensor, "batch query_pos key_pos"]]]:
        """Every head with its pattern."""
        for layer, pattern in enumerate(self.patterns):
            for head in range(pattern.shape[1]):
                yield Head(layer, head), pattern[:, head]


@torch.no_grad()
def watch(model: Weights | HookedModel | LiveModel, batch: TokenBatch, chunk: int = CHUNK) -> Iterator[Watched]:
    """Run a model over a batch, part by part, on the batch's device; the results are on the CPU.

    Weights do not need TransformerLens.

    Raises:
        BirthlensError: if the batch does not fit the model's vocabulary or context.
    """
    if isinstance(model, Weights):
        n_ctx = model.n_ctx or batch.tokens.shape[1]
        check_tokens(batch, len(model["W_E"]), n_ctx)
        tensors = tensors_of(model, device=batch.device)
        for part in batch.chunks(chunk):
            seen = activations(tensors, model.config, part.tokens)
            yield Watched(part.to("cpu"), [pattern.cpu() for pattern in seen.patterns], seen.logits.cpu())
        return
    check_tokens(batch, model.cfg.d_vocab, model.cfg.n_ctx)
    if isinstance(model, LiveModel):
        for part in batch.chunks(chunk):
            yield Watched(part.to("cpu"), *model.seen(part.tokens))
        return
    points = [Point("pattern", layer) for layer in range(model.cfg.n_layers)]
    for part in batch.chunks(chunk):
        found, logits = captured_with_logits(model, part.tokens, points)
        yield Watched(part.to("cpu"), [found[point].cpu() for point in points], logits.cpu())


class QueryShares:
    """Sums of a quantity and of its chance over queries, by key."""

    def __init__(self) -> None:
        self._sums: dict[tuple[object, ...], list[float]] = {}

    def add(self, key: tuple[object, ...], value: Tensor, chance: Tensor, where: Bool[Tensor, "..."]) -> None:
        """Add the queries at which `where` holds."""
        known = self._sums.setdefault(key, [0.0, 0.0, 0.0])
        for index, part in enumerate((value, chance)):
            known[index] += float(torch.where(where, part.double(), 0.0).sum())
        known[2] += int(where.sum())

    def rows(self) -> Iterator[tuple[object, ...]]:
        """Yield (*key, value, chance, n); means are NaN if there are no queries."""
        for key, (value, chance, n) in self._sums.items():
            mean = (value / n, chance / n) if n else (float("nan"), float("nan"))
            yield (*key, *mean, int(n))


def attention_table(models: Models, batch: TokenBatch, role: str = "in_context", chunk: int = CHUNK) -> pd.DataFrame:
    """Compute the probes for every head at each checkpoint.

    Columns: step, probe, layer, head, given (the later head, for previous_where_attended), value, chance, n (queries).
    `role` is the role of the queries that count as in context: 'in_context' or 'in_context_unabsorbed'.
    """
    import pandas as pd

    rows = []
    for step, model in models:
        shares = QueryShares()
        for seen in watch(model, batch, chunk):
            _probe(seen, role, shares)
        rows += [(step, *row) for row in shares.rows()]
    return pd.DataFrame(rows, columns=["step", "probe", "layer", "head", "given", "value", "chance", "n"])


def _probe(seen: Watched, role: str, shares: QueryShares) -> None:
    batch = seen.batch
    tokens = seen.batch.tokens
    masks = role_masks_with_successors(batch)
    after_trigger = masks["first_successor"] | masks["later_successor"]
    in_context = masks[role]
    visible = torch.arange(1, tokens.shape[1] + 1)
    evenly = (1 / visible).expand(tokens.shape)
    before = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=-1)
    predicted = seen.logits.argmax(-1)
    attended = {head: pattern.argmax(-1) for head, pattern in seen.heads}
    # argmax returns the place of a NaN if there is one; what is attended or predicted is then unknown.
    unknown = {head: _points_at_nan(pattern, attended[head]) for head, pattern in seen.heads}
    unpredicted = _points_at_nan(seen.logits, predicted)
    for head, most in attended.items():
        place = (head.layer, str(head), None)
        is_previous = _known(most == torch.arange(tokens.shape[1]) - 1, unknown[head])
        shares.add(("previous_token", *place), is_previous, evenly, after_trigger)
        chance = _share_of_keys(before, tokens)
        match = _known(before.gather(1, most) == tokens, unknown[head])
        shares.add(("induction_match", *place), match, chance, in_context)
        chance = _share_of_keys(tokens, predicted)
        copied = _known(tokens.gather(1, most) == predicted, unknown[head] | unpredicted)
        shares.add(("attended_is_predicted", *place), copied, chance, in_context)
        for later, chosen in attended.items():
            if later.layer > head.layer:
                key = ("previous_where_attended", head.layer, str(head), str(later))
                value = _known(is_previous.gather(1, chosen), unknown[later])
                shares.add(key, value, evenly.gather(1, chosen), in_context)
    repeats = batch.targets == tokens
    shares.add(("repeats", None, None, None), repeats, torch.full(tokens.shape, float("nan")), in_context)


def _points_at_nan(
    values: Float[Tensor, "batch pos choice"], chosen: Int[Tensor, "batch pos"]
) -> Bool[Tensor, "batch pos"]:
    return values.gather(-1, chosen[..., None])[..., 0].isnan()


def _known(value: Tensor, unknown: Bool[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
    """Return a boolean as 1.0 or 0.0, and NaN if it is unknown."""
    return torch.where(unknown, torch.nan, value.float())


def _share_of_keys(keys: Int[Tensor, "batch pos"], wanted: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
    """Return, for each query, the share of visible positions whose entry in `keys` is the wanted one."""
    equal = (keys[:, None] == wanted[:, :, None]).tril()
    return equal.sum(-1) / torch.arange(1, keys.shape[1] + 1)
