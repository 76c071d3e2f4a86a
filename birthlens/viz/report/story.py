"""The report of one run."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

from birthlens.analysis.interventions.causal_tables import changes, edge_ablations_table, head_ablations_table
from birthlens.analysis.memories.names import is_paper_model
from birthlens.errors import BirthlensError
from birthlens.labels import in_words, label
from birthlens.runs.evaluation import evaluation_batch
from birthlens.runs.run import Run
from birthlens.viz import notebook
from birthlens.viz.attention_frames import run_frames
from birthlens.viz.html import escape
from birthlens.viz.report import leads
from birthlens.viz.report.charts import Chart, Level, Line
from birthlens.viz.report.command_of_run import command_of
from birthlens.viz.report.compare import overlaid, run_names
from birthlens.viz.report.memories import memory_tables
from birthlens.viz.report.numbers import Facts, key_numbers
from birthlens.viz.report.page import (
    config_rows,
    corpus_facts,
    document,
    framed,
    machine_facts,
    progress,
    section,
    shown,
    skipped,
    table,
)

FRAMES = 16
MOST_EDGES = 14


def story(run: Run, causal: bool = True) -> str:
    """Return the page of one run."""
    facts = Facts(run)
    sections = [
        section("trained", "What was trained", lambda: f"<p>{escape(leads.trained(run))}</p>{leads.glossary()}"),
        section("numbers", "Key numbers", lambda: _numbers(facts)),
        section("birth", "The birth", lambda: _birth(facts)),
        section("memories", "The memories", lambda: _memories(facts)),
        section("causes", "The causal evidence", (lambda: _causes(run)) if causal else skipped("left out on request.")),
        section("attention", "Where the heads look", lambda: _attention(run)),
        section("made", "To make it again", lambda: _made(run)),
    ]
    if run.parent is not None:
        sections.insert(3, section("fork", "The fork and its parent", lambda: _fork(facts)))
    return document(run.path.resolve().name, _subtitle(facts), facts.steps, sections, notebook.scripts())


def _subtitle(facts: Facts) -> str:
    headline, name = facts.headline
    accuracy = facts.last(f"{headline}_accuracy")
    said = f"{progress(facts.run)}."
    if math.isfinite(accuracy):
        bag = facts.reference("bag", headline, "accuracy")
        said += f" {name.capitalize()} accuracy {accuracy:.3f}"
        said += f"; a bag of tokens (approximate) reaches {bag:.3f}." if math.isfinite(bag) else "."
    return said[0].upper() + said[1:]


def _numbers(facts: Facts) -> str:
    numbers = key_numbers(facts, is_paper_model(facts.run.config.model))
    rows = [(n.name, shown(n.value), shown(n.chance), shown(n.optimum)) for n in numbers]
    caption = (
        "Measured on held-out sequences; recalls are read from the weights alone. Optimum: for loss and accuracy the "
        "Bayes-optimal predictor, which on average none beats over all positions together, though at one kind of position "
        "alone another may; for recall all right."
    )
    if approximation := facts.run.task.approximation:
        caption += f" {approximation}"
    header = ("", f"at step {facts.steps[-1]}", "chance", "optimum")
    return table(header, rows, caption, "numbers story", {n.name: n.about for n in numbers})


def _birth(facts: Facts) -> str:
    charts = []
    for role, said in facts.run.task.shown_roles.items():
        for metric in ("loss", "accuracy"):
            steps, values = facts.series(f"{role}_{metric}")
            if values:
                levels = [Level(label(name), facts.reference(name, role, metric)) for name in facts.predictors]
                series = [Line("model", steps, values)]
                top = 1.0 if metric == "accuracy" else None
                charts.append(
                    Chart(f"{said.capitalize()} {metric}{' (nats)' if metric == 'loss' else ''}", series, levels, top)
                )
    if not charts:
        raise BirthlensError("the run has no measurement yet.")
    return f'<p>{escape(leads.birth(facts))}</p><div class="grid">{"".join(chart.html() for chart in charts)}</div>'


def _memories(facts: Facts) -> str:
    if not is_paper_model(facts.run.config.model):
        return _circuits(facts)
    charts = []
    for memory, said in (
        ("output_memory", "Output memory: what is copied"),
        ("trigger_memory", "Trigger memory: where to look"),
        ("prev_token_memory", "Previous-token memory: one place back"),
    ):
        series = []
        levels = []
        for colour, candidates in enumerate(facts.readings(memory)):
            steps, values, chance = facts.recall_series(memory, candidates)
            asked = facts.queries(memory, candidates)
            series.append(Line(asked, steps, values, colour))
            levels.append(Level(f"chance, {asked}", chance, colour))
        if series:
            charts.append(Chart(f"{said} (recall)", series, levels, 1.0))
    shown_steps = notebook.thinned(facts.steps, FRAMES)
    lead = "The score of every pair, less their median; each table keeps its scale over all steps."
    return (
        f'<p>{escape(leads.memories(facts))}</p><div class="grid">{"".join(chart.html() for chart in charts)}</div>'
        f'<h3>As tables</h3><p>{lead}</p><div class="grid tables">{memory_tables(facts.run, shown_steps)}</div>'
    )


def _circuits(facts: Facts) -> str:
    """Chart the circuits that recall best at the end, for models whose memories have no known place."""
    from birthlens.analysis.behaviour.trajectory import memories_over

    steps = notebook.thinned(facts.steps, 8)
    read = memories_over(facts.run, steps, bases=("raw",)).to_pandas()
    read = read[(read["metric"] == "recall") & (read["n"] > 1)]
    if read.empty:
        return skipped("this model has no circuit between two codebooks that pair.")
    last = read[read["step"] == steps[-1]].assign(over=lambda rows: rows["value"] - rows["chance"])
    names = list(last.sort_values("over", ascending=False, kind="stable")["memory"].drop_duplicates()[:6])
    series = []
    for name in names:
        rows = read[read["memory"] == name].drop_duplicates("step").sort_values("step")
        series.append(Line(in_words(name), [int(s) for s in rows["step"]], [float(v) for v in rows["value"]]))
    chance = float(last["chance"].median())
    note = "Every head was read in every basis that its layer's input holds; these recall best at the end."
    chart = Chart("Recall of the best circuits", series, [Level("chance", chance, neutral=True)], 1.0, note)
    return f'<div class="grid">{chart.html()}</div>'


def _causes(run: Run) -> str:
    if not evaluation_batch(run, 8).in_context.any():
        return skipped(
            "no target of this task is known from the context only, so there is no in-context accuracy to lose."
        )
    heads = changes(head_ablations_table(run, notebook.thinned(run.steps, 9)))
    series = [
        Line(str(name), [int(s) for s in rows["step"]], [float(v) for v in rows["change"]])
        for name, rows in heads.groupby("ablated", sort=False)
    ]
    note = "Each head's output is replaced by its average over other sequences, at one step at a time."
    chart = Chart("Change of in-context accuracy without a head", series, note=note).html()
    edges, said = _edges(run)
    return f'<p>{escape(f"{leads.heads(heads)} {said}")}</p><div class="grid">{chart}{edges}</div>'


def _edges(run: Run) -> tuple[str, str]:
    """Return the table of the edges that matter most, and what it says in a sentence."""
    if run.config.model.n_layers == 1:
        return skipped("a model of one layer has no edge between heads."), ""
    edges = changes(edge_ablations_table(run, run.steps[-1:], n=16))
    edges = edges.reindex(edges["change"].abs().sort_values(ascending=False, kind="stable").index)
    caption = f"Change of in-context accuracy at step {run.steps[-1]} where one edge is replaced by its average."
    if run.config.model.n_heads > 1:
        caption += " Only edges from head to head are tested."
    if left := len(edges) - MOST_EDGES:
        others = "The other one changes" if left == 1 else f"The {left} others change"
        caption += f" {others} it by at most as much." if left > 0 else ""
    body = "".join(_edge(row) for row in edges.head(MOST_EDGES).to_dict("records"))
    return framed(("edge", "", "change, 95 % interval"), body, caption, "edges"), leads.edges(edges)


def _edge(row: dict[Hashable, Any]) -> str:
    change, low, high = (float(row[name]) for name in ("change", "change_low", "change_high"))
    return (
        f'<tr><th scope="row">{escape(in_words(str(row["ablated"])))}</th>'
        f'<td><span class="bar" style="width:{min(1.0, abs(change)):.1%}"></span></td>'
        f"<td>{leads.signed(change)}<small>{leads.signed(low)} to {leads.signed(high)}</small></td></tr>"
    )


def _attention(run: Run) -> str:
    steps = notebook.thinned(run.steps, FRAMES)
    frames = run_frames(run, steps)
    picture = notebook.AttentionPicture(frames, "One held-out sequence")
    how = "Click a token, or move with the arrow keys, to see where it looks."
    return f"<p>{escape(leads.attention(frames))} {how}</p>{picture.html()}"


def _fork(facts: Facts) -> str:
    """Lay a fork over its parent, where that is still there."""
    parent = facts.run.parent
    assert parent is not None
    said = f"<p>This run was {escape(str(parent))}.</p>"
    if not (parent.path / "run.json").exists():
        return said + skipped("its parent is not there any more.")
    runs = [Run(parent.path), facts.run]
    return said + overlaid(run_names(runs), [Facts(runs[0]), facts])


def _made(run: Run) -> str:
    facts = table(("", ""), corpus_facts(run), "The corpus and the task", "facts")
    machine = table(("", ""), machine_facts(run), "The engine and the versions", "facts")
    settings = table(("setting", "value"), config_rows(run), "Every setting", "facts")
    line = escape(command_of(run))
    return (
        f'<pre tabindex="0"><code>{line}</code></pre>{facts}'
        f"<details><summary>Every setting</summary>{settings}</details>"
        f"<details><summary>Engine and versions</summary>{machine}</details>"
    )
