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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from birthlens.analysis.interventions.backends import backend_of
from birthlens.analysis.interventions.head_sets import HeadSet, HeadSets
from birthlens.analysis.interventions.metrics import DEFAULT_METRICS, Metric
from birthlens.analysis.interventions.runner import CHUNK, evaluate
from birthlens.analysis.interventions.scoring import BASELINE, Scoring
from birthlens.analysis.interventions.spec import (
    METHODS,
    PATTERNS,
    Cases,
    Intervention,
    at_heads,
)
from birthlens.errors import BirthlensError
from birthlens.model.components import Sizes, has_mlp, has_positions
from birthlens.model.sites import Embedding, Head, Mlp, Sender
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


@dataclass(frozen=True)
class Ablation:
    """Components that are ablated together by one method.

    Example:
        >>> one = Ablation((Head(0, 0), Head(1, 0)), "mean")
        >>> str(one), [str(each) for each in one.interventions()]
        ('L0H0+L1H0 mean', ['z L0H0 mean', 'z L1H0 mean'])
    """

    components: tuple[Sender, ...]
    method: str

    def __str__(self) -> str:
        return f"{self.ablated} {self.method}"

    @property
    def ablated(self) -> str:
        """The components, joined by +."""
        return "+".join(map(str, self.components))

    def interventions(self) -> tuple[Intervention, ...]:
        """Return the interventions that ablate the components together."""
        heads = [one for one in self.components if isinstance(one, Head)]
        others = [
            Intervention("mlp_out", self.method, one.layer)
            if isinstance(one, Mlp)
            else Intervention(one.name, self.method)
            for one in self.components
            if not isinstance(one, Head)
        ]
        return (*(ablate_heads(heads, self.method) if heads else ()), *others)


def head_ablations(sets: Iterable[HeadSet], methods: Sequence[str] = DEFAULT_METHODS) -> list[Ablation]:
    """Return an ablation for each set of heads and method."""
    return [Ablation(group, method) for group in sets for method in methods]


def component_ablations(sizes: Sizes, methods: Sequence[str] = DEFAULT_METHODS) -> list[Ablation]:
    """Return ablations of components other than heads: feed-forwards, and the token and position inputs."""
    others: list[Sender] = [Mlp(layer) for layer in range(sizes.n_layers) if has_mlp(sizes, layer)]
    others += [Embedding("embed"), *([Embedding("pos_embed")] if has_positions(sizes) else [])]
    return [Ablation((one,), method) for method in methods if method not in PATTERN_METHODS for one in others]


def ablation_table(
    models: Models,
    batch: TokenBatch,
    reference: TokenBatch | None = None,
    heads: HeadSets | str = "all",
    methods: Sequence[str] = DEFAULT_METHODS,
    components: bool = False,
    metrics: Sequence[Metric | str] = DEFAULT_METRICS,
    statistics: BigramStatistics | None = None,
    seed: int = 0,
    draws: int = 200,
    chunk: int = CHUNK,
) -> pd.DataFrame:
    """Ablate sets of heads (and other components) at each checkpoint; `heads` as in `HeadSets.parse`.

    Columns: step, ablated ('none' for the whole model), method, role, metric, value, change (from the whole model), low,
    high, change_low, change_high (95 % percentile intervals from `draws` bootstrap resamples of the sequences, with `seed`),
    n (positions).

    Raises:
        BirthlensError: for unknown heads, methods or metrics, or a reference batch that is missing or too small.
    """
    sets = HeadSets.parse(heads) if isinstance(heads, str) else heads
    known: dict[str, Ablation] = {}

    def cases(sizes: Sizes) -> Cases:
        chosen = head_ablations(sets.of(sizes), methods)
        if components:
            chosen += component_ablations(sizes, methods)
        known.update({str(one): one for one in chosen})
        return {str(one): one.interventions() for one in chosen}

    table = cases_table(models, cases, batch, reference, metrics, statistics, seed, draws, chunk)
    done = [known.get(str(case)) for case in table.pop("case")]  # None is the unedited model
    table.insert(1, "ablated", [BASELINE if one is None else one.ablated for one in done])
    table.insert(2, "method", [BASELINE if one is None else one.method for one in done])
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
        outcomes = evaluate(backend_of(model, chosen, batch.device), chosen, batch, scoring, reference, seed, chunk)
        table = outcomes.table(np.random.default_rng(seed) if draws else None, draws)
        table.insert(0, "step", step)
        tables.append(table)
    if not tables:
        raise BirthlensError("steps: there is no checkpoint to analyse; give at least one.")
    return pd.concat(tables, ignore_index=True)


def sizes_of(model: Weights | HookedModel) -> Sizes:
    """Return the config that holds a model's numbers of layers and heads."""
    return model.config if isinstance(model, Weights) else model.cfg
