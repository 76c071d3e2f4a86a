"""Line charts over training as inline SVG, readable without a script; the script adds the cursor and its values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from birthlens.viz.html import escape, script_json

WIDTH = 460
HEIGHT = 270
LEFT = 48
RIGHT = 14
TOP = 12
BOTTOM = 40
"""Margins of the plot inside the picture."""

COLOURS = 8
LEVELS = 5
"""The number of colours that report.css has for lines, and for horizontal levels."""


@dataclass(frozen=True)
class Curve:
    """A value at each step; values that are not finite leave a gap.

    `colour` is an index into the palette, by default the curve's place in the chart.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    colour: int | None = None


@dataclass(frozen=True)
class Level:
    """One horizontal line, such as chance or a floor.

    `of` is the palette index of the curve that it belongs to; a `neutral` level belongs to all curves and has no colour.
    """

    name: str
    value: float
    of: int | None = None
    neutral: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart with lines over step and horizontal levels (chance, floors); `top` fixes the upper end."""

    title: str
    series: Sequence[Curve]
    levels: Sequence[Level] = ()
    top: float | None = None
    note: str = ""
    _range: tuple[float, float] = field(init=False, repr=False, default=(0.0, 1.0))

    def __post_init__(self) -> None:
        values = [v for line in self.series for v in line.values if math.isfinite(v)]
        values += [level.value for level in self.levels if math.isfinite(level.value)]
        low = min([0.0, *values])
        high = self.top if self.top is not None else max([low, *values])
        high = high if high > low else low + 1.0
        step = _nice((high - low) / 4)
        high = self.top if self.top is not None else math.ceil(high / step - 1e-9) * step
        object.__setattr__(self, "_range", (math.floor(low / step + 1e-9) * step, high))

    def html(self) -> str:
        """Return the chart as a figure, with its legend and the data that the script needs."""
        steps = [step for line in self.series for step in line.steps]
        first, last = (min(steps), max(steps)) if steps else (0, 1)
        parts = [self._axes(first, last)]
        for name, level in zip(self._level_classes, self.levels, strict=True):
            if math.isfinite(level.value) and level.value <= self._range[1]:
                y = self._y(level.value)
                parts.append(f'<line class="{name}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        for name, line in zip(self._series_classes, self.series, strict=True):
            parts.append(f'<path class="{name}" d="{self._path(line, first, last)}"/>')
        parts.append(f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}" hidden/>')
        data = {
            "first": first,
            "last": last,
            "left": LEFT,
            "right": WIDTH - RIGHT,
            "series": [
                {"steps": list(line.steps), "shown": [number(value) for value in line.values]} for line in self.series
            ],
        }
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        return f"""<figure class="chart">
<figcaption>{escape(self.title)}</figcaption>
<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.alt)}">{"".join(parts)}</svg>
{self._legend()}{note}
<script type="application/json">{script_json(data)}</script>
</figure>"""

    @property
    def alt(self) -> str:
        """The chart in words."""
        said = []
        for line in self.series:
            finite = [(step, v) for step, v in zip(line.steps, line.values, strict=True) if math.isfinite(v)]
            if finite:
                first_step, first = finite[0]
                last_step, last = finite[-1]
                said.append(
                    f"{line.name} goes from {number(first)} at step {first_step} to {number(last)} at step {last_step}"
                )
        said += [f"{level.name} lies at {number(level.value)}" for level in self.levels if math.isfinite(level.value)]
        return f"{self.title}: " + "; ".join(said) + "."

    @property
    def _series_classes(self) -> list[str]:
        places = [i if line.colour is None else line.colour for i, line in enumerate(self.series)]
        return [f"series c{place % COLOURS}" for place in places]

    @property
    def _level_classes(self) -> list[str]:
        return [
            "level n"
            if level.neutral
            else f"level l{i % LEVELS}"
            if level.of is None
            else f"level c{level.of % COLOURS}"
            for i, level in enumerate(self.levels)
        ]

    def _legend(self) -> str:
        items = [
            f'<li>{_key(kind)}{escape(line.name)} <output data-series="{i}">'
            f"{number(line.values[-1]) if line.values else ''}</output></li>"
            for i, (kind, line) in enumerate(zip(self._series_classes, self.series, strict=True))
        ]
        items += [
            f'<li>{_key(kind)}{escape(level.name)} <span class="at">{number(level.value)}</span></li>'
            for kind, level in zip(self._level_classes, self.levels, strict=True)
            if math.isfinite(level.value)
        ]
        return f'<ul class="legend">{"".join(items)}</ul>'

    def _y(self, value: float) -> float:
        low, high = self._range
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def _path(self, line: Curve, first: int, last: int) -> str:
        out = []
        finite = [False, *map(math.isfinite, line.values), False]
        for i, (step, value) in enumerate(zip(line.steps, line.values, strict=True)):
            before, here, after = finite[i : i + 3]
            if not here:
                continue
            x = LEFT + (step - first) / max(1, last - first) * (WIDTH - LEFT - RIGHT)
            y = self._y(min(value, self._range[1]))
            if before or after:
                out.append(f"{'L' if before else 'M'}{x:.1f} {y:.1f}")
            else:  # a single value would be a line of length zero
                out.append(f"M{min(max(x - 3, LEFT), WIDTH - RIGHT - 6):.1f} {y:.1f}h6")
        return "".join(out)

    def _axes(self, first: int, last: int) -> str:
        low, high = self._range
        out = []
        for tick in ticks(low, high):
            y = self._y(tick)
            out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            out.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        for tick in ticks(first, last, 5, whole=True):
            x = LEFT + (tick - first) / max(1, last - first) * (WIDTH - LEFT - RIGHT)
            out.append(
                f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{tick:g}</text>'
            )
        out.append(
            f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>'
        )
        return "".join(out)


def _key(classes: str) -> str:
    """Draw the key of a legend entry in the style of its line."""
    line = f'<line class="{classes}" x1="0" x2="28" y1="4" y2="4"/>'
    return f'<svg class="key" viewBox="0 0 28 8" aria-hidden="true">{line}</svg>'


def number(value: float) -> str:
    """Round a value for display.

    Example:
        >>> number(0.99899), number(-4.158), number(123.4), number(float("nan"))
        ('0.999', '-4.158', '123', '-')
    """
    if not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def _nice(width: float) -> float:
    scale = 10.0 ** math.floor(math.log10(max(width, 1e-12)))
    return float(next(m * scale for m in (1, 2, 2.5, 5, 10) if width <= m * scale * (1 + 1e-9)))


def ticks(low: float, high: float, count: int = 4, whole: bool = False) -> list[float]:
    """Return about `count` round numbers between two values; with `whole`, whole numbers."""
    step = _nice((high - low) / count) if high > low else 1.0
    step = math.ceil(step) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]
