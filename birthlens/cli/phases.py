"""`birthlens phase`: a diagram of many runs over two settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from birthlens.cli.many_runs import Means, continued_by_repeating, how_to_train, say_outcome, training_options
from birthlens.cli.streams import tell
from birthlens.cli.tables import format_option, show, write

if TYPE_CHECKING:
    from birthlens.config.run import RunConfig
    from birthlens.training.sweep import Outcome


@click.command(
    epilog="Example: birthlens phase grid.yaml --x task.n_triggers --y model.d_model --out runs/phase --refine 8"
)
@click.argument("grid", type=click.Path())
@click.option("--x", required=True, metavar="SECTION.KEY", help="The setting of the horizontal axis, an axis of GRID.")
@click.option("--y", required=True, metavar="SECTION.KEY", help="The setting of the vertical axis.")
@click.option(
    "--value",
    type=click.Choice(["birth", "accuracy", "loss", "output_memory", "trigger_memory", "prev_token_memory", "order"]),
    default="birth",
    show_default=True,
    help="What to draw: the step of birth, a measurement at the end, or how often the memories are born in order.",
)
@click.option("--out", default="runs/phase", show_default=True, type=click.Path(), help="The folder of the runs.")
@click.option("--seeds", type=click.IntRange(min=1), help="Number of seeds, instead of the file's.")
@click.option(
    "--refine",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="How many points to add where neighbours differ most.",
)
@training_options
@format_option
def phase(
    grid: str,
    x: str,
    y: str,
    value: str,
    out: str,
    seeds: int | None,
    refine: int,
    means: Means,
    style: str,
) -> None:
    """Draw a phase diagram: a result of the runs of GRID over two of its axes, averaged over seeds.

    GRID is a YAML or JSON file as `birthlens sweep` takes it, with two axes. The table is written to phase.csv and the
    figure to phase.svg in --out. Finished runs are reused, and the same command continues an interrupted diagram. With
    --refine, points are added halfway between neighbours, on axes of numbers.
    """
    from birthlens.analysis.behaviour.phase import VALUES, Diagram, phase_table
    from birthlens.reading import read_mapping
    from birthlens.training.grid import Grid
    from birthlens.viz.figures.phase import phase_map
    from birthlens.viz.figures.style import save

    diagram = Diagram(read_mapping(grid, "sweep"), x, y, value, seeds)
    configs = list(Grid.parse(diagram.tree, seeds).configs().values())
    with continued_by_repeating(), how_to_train(configs, out, means) as train:
        number = 0

        def watched(wanted: Sequence[RunConfig]) -> Iterator[Outcome]:
            nonlocal number
            for outcome in train(wanted):
                number += 1
                say_outcome(outcome, number)
                yield outcome

        table = phase_table(diagram, out, watched, refine)
    write(table, str(Path(out) / "phase.csv"))
    show(table, style)
    tell(str(save(phase_map(table, x, y, VALUES[value]), Path(out) / "phase.svg")), err=True)
