"""Every score of the paper's three memories at one checkpoint, as a tidy table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from birthlens.analysis.memories.circuits import EARLY, output_memory, prev_token_memory, trigger_memory
from birthlens.analysis.memories.memory import Array, AssociativeMemory
from birthlens.model.weights import Weights
from birthlens.shapes import Int

if TYPE_CHECKING:
    import pandas as pd


def memory_scores_table(
    weights: Weights,
    labels: Sequence[str] | None = None,
    triggers: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
) -> pd.DataFrame:
    """List the scores of the output, trigger and previous-token memories, row by row of each memory's table.

    `tokens` restricts both sides to some tokens (default: all), and several fixed `triggers` restrict those of the trigger
    memory. The previous-token memory has the first 64 positions, and is left out for models without W_pos.

    Columns: memory, row, column (places in the memory's table), input, output (their labels), score, centred (score minus
    the median of the memory's table), right (whether the output is the input's right entry; the first position has none).

    Example:
        >>> from birthlens.config.model import ModelConfig
        >>> from birthlens.model.initialisation import initial_weights
        >>> weights = initial_weights(ModelConfig(d_model=8), 3, 4, np.random.default_rng(0))
        >>> table = memory_scores_table(weights, ["a", "b", "c"])
        >>> table.groupby("memory", sort=False).size().to_dict()
        {'output_memory': 9, 'trigger_memory': 9, 'prev_token_memory': 16}
    """
    import pandas as pd

    shown = np.arange(len(weights["W_E"])) if tokens is None else np.asarray(tokens)
    asked = shown
    if triggers is not None and len(triggers) > 1:
        asked = np.asarray([trigger for trigger in triggers if trigger in shown])
    tables = [
        _scores("output_memory", output_memory(weights, labels=labels), shown),
        _scores("trigger_memory", trigger_memory(weights, labels=labels), asked),
    ]
    if "W_pos" in weights:
        memory = prev_token_memory(weights, first=EARLY)
        tables.append(_scores("prev_token_memory", memory, np.arange(len(memory.inputs)), shift=1))
    return pd.concat(tables, ignore_index=True)


def _scores(name: str, memory: AssociativeMemory, entries: Int[Array, "entry"], shift: int = 0) -> pd.DataFrame:
    """List the scores between some entries; the right entry of row i is in column i - `shift`."""
    import pandas as pd

    count = len(entries)
    scores = np.concatenate([block.copy() for _, _, block in memory.blocks(entries, entries)])
    return pd.DataFrame(
        {
            "memory": name,
            "row": np.repeat(np.arange(count), count),
            "column": np.tile(np.arange(count), count),
            "input": np.repeat([memory.inputs.labels[entry] for entry in entries], count),
            "output": np.tile([memory.outputs.labels[entry] for entry in entries], count),
            "score": scores.ravel(),
            "centred": (scores - np.median(scores)).ravel(),
            "right": np.eye(count, k=-shift, dtype=bool).ravel(),
        }
    )
