"""`birthlens plot`, `gallery`, `report`, `attention` and `watch`: figures, pages and live progress of a run."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import click

from birthlens.cli.options import device_option, refuse_idle
from birthlens.cli.probing import steps_option
from birthlens.cli.streams import note, tell
from birthlens.cli.subjects import holds_models, load, names
from birthlens.errors import BirthlensError

MOST_PICTURES = 50
"""Prompts that are drawn on one page."""
RUN_KINDS = ("birth", "behaviour", "recall", "memories", "ledger", "ablation", "edges", "patching",
             "weight-patching", "attention")  # fmt: skip
RENAMED_KINDS = {"transplant": "weight-patching"}
TABLE_KINDS = ("curves", "recall", "timeline", "ledger", "patching", "weight-patching", "sweep", "heatmap")


@click.command(epilog="Example: birthlens plot runs/demo --kind recall --out recall.svg")
@click.argument("source", type=click.Path(), metavar="RUN")
@click.option(
    "--kind",
    required=True,
    type=click.Choice(sorted({*RUN_KINDS, *TABLE_KINDS, *RENAMED_KINDS})),
    metavar="KIND",
    help=f"Of a run: {', '.join(RUN_KINDS)}. Of a table: {', '.join(TABLE_KINDS)}.",
)
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="A name that ends in .png, .svg or .pdf.")
@steps_option()
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="For a table: x, y, value, series, metric, title ..., or a column and the value to keep.",
)
@click.option("--dark", is_flag=True, help="Light lines and text on a dark ground.")
def plot(source: str, kind: str, out: str, steps: str, options: tuple[str, ...], dark: bool) -> None:
    """Draw a figure of a RUN, or of a table that birthlens wrote (.csv, .parquet, .json).

    Columns needed by each kind of table:

    \b
    curves      step, split, metric, value
    recall      step, memory, basis, metric, candidates, value, chance, n
    timeline    step, a column named by series (default case), value
    ledger      step, matrix, family, kind, share
    patching    the columns named by x, y and value (default position, site, recovered)
    weight-patching  matrix, from_step, to_step, metric, value
    sweep       the columns named by x, y and value, for instance two axes and a result of a sweep
    heatmap     the columns named by x, y and value

    An --option with the name of another column keeps the rows with that value: --option role=in_context.
    """  # noqa: D301
    from birthlens.viz.figures.gallery import draw, draw_table, drawn_steps, read_table
    from birthlens.viz.figures.style import check_name, save

    check_name(out)
    if kind in RENAMED_KINDS:
        note(f"the kind {kind} is now called {RENAMED_KINDS[kind]}; the old name still works.")
        kind = RENAMED_KINDS[kind]
    if Path(source).is_file():
        refuse_idle("a table is drawn with the steps that it has", "steps")
        pairs = [option.partition("=") for option in options]
        if wrong := [option for option, pair in zip(options, pairs, strict=True) if not pair[1]]:
            raise BirthlensError(f"option = {wrong[0]!r}: write it as NAME=VALUE, for instance x=d_model.")
        figure = draw_table(read_table(source), kind, **{name: value for name, _, value in pairs})
    else:
        from birthlens.runs.run import load_run

        if options:
            raise BirthlensError(f"option = {options[0]!r}: options are for tables; figures of a run have none.")
        run = load_run(source)
        chosen = run.select(steps)
        figure = draw(run, kind, chosen)
        kept = drawn_steps(run, kind, chosen)
        if len(kept) < len(chosen):
            drawn = ", ".join(map(str, kept))
            tell(f"{kind} draws {len(kept)} of the {len(chosen)} steps: {drawn}; choose others with --steps.", err=True)
    if dark:
        from birthlens.viz.figures.dark import darken

        figure = darken(figure)
    tell(str(save(figure, out)))


@click.command(epilog="Example: birthlens gallery runs/demo --out gallery.html")
@click.argument("run", type=click.Path())
@click.option(
    "--out", default="gallery.html", show_default=True, type=click.Path(dir_okay=False), help="An .html file."
)
@steps_option()
def gallery(run: str, out: str, steps: str) -> None:
    """Draw every figure of a RUN into one self-contained page, each with the command that draws it."""
    from birthlens.runs.run import load_run
    from birthlens.viz.report.gallery_page import write_gallery

    loaded = load_run(run)
    tell(str(write_gallery(loaded, out, loaded.select(steps), lambda kind: tell(kind, err=True))))


@click.command(epilog="Example: birthlens report runs/demo --out report.html")
@click.argument("runs", nargs=-1, required=True, type=click.Path(), metavar="RUN...|SERIES")
@click.option("--out", default="report.html", show_default=True, type=click.Path(dir_okay=False), help="An .html file.")
@click.option("--quick", is_flag=True, help="Leave out the causal analyses.")
def report(runs: tuple[str, ...], out: str, quick: bool) -> None:
    """Write one self-contained page that describes a RUN, compares several, or describes a SERIES of model directories."""
    from birthlens.runs.run import load_run
    from birthlens.viz.report import write_report

    if len(runs) == 1 and holds_models(runs[0]):
        tell(str(_report_on_series(runs[0], out, not quick)))
        return

    tell(str(write_report([load_run(run) for run in runs], out, causal=not quick)))


def _report_on_series(path: str, out: str, causal: bool) -> Path:
    from birthlens.model.audit import audit_table
    from birthlens.viz.html import write_page
    from birthlens.viz.report.series import series_page, series_tables

    loaded = load(path, "all", 0)
    if loaded.series is None or len(loaded.steps) < 2:
        raise BirthlensError(f"model = {path!r} is one model; a report describes a series of them, or runs.")
    findings = audit_table(loaded.series)
    with loaded.progress() as advance:
        tables = series_tables(loaded.models(advance), loaded.batch(64, 0), loaded.batch(64, 1), findings, causal)
    return write_page(out, series_page(Path(path).name, tables))


@click.command(epilog="Example: birthlens attention runs/demo --steps every:5 --out attention.html")
@click.argument("subject", metavar="RUN|MODEL_DIR|SERIES", type=click.Path())
@click.option(
    "--out", default="attention.html", show_default=True, type=click.Path(dir_okay=False), help="An .html file."
)
@click.option("--steps", help="all, last, every:N, or a list 0,100,-1; by default up to twenty.")
@click.option("--text", help="A text of your own instead of a held-out sequence of the task.")
@click.option("--prompts", type=click.Path(), help="Several sentences or ids of your own, as YAML or JSON.")
@click.option("--row", default=0, show_default=True, type=click.IntRange(min=0), help="Which held-out sequence.")
@click.option("--heads", help="Heads such as L0H0,L1H0; by default all.")
@click.option("--length", default=64, show_default=True, type=click.IntRange(min=1), help="How many positions.")
@device_option
def attention(
    subject: str,
    out: str,
    steps: str | None,
    text: str | None,
    prompts: str | None,
    row: int,
    heads: str | None,
    length: int,
    device: str,
) -> None:
    """Write the attention patterns of a RUN or of model directories as one page with a slider over checkpoints.

    A model directory is shown on random tokens that repeat, or on your own --text or --prompts.
    """
    from birthlens.viz.notebook import save_pictures, series_pictures, show_attention, thinned

    if text is not None or prompts is not None:
        refuse_idle("the sequences are given", "row")
    if prompts is not None:
        refuse_idle("--prompts has the text", "text")
    chosen = names("heads", heads) if heads is not None else None
    loaded = load(subject, steps or "all", 0)
    if steps is None:
        loaded = replace(loaded, steps=thinned(loaded.steps, 20))  # with the first step, which is opened already
    loaded.use(device, loaded.batch(1, 0))
    if loaded.run is not None and prompts is None:
        picture = show_attention(
            loaded.run, steps, tokens=text, row=row, heads=chosen, length=length, device=loaded.device
        )
        tell(str(picture.save(out)))
        return
    if prompts is not None:
        sequences = [list(prompt.text) for prompt in loaded.prompts(prompts)]
        if len(sequences) > MOST_PICTURES:
            note(f"the page shows the first {MOST_PICTURES} of {len(sequences)} prompts.")
            sequences = sequences[:MOST_PICTURES]
    elif text is not None:
        sequences = [loaded.encoded(text)]
    else:
        sequences = [loaded.batch(row + 1, 0).tokens[row].tolist()]
    if loaded.run is not None:
        pictures = [
            show_attention(loaded.run, steps, ids, heads=chosen, length=length, device=loaded.device)
            for ids in sequences
        ]
    else:
        pictures = series_pictures(loaded.models(), sequences, chosen, length, Path(subject).name)
    tell(str(save_pictures(pictures, out)))


@click.command(epilog="Example: birthlens watch runs/demo")
@click.argument("run", type=click.Path())
@click.option("--once", is_flag=True, help="Print one frame and stop; the default if the output is not a terminal.")
@click.option("--every", default=2.0, show_default=True, type=click.FloatRange(min=0.2), help="Seconds between frames.")
def watch(run: str, once: bool, every: float) -> None:
    """Follow a RUN in the terminal until it is finished."""
    from rich.console import Console
    from rich.live import Live

    from birthlens.runs.run import load_run
    from birthlens.viz.watch import Watch

    if once:
        refuse_idle("--once prints one frame", "every")
    console = Console()
    live = console.is_terminal and not once
    width = max(10, min(60, console.width - 54))
    height = console.height if live else None
    watched = Watch(load_run(run), width, height)
    if not live:
        console.print(watched.frame())
        return
    with Live(watched.frame(), console=console, auto_refresh=False) as screen:
        while not watched.over:
            time.sleep(every)
            watched.height = console.height
            screen.update(watched.frame(), refresh=True)
