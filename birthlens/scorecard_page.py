"""The scorecard as one self-contained page: every claim with its verdict, its effects as intervals, and its command."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from birthlens.claims.scorecard import Result
from birthlens.report.charts import number
from birthlens.report.page import document, section, table
from birthlens.run_files import versions
from birthlens.web import escape, write_page

SIGNS = {"pass": "✓ pass", "fail": "✗ fail", "inconclusive": "? inconclusive", "not checked": "– not checked"}
RULE = (
    "A claim passes where the 95 % interval over seeds of each of its numbers lies wholly on the claimed side, "
    "and fails where one lies wholly on the other."
)
WIDTH, HEIGHT = 260, 34


def scorecard_page(results: Sequence[Result], command: str) -> str:
    """Return the page as one HTML document."""
    counts = [f"{sum(r.verdict == verdict for r in results)} {verdict}" for verdict in SIGNS]
    checked = [result for result in results if result.verdict != "not checked"]
    unchecked = [result for result in results if result.verdict == "not checked"]
    sections = [section("verdicts", "Verdicts", _overview(results), RULE)]
    sections += [section(result.claim.id, result.claim.sentence, _one(result)) for result in checked]
    if unchecked:
        rows = [(result.claim.id, result.claim.sentence, result.note()) for result in unchecked]
        sections.append(
            section("unchecked", "Not checked here", table(("claim", "sentence", "why"), rows, "Claims left out"))
        )
    made = table(("", ""), [("command", command), *versions().items()], "What made this page", "facts")
    sections.append(section("made", "To make it again", made))
    return document("Birth of a Transformer, claim by claim", "; ".join(counts), [], sections)


def write_scorecard_page(results: Sequence[Result], path: Path, command: str) -> Path:
    """Write the page."""
    return write_page(path, scorecard_page(results, command))


def _overview(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        effects = "; ".join(f"{row['quantity']} {number(row['value'])}" for row in result.rows())
        rows.append((result.claim.id, SIGNS[result.verdict], effects or "–", f"{result.cpu_seconds:.0f} s"))
    return table(("claim", "verdict", "effects (mean over seeds)", "CPU time"), rows, "All claims", "numbers")


def _one(result: Result) -> str:
    claim, tier = result.claim, result.tier
    parts = [
        f'<p><strong>{escape(SIGNS[result.verdict])}</strong> <span class="subtitle">{escape(claim.id)}</span></p>'
    ]
    rows = result.rows()
    body = "".join(
        f'<tr><th scope="row">{escape(row["says"])}</th><td>{escape(row["wanted"])}</td><td>{escape(_effect(row))}</td>'
        f"<td>{_whisker(row, result)}</td><td>{escape(SIGNS[row['holds']])}</td></tr>"
        for row in rows
    )
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("number", "wanted", "mean [95 % interval]", "seeds", "verdict")
    )
    caption = f"{rows[0]['seeds']} seeds, tier {tier}" if rows else ""
    parts.append(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(claim.id)}"><table><caption>{escape(caption)}'
        f"</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
    if result.problems:
        parts.append(f'<p class="skipped">{escape("; ".join(result.problems))}</p>')
    cases = [(case, " ".join(words) or "the base") for case, words in claim.cases.items()]
    settings = [(name, str(value)) for name, value in claim.settings_at(tier).items()]
    if cases or settings:
        parts.append(
            table(("case or setting", "overrides of the tier's base"), cases + settings, "What was run", "facts")
        )
    cost = f"{result.runs} runs, {result.cpu_seconds:.0f} s of CPU time"
    parts.append(f"<pre><code>birthlens reproduce {escape(claim.id)} --tier {escape(tier)}</code></pre><p>{cost}</p>")
    return "".join(parts)


def _effect(row: dict[str, Any]) -> str:
    if not math.isfinite(row["low"]):
        return number(row["value"])
    return f"{number(row['value'])} [{number(row['low'])}, {number(row['high'])}]"


def _whisker(row: dict[str, Any], result: Result) -> str:
    """Draw seeds as dots, the interval as a line, and the bounds as dashed lines."""
    seeds = [one.values.get(row["quantity"], math.nan) for one in result.measured]
    seeds = [value for value in seeds if math.isfinite(value)]
    expectation = next(one for one in result.claim.expectations if one.quantity == row["quantity"])
    bounds = [bound for bound in (expectation.above, expectation.below) if math.isfinite(bound)]
    ends = [value for value in (*seeds, *bounds, row["low"], row["high"]) if math.isfinite(value)]
    low, high = min(ends), max(ends)
    margin = 0.08 * (high - low) or 1.0

    def x(value: float) -> float:
        return (value - low + margin) / (high - low + 2 * margin) * WIDTH

    middle = HEIGHT / 2
    parts = [f'<line class="level l0" x1="{x(b):.1f}" x2="{x(b):.1f}" y1="2" y2="{HEIGHT - 2}"/>' for b in bounds]
    if math.isfinite(row["low"]):
        parts.append(
            f'<line class="series c0" x1="{x(row["low"]):.1f}" x2="{x(row["high"]):.1f}" y1="{middle}" y2="{middle}"/>'
        )
    parts += [f'<circle class="c0" cx="{x(v):.1f}" cy="{middle}" r="3.5" fill="var(--c0)"/>' for v in seeds]
    said = f"seeds {', '.join(map(number, seeds))}; bound {', '.join(f'{bound:g}' for bound in bounds)}"
    return (
        f'<div class="chart"><svg viewBox="0 0 {WIDTH} {HEIGHT}" style="width:{WIDTH}px;max-width:100%" role="img" '
        f'aria-label="{escape(said)}"><title>{escape(said)}</title>{"".join(parts)}</svg></div>'
    )
