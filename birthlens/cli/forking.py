"""`birthlens fork`, `contrast` and `data-attribution`: experiments on training, and what came of them."""

from __future__ import annotations

from typing import Any

import click

from birthlens.cli.streams import note, tell
from birthlens.cli.tables import deliver, format_option, out_option
from birthlens.cli.training import follow
from birthlens.errors import BirthlensError


@click.command(
    epilog="Example: birthlens fork runs/demo runs/frozen --at 100 training.steps=300 --clamp 'freeze L0.W_K until=200'"
)
@click.argument("run", type=click.Path())
@click.argument("out", type=click.Path())
@click.argument("changes", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--at", required=True, type=int, help="The step of RUN to start from; -1 is the last kept one.")
@click.option(
    "--clamp",
    "clamps",
    multiple=True,
    metavar="TEXT",
    help="An intervention over a span of steps; may be repeated. The kinds are listed above.",
)
@click.option("--log", "logger", type=click.Choice(["tensorboard", "wandb"]), help="Also log to this service.")
def fork(run: str, out: str, changes: tuple[str, ...], at: int, clamps: tuple[str, ...], logger: str | None) -> None:
    """Train a new run in OUT that starts from a step of RUN.

    Without changes and clamps, the new run repeats RUN bit for bit. Settings of the task, the training, the optimiser,
    the checkpoints and seeds.data may change; the model and the vocabulary may not. A step that was not kept is computed
    by training again.

    Clamps act at the steps from=N to until=N (exclusive; by default from --at to the end):

    \b
      freeze MATRIX
      hold MATRIX zero|initial|step:N|ideal|ideal_dual|ledger|without_ledger|rank:N [strength=X]
      add MATRIX STRENGTH [held]              the ideal memory, once or held
      reset [MATRIX]                          the state of the optimiser
      set SECTION.KEY=VALUE                   of the task, the loss, the batch size or the optimiser
      ablate HEAD|SENDER->RECEIVER zero|mean
      pin HEAD previous|uniform|frozen        the attention pattern
      copy HEAD [STRENGTH]                    the tokens that it attends to, into the logits
      stop_gradient SENDER->RECEIVER
    """  # noqa: D301  click reads the escape
    from birthlens.training.forking import fork as start

    follow(start(run, out, at, changes, clamps), out, logger)


@click.command(epilog="Example: birthlens contrast runs/demo runs/frozen")
@click.argument("control")
@click.argument("forks", nargs=-1, required=True, type=click.Path(), metavar="FORK...")
@click.option(
    "--what",
    type=click.Choice(["births", "steps", "first"]),
    default="births",
    show_default=True,
    help="Shifts of births, differences at every step, or the first step at which each metric differs.",
)
@click.option(
    "--width", default=4.0, show_default=True, help="Width of the null band of a birth, in standard deviations."
)
@click.option("--figure", type=click.Path(dir_okay=False), help="Also draw the differences: .png, .svg or .pdf.")
@out_option
@format_option
def contrast(
    control: str, forks: tuple[str, ...], what: str, width: float, figure: str | None, out: str | None, style: str
) -> None:
    """Compare FORKs, or other changed runs, with their CONTROL, pair by pair.

    Over seeds, CONTROL is a comma-separated list of runs, and each FORK is paired with the control of its seeds.
    Differences are fork minus control, with 95 % intervals of Student's t over pairs.
    """
    from birthlens.analysis.behaviour import contrast as contrasts
    from birthlens.runs.run import load_run

    controls = control.split(",")
    if not all(controls):
        raise BirthlensError(f"control = {control!r}: a run is missing beside a comma.")
    pairs = contrasts.pairs_of([load_run(path) for path in controls], [load_run(path) for path in forks])
    if what == "births":
        table = contrasts.birth_shifts_table(pairs, width)
    else:
        table = contrasts.contrast_table(pairs)
        if what == "first":
            table = contrasts.first_differences_table(table)
    for caution in contrasts.cautions(pairs):
        note(caution)
    deliver(table, out, style)
    if figure is not None:
        from birthlens.viz.figures.contrast import difference_curves
        from birthlens.viz.figures.style import save

        tell(str(save(difference_curves(contrasts.contrast_table(pairs)), figure)), err=True)


@click.command("data-attribution", epilog="Example: birthlens data-attribution runs/demo trigger_memory --every 10")
@click.argument("run", type=click.Path())
@click.argument("memory")
@click.option("--from", "start", type=int, help="The step before the first update; by default the first step.")
@click.option("--until", "stop", type=int, help="The step after the last update; by default the last step.")
@click.option(
    "--by",
    type=click.Choice(["role", "occurrence", "token", "target", "position", "sequence", "step"]),
    default="role",
    show_default=True,
    help="What the positions of the data are grouped by.",
)
@click.option("--every", type=click.IntRange(min=1), help="Split the span into windows of this many updates.")
@click.option("--figure", type=click.Path(dir_okay=False), help="Also draw the table: .png, .svg or .pdf.")
@out_option
@format_option
def data_attribution(
    run: str,
    memory: str,
    start: int | None,
    stop: int | None,
    by: Any,
    every: int | None,
    figure: str | None,
    out: str | None,
    style: str,
) -> None:
    """Show which training data taught MEMORY: how much each part of the data changed the memory's margin.

    The margin is the mean score of the right answers less that of all answers, in nats. The updates of the span are
    repeated, and the change of the margin is split over all positions with a loss, weight decay, and the momentum of
    batches before the span. The rows sum to the change to rounding. With AdamW the sum is exact, and the denominators,
    which depend on the data too, are taken as they were. It takes about as long as training the span twice without the
    fused engine.
    """
    from birthlens.runs.run import load_run
    from birthlens.training.data_attribution import data_attribution_table

    loaded = load_run(run)
    first = loaded.steps[0] if start is None else start
    last = loaded.steps[-1] if stop is None else stop
    table = data_attribution_table(loaded, memory, first, last, by, every)
    deliver(table, out, style)
    if figure is not None:
        from birthlens.viz.figures.attribution import data_parts
        from birthlens.viz.figures.style import save

        tell(str(save(data_parts(table), figure)), err=True)
