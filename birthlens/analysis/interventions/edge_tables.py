"""Edge patching tables: which edges carry the difference between clean and corrupted, exactly and by attribution.

`edges` defines edges and their replacement; `patching` defines `recovered`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from birthlens.analysis.interventions.ablation import Models, sizes_of
from birthlens.analysis.interventions.attribution import edge_attributions, norm_points
from birthlens.analysis.interventions.backends import HookedBackend, backend_of
from birthlens.analysis.interventions.corruptions import Pair
from birthlens.analysis.interventions.patching import DIRECTIONS, patched_table
from birthlens.analysis.interventions.runner import CHUNK
from birthlens.analysis.interventions.spec import AnyIntervention, Cases, EdgeIntervention, frozen_norms
from birthlens.errors import BirthlensError
from birthlens.model.components import Sizes, edges_of
from birthlens.model.sites import Edge, Sender

if TYPE_CHECKING:
    import pandas as pd


def edge_table(
    models: Models,
    pair: Pair,
    edges: Iterable[Edge | str] | None = None,
    direction: str = DIRECTIONS[0],
    attribution_steps: Sequence[int] = (),
    freeze_norms: bool = False,
    quantities: Sequence[str] = (),
    seed: int = 0,
    draws: int = 0,
    chunk: int = 2 * CHUNK,
) -> pd.DataFrame:
    """Patch every edge (or some), one at a time, at each checkpoint.

    Columns: step, direction, edge, sender, receiver, metric, value, clean, corrupted, recovered (with its interval if
    `draws` is not 0), n. For each m in `attribution_steps` (0 is the plain gradient) there are also `attribution_m`, the
    linear estimate of recovered, and `attribution_m_error`, its difference from recovered.

    Raises:
        BirthlensError: for edges that do not exist, metrics without a gradient, or an unknown direction.
    """
    import pandas as pd

    if "accuracy" in quantities and attribution_steps:
        raise BirthlensError(
            "metric = 'accuracy': it has no gradient, so no attribution; use logit_difference or loss."
        )
    named = None if edges is None else list(map(_edge, edges))
    if named == []:
        raise BirthlensError(
            "edges = []: name at least one, for instance L0H0->L1H0.k, or leave it out for every edge."
        )
    tables = []
    for step, model in models:
        sizes = sizes_of(model)
        chosen = edges_of(sizes) if named is None else named
        norms = frozen_norms(sizes) if freeze_norms else ()
        by_name = {str(edge): edge for edge in chosen}
        cases: Cases = {name: (EdgeIntervention(edge, "patch"), *norms) for name, edge in by_name.items()}
        backend = backend_of(model, cases, pair.clean.device)
        table = patched_table(backend, pair, cases, direction, quantities, seed, draws, chunk)
        patched = [by_name[str(case)] for case in table.pop("case")]
        table.insert(0, "step", step)
        table.insert(1, "direction", direction)
        table.insert(2, "edge", [str(edge) for edge in patched])
        table.insert(3, "sender", [str(edge.sender) for edge in patched])
        table.insert(4, "receiver", [str(edge.receiver) for edge in patched])
        base, source = (pair.corrupted, pair.clean) if direction == DIRECTIONS[0] else (pair.clean, pair.corrupted)
        start = table["corrupted"] if direction == DIRECTIONS[0] else table["clean"]
        for steps in attribution_steps:
            if not isinstance(backend, HookedBackend):
                raise BirthlensError("attribution needs a live model; pass at least one edge.")
            scoring = pair.scoring(tuple(quantities))
            estimate = edge_attributions(backend.model, chosen, base, source, scoring, steps, norm_points(norms), chunk)
            gap = table["clean"] - table["corrupted"]
            table[f"attribution_{steps}"] = (start + estimate.reshape(-1) - table["corrupted"]) / gap
            table[f"attribution_{steps}_error"] = table[f"attribution_{steps}"] - table["recovered"]
        tables.append(table)
    if not tables:
        raise BirthlensError("steps: there is no checkpoint to analyse; give at least one.")
    return pd.concat(tables, ignore_index=True)


def cut_edges(
    edges: Iterable[Edge | str], method: str = "mean", freeze_norms: bool = False
) -> Callable[[Sizes], tuple[AnyIntervention, ...]]:
    """Return the case in which some edges are ablated together, as a function of the model's sizes."""
    chosen = [_edge(edge) for edge in edges]

    def case(sizes: Sizes) -> tuple[AnyIntervention, ...]:
        return (*(EdgeIntervention(edge, method) for edge in chosen), *(frozen_norms(sizes) if freeze_norms else ()))

    return case


