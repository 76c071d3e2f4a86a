"""A suite of ablations on prompts of the user: what is read of them, and which methods they allow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from birthlens.errors import BirthlensError

if TYPE_CHECKING:
    from torch import Tensor

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
