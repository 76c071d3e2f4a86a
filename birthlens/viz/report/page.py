"""Parts that both kinds of report share: sections, tables, facts about corpus and config, and the page itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from birthlens.config.differences import settings
from birthlens.errors import BirthlensError
from birthlens.labels import legible
from birthlens.runs.run import Run
from birthlens.viz.html import asset, escape, page, script_json
from birthlens.viz.report.charts import number


def section(name: str, title: str, body: str | Callable[[], str], lead: str = "") -> str:
    """Return a section; if its body cannot be computed, the reason is shown instead."""
    try:
        inner = body if isinstance(body, str) else body()
    except BirthlensError as error:
        inner = skipped(str(error))
    lead = f"<p>{escape(lead)}</p>" if lead else ""
    heading = f'<h2 id="{name}-title">{escape(title)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">\n{heading}\n{lead}{inner}\n</section>'


def skipped(reason: str) -> str:
    """Return the note for a part that could not be shown."""
    return f'<p class="skipped">Not shown: {escape(reason)}</p>'


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str,
    classes: str = "",
    notes: Mapping[str, str] | None = None,
) -> str:
    """Return an HTML table of text; the first cell of each row is its heading, followed by its note, if any, in small."""

    def heading(name: str) -> str:
        note = (notes or {}).get(name)
        return escape(name) + (f"<small>{escape(note)}</small>" if note else "")

    body = "".join(
        f'<tr><th scope="row">{heading(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return framed(header, body, caption, classes)


def framed(header: Sequence[str], rows: str, caption: str, classes: str, captioned: bool = True) -> str:
    """Put the rows of a table (HTML) under a header (text), in a frame that scrolls on narrow screens.

    The caption (text) names the frame. With `captioned`, it is also shown above the table.
    """
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    said = escape(caption)
    above = f"<caption>{said}</caption>" if captioned else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{said}"><table class="{classes}">'
        f"{above}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def corpus_facts(run: Run) -> list[tuple[str, str]]:
    """Describe the corpus and the triggers of a run."""
    statistics = run.statistics
    config = run.config.corpus
    triggers = run.trigger_ids
    spelled = (
        "drawn for each sequence" if triggers is None else " ".join(legible(statistics.vocab[i]) for i in triggers)
    )
    return [
        ("corpus", config.source if config.path is None else f"{config.source}: {config.path}"),
        ("vocabulary", f"{len(statistics)} tokens, {int((statistics.bigram > 0).sum())} bigrams that occur"),
        ("unigram entropy", f"{statistics.unigram_entropy:.3f} nats"),
        ("conditional bigram entropy", f"{statistics.conditional_entropy:.3f} nats"),
        ("most frequent tokens", " ".join(legible(statistics.vocab[i]) for i in statistics.most_frequent(10))),
        ("triggers", spelled),
    ]


def machine_facts(run: Run) -> list[tuple[str, str]]:
    """List the engine and the versions that made the run."""
    engine = run.header["engine"]
    facts = [("engine", f"{engine['name']} ({engine['reason']}), {engine['threads']} threads")]
    return facts + [(name, str(version)) for name, version in run.header.get("versions", {}).items()]


def config_rows(run: Run) -> list[tuple[str, str]]:
    """List every setting."""
    return [(name, spelled(value)) for name, value in settings(run.config).items()]


def spelled(value: Any) -> str:
    """Format a setting."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} until {inner}" for key, inner in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def number_text(value: float) -> str:
    """Format a number in a table: steps as whole numbers, others rounded, a dash for NaN."""
    if not math.isfinite(value):
        return "–"
    return str(int(value)) if value == int(value) and abs(value) >= 2 else number(value)


def state(run: Run) -> str:
    """Return whether a run is finished, and at which step it is."""
    last = run.steps[-1]
    planned = run.config.training.steps
    return f"finished, {planned} steps" if last >= planned else f"unfinished: step {last} of {planned}"


def progress(run: Run) -> str:
    """Return the state of a run, with the command that continues it."""
    advice = (
        "" if run.steps[-1] >= run.config.training.steps else f"; `birthlens train {run.path} --resume` continues it"
    )
    return state(run) + advice


def document(title: str, subtitle: str, steps: Sequence[int], sections: Sequence[str], scripts: str = "") -> str:
    """Assemble the page, with the shared step cursor if there are several steps."""
    cursor = ""
    if len(steps) > 1:
        end = len(steps) - 1
        cursor = f"""<div id="cursor"><label for="step">step <output id="at">{steps[-1]}</output></label>
<input id="step" type="range" min="0" max="{end}" value="{end}" aria-valuetext="step {steps[-1]}"
 aria-label="step of all charts, tables and patterns"><button type="button" id="play" aria-pressed="false">play</button>
<script type="application/json" id="steps">{script_json(list(steps))}</script></div>"""
    body = f"""<a class="jump" href="#main">Skip to the content</a>
<header><h1>{escape(title)}</h1><p class="subtitle">{escape(subtitle)}</p></header>
{cursor}
<main id="main">
{chr(10).join(sections)}
</main>
<footer><p>Made by birthlens. The page is self-contained and loads nothing from the network.</p></footer>"""
    own = f"<script>\n{asset('report.js')}\n</script>"
    return page(title, body, asset("attention.css") + asset("report.css"), f"{own}\n{scripts}")
