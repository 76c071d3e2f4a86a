"""Many interventions on one model: shared prefixes, only the positions that are read, and chunks that fit the cache.

`evaluate` takes weights (the functional pass, with all its shortcuts) or a live model (hooks). If a case edits edges, which
the functional pass does not support, weights are loaded into a hooked model automatically. Weights run on the device of the
batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from birthlens.analysis.interventions.backends import Backend, HookedBackend, backend_of, has_shortcut
from birthlens.analysis.interventions.replacements import (
    Averages,
    Kept,
    Need,
    Sources,
    Unedited,
    needs,
    points_to_average,
    resampled_rows,
)
from birthlens.analysis.interventions.scoring import BASELINE, Outcomes, Scoring, merged
from birthlens.analysis.interventions.spec import MEANS, AnyIntervention, Cases, check_cases
from birthlens.errors import BirthlensError
from birthlens.model.hooks import edited
from birthlens.model.layout import Rows
from birthlens.model.sites import Point
from birthlens.model.weights import Weights
from birthlens.shapes import Int
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.positions import check_tokens, take

if TYPE_CHECKING:
    from birthlens.model.hooked import HookedModel

CHUNK = 16
"""Sequences in a chunk: their activations stay in the processor's cache."""

KEPT_BYTES = 2**28
"""Activations of a reference batch up to this size are kept for resampling; larger ones are recomputed."""

READ_ALL = 0.7
"""Above this share of read positions, computing causal attention over all positions is faster."""


@torch.no_grad()
def evaluate(
    model: Weights | HookedModel | Backend,
    cases: Cases,
    batch: TokenBatch,
    scoring: Scoring,
    reference: TokenBatch | None = None,
    seed: int = 0,
    chunk: int = CHUNK,
    advance: Callable[[float], None] | None = None,
) -> Outcomes:
    """Run the unedited model and every case on a batch.

    `reference` supplies the activations of other runs: a second batch, or the partner of a clean/corrupted pair with
    matching rows. `seed` determines which of its sequences are used for resampling. `advance` is called with each share of
    the work that is done.

    Raises:
        BirthlensError: for heads, layers or sites that do not exist, tokens that do not fit the model, or a missing or too
            small reference batch.
    """
    if isinstance(model, Weights):
        check_cases(cases, model.config)
        slow = {name: case for name, case in cases.items() if not all(map(has_shortcut, case))}
        if slow and len(slow) < len(cases):
            fast = {name: case for name, case in cases.items() if name not in slow}
            parts = []
            for some in (fast, slow):
                told = None if advance is None else _scaled(advance, len(some) / len(cases))
                parts.append(evaluate(model, some, batch, scoring, reference, seed, chunk, told))
            return merged(parts, (BASELINE, *cases))
    backend = backend_of(model, cases, batch.device)
    check_cases(cases, backend.sizes)
    _check_batches(backend, batch, reference)
    wanted = needs(one for case in cases.values() for one in case)
    picked = _picked_rows(batch, wanted, reference, seed)
    averages, kept = _survey(backend, wanted, batch, reference, chunk)
    read = scoring.read
    by_rows = backend.picks_rows and float(read.float().mean()) < READ_ALL
    # Sequences with a similar number of read positions share a chunk, so that there is little padding.
    order = read.sum(1).argsort() if by_rows else torch.arange(len(batch), device=batch.device)
    labels = (BASELINE, *cases)
    sums = torch.zeros(len(labels), len(batch), len(scoring.metrics), dtype=torch.float64)
    for index in torch.split(order, chunk):
        part = take(batch, index)
        scores = scoring[index]
        rows = Rows.of(scores.read) if by_rows else None
        scores = scores if rows is None else scores.at(rows)
        runs: dict[Need, Unedited] = {}
        base = backend.open(part.tokens, rows, wanted.get(("batch", "patch"), ()))
        for need, points in wanted.items():
            if need == ("batch", "patch"):
                runs[need] = base
            elif need in picked:
                donor, chosen = picked[need]
                if points <= kept.get(need[0], {}).keys():
                    restricted = {point for point in points if backend.restricts(point)}
                    runs[need] = Kept(kept[need[0]], chosen[index], rows, restricted)
                else:
                    runs[need] = backend.open(donor.tokens[chosen[index]], rows, points)
        sources = Sources(part, runs, averages)
        place = index.cpu()
        sums[0, place] = scores.sums(base.logits())
        for number, case in enumerate(cases.values(), start=1):
            sums[number, place] = scores.sums(base.logits(backend.edits(case, sources)))
        if advance is not None:
            advance(len(index) / len(batch))
    return Outcomes(labels, scoring.metrics, sums.numpy(), scoring.counts().numpy())


