"""`birthlens weight-patch`: matrices of one step in the model of another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from birthlens.cli.memory import bigram_of
from birthlens.cli.options import device_option, refuse_idle
from birthlens.cli.streams import note, tell
from birthlens.cli.subjects import Subject, holds_models, load, names
from birthlens.cli.tables import deliver, format_option, out_option, show
from birthlens.errors import BirthlensError

if TYPE_CHECKING:
    import pandas as pd

    from birthlens.analysis.interventions.weight_patching import Evaluate
    from birthlens.model.series import Series
    from birthlens.runs.run import Run

MAP_METRICS = ("in_context_accuracy", "in_context_loss", "global_loss", "global_accuracy", "all_loss")


@click.command(epilog="Example: birthlens weight-patch runs/demo --from 0,100,-1 --to 0,100,-1")
@click.argument("run", metavar="RUN|SERIES", type=click.Path())
@click.option(
    "--matrices", help="Names as for 'associations', L1.QK or L1.OV, joined by commas; + moves several at once."
)
@click.option("--from", "donors", help="Steps to take a matrix from, as 0,100,-1 or every:N; by default up to six.")
@click.option("--to", "recipients", help="Steps of the models that receive it; by default up to six.")
@click.option(
    "--by",
    "sources",
    help="Replace by initial, ideal, ideal_dual, ledger, without_ledger, rank:R, without_rank:R or change_rank:R.",
)
@click.option("--align", is_flag=True, help="Rotate donors into the recipient's basis (for trained embeddings).")
@click.option(
    "--metric", type=click.Choice(MAP_METRICS), default=MAP_METRICS[0], show_default=True, help="The metric to print."
)
@click.option("--sequences", default=64, show_default=True, type=click.IntRange(min=1), help="Number of new sequences.")
@click.option("--full", is_flag=True, help="On a terminal, print every row instead of the map.")
@device_option
@out_option
@format_option
def weight_patch(
    run: str,
    matrices: str | None,
    donors: str | None,
    recipients: str | None,
    sources: str | None,
    align: bool,
    metric: str,
    sequences: int,
    full: bool,
    device: str,
    out: str | None,
    style: str,
) -> None:
    """Put matrices of one step of a RUN into the model of another step, and measure what the model then does.

    A late matrix that improves an early model is sufficient; an early one that breaks a late model was necessary. With
    --by, each matrix is replaced at the steps --to by its ideal memory, its ledger projection, a truncation or its
    initial value.

    Of a SERIES of model directories, parts move: L0.attention, L0.mlp, L0.norms, embeddings, final_norm; the model then
    runs on random sequences that repeat.
    """
    printed = out is None and style == "table" and not full
    if not printed:
        refuse_idle("every metric is in the table; this one only chooses what is printed as a map", "metric")
    chosen = None if matrices is None else names("matrices", matrices)
    if holds_models(run):
        refuse_idle("it is for runs", "sources", "align")
        table = _of_series(run, chosen, donors, recipients, sequences, device)
    else:
        table = _of_run(run, chosen, donors, recipients, sources, align, sequences, device)
    if not printed:
        deliver(table, out, style)
        return
    shown = table[table["metric"] == metric]
    if shown["value"].isna().all():
        raise BirthlensError(
            f"metric = {metric!r}: the {sequences} sequences hold no such target; use more or another."
        )
    down = "to_step" if "to_step" in table else "step"
    across = "from_step" if "from_step" in table else "source"
    for name, rows in shown.groupby("matrix", sort=False):
        _print_map(rows, down, across, title=f"{metric} with {name} replaced")


def _of_run(
    path: str,
    matrices: list[str] | None,
    donors: str | None,
    recipients: str | None,
    sources: str | None,
    align: bool,
    sequences: int,
    device: str,
) -> pd.DataFrame:
    from birthlens.analysis.interventions.weight_patching import by_forward, replacement_table, weight_patching_table
    from birthlens.runs.evaluation import evaluation_batch
    from birthlens.runs.run import load_run

    loaded = load_run(path)
    if sources is not None:
        refuse_idle("it acts on matrices of other steps, and --by takes them from elsewhere", "align", "donors")
    to_steps = _chosen(loaded, recipients)
    from_steps = _chosen(loaded, donors)
    batch = evaluation_batch(loaded, sequences)
    subject = Subject(path, 0, to_steps, loaded)
    subject.use(device, batch, len(from_steps) * len(loaded.config.trained))
    batch = batch.to(subject.device)
    evaluate = _evaluator(loaded) if subject.device == "cpu" else by_forward
    if sources is None:
        steps = sorted({*to_steps, *from_steps})
        table = weight_patching_table(loaded.checkpoints(steps), batch, matrices, from_steps, to_steps, align, evaluate)
    else:
        table = replacement_table(
            loaded.checkpoints(to_steps),
            batch,
            names("by", sources),
            matrices,
            initial=loaded.weights(loaded.steps[0]),
            triggers=loaded.triggers,
            bigram=bigram_of(loaded),
            evaluate=evaluate,
        )
    moved = ", ".join(table.attrs["moving"])
    if moved and sources is None and not align:
        note(f"bases ({moved}) differ between steps, and so do the bases of the matrices; see --align.")
    elif moved and "initial" in set(table.get("source", ())):
        note(f"bases ({moved}) differ between steps, so the initial matrices are in other bases.")
    return table


def _of_series(
    path: str, parts: list[str] | None, donors: str | None, recipients: str | None, sequences: int, device: str
) -> pd.DataFrame:
    from birthlens.analysis.interventions.directory_patching import directory_patching_table

    loaded = load(path, "all", 0)
    series = loaded.series
    assert series is not None
    if len(series.steps) < 2:
        raise BirthlensError(f"model = {path!r} is one model; weights move between the steps of a series.")
    from_steps = _chosen(series, donors)
    batch = loaded.batch(sequences, 0)
    loaded.use(device, batch, len(from_steps))
    batch = batch.to(loaded.device)
    return directory_patching_table(series.directories, batch, parts, from_steps, _chosen(series, recipients))


def _chosen(subject: Run | Series, text: str | None) -> list[int]:
    """Return the steps that an option names, by default up to six."""
    from birthlens.viz.notebook import thinned

    return thinned(subject.steps, 6) if text is None else subject.select(text)


def _print_map(rows: pd.DataFrame, down: str, across: str, title: str) -> None:
    wide = rows.pivot(index=down, columns=across, values="value")[list(dict.fromkeys(rows[across]))]
    table = wide.reset_index()
    table.columns = [f"{down} \\ {across}", *map(str, wide.columns)]
    show(table, title=title)
    tell()


def _evaluator(run: Run) -> Evaluate:
    """Return the evaluation of the fastest engine for the run's model."""
    from birthlens.training.engines import choose, engine

    name, _ = choose(run.config, len(run.statistics))
    return lambda weights, batch: engine(name, run.config, weights).evaluate(batch)
