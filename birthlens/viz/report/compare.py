"""The report that compares several runs."""

from __future__ import annotations

from collections.abc import Sequence

from birthlens.analysis.memories.names import is_paper_model
from birthlens.config.differences import settings
from birthlens.errors import BirthlensError
from birthlens.runs.run import Run
from birthlens.viz.html import escape
from birthlens.viz.report import leads
from birthlens.viz.report.charts import Chart, Curve, Level
from birthlens.viz.report.command_of_run import command_of
from birthlens.viz.report.numbers import Facts, key_numbers
from birthlens.viz.report.page import document, number_text, section, skipped, spelled, state, table

MEASURED = (
    ("in_context_accuracy", "In-context accuracy", 1.0),
    ("in_context_loss", "In-context loss (nats)", None),
    ("global_loss", "Global loss (nats)", None),
)
RECALLED = (
    ("output_memory", "all", "Recall of the output memory"),
    ("trigger_memory", "triggers", "Recall of the trigger memory, among triggers"),
    ("trigger_memory", "all", "Recall of the trigger memory, among all tokens"),
    ("prev_token_memory", "all", "Recall of the previous-token memory"),
)


def comparison(runs: Sequence[Run]) -> str:
    """Return the page of several runs."""
    names = run_names(runs)
    facts = [Facts(run) for run in runs]
    steps = sorted({step for one in facts for step in one.steps})
    sections = [
        section("numbers", "Key numbers", lambda: _numbers(names, facts)),
        section("settings", "What differs", lambda: _settings(names, runs)),
        section("birth", "The birth", lambda: overlaid(names, facts)),
        section("memories", "The memories", lambda: _memories(names, facts)),
        section("made", "How to repeat them", lambda: _commands(names, runs)),
    ]
    return document(f"{len(runs)} runs compared", ", ".join(names), steps, sections)


def run_names(runs: Sequence[Run]) -> list[str]:
    """Name each run by the shortest end of its path that is unique.

    Example:
        >>> from types import SimpleNamespace
        >>> from pathlib import Path
        >>> run_names([SimpleNamespace(path=Path(p)) for p in ("/a/x/run", "/a/y/run")])
        ['x/run', 'y/run']
    """
    parts = [run.path.resolve().parts for run in runs]
    deepest = max(len(part) for part in parts)
    for length in range(1, deepest + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{part[-1]} ({number})" for number, part in enumerate(parts, start=1)]


def _numbers(names: Sequence[str], facts: Sequence[Facts]) -> str:
    columns = [{n.name: n for n in key_numbers(one, is_paper_model(one.run.config.model))} for one in facts]
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = [number_text(column[name].value) if name in column else "–" for column in columns]
        chance = sorted({number_text(column[name].chance) for column in columns if name in column})
        rows.append((name, *cells, " / ".join(chance)))
    rows.insert(0, ("state", *(state(one.run) for one in facts), ""))
    caption = "Each run at its last kept step, on its own held-out sequences; recalls are read from the weights alone."
    return table(("", *names, "chance"), rows, caption, "numbers") + leads.glossary(*(one.run for one in facts))


def _settings(names: Sequence[str], runs: Sequence[Run]) -> str:
    columns = [settings(run.config) for run in runs]
    rows = [
        (name, *(spelled(column[name]) for column in columns))
        for name in columns[0]
        if len({repr(column[name]) for column in columns}) > 1
    ]
    if not rows:
        return "<p>The runs have the same settings.</p>"
    return table(("setting", *names), rows, "Settings in which the runs differ", "facts")


def overlaid(names: Sequence[str], facts: Sequence[Facts]) -> str:
    """Return charts of what the runs measured, one line for each run."""
    charts = []
    for metric, title, top in MEASURED:
        series = [Curve(name, *one.series(metric), i) for i, (name, one) in enumerate(zip(names, facts, strict=True))]
        series = [line for line in series if line.values]
        if series:
            charts.append(Chart(title, series, top=top).html())
    if not charts:
        raise BirthlensError("the runs have no measurement yet.")
    lead = "In-context accuracy first exceeds " + leads.exceeded(names, facts)
    return f'<p>{escape(lead)}</p><div class="grid">{"".join(charts)}</div>'


def _memories(names: Sequence[str], facts: Sequence[Facts]) -> str:
    # A run keeps its colour in every chart, whichever runs are on it.
    known = [
        (i, n, one) for i, (n, one) in enumerate(zip(names, facts, strict=True)) if is_paper_model(one.run.config.model)
    ]
    if not known:
        return skipped("the three memories are defined for the two-layer simplified model only.")
    charts = []
    for memory, candidates, title in RECALLED:
        lines = []
        levels = []
        for colour, name, one in known:
            if candidates in one.readings(memory):
                steps, values, chance = one.recall_series(memory, candidates)
                lines.append(Curve(name, steps, values, colour))
                levels.append(Level(f"chance, {name}", chance, colour))
        if len({level.value for level in levels}) == 1:
            levels = [Level("chance", levels[0].value, neutral=True)]
        if lines:
            charts.append(Chart(title, lines, levels, 1.0).html())
    left = [name for name in names if name not in {name for _, name, _ in known}]
    more = skipped(f"{', '.join(left)}: not a two-layer simplified model.") if left else ""
    return f'<div class="grid">{"".join(charts)}</div>{more}'


def _commands(names: Sequence[str], runs: Sequence[Run]) -> str:
    return "".join(
        f'<h3>{escape(name)}</h3><pre tabindex="0"><code>{escape(command_of(run))}</code></pre>'
        for name, run in zip(names, runs, strict=True)
    )
