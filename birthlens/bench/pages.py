"""Bench files as Markdown: the goals beside what was measured, every comparison, and the scaling table.

A page holds blocks between `<!-- bench: NAME -->` and `<!-- bench: end -->`, where NAME is a key of `BLOCKS`; `filled`
writes the tables there, so that no number in a page is typed by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from birthlens.errors import BirthlensError
from birthlens.reading import parse_json, read_text

Row = Mapping[str, Any]


class Goal(NamedTuple):
    """One goal: the row and the column of its value, and the bound that the value must keep ('>=' or '<=')."""

    what: str
    case: str
    setting: str
    variant: str
    column: str
    sense: str
    bound: float
    baseline: str | None = None
    unit: str = "times"


GOALS = (
    Goal("fused step against a HookedTransformer loop, batch 512", "training step", "batch 512", "fused",
         "times_baseline", ">=", 10),
    Goal("fused step against a HookedTransformer loop, batch 64", "training step", "batch 64", "fused",
         "times_baseline", ">=", 6),
    Goal("fused step against the paper's equations in PyTorch, batch 512", "training step", "batch 512", "fused",
         "times_baseline", ">=", 7, "plain"),
    Goal("the same, the equations in micro-batches of 16", "training step", "batch 512", "fused",
         "times_baseline", ">=", 1, "plain, micro-batches of 16"),
    Goal("fused step against the paper's equations in PyTorch, batch 64", "training step", "batch 64", "fused",
         "times_baseline", ">=", 4.5, "plain"),
    Goal("hand-written torch step against a HookedTransformer loop, batch 512", "training step", "batch 512", "handwritten",
         "times_baseline", ">=", 4.5),
    Goal("hand-written torch step against a HookedTransformer loop, batch 64", "training step", "batch 64", "handwritten",
         "times_baseline", ">=", 2.7),
    Goal("sampling, as a share of the fused step, batch 512", "sampling in a step", "batch 512", "sampling alone",
         "share_of_baseline", "<=", 0.03, unit="%"),
    Goal("sampling, as a share of the fused step, batch 64", "sampling in a step", "batch 64", "sampling alone",
         "share_of_baseline", "<=", 0.03, unit="%"),
    Goal("full model's step against a HookedTransformer loop, batch 64", "full model step", "batch 64", "functional",
         "times_baseline", ">=", 2.2),
    Goal("weight probes of 200 checkpoints, from process start", "weight probes", "200 checkpoints", "probe process",
         "ms", "<=", 2000, unit="s"),
    Goal("the same against a loop over HookedTransformers", "weight probes", "200 checkpoints", "probe process",
         "times_baseline", ">=", 20),
    Goal("saving checkpoints, as a share of training", "checkpoint", "batch 512", "saves a step, one every 10 steps",
         "share_of_baseline", "<=", 0.05, unit="%"),
    Goal("six head ablations against hooks per case", "interventions", "256 sequences, 6 cases", "runner",
         "times_baseline", ">=", 12),
    Goal("the same over 100 checkpoints", "ablation suite", "100 checkpoints, 256 sequences", "suite",
         "seconds", "<=", 90, unit="s"),
    Goal("`paper`, from nothing to in-context accuracy 0.9", "training", "paper", "to accuracy 0.9",
         "seconds", "<=", 120, unit="s"),
    Goal("`demo`, the whole training", "training", "demo", "to the end", "seconds", "<=", 10, unit="s"),
    Goal("`birthlens --help`, from process start", "start-up", "new process", "birthlens --help", "ms", "<=", 400, unit="s"),
    Goal("`import birthlens`, from process start", "start-up", "new process", "import birthlens", "ms", "<=", 300, unit="s"),
    Goal("peak memory of training at batch 512, compiled", "memory", "batch 512", "fused", "peak_mb", "<=", 1500, unit="MB"),
    Goal("a sequence and step of an ensemble on a GPU", "ensemble", "d 128, T 256, B 128, R 64",
         "ensemble, bfloat16, counter", "us", "<=", 1.3, unit="us"),
    Goal("the same against the plain float32 loop of the same card", "ensemble", "d 128, T 256, B 128, R 64",
         "ensemble, bfloat16, counter", "times_baseline", ">=", 15),
    Goal("the sampler's share of it", "ensemble", "d 128, T 256, B 128, R 64", "ensemble, bfloat16, counter", "sampling",
         "<=", 0.1, unit="%"),
    Goal("peak memory of training at batch 512, torch", "memory", "batch 512", "handwritten", "peak_mb", "<=", 1500,
         unit="MB"),
)  # fmt: skip
FRONT = {
    "fused step against a HookedTransformer loop, batch 512": "birthlens bench --only step512",
    "`paper`, from nothing to in-context accuracy 0.9": "birthlens bench --only accuracy",
    "weight probes of 200 checkpoints, from process start": "birthlens bench --only probes",
    "six head ablations against hooks per case": "birthlens bench --only interventions",
    "`birthlens --help`, from process start": "birthlens bench --only start",
}
"""The goals that the README shows, each with the command that measures it."""
_SIGNS = {">=": "at least", "<=": "at most"}


def read(paths: Iterable[str | Path]) -> dict[str, Any]:
    """Read bench files, and combine those of one machine that contain different cases.

    Raises:
        BirthlensError: if a file was not written by `birthlens bench --out`.
    """
    found: dict[str, Any] = {}
    for path in paths:
        try:
            one: Any = parse_json(read_text(path, "from"), str(path))
            if not isinstance(one["machine"], dict) or not all(isinstance(row["case"], str) for row in one["rows"]):
                raise TypeError("machine is a mapping, and every row has a case")
            rows = [*found.get("rows", []), *one["rows"]]
            found = {"machine": one["machine"], "quick": one["quick"] or found.get("quick", False), "rows": rows}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BirthlensError(
                f"from = {str(path)!r} is not a file of `birthlens bench --out` ({type(error).__name__}: {error})."
            ) from None
    return found


def goals(report: Mapping[str, Any]) -> str:
    """Return the table of the goals that the report has rows for: what, measured, promised."""
    lines = []
    for goal in GOALS:
        value = _measured(goal, report["rows"])
        if value is not None:
            kept = value >= goal.bound if goal.sense == ">=" else value <= goal.bound
            promised = f"{_SIGNS[goal.sense]} {_shown(goal.bound, goal)}"
            if goal.unit == "times" and goal.bound == 1:
                promised = "at least as fast"
            lines.append([goal.what, f"**{_shown(value, goal)}**", promised if kept else f"{promised}, **missed**"])
    return _table(["what", "measured", "promised"], lines)


def front(report: Mapping[str, Any]) -> str:
    """Return the table of the README's measurements: what, measured, command."""
    rows = []
    for goal in GOALS:
        value = _measured(goal, report["rows"]) if goal.what in FRONT else None
        if value is not None:
            rows.append([goal.what, f"**{_shown(value, goal)}**", f"`{FRONT[goal.what]}`"])
    return _table(["what", "measured", "command"], rows)


