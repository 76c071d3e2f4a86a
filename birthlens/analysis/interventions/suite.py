"""Suites: a set of interventions described as data, run over checkpoints, saved durably, and resumed without repetition.

A suite is plain data (YAML or JSON):

    name: heads-and-edges
    heads: all                      # optional: 'all', 'pairs' or addresses; methods and components are those of `ablation`
    methods: [zero, mean, resample]
    components: false
    cases:                          # optional: named interventions, as `Intervention.to_json` writes them
      keys only: [{edge: L0H0->L1H0.q, method: mean}, {edge: L0H0->L1H0.v, method: mean}]
      truncated: [{matrix: L1.W_F, method: without_rank:1}]   # see `truncation`
    metrics: [in_context.accuracy, in_context.loss]
    seed: 0
    draws: 200

`execute` writes into a directory, in the files that `suite_results` describes. A checkpoint's file is written again,
atomically, after every group of cases.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import numpy as np
from msgspec import Meta

from birthlens.analysis.interventions.ablation import (
    ABLATIONS,
    DEFAULT_METHODS,
    Ablation,
    Models,
    component_ablations,
    head_ablations,
    sizes_of,
)
from birthlens.analysis.interventions.backends import backend_of
from birthlens.analysis.interventions.head_sets import HeadSets
from birthlens.analysis.interventions.runner import CHUNK, evaluate
from birthlens.analysis.interventions.scoring import BASELINE, Outcomes, Scoring, default_metrics, merged
from birthlens.analysis.interventions.spec import (
    AnyIntervention,
    EdgeIntervention,
    Intervention,
    from_json,
)
from birthlens.analysis.interventions.suite_results import (
    manifest,
    model_hash,
    open_results,
    read_rows,
    spelled_out,
    write_rows,
)
from birthlens.analysis.interventions.suite_results import (
    read_results as read_results,
)
from birthlens.analysis.interventions.truncation import MatrixIntervention
from birthlens.config.base import Count, Section
from birthlens.errors import BirthlensError
from birthlens.labels import shown
from birthlens.model.components import Sizes
from birthlens.model.weights import Weights
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.corpus import BigramStatistics

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from birthlens.model.hooked import HookedModel
    from birthlens.model.live import LiveModel
    from birthlens.shapes import Int

AnySuiteIntervention = AnyIntervention | MatrixIntervention
SuiteCases = Mapping[str, Sequence[AnySuiteIntervention]]
GROUP = 64
"""Number of cases between two writes of a checkpoint's results."""


class Suite(Section):
    """What to run at each checkpoint; `metrics` defaults to the usual ones.

    Raises:
        BirthlensError: for unknown keys, values of the wrong kind, or invalid interventions.

    Example:
        >>> suite = Suite.from_data({"name": "two", "heads": "L0H0", "methods": ["zero"]})
        >>> Suite.from_data(suite.to_data()) == suite
        True
    """

    section: ClassVar[str] = "suite"
    name: str = "suite"
    heads: str | None = None
    methods: tuple[str, ...] = DEFAULT_METHODS
    components: bool = False
    cases: dict[str, tuple[Any, ...]] = {}
    metrics: Annotated[tuple[str, ...], Meta(min_length=1)] | None = None
    seed: Count = 0
    draws: Annotated[int, Meta(ge=0, le=100_000)] = 200

    def __init__(self, **values: Any) -> None:
        super().__init__(**{**values, "cases": _read_cases(values.get("cases", {}))})

    def _check(self) -> None:
        if unknown := [method for method in self.methods if method not in ABLATIONS]:
            raise BirthlensError(f"suite.methods = {unknown[0]!r} is unknown; valid are {', '.join(ABLATIONS)}.")

    @classmethod
    def from_data(cls, data: Mapping[Any, Any]) -> Self:
        """Read plain data."""
        return cls(**{str(key): value for key, value in data.items()})

    def to_data(self) -> dict[str, Any]:
        """Return plain data."""
        return super().to_data() | {"cases": spelled_out(self.cases)}

    def ablations(self, sizes: Sizes) -> dict[str, Ablation]:
        """Return the ablations of heads and components for a model, by the names of their cases."""
        chosen: list[Ablation] = []
        if self.heads is not None:
            chosen += head_ablations(HeadSets.parse(self.heads).of(sizes), self.methods)
        if self.components:
            chosen += component_ablations(sizes, self.methods)
        return {str(one): one for one in chosen}

    def cases_for(self, sizes: Sizes) -> SuiteCases:
        """Return every case in full, checked against a model."""
        out: dict[str, tuple[AnySuiteIntervention, ...]] = {
            name: one.interventions() for name, one in self.ablations(sizes).items()
        }
        if taken := [name for name in self.cases if name in out or name == BASELINE]:
            owner = "the unedited model" if taken[0] == BASELINE else "a case of heads or components"
            raise BirthlensError(f"suite.cases: {taken[0]!r} is the name of {owner}; choose another.")
        out |= self.cases
        if not out:
            raise BirthlensError("suite: it has no intervention; give heads, components or cases.")
        for case in out.values():
            for one in case:
                one.check(sizes)
        return out

    def labels(self, sizes: Sizes) -> dict[str, dict[str, str]]:
        """Return what each case ablates and how; a case from `cases` has its own name and its interventions' methods."""
        said = {BASELINE: (BASELINE, BASELINE)}
        said |= {name: (one.ablated, one.method) for name, one in self.ablations(sizes).items()}
        said |= {name: (name, "+".join(dict.fromkeys(one.method for one in ones))) for name, ones in self.cases.items()}
        return {name: {"ablated": ablated, "method": method} for name, (ablated, method) in said.items()}


