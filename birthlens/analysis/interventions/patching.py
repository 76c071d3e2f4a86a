"""Activation patching between a clean and a corrupted batch: which activations carry the difference.

One activation of the base run is replaced by that of the source run, and

    recovered = ( m(patched) - m(corrupted) ) / ( m(clean) - m(corrupted) )

is the share of the clean-corrupted gap that the patched run reaches, in both directions of patching. When clean is patched
into corrupted (`clean_into_corrupted`), 1 means that the activation restores everything. In the other direction
(`corrupted_into_clean`), 0 means that it destroys everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from birthlens.analysis.interventions.ablation import Models, sizes_of
from birthlens.analysis.interventions.backends import Backend, backend_of
from birthlens.analysis.interventions.bootstrap import percentile_interval, resample_counts
from birthlens.analysis.interventions.corruptions import Pair
from birthlens.analysis.interventions.runner import CHUNK, evaluate
from birthlens.analysis.interventions.scoring import Outcomes
from birthlens.analysis.interventions.spec import Cases, Intervention
from birthlens.errors import BirthlensError
from birthlens.model.components import Sizes, has_mlp, has_positions, heads_at
from birthlens.model.sites import ATTENTION_SITES, INPUT_SITES, INTERVENTION_SITES, Head
from birthlens.tasks.positions import POSITION_ROLES

if TYPE_CHECKING:
    import pandas as pd

    from birthlens.model.hooked import HookedModel
    from birthlens.model.weights import Weights

DIRECTIONS = ("clean_into_corrupted", "corrupted_into_clean")
PATCHED_SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern")
AXES = ("head", "position", "role")


def patching_cases(
    sizes: Sizes, n_pos: int, sites: Sequence[str] | None = None, by: Sequence[str] = ("head",)
) -> list[tuple[dict[str, object], Intervention]]:
    """List the patches, each with its columns (site, layer, head, position); there is always one for each layer.

    `sites` defaults to all of `PATCHED_SITES` that the model has. `by` adds axes: 'head' (for sites that have heads), and
    'position' (every position) or 'role' (roles of position).

    Raises:
        BirthlensError: for sites that do not exist (in this model), or unknown axes; the message lists the valid ones.
    """
    there = [site for site in INTERVENTION_SITES if _layers(sizes, site)]
    chosen = [site for site in PATCHED_SITES if site in there] if sites is None else sites
    if not chosen:
        raise BirthlensError(f"sites = {sites}: name at least one of {', '.join(there)}.")
    for site in chosen:
        if site not in INTERVENTION_SITES:
            raise BirthlensError(f"site = {site!r} is unknown; valid are {', '.join(there)}.")
        if site not in there:
            lacks = "has no feed-forward" if site == "mlp_out" else "adds no positions to its input"
            raise BirthlensError(f"site = {site!r}: this model {lacks}; valid are {', '.join(there)}.")
    for axis in by:
        if axis not in (*AXES, "layer"):
            raise BirthlensError(f"by = {axis!r} is unknown; valid are layer, {', '.join(AXES)}.")
    places: list[str | tuple[int, ...]] = ["all"]
    if "position" in by:
        places = [(position,) for position in range(n_pos)]
    elif "role" in by:
        places = list(POSITION_ROLES)
    out = []
    for site in chosen:
        for layer in _layers(sizes, site):
            split = site in ATTENTION_SITES and "head" in by
            for number in range(heads_at(sizes, site)) if split else (None,):
                for place in places:
                    head = None if number is None or layer is None else Head(layer, number)
                    columns: dict[str, object] = {
                        "site": site,
                        "layer": layer,
                        "head": None if head is None else str(head),
                        "position": place if isinstance(place, str) else place[0],
                    }
                    heads = None if head is None else (head,)
                    out.append((columns, Intervention(site, "patch", layer, heads, place)))
    return out


def patching_table(
    models: Models,
    pair: Pair,
    sites: Sequence[str] | None = None,
    by: Sequence[str] = ("head",),
    directions: Sequence[str] = DIRECTIONS[:1],
    quantities: Sequence[str] = (),
    seed: int = 0,
    draws: int = 200,
    chunk: int = CHUNK,
) -> pd.DataFrame:
    """Patch each activation, one at a time, at each checkpoint.

    Columns: step, direction, site, layer, head, position, metric, value (patched), clean, corrupted, recovered,
    recovered_low, recovered_high (95 % intervals from bootstrap resamples of sequences, if `draws` is not 0), n (scored
    positions). `recovered` is NaN if clean and corrupted do not differ.
    """
    import pandas as pd

    tables = []
    for step, model in models:
        sizes = sizes_of(model)
        listed = patching_cases(sizes, pair.clean.tokens.shape[1], sites, by)
        for direction in directions:
            cases = {str(number): (patch,) for number, (_, patch) in enumerate(listed)}
            table = patched_table(model, pair, cases, direction, quantities, seed, draws, chunk)
            columns = pd.DataFrame([columns for columns, _ in listed]).iloc[table.pop("case").astype(int)]
            table = pd.concat([columns.reset_index(drop=True), table], axis=1)
            table.insert(0, "step", step)
            table.insert(1, "direction", direction)
            tables.append(table)
    if not tables:
        raise BirthlensError("steps: there is no checkpoint to analyse; give at least one.")
    return pd.concat(tables, ignore_index=True)


def _layers(sizes: Sizes, site: str) -> list[int | None]:
    """List the layers that have a site: [None] for the model's inputs, an empty list if there are none."""
    if site in INPUT_SITES:
        return [None] if site == "embed" or has_positions(sizes) else []
    return [layer for layer in range(sizes.n_layers) if site != "mlp_out" or has_mlp(sizes, layer)]