def comparisons(report: Mapping[str, Any]) -> str:
    """Tabulate every case but the scaling, one table per case."""
    parts = []
    for case in dict.fromkeys(row["case"] for row in report["rows"]):
        if case != "scaling":
            rows = [{k: v for k, v in row.items() if k != "case"} for row in report["rows"] if row["case"] == case]
            columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
            body = _table(columns, [[_cell(row[column]) for column in columns] for row in rows])
            parts.append(f"**{case[0].upper()}{case[1:]}**\n\n{body}")
    return "\n\n".join(parts)


def scaling(report: Mapping[str, Any]) -> str:
    """Tabulate the scaling of the fused step."""
    rows = [row for row in report["rows"] if row["case"] == "scaling"]
    head = ["varied", "value", "ms", "useful GFLOP", "share of peak", "peak memory, MB"]
    keys = ("varied", "value", "ms", "useful_gflop", "share_of_peak", "peak_memory_mb")
    return _table(head, [[_cell(row[key]) for key in keys] for row in rows])


def machine(report: Mapping[str, Any]) -> str:
    """Describe the machine and the versions of a measurement."""
    facts = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    return f"Measured with {facts}{' (quick)' if report['quick'] else ''}."


BLOCKS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "goals": goals,
    "front": front,
    "comparisons": comparisons,
    "scaling": scaling,
    "machine": machine,
}


def filled(page: str, report: Mapping[str, Any], name: str = "page") -> str:
    r"""Return a page with its blocks written again.

    Raises:
        BirthlensError: if the page has no block, or one of an unknown name.

    Example:
        >>> report = {"machine": {"cores": 2}, "quick": False, "rows": []}
        >>> filled("<!-- bench: machine -->\nold\n<!-- bench: end -->\n", report).splitlines()[1]
        'Measured with cores 2.'
    """
    blocks = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- bench: end -->)", re.DOTALL)
    names = [match[2] for match in blocks.finditer(page)]
    if not names or (unknown := [block for block in names if block not in BLOCKS]):
        what = "has no block" if not names else f"has blocks {', '.join(unknown)}"
        raise BirthlensError(
            f"into = {name!r} {what}; write <!-- bench: NAME --> and <!-- bench: end --> with NAME {', '.join(BLOCKS)}."
        )
    return blocks.sub(lambda match: f"{match[1]}{BLOCKS[match[2]](report)}\n{match[3]}", page)


def _measured(goal: Goal, rows: Sequence[Row]) -> float | None:
    variants = {row["variant"]: row for row in rows if (row["case"], row.get("setting")) == (goal.case, goal.setting)}
    if goal.variant not in variants or (goal.baseline or goal.variant) not in variants:
        return None
    if goal.baseline is not None:  # another one than the case's own
        return float(variants[goal.baseline]["ms"] / variants[goal.variant]["ms"])
    return float(variants[goal.variant][goal.column])


def _shown(value: float, goal: Goal) -> str:
    if goal.unit == "%":
        return f"{100 * value:.2g} %"
    if goal.unit == "s":
        return f"{value / 1000 if goal.column == 'ms' else value:.3g} s"
    if goal.unit == "us":
        return f"{value:.3g} microseconds"
    return f"{value:.0f} MB" if goal.unit == "MB" else f"{value:.3g} times"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
