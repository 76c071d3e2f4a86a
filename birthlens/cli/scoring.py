"""`birthlens scores`: what heads do, asked of a run, a model directory or a series of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from birthlens.cli.options import device_option, refuse_idle
from birthlens.cli.probing import steps_option
from birthlens.cli.subjects import load, sample_options
from birthlens.cli.tables import check_counts, deliver, format_option, out_option

if TYPE_CHECKING:
    import pandas as pd


SCORE_KINDS = ("heads", "weights", "attention", "composition", "transfer", "in-context-learning", "sinks")


@click.command(epilog="Example: birthlens scores runs/demo --kind transfer")
@click.argument("subject", metavar="RUN|MODEL_DIR|SERIES", type=click.Path())
@click.option("--kind", type=click.Choice(SCORE_KINDS), default="heads", show_default=True, help="Which scores.")
@steps_option("last")
@sample_options(64)
@device_option
@out_option
@format_option
def scores(
    subject: str, kind: str, steps: str, batch_size: int, seed: int, device: str, out: str | None, style: str
) -> None:
    """Score every head of a RUN or of a model directory, with the chance level of each score.

    heads: previous-token, duplicate-token and induction scores from patterns; weights: the same and copying from
    weights; attention: the paper's probes; composition: Q, K, V; transfer: repeated random sequences, trigger and other
    tokens apart; sinks: attention to the first token, and the norms that go with it. docs/tables.md explains every
    column.
    """
    import numpy as np

    from birthlens.analysis.behaviour.attention import attention_table
    from birthlens.analysis.behaviour.head_scores import in_context_learning_table, scores_table, transfer_table
    from birthlens.analysis.behaviour.head_weights import composition_table, weight_scores_table
    from birthlens.analysis.behaviour.sinks import sink_table

    if kind in ("weights", "composition"):
        refuse_idle(f"--kind {kind} reads weights and no sequences", "batch_size", "device")
    if kind == "weights":
        refuse_idle("--kind weights draws nothing", "seed")
    loaded = load(subject, steps, seed)
    generator = np.random.default_rng([seed, 7])
    batch = loaded.batch(batch_size, 0)
    loaded.use(device, batch)
    batch = batch.to(loaded.device)
    with loaded.progress() as advance:
        models = loaded.models(advance)
        calls: dict[str, Callable[[], pd.DataFrame]] = {
            "heads": lambda: scores_table(models, batch),
            "weights": lambda: weight_scores_table(models),
            "attention": lambda: attention_table(models, batch),
            "composition": lambda: composition_table(models, generator),
            "transfer": lambda: transfer_table(
                models, generator, batch_size, triggers=loaded.triggers, device=loaded.device
            ),
            "in-context-learning": lambda: in_context_learning_table(models, batch),
            "sinks": lambda: sink_table(models, batch),
        }
        table = calls[kind]()
    counted = {"heads": "score", "weights": "score", "attention": "probe", "transfer": "score"}.get(kind)
    deliver(table if counted is None else check_counts(table, counted), out, style)
