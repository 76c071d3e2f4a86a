"""How wide must a memory be? Recall and accuracy of the closed-form induction head, by d_model.

Recall depends on one matrix: the right entry must beat each wrong one. Accuracy depends on three matrices at once, and the
input of each is a sum. A layer reads the token plus the position plus what was written before, takes a softmax over hundreds
of keys, and passes its noise on. Raw outer products of Gaussian vectors therefore recall everything at much smaller widths
than those at which the model is right. Three choices of vectors:

    raw          plain Gaussian codebooks: interference falls as 1 / sqrt(d_model)
    dual         Gaussian codebooks, memories between their dual vectors: exact if everything that a layer reads is linearly
                 independent, d_model >= 2 d_vocab + n_ctx; worse than raw far below that, where no dual vectors exist
    orthogonal   codebooks drawn orthogonal as far as d_model allows
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from birthlens.analysis.interventions.weight_patching import Evaluate, by_forward
from birthlens.analysis.memories.ideal import Strengths, ideal_weights
from birthlens.analysis.memories.recall import readings
from birthlens.analysis.memories.recall_tables import paper_probes
from birthlens.config.model import ModelConfig
from birthlens.errors import BirthlensError
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.roles import summary

if TYPE_CHECKING:
    import pandas as pd

Vectors = Literal["raw", "dual", "orthogonal"]
VECTORS: tuple[Vectors, ...] = ("raw", "dual", "orthogonal")


def width_table(
    task: BigramTask,
    widths: Sequence[int],
    vectors: Sequence[Vectors] = VECTORS,
    seeds: Sequence[int] = (0,),
    sequences: int = 64,
    strengths: Strengths | None = None,
    evaluate: Evaluate = by_forward,
) -> pd.DataFrame:
    """Build the induction head for each width and seed, read its memories and run it on new sequences of the task.

    Columns: d_model, vectors, seed, metric, value, n. Metrics: the recall of each memory over its own queries
    ("output_memory_recall", ...), and loss and accuracy by role ("in_context_accuracy", ...).

    Raises:
        BirthlensError: for unknown vectors.
    """
    import pandas as pd

    unknown = [kind for kind in vectors if kind not in VECTORS]
    if unknown:
        raise BirthlensError(f"vectors = {unknown[0]!r} is unknown; valid are {', '.join(VECTORS)}.")
    d_vocab = len(task.statistics)
    n_ctx = task.config.context
    triggers = None if task.fixed_triggers is None else task.fixed_triggers.tolist()
    rows: list[tuple[object, ...]] = []
    for seed in seeds:
        batch = task.batch(sequences, seed, 0)
        for width in widths:
            for kind in vectors:
                config = ModelConfig(d_model=width, init="orthogonal" if kind == "orthogonal" else "authors")
                weights = ideal_weights(
                    config,
                    d_vocab,
                    n_ctx,
                    np.random.default_rng(seed),
                    triggers,
                    strengths,
                    "dual" if kind == "dual" else "raw",
                )
                for probe in paper_probes(weights, triggers):
                    # With fixed triggers, the trigger memory stores only these; the other memories store everything.
                    association = probe.associations[-1 if probe.name == "trigger_memory" else 0]
                    if association.name != "first 64":
                        recall = float(readings(probe.memory, association)["recall"])
                        rows.append((width, kind, seed, f"{probe.name}_recall", recall, len(association.queries)))
                found = summary(*evaluate(weights, batch), batch)
                rows += [(width, kind, seed, f"{role}_{what}", value, n) for (role, what), (value, n) in found.items()]
    return pd.DataFrame(rows, columns=["d_model", "vectors", "seed", "metric", "value", "n"])
