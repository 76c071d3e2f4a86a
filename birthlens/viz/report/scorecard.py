"""The scorecard as one self-contained page: every claim with its verdict, effects as intervals, cost and command."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from birthlens.claims.book import command_of
from birthlens.claims.claim import PAPERS
from birthlens.claims.scorecard import Result, Scorecard
from birthlens.claims.tiers import TIERS
from birthlens.viz.html import escape, write_page
from birthlens.viz.report.charts import number, ticks
from birthlens.viz.report.page import document, framed, section, table

SIGNS = {"pass": "✓ pass", "fail": "✗ fail", "inconclusive": "? inconclusive", "not yet run": "… not yet run",
         "not checked": "– not checked"}  # fmt: skip
RULE = (
    "A claim passes if the 95 % interval over seeds of each of its numbers is entirely on the claimed side of the bound, "
    "and fails if one is entirely on the other side. Dashed lines are bounds, dots are seeds, bars are intervals."
)
ABOUT_VARIANTS = (
    "These are not statements of the papers. Each changes a condition, a probe or a scale of a claim, to see what it "
    "depends on; a failure here says that the claim needs that condition."
)
WIDTH = 260
HEIGHT = 52
MIDDLE = 17
"""Width and height of the picture of one number, and the height of its interval; the axis is below."""


def scorecard_page(*cards: Scorecard) -> str:
    """Return scorecards as one HTML document, in which the claims of several papers are grouped by paper."""
    results = [result for card in cards for result in card.results]
    sections = [*_verdicts(results)]
    details = "".join(_folded(result) for result in results if result.rows())
    if details:
        sections.append(section("details", "Each claim in detail", details, "Open a claim to see its numbers."))
    for verdict, title in (("not yet run", "Not yet run"), ("not checked", "Not checked here")):
        rows = [(r.claim.id, r.claim.sentence, r.note()) for r in results if r.verdict == verdict]
        if rows:
            listed = table(("claim", "sentence", "why"), rows, title, "stacked")
            sections.append(section(verdict.replace(" ", "-"), title, listed))
    made = "".join(table(("", ""), _made(card), _caption(card, len(cards)), "facts") for card in cards)
    sections.append(section("made", "How to repeat it", made))
    named = (("Claims of the papers", False), ("Our variants", True))
    counts = [
        f"{title}: {_counts(chosen)}"
        for title, variant in named
        if (chosen := [result for result in results if result.claim.variant is variant])
    ]
    return document("The memory viewpoint, claim by claim", ". ".join(counts), [], sections)


def _verdicts(results: Sequence[Result]) -> Iterator[str]:
    """Yield the overviews: of each paper, its claims and then our variants of them."""
    papers = [paper for paper in PAPERS if any(result.claim.paper == paper for result in results)]
    said = {True: ABOUT_VARIANTS, False: RULE}  # each is explained where it comes first
    for paper in papers:
        of, name = ("", "") if len(papers) == 1 else (f": {PAPERS[paper]}", f"-{paper}")
        for variant, title in (
            (False, "Claims of the papers" if len(papers) == 1 else "Claims"),
            (True, "Our variants"),
        ):
            chosen = [result for result in results if (result.claim.paper, result.claim.variant) == (paper, variant)]
            if chosen:
                where = ("variants" if variant else "verdicts") + name
                yield section(where, title + of, _overview(chosen), said.pop(variant, ""))


def _caption(card: Scorecard, n_cards: int) -> str:
    """Return the caption of a card's facts, with the paper if there are several cards."""
    papers = " and ".join(PAPERS[paper] for paper in dict.fromkeys(result.claim.paper for result in card.results))
    return "Command, cost and versions" + (f": {papers}" if n_cards > 1 else "")


def _made(card: Scorecard) -> list[tuple[str, str]]:
    """List what made a card: the command, its cost, the packages, and the claims that other code measured."""
    totals = [(name.replace("_", " "), f"{value:g}") for name, value in card.totals.items()]
    later = [result for result in card.results if result.commit not in (None, card.commit)]
    apart = [(f"measured by {_short(commit)}", ", ".join(one.claim.id for one in later if one.commit == commit))
             for commit in dict.fromkeys(result.commit for result in later)]  # fmt: skip
    return [("command", card.command), *totals, ("commit", _short(card.commit)), *card.versions.items(), *apart]


def _short(commit: str | None) -> str:
    """Shorten a commit to what fits a phone."""
    digits, dash, dirty = (commit or "unknown").partition("-")
    return digits[:10] + dash + dirty


def write_scorecard_page(path: Path, *cards: Scorecard) -> Path:
    """Write the page."""
    return write_page(path, scorecard_page(*cards))


def _counts(results: Sequence[Result]) -> str:
    found = {verdict: sum(result.verdict == verdict for result in results) for verdict in SIGNS}
    return ", ".join(f"{count} {verdict}" for verdict, count in found.items() if count or verdict in ("pass", "fail"))


def _folded(result: Result) -> str:
    """Return one claim as a block that can be opened; a link to it opens it."""
    summary = f"{escape(SIGNS[result.verdict])} · {escape(result.claim.sentence)}"
    return (
        f'<details class="claim"><summary>{summary}</summary>'
        f'<div id="{escape(result.claim.id)}">{_one(result)}</div></details>'
    )


