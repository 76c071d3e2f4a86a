"""The report on a series of model directories: heads, in-context learning and ablations by step, and the labels' audit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from birthlens.analysis.behaviour.head_onsets import LEAST, head_onsets_table
from birthlens.analysis.behaviour.head_scores import in_context_learning_table, scores_table
from birthlens.analysis.interventions.ablation import ablation_table
from birthlens.errors import BirthlensError
from birthlens.tasks.batch import TokenBatch
from birthlens.viz.report.charts import COLOURS, Chart, Curve, Level
from birthlens.viz.report.page import document, number_text, section, skipped, table

if TYPE_CHECKING:
    import pandas as pd

    from birthlens.model.hooked import HookedModel

TITLES = {
    "previous_token": "Attention to the previous position",
    "duplicate_token": "Attention to earlier equal tokens",
    "induction": "Attention to what followed earlier equal tokens",
}
MOST_ROWS = 20
"""The number of rows in a table of heads."""


@dataclass(frozen=True, eq=False)
class SeriesTables:
    """The tables of the page: head scores and in-context learning by step, ablations (None: left out), and the audit."""

    scores: pd.DataFrame
    learning: pd.DataFrame
    ablations: pd.DataFrame | None
    findings: pd.DataFrame


def series_tables(
    models: Iterable[tuple[int, HookedModel]],
    batch: TokenBatch,
    reference: TokenBatch,
    findings: pd.DataFrame,
    causal: bool = True,
) -> SeriesTables:
    """Measure each model of a series, with one in memory at a time; means for ablations are computed on `reference`."""
    import pandas as pd

    scores = []
    learning = []
    ablations = []
    for step, model in models:
        one: list[tuple[int, HookedModel]] = [(step, model)]
        scores.append(scores_table(one, batch))
        learning.append(in_context_learning_table(one, batch))
        if causal:
            ablations.append(_ablated(one, batch, reference))
    if not scores:
        raise BirthlensError("report: the series has no step to measure.")
    return SeriesTables(
        pd.concat(scores, ignore_index=True),
        pd.concat(learning, ignore_index=True),
        pd.concat(ablations, ignore_index=True) if causal else None,
        findings,
    )


def _ablated(models: Iterable[tuple[int, HookedModel]], batch: TokenBatch, reference: TokenBatch) -> pd.DataFrame:
    return ablation_table(models, batch, reference, methods=("mean",), metrics=("in_context.loss",), draws=0)


def series_page(name: str, tables: SeriesTables) -> str:
    """Return the report as one HTML document."""
    steps = sorted(set(tables.scores["step"]))
    ablations = tables.ablations
    sections = [
        section("labels", "The labels of the checkpoints", lambda: _audit(tables.findings)),
        section("heads", "Heads", lambda: _heads(tables.scores)),
        section("onsets", "Onsets", lambda: _onsets(tables.scores)),
        section("learning", "In-context learning", lambda: _learning(tables.learning)),
        section(
            "causes",
            "What the model uses: ablations",
            skipped("left out on request.") if ablations is None else lambda: _causes(ablations),
        ),
    ]
    said = f"{len(steps)} model directories, on random sequences that repeat."
    return document(name, said, steps, sections)


def _audit(findings: pd.DataFrame) -> str:
    if findings.empty:
        return "<p>Nothing is suspicious about the labels.</p>"
    listed: list[Any] = list(findings.itertuples())
    rows = [(one.kind, f"{one.strength:.2f}", one.finding) for one in listed]
    return table(("kind", "strength", "finding"), rows, "Suspicions, the strongest first")


def _heads(scores: pd.DataFrame) -> str:
    charts = []
    for score, title in TITLES.items():
        rows = scores[scores["score"] == score]
        best = rows.groupby("head", sort=False)["value"].max().nlargest(COLOURS).index
        curves = [
            Curve(str(head), part["step"].tolist(), part["value"].tolist())
            for head in best
            for part in [rows[rows["head"] == head].sort_values("step")]
        ]
        chance = Level("chance", float(rows["chance"].mean()), neutral=True)
        note = f"The {len(best)} heads with the largest scores." if rows["head"].nunique() > len(best) else ""
        charts.append(Chart(title, curves, [chance], 1.0, note).html())
    return f'<div class="grid">{"".join(charts)}</div>'


def _onsets(scores: pd.DataFrame) -> str:
    found = head_onsets_table(scores)
    begun = found[found["onset"] < float("inf")].head(MOST_ROWS)
    if begun.empty:
        return f"<p>No score of any head exceeds chance by {LEAST} and keeps half of its excess.</p>"
    listed: list[Any] = list(begun.itertuples())
    rows = [
        (f"{one.head} {one.score}", number_text(one.onset), number_text(one.peak), number_text(one.last))
        for one in listed
    ]
    caption = "The first step from which a score keeps half of its largest excess over chance"
    return table(("head and score", "onset", "largest excess", "at the end"), rows, caption)


def _learning(learning: pd.DataFrame) -> str:
    curve = Curve("late minus early loss (nats)", learning["step"].tolist(), learning["value"].tolist())
    note = "The loss in the last eighth of the context minus that in the second; negative if context helps."
    return Chart("In-context learning score", [curve], [Level("none", 0.0, neutral=True)], None, note).html()


def _causes(ablations: pd.DataFrame) -> str:
    last = ablations[(ablations["step"] == ablations["step"].max()) & (ablations["ablated"] != "none")]
    strongest: list[Any] = list(last.sort_values("change", ascending=False).head(MOST_ROWS).itertuples())
    rows = [(str(one.ablated), number_text(one.value), number_text(one.change)) for one in strongest]
    best = [row[0] for row in rows[:COLOURS]]
    curves = [
        Curve(head, part["step"].tolist(), part["change"].tolist())
        for head in best
        for part in [ablations[ablations["ablated"] == head].sort_values("step")]
    ]
    chart = Chart("Change of the loss in the second copy (nats)", curves, note="Each head replaced by its mean.").html()
    caption = "Loss in the second copy with a head replaced by its mean, at the last step"
    return chart + table(("head", "loss", "change"), rows, caption)
