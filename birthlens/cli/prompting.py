"""`birthlens logit-split`, and what ablations and patches read of prompts of the user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from birthlens.cli.probing import steps_option
from birthlens.cli.tables import deliver, format_option, out_option
from birthlens.errors import BirthlensError

if TYPE_CHECKING:
    from torch import Tensor

    from birthlens.analysis.interventions.corruptions import Pair
    from birthlens.analysis.interventions.suite import Suite
    from birthlens.shapes import Int
    from birthlens.tasks.batch import TokenBatch
    from birthlens.tasks.prompts import Prompt


def on_prompts(
    suite: Suite, prompts: list[Prompt]
) -> tuple[Suite, TokenBatch, TokenBatch | None, Int[Tensor, "batch pos"] | None]:
    """Return a suite that reads the answers of prompts, their batch, the corrupted prompts and the wrong answers."""
    from birthlens.tasks.prompts import prompt_batch

    found = prompt_batch(prompts)
    quantities = ["logit", "loss", "accuracy"] if found.wrong is None else ["logit_difference", "logit", "accuracy"]
    averaging = [method for method in suite.methods if method != "zero"]
    if averaging and not found.equal_lengths:
        raise BirthlensError(
            f"methods = {averaging[0]!r}: the prompts have different lengths, and this method takes values from other "
            "positions or prompts; use zero, or prompts of one length."
        )
    if "resample" in averaging and found.corrupted is None:
        raise BirthlensError(
            "methods = 'resample': it takes values from the corrupted prompts, and not every prompt has one; add them, or "
            "use --methods zero,mean."
        )
    metrics = suite.metrics or tuple(f"answer.{quantity}" for quantity in quantities)
    return suite.changed(metrics=metrics), found.clean, found.corrupted, found.wrong


def pair_on_prompts(prompts: list[Prompt], axes: Sequence[str] = ()) -> Pair:
    """Return prompts and their corrupted versions as a pair to patch between, along `axes` of positions."""
    from birthlens.analysis.interventions.corruptions import pair_of_prompts
    from birthlens.tasks.prompts import prompt_batch

    found = prompt_batch(prompts)
    if "role" in axes:
        raise BirthlensError("by = 'role': roles are those of a run's task, which prompts do not have; use position.")
    if "position" in axes and not found.equal_lengths:
        raise BirthlensError(
            "by = 'position': the prompts have different lengths, so that a position is another place in each; use prompts "
            "of one length."
        )
    return pair_of_prompts(found)


@click.command(epilog="Example: birthlens logit-split path/to/model --prompts prompts.yaml")
@click.argument("subject", metavar="RUN|MODEL_DIR|SERIES", type=click.Path())
@click.option("--prompts", required=True, type=click.Path(), help="Sentences or ids with answers (docs/how_to.md).")
@steps_option("last")
@out_option
@format_option
def logit_split(subject: str, prompts: str, steps: str, out: str | None, style: str) -> None:
    """Split the logit of each prompt's answer over what every component writes (direct logit attribution).

    If every prompt has a wrong answer, the logit difference is split. One row per step, prompt and component: value. The
    values of a prompt add up to its logit. docs/tables.md explains every column.
    """
    from birthlens.analysis.behaviour.logit_split import logit_split_of_prompts
    from birthlens.cli.subjects import load
    from birthlens.tasks.prompts import prompt_batch

    loaded = load(subject, steps, 0)
    asked = prompt_batch(loaded.prompts(prompts))
    with loaded.progress() as advance:
        table = logit_split_of_prompts(loaded.models(advance), asked)
    deliver(table, out, style)
