"""`birthlens memories`, `associations`, `weight-patch` and `order`: read weights as associative memories."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from birthlens.cli.options import refuse_idle
from birthlens.cli.probing import overview, steps_option
from birthlens.cli.streams import note, tell
from birthlens.cli.subjects import holds_models, load, names
from birthlens.cli.tables import deliver, format_option, out_option, show_rows
from birthlens.errors import BirthlensError
from birthlens.labels import label

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from birthlens.analysis.memories.memory import Basis
    from birthlens.runs.run import Run
    from birthlens.shapes import Float

fold_option = click.option("--fold", is_flag=True, help="Fold layer norms into the matrices that follow them.")


@click.command(epilog="Example: birthlens memories runs/demo --steps every:5 --ledger")
@click.argument("run", metavar="RUN|MODEL_DIR|SERIES", type=click.Path())
@steps_option()
@click.option("--ledger", is_flag=True, help="Show what each matrix is made of instead of what it recalls.")
@click.option(
    "--cells", is_flag=True, help="With --ledger: split what no association explains over pairs of codebooks."
)
@click.option(
    "--draws",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="With --ledger: wrong pairings for the last two columns; 0 leaves these out, which is faster.",
)
@click.option("--whole", is_flag=True, help="With --ledger: analyse the whole matrices, initial values included.")
@fold_option
@click.option(
    "--heads", help="Of a model directory: heads such as L0H0,L1H0, each read with all earlier ones; by default all."
)
@click.option(
    "--top",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="Of a model directory: how many of the strongest entries to list.",
)
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
    heads: str | None,
    top: int,
    full: bool,
    out: str | None,
    style: str,
) -> None:
    """Read the memories of a RUN over its checkpoints: recall, margins, ranks, raw and dual, with their chance levels.

    With --ledger, the table shows how much of each matrix's squared norm, after its value at the first kept step is
    subtracted, every family of associations explains, the residual that none explains, and the shares expected by chance.
    The trained matrix ("L1.W_O") is read between the codebooks on its own two sides, and the circuit W_V W_O is a second
    reading with other shares.

    Of model directories, the table shows for every head how often its strongest key for a token is the same token as
    an earlier head writes it, whether the head copies, whether it looks at the previous position (learned positions
    only), and the strongest entries.
    """
    if holds_models(run):
        refuse_idle("it is for runs", "ledger", "cells", "draws", "whole", "full")
        deliver(_of_directories(run, steps, fold, heads, top), out, style)
        return
    refuse_idle("it is for model directories", "heads", "top")
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
    run: str, matrix: str, step: int, top: int, basis: Basis, fold: bool, out: str | None, style: str
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
    table = top_associations_table(found, top, association, basis)
    deliver(table, out, style, title=f"{found.name}, step {kept}, {basis}{', folded' if fold else ''}")


@click.command(epilog="Example: birthlens order runs/seed0 runs/seed1 runs/seed2")
@click.argument("runs", nargs=-1, required=True, type=click.Path(), metavar="RUN...|SERIES")
@click.option("--width", default=4.0, show_default=True, help="Width of the null band, in standard deviations.")
@click.option("--sensitivity", is_flag=True, help="Show how the order depends on probe, threshold and candidate sets.")
@out_option
@format_option
def order(runs: tuple[str, ...], width: float, sensitivity: bool, out: str | None, style: str) -> None:
    """Show when each memory is born over several RUNs (seeds), and in which order, with exact intervals.

    A memory is born at the step from which its right entries stay outside the band that shifted pairings of the same
    table span. The RUNs may differ only in their seeds.

    Of one SERIES of model directories: the step from which each score of each head stays above half of its largest excess
    over chance, on random sequences that repeat.
    """
    if len(runs) == 1 and holds_models(runs[0]):
        refuse_idle("a series has scores of heads, not the paper's memories", "width", "sensitivity")
        table = _order_of_series(runs[0])
        deliver(table.replace(float("inf"), "never") if out is None and style == "table" else table, out, style)
        return
    import numpy as np
    import pandas as pd

    from birthlens.analysis.memories.birth_order import birth_order_table, order_sensitivity_table
    from birthlens.analysis.memories.order_tables import (
        chosen_sets,
        crossings_table,
        onsets_table,
        standardised_scores_table,
    )
    from birthlens.runs.run import load_run

    loaded = [load_run(run) for run in runs]
    onsets = onsets_table(standardised_scores_table(loaded), width)
    if sensitivity:
        table = order_sensitivity_table(pd.concat([onsets, crossings_table(loaded)], ignore_index=True))
    else:
        table = birth_order_table(chosen_sets(onsets))
        gap = max(max(np.diff(run.steps), default=0) for run in loaded)
        if gap > 20:
            note(f"checkpoints are up to {gap} steps apart, so onsets closer than that are ties.")
    if len(loaded) < 6:
        note(f"{len(loaded)} {'runs' if len(loaded) > 1 else 'run'}: a 95 % interval of a median needs at least six.")
    _note_moving(onsets.attrs["moving_codebooks"])
    if out is None and style == "table":
        table = table.replace(np.inf, "never")
    deliver(table, out, style)


def _of_directories(path: str, steps: str, fold: bool, heads: str | None, top: int) -> pd.DataFrame:
    from birthlens.analysis.behaviour.real_memories import real_memories_table
    from birthlens.model.directory import load_tokenizer
    from birthlens.model.sites import Head

    loaded = load(path, steps, 0)
    chosen = None if heads is None else [Head.parse(head) for head in names("heads", heads)]
    assert loaded.series is not None
    tokenizer = load_tokenizer(loaded.series.directories[loaded.steps[0]])
    labels = None if tokenizer is None else [tokenizer.decode([token]) for token in range(int(loaded.cfg.d_vocab))]
    with loaded.progress() as advance:
        return real_memories_table(loaded.models(advance), top, chosen, fold, labels)


def _order_of_series(path: str) -> pd.DataFrame:
    from birthlens.analysis.behaviour.head_onsets import head_onsets_table
    from birthlens.analysis.behaviour.head_scores import scores_table

    loaded = load(path, "all", 0)
    with loaded.progress() as advance:
        return head_onsets_table(scores_table(loaded.models(advance), loaded.batch(64, 0)))


def _note_moving(moving: list[str]) -> None:
    if moving:
        note(f"codebooks ({', '.join(moving)}) change in training: each step is read in its own.")


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
        bigram=bigram_of(run),
        told=lambda memory: note(f"reading the {label(memory)} of {len(run.statistics)} tokens") if slow else None,
    )
    if table.attrs["moving_partners"]:
        note(
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


def bigram_of(run: Run) -> Float[np.ndarray, "d_vocab d_vocab"] | None:
    """Return the bigrams that a linear feed-forward can store, or None if the run has none."""
    return run.statistics.bigram if run.config.model.feed_forward == "linear" else None