def _read_cases(listed: Any) -> dict[str, tuple[AnySuiteIntervention, ...]]:
    if not (isinstance(listed, Mapping) and all(isinstance(ones, list | tuple) for ones in listed.values())):
        raise BirthlensError(f"suite.cases = {shown(listed)}: map each case's name to a list of interventions.")
    if empty := [name for name, ones in listed.items() if not ones]:
        raise BirthlensError(f"suite.cases.{empty[0]} = []: list at least one intervention.")
    if len({str(name) for name in listed}) < len(listed):
        raise BirthlensError(f"suite.cases = {shown(list(listed))}: two of its names are the same text.")
    cases = {str(name): tuple(map(_read_intervention, ones)) for name, ones in listed.items()}
    for name, ones in cases.items():
        if len({isinstance(one, MatrixIntervention) for one in ones}) > 1:
            raise BirthlensError(f"suite.cases.{name}: a case truncates matrices or replaces activations, not both.")
    return cases


def _read_intervention(data: Any) -> AnySuiteIntervention:
    if isinstance(data, Intervention | EdgeIntervention | MatrixIntervention):
        return data
    if not isinstance(data, Mapping) or "matrix" not in data:
        return from_json(data)
    return MatrixIntervention.from_json(data)


def _outcomes(
    model: Weights | HookedModel | LiveModel,
    cases: SuiteCases,
    batch: TokenBatch,
    scoring: Scoring,
    reference: TokenBatch | None,
    seed: int,
    chunk: int,
    told: Callable[[float], None] | None,
    initial: Weights | None,
) -> Outcomes:
    """Evaluate the unedited model and every case; a case of truncations is an unedited pass over other weights."""
    edited: dict[str, Sequence[AnyIntervention]] = {}
    for name, case in cases.items():
        if listed := [one for one in case if not isinstance(one, MatrixIntervention)]:
            edited[name] = listed
    backend = backend_of(model, edited, batch.device)
    parts = [evaluate(backend, edited, batch, scoring, reference, seed, chunk, told)]
    for name, case in cases.items():
        if name in edited:
            continue
        assert isinstance(model, Weights)
        truncated = model
        for one in case:
            assert isinstance(one, MatrixIntervention)
            truncated = one.of(truncated, initial)
        found = evaluate(truncated, {}, batch, scoring, None, seed, chunk)
        parts.append(Outcomes((name,), found.metrics, found.sums, found.counts))
    return merged(parts, (BASELINE, *cases))


def execute(
    suite: Suite,
    models: Models,
    batch: TokenBatch,
    reference: TokenBatch | None,
    directory: Path,
    subject: Mapping[str, Any] | None = None,
    statistics: BigramStatistics | None = None,
    chunk: int = CHUNK,
    progress: Callable[[int, float], None] | None = None,
    initial: Weights | None = None,
    alternatives: Int[Tensor, "batch pos"] | None = None,
) -> pd.DataFrame:
    """Run everything not yet done, and return the whole table: the columns of `ablation.cases_table`, ablated and method.

    A checkpoint is repeated if its weights are no longer those that were measured. `progress` is called with a step and the
    share of its work that is done: 1 when it is complete. `initial` are the weights that `change_rank` counts changes from.
    `alternatives` are the wrong answers of logit_difference, and `subject` must say which.

    Raises:
        BirthlensError: if the directory holds another suite's results, the same suite's results on other data or with other
            versions, or a damaged file.
    """
    suite = suite.changed(metrics=suite.metrics or tuple(map(str, default_metrics(statistics))))
    scoring = Scoring.of(batch, suite.metrics or (), statistics, alternatives)
    steps: list[int] = []
    for step, model in models:
        cases = suite.cases_for(sizes_of(model))
        labels = suite.labels(sizes_of(model))
        if not steps:
            asked = {"suite": suite.to_data(), "interventions": spelled_out(cases)}
            open_results(directory, manifest(asked, subject or {}, {"batch": batch, "reference": reference}))
        measured = model_hash(model)
        rows = read_rows(directory, step, measured)
        done = {row["case"] for row in rows}
        missing = [name for name in cases if name not in done]
        for start in range(0, len(missing), GROUP):
            group = {name: cases[name] for name in missing[start : start + GROUP]}
            told = (
                None if progress is None else _telling(progress, step, start / len(missing), len(group) / len(missing))
            )
            outcomes = _outcomes(model, group, batch, scoring, reference, suite.seed, chunk, told, initial)
            table = outcomes.table(np.random.default_rng(suite.seed) if suite.draws else None, suite.draws)
            fresh = table if not rows else table[table["case"] != BASELINE]
            for row in json.loads(fresh.to_json(orient="records", double_precision=15)):
                case = row.pop("case")
                rows.append({"case": case} | labels[case] | row)
            write_rows(directory, step, rows, measured)
        steps.append(step)
        if progress is not None:
            progress(step, 1.0)
    if not steps:
        raise BirthlensError("steps: there is no checkpoint to analyse; give at least one.")
    return read_results(directory, steps)


def _telling(progress: Callable[[int, float], None], step: int, done: float, weight: float) -> Callable[[float], None]:
    """Return a function that turns shares of a group's work into shares of its checkpoint's; 1 means saved to disk."""

    def advance(part: float) -> None:
        nonlocal done
        done += part * weight
        progress(step, min(done, 0.999))

    return advance
