"""Suites: a described set of interventions, run over checkpoints, written durably, resumed without doing anything twice.

A suite is plain data (YAML or JSON):

    name: heads-and-edges
    heads: all                      # optional: 'all', 'pairs' or addresses; with methods and components as in `ablation`
    methods: [zero, mean, resample]
    components: false
    cases:                          # optional: named interventions, as `Intervention.to_json` writes them
      keys only: [{edge: L0H0->L1H0.q, method: mean}, {edge: L0H0->L1H0.v, method: mean}]
    metrics: [in_context.accuracy, in_context.loss]
    seed: 0
    draws: 200

`execute` writes into a directory: manifest.json (what was run, on what, with which versions and seeds) and
steps/<step>.json, one atomic file a checkpoint, rewritten after every group of cases.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from birthlens.analysis.ablation import DEFAULT_METHODS, Models, component_cases, head_cases, head_sets, sizes_of
from birthlens.analysis.anatomy import Sizes
from birthlens.analysis.backends import backend_of
from birthlens.analysis.interventions import AnyIntervention, Cases, check_cases, from_json
from birthlens.analysis.metrics import BASELINE, METRICS, Scoring
from birthlens.analysis.runner import CHUNK, evaluate
from birthlens.corpus import BigramStatistics
from birthlens.disk import write_atomically
from birthlens.errors import BirthlensError
from birthlens.task import TokenBatch

if TYPE_CHECKING:
    import pandas as pd

PACKAGES = ("birthlens", "torch", "transformer-lens", "numpy")
GROUP = 64
"""Cases between two writes of a checkpoint's results."""


@dataclass(frozen=True)
class Suite:
    """What to run at each checkpoint.

    Raises:
        BirthlensError: for unknown keys, or interventions that make no sense.

    Example:
        >>> suite = Suite.from_data({"name": "two", "heads": "L0H0", "methods": ["zero"]})
        >>> Suite.from_data(suite.to_data()) == suite
        True
    """

    name: str = "suite"
    heads: str | None = None
    methods: tuple[str, ...] = DEFAULT_METHODS
    components: bool = False
    cases: Mapping[str, tuple[AnyIntervention, ...]] = field(default_factory=dict)
    metrics: tuple[str, ...] = METRICS
    seed: int = 0
    draws: int = 200

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Suite:
        """Read plain data."""
        known = [one.name for one in fields(cls)]
        if unknown := [key for key in data if key not in known]:
            raise BirthlensError(f"suite: {', '.join(unknown)} is unknown; valid keys are {', '.join(known)}.")
        values = dict(data)
        for key in ("methods", "metrics"):
            if key in values:
                values[key] = tuple(values[key])
        listed = values.get("cases") or {}
        if not isinstance(listed, Mapping) or not all(isinstance(ones, Sequence) for ones in listed.values()):
            raise BirthlensError("suite.cases: map each case's name to a list of interventions.")
        values["cases"] = {str(name): tuple(map(from_json, ones)) for name, ones in listed.items()}
        return cls(**values)

    def to_data(self) -> dict[str, Any]:
        """Return plain data."""
        cases = {name: [one.to_json() for one in ones] for name, ones in self.cases.items()}
        plain = {one.name: getattr(self, one.name) for one in fields(self)}
        return plain | {"cases": cases, "methods": list(self.methods), "metrics": list(self.metrics)}

    def cases_for(self, sizes: Sizes) -> Cases:
        """Return every case, spelled out and checked for a model."""
        out: dict[str, tuple[AnyIntervention, ...]] = {}
        if self.heads is not None:
            out |= head_cases(head_sets(sizes, self.heads), self.methods)
        if self.components:
            out |= component_cases(sizes, self.methods)
        out |= self.cases
        if not out:
            raise BirthlensError("suite: it names no intervention; give heads, components or cases.")
        if BASELINE in out:
            raise BirthlensError(f"suite.cases: {BASELINE!r} is the name of the unedited model; choose another.")
        check_cases(out, sizes)
        return out


def manifest(
    suite: Suite, subject: Mapping[str, Any], batch: TokenBatch, reference: TokenBatch | None
) -> dict[str, Any]:
    """Describe a run of a suite: the suite, its subject (a run or model, in the caller's words), the data, the versions."""
    return {
        "suite": suite.to_data(),
        "subject": dict(subject),
        "batch": _described(batch),
        "reference": None if reference is None else _described(reference),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def execute(
    suite: Suite,
    models: Models,
    batch: TokenBatch,
    reference: TokenBatch | None,
    directory: Path,
    subject: Mapping[str, Any] | None = None,
    statistics: BigramStatistics | None = None,
    chunk: int = CHUNK,
    progress: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Run what is not yet done, and return the whole table: the columns of `ablation.cases_table`.

    `progress` is called with each step once it is complete.

    Raises:
        BirthlensError: where the directory holds another suite's results, or the same suite's on other data or versions.
    """
    described = manifest(suite, subject or {}, batch, reference)
    parts = directory / "steps"
    parts.mkdir(parents=True, exist_ok=True)
    _claim(directory / "manifest.json", described)
    scoring = Scoring.of(batch, suite.metrics, statistics)
    steps = []
    for step, model in models:
        cases = suite.cases_for(sizes_of(model))
        path = parts / f"{step}.json"
        rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        done = {row["case"] for row in rows}
        missing = [name for name in cases if name not in done]
        for start in range(0, len(missing), GROUP):
            group = {name: cases[name] for name in missing[start : start + GROUP]}
            outcomes = evaluate(backend_of(model, group), group, batch, scoring, reference, suite.seed, chunk)
            table = outcomes.table(np.random.default_rng(suite.seed) if suite.draws else None, suite.draws)
            fresh = table if not rows else table[table["case"] != BASELINE]
            rows += json.loads(fresh.to_json(orient="records", double_precision=15))
            write_atomically(path, json.dumps(rows).encode())
        steps.append(step)
        if progress is not None:
            progress(step)
    return read_results(directory, steps)


def read_results(directory: Path, steps: Sequence[int] | None = None) -> pd.DataFrame:
    """Read a suite's table: all steps that are there, or some, in order.

    Raises:
        BirthlensError: where the directory holds no results.
    """
    import pandas as pd

    paths = {int(path.stem): path for path in (directory / "steps").glob("*.json")}
    chosen = sorted(paths) if steps is None else [step for step in steps if step in paths]
    if not chosen:
        raise BirthlensError(f"{directory} holds no results of a suite.")
    tables = []
    for step in chosen:
        table = pd.DataFrame(json.loads(paths[step].read_text()))
        table.insert(0, "step", step)
        tables.append(table)
    whole = pd.concat(tables, ignore_index=True)
    for name in ("value", "change", "low", "high", "change_low", "change_high"):
        if name in whole:
            whole[name] = pd.to_numeric(whole[name])
    return whole


def _claim(path: Path, described: dict[str, Any]) -> None:
    text = json.dumps(described, indent=2, sort_keys=True)
    if not path.exists():
        write_atomically(path, text.encode())
        return
    before = json.loads(path.read_text())
    now = json.loads(text)
    if different := [key for key in now if now[key] != before.get(key)]:
        raise BirthlensError(
            f"{path.parent} holds results of another suite: its {', '.join(different)} differ; choose another directory."
        )


def _described(batch: TokenBatch) -> dict[str, Any]:
    content = hashlib.sha256()
    for name, tensor in asdict(batch).items():
        content.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return {"sequences": len(batch), "positions": int(batch.tokens.shape[1]), "sha256": content.hexdigest()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