@contextlib.contextmanager
def intervene(
    model: HookedModel,
    interventions: Iterable[AnyIntervention],
    batch: TokenBatch,
    reference: TokenBatch | None = None,
    seed: int = 0,
) -> Iterator[None]:
    """Apply interventions to a live model inside the block; call the model on the batch's tokens.

    Raises:
        BirthlensError: as in `evaluate`, and at the end of the block if a hook never fired.

    Example:
        >>> from birthlens.config.model import ModelConfig
        >>> from birthlens.model.initialisation import initial_weights
        >>> from birthlens.analysis.interventions.spec import Intervention
        >>> from birthlens.model.hooked import build
        >>> from birthlens.tasks.positions import repeated_tokens
        >>> model = build(initial_weights(ModelConfig(d_model=8), 5, 9, np.random.default_rng(0)))
        >>> batch = repeated_tokens(2, 5, 5, np.random.default_rng(0))
        >>> with intervene(model, [Intervention("z", "zero", layer=1)], batch):
        ...     tuple(model(batch.tokens).shape)
        (2, 9, 5)
    """
    case = tuple(interventions)
    backend = HookedBackend(model)
    check_cases({"case": case}, backend.sizes)
    _check_batches(backend, batch, reference)
    wanted = needs(case)
    picked = _picked_rows(batch, wanted, reference, seed)
    averages, _ = _survey(backend, wanted, batch, reference, len(batch))
    runs = {
        need: backend.open(picked[need][0].tokens[picked[need][1]], None, points)
        for need, points in wanted.items()
        if need in picked
    }
    with edited(model, backend.edits(case, Sources(batch, runs, averages))):
        yield


def _scaled(advance: Callable[[float], None], by: float) -> Callable[[float], None]:
    return lambda share: advance(by * share)


def _check_batches(backend: Backend, batch: TokenBatch, reference: TokenBatch | None) -> None:
    for name, one in (("the batch", batch), ("the reference batch", reference)):
        if one is not None and one.device != backend.device:
            raise BirthlensError(
                f"{name} is on {one.device}, the model on {backend.device}; move one with .to(device)."
            )
    check_tokens(batch, backend.d_vocab, backend.n_ctx)
    if reference is not None:
        check_tokens(reference, backend.d_vocab, backend.n_ctx, "the reference batch")


def _picked_rows(
    batch: TokenBatch, wanted: dict[Need, set[Point]], reference: TokenBatch | None, seed: int
) -> dict[Need, tuple[TokenBatch, Int[Tensor, "batch"]]]:
    """Return, for each need, the batch that supplies it and which of its sequences replaces each of ours."""
    out = {}
    for source, method in wanted:
        if method in MEANS:
            continue
        donor = _donor(source, batch, reference)
        if method == "resample":
            drawn = resampled_rows(len(batch), source, len(donor), np.random.default_rng([seed, len(batch)]))
            rows = drawn.to(batch.device)
        elif len(donor) != len(batch):
            raise BirthlensError(f"patching needs a partner of {len(batch)} sequences; the reference has {len(donor)}.")
        else:
            rows = torch.arange(len(batch), device=batch.device)
        out[source, method] = (donor, rows)
    return out


def _survey(
    backend: Backend, wanted: dict[Need, set[Point]], batch: TokenBatch, reference: TokenBatch | None, chunk: int
) -> tuple[dict[str, Averages], dict[str, dict[Point, Tensor]]]:
    """Compute the averages that are needed, in one pass; keep activations for resampling if they are small enough."""
    averages: dict[str, Averages] = {}
    kept: dict[str, dict[Point, Tensor]] = {}
    for source in {source for source, method in wanted if method in MEANS}:
        donor = _donor(source, batch, reference)
        points = points_to_average(wanted, source)
        resampled = wanted.get((source, "resample"), set())
        averages[source] = Averages(by_role=(source, "mean_role") in wanted)
        keep: dict[Point, Tensor] = {}
        for first in range(0, len(donor), chunk):
            part = donor[first : first + chunk]
            trace = backend.open(part.tokens, None, points)
            values = {point: trace.value(point) for point in points}
            averages[source].add(values, part)
            size = sum(values[point].nbytes for point in points & resampled)
            if first == 0 and size * len(donor) <= KEPT_BYTES * len(part):
                shapes = {point: values[point].shape[1:] for point in points & resampled}
                keep = {point: torch.empty(len(donor), *shape, device=donor.device) for point, shape in shapes.items()}
            for point, whole in keep.items():
                whole[first : first + chunk] = values[point]
        kept[source] = keep
    return averages, kept


def _donor(source: str, batch: TokenBatch, reference: TokenBatch | None) -> TokenBatch:
    if source == "batch":
        return batch
    if reference is None:
        raise BirthlensError("reference = None: these interventions need a reference batch, or source='batch'.")
    if reference.tokens.shape[1] != batch.tokens.shape[1]:
        raise BirthlensError(
            f"the reference has {reference.tokens.shape[1]} positions, the batch {batch.tokens.shape[1]}; they must agree."
        )
    return reference