def other_edges(sizes: Sizes, sender: Sender, kept: Collection[Edge]) -> list[Edge]:
    """List the edges that leave a sender, except those that are kept.

    Example:
        >>> from birthlens.config.model import ModelConfig
        >>> from birthlens.model.sites import Head
        >>> kept = [Edge.parse("L0H0->L1H0.k")]
        >>> [str(edge) for edge in other_edges(ModelConfig(n_layers=2), Head(0, 0), kept)]
        ['L0H0->L1H0.q', 'L0H0->L1H0.v', 'L0H0->logits']
    """
    return [edge for edge in edges_of(sizes) if edge.sender == sender and edge not in kept]


def steps_with_gap(table: pd.DataFrame, least_gap: float = 0.1) -> pd.DataFrame:
    """Return the rows of the steps that count: where |clean - corrupted| is at least this share of its largest value.

    At other steps there is nothing to recover, and `recovered` (or an attribution) divides noise by almost zero.
    """
    gap = (table["clean"] - table["corrupted"]).abs()
    return table[(gap > 0) & (gap >= least_gap * gap.groupby(table["metric"]).transform("max"))]


def births_table(
    table: pd.DataFrame, threshold: float = 0.5, value: str = "recovered", least_gap: float = 0.1
) -> pd.DataFrame:
    """Find when each edge becomes causal: the first step from which |value| stays at or above the threshold.

    Takes an `edge_table` over checkpoints. If it has intervals, the whole interval must stay at or above the threshold. Only
    steps with a gap to recover count (`steps_with_gap`). Columns: edge, metric, born (step, NaN if never), peak (the value
    that is largest in size), peak_step, last (the value at the last step), all among the steps that count; and counted_from,
    the first of these steps.

    Raises:
        BirthlensError: for a table of one step, which has nothing before it, or one whose intervals are all unknown.
    """
    import pandas as pd

    if table["step"].nunique() < 2:
        raise BirthlensError("births: one checkpoint does not say when an edge became causal; give at least two steps.")
    ends = [name for name in (f"{value}_low", f"{value}_high") if name in table]
    if ends and table[value].notna().any() and table[ends].isna().all(axis=None):
        raise BirthlensError(
            "births: the intervals are unknown, because fewer than two sequences are scored; use more sequences, or no "
            "intervals."
        )
    counted = set(steps_with_gap(table, least_gap).index)
    columns = ["edge", "metric", "born", "peak", "peak_step", "last", "counted_from"]
    rows = []
    for (edge, metric), group in table.groupby(["edge", "metric"], sort=False):
        group = group[group.index.isin(counted)].sort_values("step")
        if group.empty:
            rows.append((edge, metric, *[float("nan")] * 5))
            continue
        values = group[value].to_numpy()
        steps = group["step"].to_numpy()
        bounds = ends or [value]
        # The end of the interval nearest to 0, on the side of the value itself.
        sure = (group[bounds].to_numpy() * np.sign(values)[:, None]).min(1)
        below = np.flatnonzero(~(sure >= threshold))
        first = 0 if len(below) == 0 else int(below[-1]) + 1
        born = float(steps[first]) if first < len(steps) else float("nan")
        peak = int(np.argmax(np.abs(values)))
        rows.append((edge, metric, born, float(values[peak]), int(steps[peak]), float(values[-1]), int(steps[0])))
    return pd.DataFrame(rows, columns=columns)


def _edge(edge: Edge | str) -> Edge:
    return Edge.parse(edge) if isinstance(edge, str) else edge
