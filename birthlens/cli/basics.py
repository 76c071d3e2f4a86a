"""`birthlens corpus`, `birthlens steps`, `birthlens verify` and `birthlens audit`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from birthlens.cli.streams import tell
from birthlens.cli.tables import deliver, escaped_json, format_option, out_option, show_csv, show_rows, without_formulas
from birthlens.errors import BirthlensError


@click.command(epilog="Example: birthlens corpus my_novel.txt --format json")
@click.argument("file", required=False, type=click.Path())
@format_option
def corpus(file: str | None, style: str) -> None:
    """Print the statistics of a text, of a table of counts (.json, .csv), or of the embedded corpus.

    FILE is any UTF-8 text; entropies are in nats.
    """
    from birthlens.tasks.corpus import embedded_text, from_file, from_text

    statistics = from_file(Path(file)) if file else from_text(embedded_text(), "embedded corpus")
    frequent = [statistics.vocab[i] for i in statistics.most_frequent(10)]
    facts: dict[str, object] = {"corpus": file or "embedded"}
    if statistics.counts is not None:
        facts["tokens"] = int(statistics.counts.sum()) + 1
        facts["distinct tokens"] = len(statistics)
        facts["distinct bigrams"] = int((statistics.counts > 0).sum())
        facts["tokens without successor"] = int((statistics.counts.sum(1) == 0).sum())
    facts["unigram entropy"] = round(statistics.unigram_entropy, 4)
    facts["conditional bigram entropy"] = round(statistics.conditional_entropy, 4)
    facts["most frequent"] = frequent if style == "json" else " ".join(map(repr, frequent))
    if style == "json":
        tell(escaped_json(json.dumps(facts, indent=1, ensure_ascii=False)))
    elif style in ("csv", "spreadsheet"):
        _csv(style, ["fact", "value"], [[name, str(value)] for name, value in facts.items()])
    else:
        show_rows(["fact", "value"], [[name, str(value)] for name, value in facts.items()])


@click.command(epilog="Example: birthlens steps runs/demo --format json")
@click.argument("run", metavar="RUN|SERIES", type=click.Path())
@format_option
def steps(run: str, style: str) -> None:
    """List the steps of a RUN at which its weights were kept, or those of a SERIES of model directories."""
    from birthlens.model.series import series_at
    from birthlens.runs.run import load_run

    series = series_at(run)
    if series is not None:
        if style == "json":
            tell(json.dumps(series.steps))
        elif style in ("csv", "spreadsheet"):
            _csv(style, ["step"], [[str(step)] for step in series.steps])
        else:
            tell(f"{run}: {len(series.steps)} model directories")
            tell(" ".join(map(str, series.steps)))
        return
    loaded = load_run(run)
    kept = loaded.steps
    if style == "json":
        tell(json.dumps(kept))
    elif style in ("csv", "spreadsheet"):
        _csv(style, ["step"], [[str(step)] for step in kept])
    else:
        planned = loaded.config.training.steps
        state = "finished" if loaded.finished else f"{kept[-1]} of {planned} steps, continue with --resume"
        tell(f"{run}: {len(kept)} checkpoints ({state}; engine {loaded.header['engine']['name']})")
        for parent in loaded.lineage:
            tell(str(parent))
        tell(" ".join(map(str, kept)))


@click.command(epilog="Example: birthlens verify runs")
@click.argument("paths", nargs=-1, required=True, metavar="RUN...", type=click.Path())
def verify(paths: tuple[str, ...]) -> None:
    """Check every file of each RUN, or of all runs in a folder, against its digest and its config.

    Each fault is reported, with what can still be used; the exit status is then 2.
    """
    from birthlens.runs.verify import runs_below
    from birthlens.runs.verify import verify as verdict_of

    verdicts = [verdict_of(run) for path in paths for run in runs_below(path)]
    for verdict in verdicts:
        tell("\n".join(verdict.lines()))
    if damaged := sum(not verdict.whole for verdict in verdicts):
        raise BirthlensError(f"{damaged} of {len(verdicts)} runs {'is' if damaged == 1 else 'are'} damaged.")


@click.command(epilog="Example: birthlens audit models--EleutherAI--pythia-14m")
@click.argument("series", metavar="SERIES", type=click.Path())
@out_option
@format_option
def audit(series: str, out: str | None, style: str) -> None:
    """Look for wrong labels in a SERIES of model directories: which are suspicious, and how strongly (0 to 1).

    It looks for equal weights under two steps, weights that belong elsewhere in the series, a first step that looks trained,
    checkpoints of another run, missing steps, and configs or tokenizers that differ. docs/tables.md explains every column.
    """
    from birthlens.model.audit import audit_table
    from birthlens.model.series import series_at

    found = series_at(series)
    if found is None:
        raise BirthlensError(
            f"series = {series!r} is no series of model directories: give a folder with step1000 or checkpoint-1000 "
            "folders, a model in the cache of the hub with references step1000, or a YAML file of steps and directories."
        )
    table = audit_table(found)
    if out is not None or style != "table":
        deliver(table, out, style)
        return
    for strength, kind, sentence in zip(table["strength"], table["kind"], table["finding"], strict=True):
        tell(f"{strength:.2f}  {kind}: {sentence}")
    tell(f"{len(found.steps)} checkpoints, {len(table) or 'no'} suspicious finding{'' if len(table) == 1 else 's'}.")


def _csv(style: str, header: list[str], rows: list[list[str]]) -> None:
    import csv
    import io

    text = io.StringIO()
    cells = [[without_formulas(cell) if style == "spreadsheet" else cell for cell in row] for row in rows]
    csv.writer(text, lineterminator="\n").writerows([header, *cells])
    show_csv(text.getvalue())
