"""Probes over the checkpoints of a run: the same measurement at each checkpoint, in one tidy table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from birthlens.analysis.memories.memory import Basis
from birthlens.analysis.memories.recall_tables import circuit_series, memory_series
from birthlens.analysis.memories.series import SeriesTable
from birthlens.runs.evaluation import evaluation_batch
from birthlens.runs.run import Run

if TYPE_CHECKING:
    import pandas as pd

    from birthlens.model.weights import Weights
    from birthlens.tasks.batch import TokenBatch


def over_checkpoints(
    run: Run, probe: Callable[[Weights], pd.DataFrame], steps: Iterable[int] | None = None
) -> pd.DataFrame:
    """Stack `probe(weights)` over checkpoints, with a leading column step.

    Example:
        >>> from birthlens.analysis.behaviour.trajectory import over_checkpoints  # doctest: +SKIP
        >>> over_checkpoints(run, my_probe, run.select("every:5"))  # doctest: +SKIP
    """
    import pandas as pd

    tables = []
    for step, weights in run.checkpoints(steps):
        table = probe(weights)
        table.insert(0, "step", step)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def memories_over(
    run: Run, steps: Iterable[int] | None = None, bases: Sequence[Basis] = ("raw", "dual"), fold: bool = False
) -> SeriesTable:
    """Read the paper's memories (section 4) at each step; `.to_pandas()` gives the table, with the columns of `series`.

    Only the weights are read, without torch. A model other than the paper's two-layer simplified one is read head by head,
    in every basis (`recall_tables.circuit_series`); `fold` folds its layer norms into the weights first.

    Raises:
        BirthlensError: with `fold`, if the model has no layer norms.
    """
    model = run.config.model
    if fold or model.family != "simplified" or model.n_layers != 2:
        return circuit_series(run.checkpoints(steps), bases=bases, fold=fold)
    return memory_series(
        run.checkpoints(steps),
        triggers=run.triggers,
        bigram=run.statistics.bigram,
        outputs=run.config.task.possible_outputs(len(run.statistics), run.triggers),
        bases=bases,
    )


def behaviour_over(run: Run, steps: Iterable[int] | None = None, batch: TokenBatch | None = None) -> pd.DataFrame:
    """Measure loss and accuracy by role at each step: columns step, role, metric, value, chance, n.

    The batch defaults to new sequences of the run's own task, from the run's evaluation seed.
    """
    import torch

    from birthlens.model import forward
    from birthlens.tasks.roles import behaviour_table

    sample = batch if batch is not None else evaluation_batch(run)

    def probe(weights: Weights) -> pd.DataFrame:
        tensors = forward.tensors_of(weights)
        with torch.no_grad():
            logits = [forward.logits(tensors, weights.config, part.tokens) for part in sample.chunks(16)]
        return behaviour_table(torch.cat(logits), sample)

    table = over_checkpoints(run, probe, steps)
    n = len(run.statistics)
    table.insert(4, "chance", np.where(table["metric"] == "accuracy", 1 / n, np.log(n)))
    return table


def attention_over(run: Run, steps: Iterable[int] | None = None, batch: TokenBatch | None = None) -> pd.DataFrame:
    """Compute the paper's attention probes (section 5) for every head at each step, as in `attention.attention_table`."""
    from birthlens.analysis.behaviour.attention import attention_table

    return attention_table(run.checkpoints(steps), batch if batch is not None else evaluation_batch(run))
