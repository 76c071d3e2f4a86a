"""The content of a prefix: successors of its last token, its multiset of tokens, and the triggers if they are known."""

from __future__ import annotations

import numpy as np

from birthlens.shapes import Bool, Float, Int
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.bigram import BigramTask

Array = np.ndarray
_ENTRIES = 4_000_000  # of all tables of pairs that are in memory at once


def successor_counts(
    tokens: Int[Array, "batch pos"], d_vocab: int, first: int = 0
) -> Float[Array, "batch pos d_vocab"]:
    """Count, at each position t, the tokens z_{s+1} over first <= s < t with z_s = z_t.

    Example:
        >>> successor_counts(np.array([[0, 1, 0, 0, 1]]), 2)[0].tolist()
        [[0.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]]
    """
    n_rows, length = tokens.shape
    out = np.empty((n_rows, length, d_vocab))
    size = max(1, _ENTRIES // d_vocab**2)
    for start in range(0, n_rows, size):
        part = tokens[start : start + size]
        each = np.arange(len(part))
        pairs = np.zeros((len(part), d_vocab, d_vocab))
        for t in range(length):
            if t > first:
                pairs[each, part[:, t - 1], part[:, t]] += 1
            out[start : start + size, t] = pairs[each, part[:, t]]
    return out


def token_counts(tokens: Int[Array, "batch pos"], d_vocab: int) -> Float[Array, "batch pos d_vocab"]:
    """Count each token in every prefix z_1..z_t."""
    return np.cumsum(tokens[..., None] == np.arange(d_vocab), axis=1, dtype=np.float64)


def shown_prefix(task: BigramTask) -> int:
    """Return how many of the first tokens are not part of the chain: the list of triggers of show_latents."""
    return task.config.n_triggers if task.config.show_latents else 0


def known_triggers(task: BigramTask, batch: TokenBatch) -> Int[Array, "batch n_triggers"] | None:
    """Return the triggers if the prefix reveals them (they are fixed, or listed, or there are none), else None."""
    known = task.fixed_triggers is not None or task.config.show_latents or task.config.n_triggers == 0
    return batch.triggers.numpy() if known else None


def trigger_outputs(
    task: BigramTask, triggers: Int[Array, "batch n_triggers"], tokens: Int[Array, "batch pos"]
) -> tuple[Float[Array, "batch pos d_vocab"], Bool[Array, "batch pos"]]:
    """Return the output distribution of each position's token (zeros if not a trigger), and whether it is a trigger."""
    table = np.zeros((len(tokens), len(task.statistics), len(task.statistics)))
    np.put_along_axis(table, triggers[..., None], task.output_distribution(triggers), axis=1)
    is_trigger = (tokens[..., None] == triggers[:, None]).any(-1)
    return table[np.arange(len(tokens))[:, None], tokens], is_trigger
