"""Predictors that need only a task's global chain: what can be known without the context."""

from __future__ import annotations

import numpy as np

from birthlens.shapes import Float
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.task import Task

Array = np.ndarray


def uniform(task: Task, batch: TokenBatch) -> Float[Array, "batch pos d_vocab"]:
    """Return probability 1/N for every token."""
    n = len(task.statistics)
    return np.full((*batch.tokens.shape, n), 1 / n)


def unigram(task: Task, batch: TokenBatch) -> Float[Array, "batch pos d_vocab"]:
    """Return the corpus's token frequencies, whatever the prefix."""
    return np.broadcast_to(task.statistics.unigram, (*batch.tokens.shape, len(task.statistics))).copy()


def global_bigram(task: Task, batch: TokenBatch) -> Float[Array, "batch pos d_vocab"]:
    """Return pi_b(. | z_t), as if no token were a trigger."""
    return np.asarray(task.statistics.bigram[batch.tokens.numpy()])
