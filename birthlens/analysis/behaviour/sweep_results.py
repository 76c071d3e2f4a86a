"""The results of a sweep's runs, one row for each run, with the settings in which they differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from birthlens.analysis.behaviour.births import accuracy_birth, at_the_end
from birthlens.config.run import RunConfig
from birthlens.runs.run import Run
from birthlens.training.sweep import Outcome

if TYPE_CHECKING:
    import pandas as pd


def sweep_results_table(runs: Mapping[tuple[str, int], tuple[RunConfig, Outcome]]) -> pd.DataFrame:
    """Return the last measurements and the outcome of every (case, seed); a run that failed has no measurements.

    Columns: case, seed, every setting in which the configs differ except seeds (such as `task.n_triggers`), run, accuracy
    (in context, held out), loss (over all positions), birth (the first measured step from which the accuracy stays at
    one half or above; NaN if there is none), last_step, state, seconds, cpu_seconds.
    """
    import pandas as pd

    settings = {key: _settings(config) for key, (config, _) in runs.items()}
    names = [name for name in next(iter(settings.values()), {}) if len({s[name] for s in settings.values()}) > 1]
    rows: list[dict[str, Any]] = []
    for (case, seed), (_, outcome) in runs.items():
        chosen = {name: json.loads(settings[case, seed][name]) for name in names}
        chosen = {name: value if isinstance(value, int | float) else str(value) for name, value in chosen.items()}
        spent = {name: getattr(outcome, name) for name in ("state", "seconds", "cpu_seconds")}
        rows.append({"case": case, "seed": seed, **chosen, "run": str(outcome.path), **_measured(outcome), **spent})
    return pd.DataFrame(rows)


def means_over_seeds_table(table: pd.DataFrame, settings: Sequence[str], value: str) -> pd.DataFrame:
    """Average a column over the rows that agree in some settings: columns `settings`, `value`, n (rows).

    Example:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"d": [64, 64, 128], "seed": [0, 1, 0], "accuracy": [0.2, 0.4, 1.0]})
        >>> means_over_seeds_table(table, ["d"], "accuracy").to_dict("list")
        {'d': [64, 128], 'accuracy': [0.30000000000000004, 1.0], 'n': [2, 1]}
    """
    grouped = table.groupby(list(settings), sort=False)[value]
    return grouped.mean().to_frame().assign(n=grouped.size()).reset_index()


def _settings(config: RunConfig) -> dict[str, str]:
    """Return every setting except seeds as JSON, which can be compared."""
    tree = config.to_data()
    return {
        f"{section}.{key}": json.dumps(value)
        for section, values in tree.items()
        if section != "seeds"
        for key, value in values.items()
    }


def _measured(outcome: Outcome) -> dict[str, float]:
    nan = float("nan")
    if outcome.state == "failed":
        return {"accuracy": nan, "loss": nan, "birth": nan, "last_step": nan}
    run = Run(outcome.path)
    metrics = run.metrics()
    return {
        "accuracy": at_the_end(metrics, "in_context_accuracy"),
        "loss": at_the_end(metrics, "all_loss"),
        "birth": accuracy_birth(metrics),
        "last_step": float(run.steps[-1]),
    }
