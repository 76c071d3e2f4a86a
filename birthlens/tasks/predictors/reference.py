"""Reference predictors: the exact distribution of the task seen through more and more of the prefix (paper section 4.1).

    uniform   1/N                                  unigram  pi_u                    bigram  pi_b(. | z_t)
    copy      successors of the earlier occurrences of z_t in the prefix, in proportion; uniform at the first occurrence
    bag       z_t and the multiset of the prefix, in any order: nearly the best of these (`bag_of_tokens`, approximate)
    bayes     P(z_{t+1} | z_1..z_t), nothing left to learn: its loss is the floor of every loss curve

Bayes, triggers known (fixed, or listed by show_latents): pi_b(. | z_t) if z_t is not a trigger; the output seen before for
a trigger that has occurred before; otherwise the distribution of its output. In the list of triggers (show_latents), which
is not part of the chain, the next of them, then pi_u. Triggers unknown: P(z_t is a trigger | prefix), from
`trigger_posterior`, mixes copying (or the output distribution) with pi_b; exact except with cycles="clean", where that
module states the approximation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from birthlens.errors import BirthlensError
from birthlens.shapes import Float, Int
from birthlens.tasks.baselines import global_bigram, uniform, unigram
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.predictors.bag_of_tokens import bag_of_tokens
from birthlens.tasks.predictors.prefix import known_triggers, shown_prefix, successor_counts, trigger_outputs
from birthlens.tasks.predictors.trigger_posterior import TriggerPosterior
from birthlens.tasks.task import Task

Array = np.ndarray


def predict(name: str, task: Task, batch: TokenBatch) -> Float[Array, "batch pos d_vocab"]:
    """Return the probabilities that a reference predictor gives to the next token at every position.

    Raises:
        BirthlensError: for a name that is not one of the task's predictors, and for a predictor that returns no
            probabilities.

    Example:
        >>> from birthlens.config.run import TaskConfig
        >>> from birthlens.tasks.corpus import from_text
        >>> task = BigramTask(TaskConfig(context=16, n_triggers=2), from_text("to be or not to be"))
        >>> batch = task.batch(3, seed=0)
        >>> predict("bayes", task, batch).shape, bool(np.allclose(predict("bag", task, batch).sum(-1), 1))
        ((3, 16, 7), True)
    """
    if name not in task.predictors:
        valid = ", ".join(task.predictors) or "none for this task"
        raise BirthlensError(f"predictor = {name!r} is unknown; valid predictors are {valid}.")
    found: Any = task.predictors[name](task, batch)
    shape = (*batch.tokens.shape, len(task.statistics))
    where = f"{type(task).__name__}.predictors[{name!r}]"
    if not isinstance(found, np.ndarray) or found.shape != shape:
        kind = getattr(found, "shape", type(found).__name__)
        raise BirthlensError(f"{where} returned {kind}; it must return an array of shape {shape}.")
    if not (found >= -1e-9).all() or not np.allclose(found.sum(-1), 1, atol=1e-5):
        raise BirthlensError(f"{where} returned numbers that are no probabilities: they must be >= 0 and sum to 1.")
    return found


def in_context_copy(task: BigramTask, batch: TokenBatch) -> Float[Array, "batch pos d_vocab"]:
    """Return what followed the current token earlier in the prefix, in proportion; uniform if nothing did."""
    counts = successor_counts(batch.tokens.numpy(), len(task.statistics))
    totals = counts.sum(-1, keepdims=True)
    return np.where(totals > 0, counts / np.maximum(totals, 1), 1 / len(task.statistics))


def bayes_optimal(task: BigramTask, batch: TokenBatch) -> Float[Array, "batch pos d_vocab"]:
    """Return the distribution of the next token given the whole prefix and the rules of the task."""
    tokens = batch.tokens.numpy()
    n = len(task.statistics)
    triggers = known_triggers(task, batch)
    if triggers is None:
        posterior = TriggerPosterior(task)
        is_trigger: Array = posterior.current_is_trigger(batch)
        laws = posterior.output_law[tokens]
    else:
        laws, is_trigger = trigger_outputs(task, triggers, tokens)
    counts = successor_counts(tokens, n, first=shown_prefix(task))
    seen = counts.sum(-1, keepdims=True)
    copied = np.where(seen > 0, counts / np.maximum(seen, 1), laws)
    share = is_trigger[..., None]
    out = share * copied + (1 - share) * task.statistics.bigram[tokens]
    return with_shown_triggers(task, batch, out)


def with_shown_triggers(
    task: BigramTask, batch: TokenBatch, probabilities: Float[Array, "batch pos d_vocab"]
) -> Float[Array, "batch pos d_vocab"]:
    """Overwrite where show_latents lists the triggers: the next one is known, or drawn as they are; then comes pi_u."""
    tokens = batch.tokens.numpy()
    unigram_law = task.statistics.unigram
    shown = shown_prefix(task)
    for t in range(shown):
        if t == shown - 1:
            probabilities[:, t] = unigram_law
            continue
        if task.fixed_triggers is not None:
            probabilities[:, t] = np.eye(len(unigram_law))[task.fixed_triggers[t + 1]]
            continue
        left = np.broadcast_to(unigram_law, probabilities[:, t].shape).copy()
        np.put_along_axis(left, tokens[:, : t + 1], 0.0, axis=1)
        probabilities[:, t] = left / left.sum(-1, keepdims=True)
    return probabilities


def _bag(task: BigramTask, batch: TokenBatch) -> Float[Array, "batch pos d_vocab"]:
    return with_shown_triggers(task, batch, bag_of_tokens(task, batch))


PREDICTORS: dict[str, Callable[[BigramTask, TokenBatch], Float[Array, "batch pos d_vocab"]]] = {
    "uniform": uniform,
    "unigram": unigram,
    "bigram": global_bigram,
    "bag": _bag,
    "copy": in_context_copy,
    "bayes": bayes_optimal,
}
"""The predictors by name, from the least to the best informed."""


def smoothed(probabilities: Float[Array, "*axes d_vocab"], share: float) -> Float[Array, "*axes d_vocab"]:
    """Mix in `share` of the uniform distribution, because predictors other than Bayes exclude tokens that do occur.

    Example:
        >>> smoothed(np.array([1.0, 0.0]), 0.5).tolist()
        [0.75, 0.25]
    """
    if not 0 <= share <= 1:
        raise BirthlensError(f"smoothing = {share}: it is the share of the uniform law, from 0 to 1.")
    return (1 - share) * probabilities + share / probabilities.shape[-1]


def cross_entropy(
    probabilities: Float[Array, "batch pos d_vocab"], targets: Int[Array, "batch pos"]
) -> Float[Array, "batch pos"]:
    """Return -log p(target), in nats."""
    with np.errstate(divide="ignore"):
        return -np.log(np.take_along_axis(probabilities, targets[..., None], axis=-1)[..., 0])


def entropies(probabilities: Float[Array, "*axes d_vocab"]) -> Float[Array, "*axes"]:
    """Return the entropy of each distribution, in nats."""
    return -(probabilities * np.log(np.where(probabilities > 0, probabilities, 1.0))).sum(-1)
