"""Causal effects over checkpoints: what a run loses, at each step, if a head or an edge is replaced by its mean.

Heads and edges are replaced by their average over the sequences and positions of a second batch (`mean`). They still write
what they write on average, but nothing that depends on the current position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from birthlens.analysis.interventions.ablation import ablation_table
from birthlens.analysis.interventions.corruptions import other_outputs
from birthlens.analysis.interventions.metrics import IN_CONTEXT_METRICS
from birthlens.analysis.interventions.patching import patching_table
from birthlens.analysis.interventions.runner import evaluate
from birthlens.analysis.interventions.scoring import BASELINE, Scoring
from birthlens.analysis.interventions.spec import EdgeIntervention
from birthlens.model.components import edges_of
from birthlens.model.sites import Head, HeadInput
from birthlens.runs.evaluation import evaluation_batch
from birthlens.runs.run import Run
from birthlens.tasks.batch import TokenBatch

if TYPE_CHECKING:
    import pandas as pd


def head_ablations_table(run: Run, steps: Sequence[int], n: int = 32, method: str = "mean") -> pd.DataFrame:
    """Ablate each head alone at each step; columns as in `ablation.ablation_table`, with the head's name in `ablated`."""
    measured, reference = _batches(run, n)
    return ablation_table(run.checkpoints(steps), measured, reference, methods=(method,), metrics=IN_CONTEXT_METRICS)


def edge_ablations_table(run: Run, steps: Sequence[int], n: int = 32, method: str = "mean") -> pd.DataFrame:
    """Ablate each edge into a head's queries, keys or values alone: columns step, ablated (the edge), role, metric, value,
    change, low, high, change_low, change_high, n.

    In models with many heads, only the edges between heads are ablated.
    """
    import pandas as pd

    sizes = run.config.model
    edges = [edge for edge in edges_of(sizes) if isinstance(edge.receiver, HeadInput)]
    if sizes.n_heads > 1:
        edges = [edge for edge in edges if isinstance(edge.sender, Head)]
    cases = {str(edge): (EdgeIntervention(edge, method),) for edge in edges}
    measured, reference = _batches(run, n)
    scoring = Scoring.of(measured, IN_CONTEXT_METRICS)
    tables = []
    for step, weights in run.checkpoints(steps):
        table = evaluate(weights, cases, measured, scoring, reference).table(np.random.default_rng(0))
        table.insert(0, "step", step)
        tables.append(table.rename(columns={"case": "ablated"}))
    return pd.concat(tables, ignore_index=True)


def patching_by_role_table(run: Run, step: int, n: int = 32) -> pd.DataFrame:
    """Patch each activation of the clean run into the corrupted one, by role of the position (`patching.patching_table`).

    The corrupted sequences have other outputs after the same triggers. `component` names the site, layer and head.
    """
    import pandas as pd

    pair = other_outputs(evaluation_batch(run, n), np.random.default_rng(0), len(run.statistics))
    table = patching_table([(step, run.weights(step))], pair, by=("head", "role"), draws=0)
    places = [
        str(head or "" if pd.isna(layer) else head if isinstance(head, str) and head else f"L{int(layer)}")
        for layer, head in zip(table["layer"], table["head"], strict=True)
    ]
    table.insert(0, "component", [f"{site} {place}".strip() for site, place in zip(table["site"], places, strict=True)])
    return table


def changes_table(table: pd.DataFrame, metric: str = "accuracy", role: str = "in_context") -> pd.DataFrame:
    """Select the rows of one metric and role, without those of the unedited model."""
    return table[(table["metric"] == metric) & (table["role"] == role) & (table["ablated"] != BASELINE)]


def _batches(run: Run, n: int) -> tuple[TokenBatch, TokenBatch]:
    """Return a batch to measure on, and another one to compute averages on."""
    batch = evaluation_batch(run, 2 * n)
    return batch[:n], batch[n:]
