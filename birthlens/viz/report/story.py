"""The report of one run."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

from birthlens.analysis.interventions.causal_tables import changes_table, edge_ablations_table, head_ablations_table
from birthlens.analysis.memories.names import is_paper_model
from birthlens.errors import BirthlensError
from birthlens.labels import in_words, label
from birthlens.runs.evaluation import evaluation_batch
from birthlens.runs.run import Run
from birthlens.viz import notebook
from birthlens.viz.attention_frames import run_frames
from birthlens.viz.html import escape
from birthlens.viz.report import leads
from birthlens.viz.report.charts import Chart, Curve, Level, number
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
    number_text,
    progress,
    section,
    skipped,
    table,
)

FRAMES = 16
MOST_EDGES = 14


def story(run: Run, causal: bool = True) -> str:
    """Return the page of one run."""
    facts = Facts(run)
    sections = [
        section("trained", "What was trained", lambda: f"<p>{escape(leads.trained(run))}</p>{leads.glossary(run)}"),
        section("numbers", "Key numbers", lambda: _numbers(facts)),
        section("birth", "The birth", lambda: _birth(facts)),
        section("memories", "The memories", lambda: _memories(facts)),
        section(
            "causes",
            "What the model uses: ablations",
            (lambda: _causes(run)) if causal else skipped("left out on request."),
        ),
        section("attention", "Attention", lambda: _attention(run)),
        section("made", "How to repeat it", lambda: _made(run)),
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
    rows = [(n.name, number_text(n.value), number_text(n.chance), number_text(n.optimum)) for n in numbers]
    caption = (
        "Measured on held-out sequences; recall is read from the weights alone. Optimum: for loss and accuracy the "
        "Bayes-optimal predictor, the best on average over all positions (at one kind of position another predictor may be "
        "better); for recall, 1."
    )
    if approximation := facts.run.task.approximation:
        caption += f" {approximation}"
    header = ("", f"at step {facts.steps[-1]}", "chance", "optimum")
    return table(header, rows, caption, "numbers story", {n.name: n.about for n in numbers})


def _birth(facts: Facts) -> str:
    charts = []
    shown_as = facts.run.task.shown_as
    for role, said in facts.run.task.shown_roles.items():
        for metric in ("loss", "accuracy"):
            steps, values = facts.series(f"{role}_{metric}")
            if values:
                levels = [
                    Level(label(shown_as(name)), facts.reference(name, role, metric)) for name in facts.predictors
                ]
                series = [Curve("model", steps, values)]
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
        ("output_memory", "Output memory: attended token to predicted token"),
        ("trigger_memory", "Trigger memory: trigger to the token after it"),
        ("prev_token_memory", "Previous-token memory: position t to t - 1"),
    ):
        series = []
        levels = []
        for colour, candidates in enumerate(facts.readings(memory)):
            steps, values, chance = facts.recall_series(memory, candidates)
            asked = facts.queries(memory, candidates)
            series.append(Curve(asked, steps, values, colour))
            levels.append(Level(f"chance, {asked}", chance, colour))
        if series:
            charts.append(Chart(f"{said} (recall)", series, levels, 1.0))
    shown_steps = notebook.thinned(facts.steps, FRAMES)
    lead = "The score of every pair, minus the median. The colour scale of each table is the same at all steps."
    return (
        f'<p>{escape(leads.memories(facts))}</p><div class="grid">{"".join(chart.html() for chart in charts)}</div>'
        f'<h3>As tables</h3><p>{lead}</p><div class="grid tables">{memory_tables(facts.run, shown_steps)}</div>'
    )


def _circuits(facts: Facts) -> str:
    """Chart the circuits with the best recall at the end, for models without the three named memories."""
    from birthlens.analysis.behaviour.trajectory import memories_over
    from birthlens.analysis.memories.recall_tables import best_circuits_table

    steps = notebook.thinned(facts.steps, 8)
    best = best_circuits_table(memories_over(facts.run, steps, bases=("raw",)).to_pandas())
    if best.empty:
        return skipped("this model has no circuit between two codebooks that can be paired.")
    series = [
        Curve(in_words(str(name)), [int(s) for s in rows["step"]], [float(v) for v in rows["value"]])
        for name, rows in best.groupby("memory", sort=False)
    ]
    chances = sorted(set(best["chance"]))
    levels = [Level("chance" if len(chances) == 1 else f"chance {number(c)}", c, neutral=True) for c in chances]
    note = (
        "Each head was read between all token and position codebooks; these circuits have the best recall at the end."
    )
    chart = Chart("Recall of the best circuits", series, levels, 1.0, note)
    return f'<div class="grid">{chart.html()}</div>'


def _causes(run: Run) -> str:
    if not evaluation_batch(run, 8).in_context.any():
        return skipped("this task has no in-context targets, so there is no in-context accuracy to measure.")
    heads = changes_table(head_ablations_table(run, notebook.thinned(run.steps, 9)))
    series = [
        Curve(str(name), [int(s) for s in rows["step"]], [float(v) for v in rows["change"]])
        for name, rows in heads.groupby("ablated", sort=False)
    ]
    note = "Each head's output is replaced by its mean over other sequences."
    chart = Chart("Change of in-context accuracy when a head is ablated", series, note=note).html()
    edges, said = _edges(run)
    return f'<p>{escape(f"{leads.heads(heads)} {said}")}</p><div class="grid">{chart}{edges}</div>'


def _edges(run: Run) -> tuple[str, str]:
    """Return the table of the edges with the largest effects, and a sentence about it."""
    if run.config.model.n_layers == 1:
        return skipped("a one-layer model has no edges between heads."), ""
    edges = changes_table(edge_ablations_table(run, run.steps[-1:], n=16))
    edges = edges.reindex(edges["change"].abs().sort_values(ascending=False, kind="stable").index)
    caption = f"Change of in-context accuracy at step {run.steps[-1]} when one edge is replaced by its mean."
    if run.config.model.n_heads > 1:
        caption += " Only edges between heads are tested."
    # If the table is only one row too long, it is shown in full.
    listed = len(edges) if len(edges) <= MOST_EDGES + 1 else MOST_EDGES
    if listed < len(edges):
        caption += f" The {listed} largest changes of {len(edges)} are listed."
    body = "".join(_edge(row) for row in edges.head(listed).to_dict("records"))
    return framed(("edge", "", "change, 95 % interval"), body, caption, "edges"), leads.edges(edges)


def _edge(row: dict[Hashable, Any]) -> str:
    change, low, high = (float(row[name]) for name in ("change", "change_low", "change_high"))
    interval = "no interval" if math.isnan(low) else f"{leads.signed(low)} to {leads.signed(high)}"
    share = 0.0 if math.isnan(change) else min(1.0, abs(change))
    return (
        f'<tr><th scope="row">{escape(in_words(str(row["ablated"])))}</th>'
        f'<td><span class="bar" style="width:{share:.1%}"></span></td>'
        f"<td>{leads.signed(change)}<small>{interval}</small></td></tr>"
    )


def _attention(run: Run) -> str:
    steps = notebook.thinned(run.steps, FRAMES)
    frames = run_frames(run, steps)
    picture = notebook.AttentionPicture(frames, "One held-out sequence")
    how = "Click a token, or move with the arrow keys, to see what it attends to."
    return f"<p>{escape(leads.attention(frames))} {how}</p>{picture.html()}"


def _fork(facts: Facts) -> str:
    """Compare a fork with its parent, if the parent still exists."""
    parent = facts.run.parent
    assert parent is not None
    said = f"<p>This run was {', which was '.join(escape(str(one)) for one in facts.run.lineage)}.</p>"
    if not (parent.path / "run.json").exists():
        return said + skipped("its parent no longer exists.")
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
