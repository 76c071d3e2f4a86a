"""`birthlens probe`: what the memories recall, how the model behaves and where it looks, over checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from birthlens.cli.tables import check_counts, deliver, format_option, out_option, show, show_rows

if TYPE_CHECKING:
    import pandas as pd

    from birthlens.runs.run import Run

PROBES = ("memories", "behaviour", "attention")


def steps_option(default: str = "all") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add `--steps all|last|every:N|LIST`."""
    return click.option("--steps", default=default, show_default=True, help="all, last, every:N, or a list 0,100,-1.")


@click.command(epilog="Example: birthlens probe runs/demo --steps every:5 --out memories.csv")
@click.argument("run", type=click.Path())
@steps_option()
@click.option("--what", type=click.Choice(PROBES), default="memories", show_default=True, help="Which probes.")
@click.option("--full", is_flag=True, help="On a terminal, print every row instead of the overview.")
@out_option
@format_option
def probe(run: str, steps: str, what: str, full: bool, out: str | None, style: str) -> None:
    """Probe the checkpoints of a RUN (paper sections 4 and 5): one row per number, with its chance level and n.

    'memories' reads the weights alone; 'behaviour' and 'attention' run new sequences through the model.
    """
    from birthlens.runs.run import load_run

    loaded = load_run(run)
    kept = loaded.select(steps)
    if what != "memories":
        column = "role" if what == "behaviour" else "probe"
        deliver(check_counts(probed(loaded, kept, what), column), out, style)
    elif out is None and style == "table" and not full:
        overview(probed(loaded, kept, what))
    else:
        from birthlens.analysis.behaviour.trajectory import memories_over

        deliver(memories_over(loaded, kept), out, style)


def overview(table: pd.DataFrame) -> None:
    """Print recall by step, one column a memory and candidate set, under its chance level."""
    recall = table[(table["metric"] == "recall") & (table["basis"] == "raw")]
    if recall.empty:
        show(table)
        return
    names = recall["memory"].str.replace("_memory", "") + "/" + recall["candidates"]
    wide = recall.assign(column=names).pivot_table(index="step", columns="column", values="value", sort=False)
    chance = recall.assign(column=names).groupby("column", sort=False)["chance"].first()
    rows = [["chance", *(f"{chance[name]:z.3f}" for name in wide.columns)]]
    rows += [[str(step), *(f"{value:z.3f}" for value in values)] for step, *values in wide.itertuples()]
    show_rows(["step", *wide.columns], rows, title="recall: memory / candidates")


def probed(run: Run, steps: list[int], what: str) -> pd.DataFrame:
    """Probe a run at some steps: one of `PROBES`."""
    from birthlens.analysis.behaviour import trajectory

    if what == "memories":
        return trajectory.memories_over(run, steps).to_pandas()
    if what == "behaviour":
        return trajectory.behaviour_over(run, steps)
    return trajectory.attention_over(run, steps)
