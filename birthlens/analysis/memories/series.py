"""Readings over checkpoints before they become a table, because importing pandas takes longer than computing them.

Columns of the table, with one number in each row: step, memory, layer, head, basis ("raw", "dual"), metric, candidates (the
name of the candidate set), value, chance (the value for a random table, or NaN if that has no meaning) and n (the number of
queries in the mean, or of matrix entries for metrics of the whole matrix). Rows are sorted by step, then memory.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from birthlens.errors import BirthlensError
from birthlens.shapes import Float

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class MetricSeries:
    """One metric of one memory over some steps; the fields are the columns of the module, in the same order."""

    step: Sequence[int]
    memory: str
    layer: int
    head: str
    basis: str
    metric: str
    candidates: str
    value: Float[Array, "step"]
    chance: float
    n: int


COLUMNS = [column.name for column in fields(MetricSeries)]


@dataclass(frozen=True, eq=False)
class SeriesTable:
    """MetricSeries with facts that hold for all of them (`attrs`, as in pandas), convertible to a table or CSV.

    Raises:
        BirthlensError: if there are no series.
    """

    series: Sequence[MetricSeries]
    attrs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.series:
            raise BirthlensError("There is no checkpoint to read; give at least one (step, weights).")

    def __len__(self) -> int:
        return sum(len(single.step) for single in self.series)

    def to_pandas(self) -> pd.DataFrame:
        """Return the tidy table."""
        import pandas as pd

        ordered = self._by_memory()
        lengths = [len(single.step) for single in ordered]
        columns: dict[str, Array] = {}
        for name in COLUMNS:
            values = [getattr(single, name) for single in ordered]
            columns[name] = np.concatenate(values) if name in ("step", "value") else np.repeat(values, lengths)
        table = pd.DataFrame(columns).sort_values("step", kind="stable", ignore_index=True)
        table.attrs |= self.attrs
        return table

    def to_csv(self) -> str:
        """Format the table as pandas does; every number reads back exactly."""
        lines: dict[int, list[str]] = defaultdict(list)
        place = COLUMNS.index("value")
        for single in self._by_memory():
            constants = [getattr(single, name) for name in COLUMNS]
            before = _spelled(constants[1:place])
            after = _spelled(constants[place + 1 :])
            for step, value in zip(single.step, single.value.tolist(), strict=True):
                lines[step].append(f"{step},{before},{'' if value != value else value},{after}")
        return "\n".join([_spelled(COLUMNS), *chain.from_iterable(lines[step] for step in sorted(lines)), ""])

    def _by_memory(self) -> list[MetricSeries]:
        return sorted(self.series, key=attrgetter("memory"))


def _spelled(values: Iterable[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow("" if value != value else value for value in values)
    return line.getvalue()
