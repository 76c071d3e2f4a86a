"""A run as one frame in a terminal: sparklines of loss, accuracy and recall, progress, and the remaining time."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from birthlens.errors import BirthlensError
from birthlens.labels import counted, is_share, label, neutral
from birthlens.runs.files import checkpoint_file
from birthlens.runs.run import Run

if TYPE_CHECKING:
    from rich.console import Group

BARS = "▁▂▃▄▅▆▇█"
MEASURED = ("in_context_loss", "in_context_accuracy", "global_loss", "all_loss")
SILENCE = 10
"""A run counts as silent after this many times its usual time between checkpoints (plus ten seconds) without a new one."""


def sparkline(values: Sequence[float], width: int = 40, low: float | None = None, high: float | None = None) -> str:
    """Draw values as a row of bars, each column showing the last of its values; values that are not finite leave a gap.

    Example:
        >>> sparkline([0, 1, 2, 3]), sparkline([5.0, 5.0]), sparkline([0, 1], low=0, high=2)
        ('▁▃▆█', '▁▁', '▁▅')
    """
    shown = list(values)
    if len(shown) > width:
        shown = [shown[(i + 1) * len(shown) // width - 1] for i in range(width)]
    finite = [value for value in shown if math.isfinite(value)]
    if not finite:
        return " " * len(shown)
    floor = min(finite) if low is None else low
    half = (max(finite) if high is None else high) / 2 - floor / 2  # a whole span may exceed the largest float
    out = []
    for value in shown:
        if not math.isfinite(value):
            out.append(" ")
            continue
        share = (value / 2 - floor / 2) / half if half > 0 else 0.0
        out.append(BARS[max(0, min(len(BARS) - 1, round(share * (len(BARS) - 1))))])
    return "".join(out)


def duration(seconds: float) -> str:
    """Format a duration.

    Example:
        >>> duration(7), duration(200), duration(7300)
        ('7 s', '3 min 20 s', '2 h 1 min')
    """
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@dataclass
class Watch:
    """Draws a run repeatedly; recalls of earlier steps are cached.

    `width` is that of a sparkline. Rows that do not fit a terminal of `height` lines are left out, with a note.
    """

    run: Run
    width: int = 40
    height: int | None = None
    _recalls: dict[int, Mapping[str, tuple[float, float]]] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether the run has reached its last step."""
        try:
            return self.run.finished
        except BirthlensError:
            return False

    def frame(self, now: float | None = None) -> Group:
        """Return the current frame."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        config = self.run.config
        engine = self.run.header["engine"]["name"]
        head = Text.assemble(
            (neutral(str(self.run.path)), "bold"),
            f"  {config.model.family}, d = {config.model.d_model}, {counted(config.model.n_layers, 'layer')}, "
            f"T = {config.task.context}, {self.run.task.setting}, {engine} engine",
        )
        try:
            steps = self.run.steps
        except BirthlensError:
            return Group(head, Text("waiting for the first checkpoint"))
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, style="cyan")
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True, style="dim")
        rows = self.rows(steps)
        # The two lines above may each wrap once, and the cursor needs a line.
        room = len(rows) if self.height is None else max(1, self.height - 5)
        for row in rows[:room]:
            table.add_row(*row)
        left = [Text(f"{len(rows) - room} more rows in a taller terminal", style="dim")] if len(rows) > room else []
        return Group(head, Text(self.progress(steps, now)), table, *left)

    def rows(self, steps: Sequence[int]) -> list[tuple[str, str, str, str]]:
        """Return a line for each measurement: name, sparkline, last value, range or chance."""
        metrics = self.run.metrics()
        out = []
        train = metrics[(metrics["split"] == "train") & (metrics["metric"] == "loss")].sort_values("step")
        held_out = metrics[metrics["split"] == "held_out"].sort_values("step")
        series = {"training_loss": train}
        series |= {name: held_out[held_out["metric"] == name] for name in MEASURED}
        for name, rows in series.items():
            if len(rows):
                values = [float(value) for value in rows["value"]]
                bounds = (0.0, 1.0) if is_share(name) else (min(0.0, *values), max(values))
                said = "of 1" if is_share(name) else f"from {values[0]:.3f}"
                out.append((label(name), sparkline(values, self.width, *bounds), f"{values[-1]:.3f}", said))
        return out + self._recall_rows(steps)

    def progress(self, steps: Sequence[int], now: float | None = None) -> str:
        """Describe progress, speed and remaining time."""
        planned = self.run.config.training.steps
        last = steps[-1]
        done = f"step {last} of {planned}, {len(steps)} checkpoints"
        if last >= planned:
            return f"{done}: finished"
        recent = steps[-10:]
        first, latest = (checkpoint_file(self.run.path, step).stat().st_mtime for step in (recent[0], recent[-1]))
        if len(recent) < 2 or latest <= first:
            return f"{done}: running"
        pace = (latest - first) / (recent[-1] - recent[0])
        silence = (time.time() if now is None else now) - latest
        usual = (latest - first) / (len(recent) - 1)
        if silence > max(10.0, SILENCE * usual):
            return f"{done}: no new checkpoint for {duration(silence)}; if it was stopped, continue it with --resume"
        return f"{done}: {1 / pace:.1f} steps/s, {duration((planned - last) * pace - silence)} to go"

    def _recall_rows(self, steps: Sequence[int]) -> list[tuple[str, str, str, str]]:
        from birthlens.analysis.behaviour.trajectory import memories_over

        model = self.run.config.model
        if model.family != "simplified" or model.n_layers != 2:
            return []
        every = -(-len(steps) // self.width)
        kept = [step for i, step in enumerate(steps) if i % every == 0 or step == steps[-1]]
        if missing := [step for step in kept if step not in self._recalls]:
            table = memories_over(self.run, missing, bases=("raw",)).to_pandas()
            table = table[(table["metric"] == "recall") & table["candidates"].isin(["all", "triggers"])]
            names = table["memory"].map(label).str.removesuffix(" memory") + " recall, " + table["candidates"]
            for step, rows in table.assign(name=names).groupby("step"):
                self._recalls[int(str(step))] = dict(
                    zip(rows["name"], zip(rows["value"], rows["chance"], strict=True), strict=True)
                )
        out = []
        for name in self._recalls[kept[-1]]:
            pairs = [self._recalls[step][name] for step in kept]
            values = [value for value, _ in pairs]
            out.append((name, sparkline(values, self.width, 0, 1), f"{values[-1]:.3f}", f"chance {pairs[-1][1]:.3f}"))
        return out
