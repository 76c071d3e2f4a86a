"""Sequences for evaluating a run: new ones of its own task, the same for all callers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from birthlens.runs.run import Run

if TYPE_CHECKING:
    from birthlens.tasks.batch import TokenBatch


def evaluation_batch(run: Run, n: int = 128) -> TokenBatch:
    """Draw sequences that training never saw: batch 1 of the evaluation seed's own stream."""
    return run.task.batch(n, run.config.seeds.evaluation, 2**40 + 1)
