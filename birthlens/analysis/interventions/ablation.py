"""Ablation of heads, sets of heads, feed-forwards and inputs: how the model performs without them.

    zero       the head writes nothing
    mean, mean_position, mean_role   its z is an average over the reference batch (over batch and position; at each
               position; over tokens of the same role)
    resample   its z comes from another sequence of the reference batch
    frozen_pattern   it attends as in the unedited model, whatever else is ablated
    dropped_value    it keeps its attention pattern and reads the average value everywhere
    uniform_pattern, previous_token_pattern   it keeps its values and attends evenly, or to the previous position

Resampled and averaged activations come from the unedited model on a reference batch of the same task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from birthlens.analysis.interventions.backends import backend_of
from birthlens.analysis.interventions.metrics import DEFAULT_METRICS, Metric
from birthlens.analysis.interventions.runner import CHUNK, evaluate
from birthlens.analysis.interventions.scoring import Scoring
from birthlens.analysis.interventions.spec import (
    METHODS,
    PATTERNS,
    AnyIntervention,
    Cases,
    Intervention,
    at_heads,
)
from birthlens.errors import BirthlensError
from birthlens.model.components import Sizes, all_heads, has_mlp, has_positions
from birthlens.model.sites import Head
from birthlens.model.weights import Weights
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.corpus import BigramStatistics

if TYPE_CHECKING:
    import pandas as pd

    from birthlens.model.hooked import HookedModel
    from birthlens.model.live import LiveModel

Models = Iterable[tuple[int, "Weights | HookedModel | LiveModel"]]
"""Checkpoints to analyse: (step, weights) as from `Run.checkpoints`, or (0, model) for any TransformerLens model."""

PATTERN_METHODS = {
    "frozen_pattern": ("pattern", "patch", "batch"),
    "dropped_value": ("v", "mean", "reference"),
    "uniform_pattern": ("pattern", "uniform", "reference"),
    "previous_token_pattern": ("pattern", "previous_token", "reference"),
}
NODE_METHODS = tuple(method for method in METHODS if method not in (*PATTERNS, "patch"))
ABLATIONS = (*NODE_METHODS, *PATTERN_METHODS)
DEFAULT_METHODS = ("zero", "mean", "resample")


def ablate_heads(heads: Iterable[Head], method: str) -> tuple[Intervention, ...]:
    """Return the interventions that ablate a set of heads together.

    Raises:
        BirthlensError: for an unknown method; the message lists the valid ones.

    Example:
        >>> [str(one) for one in ablate_heads([Head(0, 0), Head(1, 0)], "mean")]
        ['z L0H0 mean', 'z L1H0 mean']
    """
    if method in PATTERN_METHODS:
        site, how, source = PATTERN_METHODS[method]
        return at_heads(site, how, heads, source=source)
    if method not in NODE_METHODS:
        raise BirthlensError(f"method = {method!r} is unknown; valid are {', '.join(ABLATIONS)}.")
    return at_heads("z", method, heads)


def head_sets(sizes: Sizes, spec: str = "all") -> list[tuple[Head, ...]]:
    """Parse which sets of heads to ablate: 'all' (each alone), 'pairs', or addresses such as 'L0H0,L0H1+L1H0'.

    Raises:
        BirthlensError: for heads that do not exist; the message lists those that do.
    """
    heads = all_heads(sizes)
    if spec == "all":
        return [(head,) for head in heads]
    if spec == "pairs":
        if len(heads) < 2:
            raise BirthlensError(f"heads = 'pairs': the model has only one head, {heads[0]}; use all.")
        return list(combinations(heads, 2))
    chosen = [tuple(map(Head.parse, group.split("+"))) for group in spec.split(",")]
    if unknown := [str(head) for group in chosen for head in group if head not in heads]:
        raise BirthlensError(f"heads = {', '.join(unknown)} do not exist; valid are {', '.join(map(str, heads))}.")
    return chosen


def head_cases(
    heads: Iterable[Sequence[Head]], methods: Sequence[str] = DEFAULT_METHODS
) -> dict[str, tuple[AnyIntervention, ...]]:
    """Return a case 'L0H0+L1H0 mean' for each set of heads and method."""
    sets = list(heads)
    return {
        f"{'+'.join(map(str, group))} {method}": ablate_heads(group, method) for group in sets for method in methods
    }


def component_cases(sizes: Sizes, methods: Sequence[str] = DEFAULT_METHODS) -> dict[str, tuple[AnyIntervention, ...]]:
    """Return cases for components other than heads: feed-forwards, and the token and position inputs."""
    cases: dict[str, tuple[AnyIntervention, ...]] = {}
    for method in methods:
        if method in PATTERN_METHODS:
            continue
        for layer in range(sizes.n_layers):
            if has_mlp(sizes, layer):
                cases[f"L{layer}.mlp {method}"] = (Intervention("mlp_out", method, layer),)
        cases[f"embed {method}"] = (Intervention("embed", method),)
        if has_positions(sizes):
            cases[f"pos_embed {method}"] = (Intervention("pos_embed", method),)
    return cases


def ablation_table(
    models: Models,
    batch: TokenBatch,
    reference: TokenBatch | None = None,
    heads: str = "all",
    methods: Sequence[str] = DEFAULT_METHODS,
    components: bool = False,
    metrics: Sequence[Metric | str] = DEFAULT_METRICS,
    statistics: BigramStatistics | None = None,
    seed: int = 0,
    draws: int = 200,
    chunk: int = CHUNK,
) -> pd.DataFrame:
    """Ablate sets of heads (and other components) at each checkpoint.

    Columns: step, ablated ('none' for the whole model), method, role, metric, value, change (from the whole model), low,
    high, change_low, change_high (95 % percentile intervals from `draws` bootstrap resamples of the sequences, with `seed`),
    n (positions).

    Raises:
        BirthlensError: for unknown heads, methods or metrics, or a reference batch that is missing or too small.
    """

    def cases(sizes: Sizes) -> Cases:
        chosen = head_cases(head_sets(sizes, heads), methods)
        return chosen | component_cases(sizes, methods) if components else chosen

    table = cases_table(models, cases, batch, reference, metrics, statistics, seed, draws, chunk)
    names = table.pop("case").str.split(" ", expand=True).reindex(columns=range(2))
    table.insert(1, "ablated", names[0])
    table.insert(2, "method", names[1].fillna("none"))
    return table


def cases_table(
    models: Models,
    cases: Callable[[Sizes], Cases] | Cases,
    batch: TokenBatch,
    reference: TokenBatch | None = None,
    metrics: Sequence[Metric | str] = DEFAULT_METRICS,
    statistics: BigramStatistics | None = None,
    seed: int = 0,
    draws: int = 200,
    chunk: int = CHUNK,
) -> pd.DataFrame:
    """Run any named sets of interventions (or a function that returns them for the model's sizes) at each checkpoint.

    Columns: step, case ('none' for the whole model), role, metric, value, change, low, high, change_low, change_high, n,
    as in `ablation_table`.
    """
    import pandas as pd

    scoring = Scoring.of(batch, metrics, statistics)
    tables = []
    for step, model in models:
        chosen = cases(sizes_of(model)) if callable(cases) else cases
        outcomes = evaluate(backend_of(model, chosen), chosen, batch, scoring, reference, seed, chunk)
        table = outcomes.table(np.random.default_rng(seed) if draws else None, draws)
        table.insert(0, "step", step)
        tables.append(table)
    if not tables:
        raise BirthlensError("steps: there is no checkpoint to analyse; give at least one.")
    return pd.concat(tables, ignore_index=True)


def sizes_of(model: Weights | HookedModel) -> Sizes:
    """Return the config that holds a model's numbers of layers and heads."""
    return model.config if isinstance(model, Weights) else model.cfg