def patched_table(
    model: Weights | HookedModel | Backend,
    pair: Pair,
    cases: Cases,
    direction: str = DIRECTIONS[0],
    quantities: Sequence[str] = (),
    seed: int = 0,
    draws: int = 0,
    chunk: int = CHUNK,
) -> pd.DataFrame:
    """Run sets of patches on a pair: columns case, metric, value, clean, corrupted, recovered (with its interval), n."""
    import pandas as pd

    forward, other = patched_outcomes(model, pair, cases, direction, quantities, seed, chunk)
    clean, corrupted = (other, forward) if direction == DIRECTIONS[0] else (forward, other)
    values = {"value": forward.values[1:], "clean": clean.values[0], "corrupted": corrupted.values[0]}
    recovered = _recovered(forward.sums[1:], clean.sums[0], corrupted.sums[0], np.ones((1, len(forward.counts))))[0]
    metrics = [metric.quantity for metric in forward.metrics]
    frame = pd.DataFrame([(case, m) for case in cases for m in metrics], columns=["case", "metric"])
    for name, array in values.items():
        frame[name] = np.broadcast_to(array, recovered.shape).reshape(-1)
    frame["recovered"] = recovered.reshape(-1)
    if draws:
        weights = resample_counts(np.random.default_rng(seed), len(forward.counts), draws)
        drawn = _recovered(forward.sums[1:], clean.sums[0], corrupted.sums[0], weights)
        low, high = percentile_interval(drawn, recovered, forward.counts, skip_empty=False)
        frame["recovered_low"] = low.reshape(-1)
        frame["recovered_high"] = high.reshape(-1)
    frame["n"] = np.tile(forward.counts.sum(0).astype(int), len(cases))
    return frame


def patched_outcomes(
    model: Weights | HookedModel | Backend,
    pair: Pair,
    cases: Cases,
    direction: str,
    quantities: Iterable[str] = (),
    seed: int = 0,
    chunk: int = CHUNK,
) -> tuple[Outcomes, Outcomes]:
    """Return the outcomes of the patched base run and of the unedited source run."""
    if direction not in DIRECTIONS:
        raise BirthlensError(f"direction = {direction!r} is unknown; valid are {', '.join(DIRECTIONS)}.")
    # Roles of position are those of the clean sequence in both directions.
    corrupted = replace(pair.corrupted, occurrence=pair.clean.occurrence, absorbed=pair.clean.absorbed)
    base, source = (corrupted, pair.clean) if direction == DIRECTIONS[0] else (pair.clean, corrupted)
    scoring = pair.scoring(tuple(quantities))
    backend = backend_of(model, cases, base.device)
    forward = evaluate(backend, cases, base, scoring, source, seed, chunk)
    return forward, evaluate(backend, {}, source, scoring, None, seed, chunk)


def _recovered(patched: np.ndarray, clean: np.ndarray, corrupted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return recovered [draw case metric] from sums [case batch metric], [batch metric] and draws [draw batch]."""
    low = weights @ corrupted
    high = weights @ clean
    gap = high - low
    with np.errstate(invalid="ignore", divide="ignore"):
        share = (np.einsum("ds,csm->dcm", weights, patched) - low[:, None]) / gap[:, None]
    return np.where(gap[:, None] == 0, np.nan, share)
