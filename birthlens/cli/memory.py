"""`birthlens memories`, `associations`, `weight-patch` and `order`: read weights as associative memories."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from birthlens.cli.options import refuse_idle
from birthlens.cli.probing import overview, steps_option
from birthlens.cli.streams import tell
from birthlens.cli.tables import deliver, format_option, out_option, show, show_rows
from birthlens.errors import BirthlensError
from birthlens.labels import label

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from birthlens.analysis.interventions.weight_patching import Evaluate
    from birthlens.runs.run import Run
    from birthlens.shapes import Float

fold_option = click.option("--fold", is_flag=True, help="Fold layer norms into the matrices that follow them.")
MAP_METRICS = ("in_context_accuracy", "in_context_loss", "global_loss", "global_accuracy", "all_loss")


@click.command(epilog="Example: birthlens memories runs/demo --steps every:5 --ledger")
@click.argument("run", type=click.Path())
@steps_option()
@click.option("--ledger", is_flag=True, help="Show what each matrix is made of instead of what it recalls.")
@click.option("--cells", is_flag=True, help="With --ledger: assign what no association explains to pairs of codebooks.")
@click.option(
    "--draws",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="With --ledger: wrong pairings for the last two columns; 0 leaves these out, in half the time for 2,000 tokens.",
)
@click.option("--whole", is_flag=True, help="With --ledger: analyse the whole matrices, initial values included.")
@fold_option
@click.option("--full", is_flag=True, help="On a terminal, print every row instead of the overview.")
@out_option
@format_option
def memories(
    run: str,
    steps: str,
    ledger: bool,
    cells: bool,
    draws: int,
    whole: bool,
    fold: bool,
    full: bool,
    out: str | None,
    style: str,
) -> None:
    """Read the memories of a RUN over its checkpoints: recall, margins, ranks, raw and dual, each beside its chance level.

    With --ledger: the share of each matrix's squared norm, less its value at the first kept step, that every family of
    associations explains, the residual that none explains, and the shares that chance would give. The trained matrix is
    shown between the codebooks at its own sides ("L1.W_O"), and the circuit W_V W_O as a second reading: the shares differ.
    """
    from birthlens.runs.run import load_run

    if ledger:
        refuse_idle("the models of the ledger have no layer norms", "fold")
    else:
        refuse_idle("it acts with --ledger only", "cells", "draws", "whole")
    loaded = load_run(run)
    chosen = loaded.select(steps)
    table = _ledger(loaded, chosen, cells, draws, whole) if ledger else _memories(loaded, chosen, fold)
    if out is None and style == "table" and not full:
        _ledger_overview(table) if ledger else overview(table)
    else:
        deliver(table, out, style)


@click.command(epilog="Example: birthlens associations runs/demo --matrix output_memory --step -1 --top 10")
@click.argument("run", type=click.Path())
@click.option("--matrix", required=True, help="A role (output_memory), W_O^2, L1.W_O, or 'L1H0.QK: W_E -> W_E'.")
@click.option("--step", default=-1, show_default=True, help="A kept step; -1 is the last one.")
@click.option("--top", default=20, show_default=True, type=click.IntRange(min=1), help="How many of each kind to list.")
@click.option(
    "--basis", type=click.Choice(["raw", "dual"]), default="raw", show_default=True, help="How to read the matrix."
)
@fold_option
@out_option
@format_option
def associations(
    run: str, matrix: str, step: int, top: int, basis: str, fold: bool, out: str | None, style: str
) -> None:
    """List the strongest associations of one matrix of a RUN, right and wrong ones, with their labels."""
    from birthlens.analysis.memories.layer_norms import folded
    from birthlens.analysis.memories.names import memory_named
    from birthlens.analysis.memories.top_associations import top_associations_table
    from birthlens.labels import legible
    from birthlens.runs.run import load_run

    loaded = load_run(run)
    (kept,) = loaded.select(str(step))
    labels = [legible(token) for token in loaded.statistics.vocab]
    weights = folded(loaded.weights(kept)) if fold else loaded.weights(kept)
    found, association = memory_named(weights, matrix, labels, loaded.triggers)
    table = top_associations_table(found, top, association, basis)  # type: ignore[arg-type]
    deliver(table, out, style, title=f"{found.name}, step {kept}, {basis}{', folded' if fold else ''}")


@click.command(epilog="Example: birthlens weight-patch runs/demo --from 0,100,-1 --to 0,100,-1")
@click.argument("run", type=click.Path())
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
@click.option("--align", is_flag=True, help="Turn donors into the recipient's basis (trained embeddings).")
@click.option(
    "--metric", type=click.Choice(MAP_METRICS), default=MAP_METRICS[0], show_default=True, help="The metric to print."
)
@click.option("--sequences", default=64, show_default=True, type=click.IntRange(min=1), help="Fresh sequences to run.")
@click.option("--full", is_flag=True, help="On a terminal, print every row instead of the map.")
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
    out: str | None,
    style: str,
) -> None:
    """Put matrices of one step of a RUN into the model of another step, and measure what the model then does.

    A late matrix that improves an early model is sufficient; an early one that breaks a late model was necessary. With --by,
    each matrix is replaced by its ideal memory, its ledger projection, a truncation or its initial value, at the steps --to.
    """
    from birthlens.analysis.interventions.weight_patching import replacement_table, weight_patching_table
    from birthlens.runs.evaluation import evaluation_batch
    from birthlens.runs.run import load_run
    from birthlens.viz.notebook import thinned

    loaded = load_run(run)
    printed = out is None and style == "table" and not full
    if sources is not None:
        refuse_idle("it acts on matrices of other steps, and --by takes them from elsewhere", "align", "donors")
    if not printed:
        refuse_idle("every metric is in the table; this one only chooses what is printed as a map", "metric")
    names = None if matrices is None else [name.strip() for name in matrices.split(",")]
    to_steps, from_steps = (
        thinned(loaded.steps, 6) if chosen is None else loaded.select(chosen) for chosen in (recipients, donors)
    )
    batch = evaluation_batch(loaded, sequences)
    evaluate = _evaluator(loaded)
    if sources is None:
        steps = sorted({*to_steps, *from_steps})
        table = weight_patching_table(loaded.checkpoints(steps), batch, names, from_steps, to_steps, align, evaluate)
        down = "to_step"
        across = "from_step"
    else:
        table = replacement_table(
            loaded.checkpoints(to_steps),
            batch,
            [source.strip() for source in sources.split(",")],
            names,
            initial=loaded.weights(loaded.steps[0]),
            triggers=loaded.triggers,
            bigram=_bigram(loaded),
            evaluate=evaluate,
        )
        down = "step"
        across = "source"
    moved = ", ".join(table.attrs["moving"])
    if moved and sources is None and not align:
        _note(f"bases ({moved}) differ between steps, and so do the bases of the matrices; see --align.")
    elif moved and "initial" in set(table.get("source", ())):
        _note(f"bases ({moved}) differ between steps, so the initial matrices are in other bases.")
    if printed:
        chosen = table[table["metric"] == metric]
        if chosen["value"].isna().all():
            raise BirthlensError(
                f"metric = {metric!r}: the {sequences} sequences hold no such target; use more or another."
            )
        for name, rows in chosen.groupby("matrix", sort=False):
            _print_map(rows, down, across, title=f"{metric} with {name} replaced")
    else:
        deliver(table, out, style)


@click.command(epilog="Example: birthlens order runs/seed0 runs/seed1 runs/seed2")
@click.argument("runs", nargs=-1, required=True, type=click.Path(), metavar="RUN...")
@click.option("--width", default=4.0, show_default=True, help="Width of the null band, in standard deviations.")
@click.option("--sensitivity", is_flag=True, help="Show how the order depends on probe, threshold and candidate sets.")
@out_option
@format_option
def order(runs: tuple[str, ...], width: float, sensitivity: bool, out: str | None, style: str) -> None:
    """Say over several RUNs (seeds) when each memory is born, and in which order, with exact intervals.

    A memory is born at the step from which its right entries stay outside the band that shifted pairings of the same table
    span. The RUNs may differ in their seeds only.
    """
    import numpy as np
    import pandas as pd

    from birthlens.analysis.memories.birth_order import birth_order_table, order_sensitivity_table
    from birthlens.analysis.memories.order_tables import chosen_sets, crossings_table, onsets_table, scores_table
    from birthlens.runs.run import load_run

    loaded = [load_run(run) for run in runs]
    onsets = onsets_table(scores_table(loaded), width)
    if sensitivity:
        table = order_sensitivity_table(pd.concat([onsets, crossings_table(loaded)], ignore_index=True))
    else:
        table = birth_order_table(chosen_sets(onsets))
        gap = max(max(np.diff(run.steps), default=0) for run in loaded)
        if gap > 20:
            _note(f"checkpoints are up to {gap} steps apart, so onsets closer than that are ties.")
    if len(loaded) < 6:
        _note(f"{len(loaded)} {'runs' if len(loaded) > 1 else 'run'}: a 95 % interval of a median needs at least six.")
    _note_moving(onsets.attrs["moving_codebooks"])
    if out is None and style == "table":
        table = table.replace(np.inf, "never")
    deliver(table, out, style)


def _note_moving(moving: list[str]) -> None:
    if moving:
        _note(f"codebooks ({', '.join(moving)}) change in training: each step is read in its own.")


def _memories(run: Run, steps: list[int], fold: bool) -> pd.DataFrame:
    from birthlens.analysis.behaviour.trajectory import memories_over

    table = memories_over(run, steps, fold=fold).to_pandas()
    _note_moving(table.attrs["moving_codebooks"])
    return table


def _ledger(run: Run, steps: list[int], cells: bool, draws: int, whole: bool) -> pd.DataFrame:
    import numpy as np

    from birthlens.analysis.memories.ledger_tables import paper_ledger_table
    from birthlens.analysis.memories.names import is_paper_model

    if not is_paper_model(run.config.model):
        raise BirthlensError("ledger: it exists for the two-layer simplified model; leave --ledger out.")
    # The ledger subtracts the value at the first step that it is given, so that step is read in any case.
    read = sorted({run.steps[0], *steps})
    generator = np.random.default_rng(0) if draws else None
    slow = len(run.statistics) >= 500
    table = paper_ledger_table(
        run.checkpoints(read),
        run.triggers,
        not whole,
        draws=draws,
        generator=generator,
        cells=cells,
        bigram=_bigram(run),
        told=lambda memory: _note(f"reading the {label(memory)} of {len(run.statistics)} tokens") if slow else None,
    )
    if table.attrs["moving_partners"]:
        _note(
            f"the other matrix of {', '.join(table.attrs['moving_partners'])} is trained too, so only the circuit, their "
            "product, is shown."
        )
    return table[table["step"].isin(steps)].reset_index(drop=True)


def _ledger_overview(table: pd.DataFrame) -> None:
    """Print shares by step, one table for each matrix, below the share that a family of that size gets by chance."""
    for (name, reading), rows in table.groupby(["matrix", "reading"], sort=False):
        wide = rows.pivot(index="step", columns="family", values="share")[list(dict.fromkeys(rows["family"]))]
        chance = rows.drop_duplicates("family")["null_rank"]
        lines = [["chance", *(f"{share:z.3f}" for share in chance)]]
        lines += [[str(step), *("-" if v != v else f"{v:z.3f}" for v in values)] for step, *values in wide.itertuples()]
        show_rows(["step", *map(str, wide)], lines, title=f"{name}, {reading}: share of the squared norm")
        tell()


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


def _bigram(run: Run) -> Float[np.ndarray, "d_vocab d_vocab"] | None:
    return run.statistics.bigram if run.config.model.feed_forward == "linear" else None


def _note(text: str) -> None:
    tell(f"birthlens: note: {text}", err=True)
