"""Phase diagrams: the outcomes of a grid of runs over two settings, refined where neighbours differ most.

A refined diagram has points between those of the grid. Each further point is the middle of two neighbours in a row or a
column whose difference was the largest. A boundary is thus found with a fraction of the runs that a finer grid would need.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from birthlens.analysis.behaviour.births import accuracy_birth, at_the_end, memory_births
from birthlens.analysis.memories.names import MEMORIES
from birthlens.config.run import RunConfig
from birthlens.errors import BirthlensError
from birthlens.runs.run import Run
from birthlens.training.grid import Grid
from birthlens.training.sweep import Outcome, run_path

if TYPE_CHECKING:
    import pandas as pd

GridPoint = tuple[Any, Any]
Train = Callable[[Sequence[RunConfig]], Iterable[Outcome]]
"""A function that brings runs to their end, like `training.sweep.sweep`."""

VALUES = {
    "birth": "step from which the in-context accuracy stays at one half or above",
    "accuracy": "in-context accuracy at the end",
    "loss": "loss over all positions at the end, nats",
    "output_memory": "step at which the output memory is born",
    "trigger_memory": "step at which the trigger memory is born",
    "prev_token_memory": "step at which the previous-token memory is born",
    "order": "share of seeds in which output, trigger and previous-token memory are born in this order, ties included",
}
"""What a diagram can show, in words."""
AT_THE_END = {"accuracy": "in_context_accuracy", "loss": "all_loss"}
"""Values that are held-out measurements at the end, and their names."""
TOGETHER = 4
"""The number of points added before the diagram is evaluated again."""


@dataclass(frozen=True)
class Diagram:
    """A grid of two settings and the quantity that is read from its runs.

    `tree` contains the other keys of a sweep (preset, overrides, seeds) as plain data.

    Raises:
        BirthlensError: for settings that are not axes of the grid, further axes or cases, and unknown values.
    """

    tree: Mapping[str, Any]
    x: str
    y: str
    value: str = "birth"
    seeds: int | None = None

    def __post_init__(self) -> None:
        axes = self.tree.get("axes")
        names = list(axes) if isinstance(axes, Mapping) else []
        for letter, key in (("x", self.x), ("y", self.y)):
            if key not in names:
                raise BirthlensError(
                    f"{letter} = {key!r} is not an axis of the grid; it has {', '.join(names) or 'none'}."
                )
        if self.x == self.y:
            raise BirthlensError(f"x and y are both {self.x!r}; name two settings.")
        if others := [name for name in names if name not in (self.x, self.y)]:
            raise BirthlensError(
                f"the grid has the further axis {others[0]!r}; set it in overrides, a diagram has two axes."
            )
        if self.tree.get("cases"):
            raise BirthlensError("the grid has cases; a phase diagram takes axes, overrides and seeds only.")
        if self.value not in VALUES:
            raise BirthlensError(f"value = {self.value!r} is unknown; valid are {', '.join(VALUES)}.")

    @property
    def points(self) -> list[GridPoint]:
        """The points of the grid itself."""
        Grid.parse(self.tree, self.seeds)
        return [(x, y) for y in self.tree["axes"][self.y] for x in self.tree["axes"][self.x]]

    def configs(self, point: GridPoint) -> list[RunConfig]:
        """Return the configs of a point, one for each seed."""
        words = [f"{key}={json.dumps(value)}" for key, value in zip((self.x, self.y), point, strict=True)]
        tree = {key: value for key, value in self.tree.items() if key != "axes"}
        return list(Grid.parse({**tree, "cases": {"point": words}}, self.seeds).configs().values())


def phase_table(diagram: Diagram, folder: str | Path, train: Train, refine: int = 0) -> pd.DataFrame:
    """Train the missing runs, and tabulate the value at every point.

    Columns: the two settings, value (mean over the seeds that have one), spread (their standard deviation), n, never (seeds
    in which the event did not happen), failed (seeds whose run failed), added (False for points of the grid itself). With
    `refine`, this many points are added where neighbours differ most.
    """
    import pandas as pd

    found: dict[GridPoint, dict[str, Any]] = {}
    waiting = diagram.points
    grid = set(waiting)
    left = refine
    while waiting:
        configs = {point: diagram.configs(point) for point in waiting}
        outcomes = {one.path: one for one in train([config for listed in configs.values() for config in listed])}
        for point, listed in configs.items():
            found[point] = _cell([outcomes[run_path(config, folder)] for config in listed], diagram.value)
        waiting = _between(diagram, found, min(left, TOGETHER))
        left -= len(waiting)
    rows = [
        {diagram.x: point[0], diagram.y: point[1], **cell, "added": point not in grid} for point, cell in found.items()
    ]
    return pd.DataFrame(rows)


def measured(run: Run, value: str) -> float:
    """Return the value of a finished run; NaN for an event that did not happen."""
    if value == "birth":
        return accuracy_birth(run.metrics())
    if value in AT_THE_END:
        return at_the_end(run.metrics(), AT_THE_END[value])
    births = memory_births(run)
    if not births:
        raise BirthlensError(f"value = {value!r}: {run.path} is not the paper's model, so its memories have no roles.")
    if value == "order":
        steps = [births.get(name, float("nan")) for name in MEMORIES]
        return float(steps[0] <= steps[1] <= steps[2])
    return births.get(value, float("nan"))


def _cell(outcomes: Sequence[Outcome], value: str) -> dict[str, Any]:
    values = np.array([measured(Run(one.path), value) for one in outcomes if one.state != "failed"])
    there = values[np.isfinite(values)]
    return {
        "value": float(there.mean()) if len(there) else float("nan"),
        "spread": float(there.std(ddof=1)) if len(there) > 1 else float("nan"),
        "n": len(there),
        "never": len(values) - len(there),
        "failed": len(outcomes) - len(values),
    }


def _between(diagram: Diagram, found: Mapping[GridPoint, Mapping[str, Any]], most: int) -> list[GridPoint]:
    """Return the middles of the pairs of neighbours that differ most, up to a number, the largest difference first."""
    values = [cell["value"] for cell in found.values() if cell["n"]]
    scale = (max(values) - min(values) if values else 0.0) or 1.0
    candidates: list[tuple[float, float, GridPoint]] = []
    for axis, key in enumerate((diagram.x, diagram.y)):
        lines: dict[Any, list[GridPoint]] = {}
        for point in found:
            lines.setdefault(point[1 - axis], []).append(point)
        marks = diagram.tree["axes"][key]
        for line in lines.values():
            if not all(_is_number(point[axis]) for point in line):
                continue
            ordered = sorted(line, key=lambda point: float(point[axis]))
            for first, second in pairwise(ordered):
                middle = _middle(first[axis], second[axis], marks)
                between = (middle, first[1]) if axis == 0 else (first[0], middle)
                if middle is not None and between not in found:
                    length = abs(_place(second[axis], marks) - _place(first[axis], marks))
                    candidates.append((_difference(found[first], found[second], scale), length, between))
    candidates.sort(key=lambda each: (-each[0], -each[1]))
    distinct = dict.fromkeys(point for difference, _, point in candidates if difference > 0)
    return list(islice((point for point in distinct if _is_possible(diagram, point)), most))


def _difference(first: Mapping[str, Any], second: Mapping[str, Any], scale: float) -> float:
    """Return how much two neighbours differ: between always and never born as much as between the extremes of the values."""
    share = [cell["never"] / max(1, cell["never"] + cell["n"]) for cell in (first, second)]
    apart = abs(first["value"] - second["value"]) / scale if first["n"] and second["n"] else 0.0
    return abs(share[0] - share[1]) + apart


def _middle(first: Any, second: Any, marks: Sequence[Any]) -> Any:
    """Return the value half-way, or None if there is none; between whole numbers it is a whole number."""
    middle = math.sqrt(first * second) if _is_geometric(marks) else (first + second) / 2
    found = round(middle) if all(isinstance(mark, int) for mark in marks) else float(f"{middle:.3g}")
    return found if first < found < second else None


def _place(value: float, marks: Sequence[Any]) -> float:
    """Return the position of a value on its axis, whose marks span 0 to 1."""
    ends = [float(min(marks)), float(max(marks))]
    scaled = [math.log(each) for each in (value, *ends)] if _is_geometric(marks) else [value, *ends]
    return (scaled[0] - scaled[1]) / ((scaled[2] - scaled[1]) or 1.0)


def _is_geometric(marks: Sequence[Any]) -> bool:
    """Return whether an axis is logarithmic: positive values that span a factor of four or more."""
    return bool(min(marks) > 0 and max(marks) >= 4 * min(marks))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_possible(diagram: Diagram, point: GridPoint) -> bool:
    """Return whether a point between others has a valid config: a width, for example, that its heads divide."""
    try:
        diagram.configs(point)
    except BirthlensError:
        return False
    return True