def _overview(results: Sequence[Result]) -> str:
    """Tabulate claims in columns that fit a phone: verdict; claim, sentence and effects; cost."""
    body = ""
    for result in results:
        name = escape(result.claim.id)
        link = f'<a href="#{name}">{name}</a>' if result.rows() else name
        effects = "".join(f"<br>{escape(row['says'])}: <b>{escape(_effect(row))}</b>" for row in result.rows())
        cost = f"{result.cpu_seconds:.0f} s" if result.rows() else "–"
        body += (
            f'<tr><td class="verdict">{escape(SIGNS[result.verdict])}</td><th scope="row">{link}<br>'
            f'{escape(result.claim.sentence)}<span class="subtitle">{effects}</span></th>'
            f'<td class="verdict">{cost}</td></tr>'
        )
    columns = ("verdict", "claim, and means over seeds [95 % interval]", "CPU time")
    return framed(columns, body, "All claims", "overview", captioned=False)


def _one(result: Result) -> str:
    claim = result.claim
    tier = result.tier
    columns = ("number", "wanted", "mean [95 % interval]", "seeds", "verdict")
    body = ""
    for row in result.rows():
        cells = (escape(row["wanted"]), escape(_effect(row)), _whisker(row, result), escape(SIGNS[row["holds"]]))
        labelled = "".join(f'<td data-of="{name}">{cell}</td>' for name, cell in zip(columns[1:], cells, strict=True))
        body += f'<tr><th scope="row">{escape(row["says"])}</th>{labelled}</tr>'
    kind = "our variant" if claim.variant else "a claim of the paper"
    cost = (
        f"{kind}; {len(result.measured)} seeds, {result.runs} runs, {result.cpu_seconds:.0f} s of CPU time, tier {tier}"
    )
    parts = [
        f'<p><strong>{escape(SIGNS[result.verdict])}</strong> <span class="subtitle">{escape(claim.id)}; {cost}</span></p>',
        framed(columns, body, claim.id, "stacked", captioned=False),
    ]
    if note := result.note():
        parts.append(f'<p class="skipped">{escape(note)}</p>')
    parts.append(f"<pre><code>{escape(_command(result))}</code></pre>")
    cases = [(case, _words(words) or "the base") for case, words in claim.cases_at(tier).items()]
    settings = [(name, str(value)) for name, value in claim.settings_at(tier).items()]
    if cases or settings:
        run = table(("case or setting", "overrides of the tier's base"), cases + settings, "", "facts")
        parts.append(f"<details><summary>What was run</summary>{run}</details>")
    return "".join(parts)


def _command(result: Result) -> str:
    usual = result.claim.seeds.get(result.tier, TIERS[result.tier].seeds)
    seeds = None if len(result.measured) == usual else len(result.measured)
    return command_of([result.claim], TIERS[result.tier], seeds)


def _words(words: Sequence[str]) -> str:
    """Join overrides; long lists of numbers are shortened (scorecard.json has all of them)."""
    return re.sub(r"\[(\d+, \d+, \d+)(?:, \d+)+, (\d+)\]", r"[\1, …, \2]", " ".join(words))


def _effect(row: dict[str, Any]) -> str:
    if not math.isfinite(row["value"]):
        return "no number"
    if not math.isfinite(row["low"]):
        return number(row["value"])
    return f"{number(row['value'])} [{number(row['low'])}, {number(row['high'])}]"


def _whisker(row: dict[str, Any], result: Result) -> str:
    """Draw seeds as dots, the interval as a line and the bounds as dashed lines, above an axis with numbers."""
    seeds = [one.values.get(row["quantity"], math.nan) for one in result.measured]
    seeds = [value for value in seeds if math.isfinite(value)]
    expectation = next(one for one in result.claim.expectations if one.quantity == row["quantity"])
    bounds = [bound for bound in (expectation.above, expectation.below) if math.isfinite(bound)]
    ends = [value for value in (*seeds, *bounds, row["low"], row["high"]) if math.isfinite(value)]
    low = min(ends)
    high = max(ends)
    margin = 0.08 * (high - low) or 1.0

    def x(value: float) -> float:
        return (value - low + margin) / (high - low + 2 * margin) * WIDTH

    bottom = 2 * MIDDLE
    parts = [f'<line class="grid" x1="0" x2="{WIDTH}" y1="{bottom}" y2="{bottom}"/>']
    for tick in ticks(low - margin, high + margin, 3):
        # Labels at the ends are aligned inwards, so that none is cut off.
        anchor = "start" if x(tick) < 24 else "end" if x(tick) > WIDTH - 24 else "middle"
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{HEIGHT - 3}" text-anchor="{anchor}">{tick:g}</text>')
    parts += [f'<line class="level l0" x1="{x(b):.1f}" x2="{x(b):.1f}" y1="2" y2="{bottom}"/>' for b in bounds]
    if math.isfinite(row["low"]):
        parts.append(
            f'<line class="series c0" x1="{x(row["low"]):.1f}" x2="{x(row["high"]):.1f}" y1="{MIDDLE}" y2="{MIDDLE}"/>'
        )
    parts += [f'<circle class="c0" cx="{x(v):.1f}" cy="{MIDDLE}" r="3.5" fill="var(--c0)"/>' for v in seeds]
    said = f"seeds {', '.join(map(number, seeds))}; bound {', '.join(f'{bound:g}' for bound in bounds)}"
    return (
        f'<div class="chart"><svg viewBox="0 0 {WIDTH} {HEIGHT}" style="width:{WIDTH}px;max-width:100%" role="img" '
        f'aria-label="{escape(said)}"><title>{escape(said)}</title>{"".join(parts)}</svg></div>'
    )
