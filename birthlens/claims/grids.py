"""A statistic over a grid of runs: the table behind an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from birthlens.claims.claim import Evidence, Statistic, interval
from birthlens.training.grid import Grid
from birthlens.training.sweep import runs_of

if TYPE_CHECKING:
    import pandas as pd


def grid_table(
    grid: Grid,
    statistic: Statistic,
    folder: str | Path,
    settings: Mapping[str, Any] | None = None,
    processes: int | None = None,
) -> pd.DataFrame:
    """Train the missing runs of a grid and compute a statistic of each run, which it gets under the name "run".

    Columns: case, seed, quantity, value.

    Raises:
        BirthlensError: if a run failed.
    """
    import pandas as pd

    rows = [
        (case, seed, quantity, float(value))
        for (case, seed), run in runs_of(grid, folder, processes).items()
        for quantity, value in statistic(Evidence({"run": run}, seed, settings or {})).items()
    ]
    return pd.DataFrame(rows, columns=["case", "seed", "quantity", "value"])


def over_seeds_table(table: pd.DataFrame) -> pd.DataFrame:
    """Average a `grid_table` over seeds: columns case, quantity, value, low, high (95 % t interval), seeds."""
    import pandas as pd

    rows = [
        (case, quantity, *interval(group["value"].tolist()), len(group))
        for (case, quantity), group in table.groupby(["case", "quantity"], sort=False)
    ]
    return pd.DataFrame(rows, columns=["case", "quantity", "value", "low", "high", "seeds"])
