"""How much memory an ensemble needs, and therefore how many runs fit.

    bytes = 4 ((2 + buffers) weights + gradients)  for each run, and 4 x the numbers that the backward pass keeps
            for each sequence of a piece

Both are estimates from the shapes; a quarter of the free memory is reserved for everything else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from birthlens.config.model import parameter_shapes
from birthlens.config.run import RunConfig

_FLOAT = 4
_SHARE = 0.75
_COPIES = 6
"""Weights, gradients, at most two buffers of the optimiser, and two copies while they are updated."""


def trained_tokens(configs: Iterable[RunConfig]) -> int:
    """Return the number of tokens that runs are trained on, in all."""
    return sum(each.training.steps * each.training.batch_size * each.task.context for each in configs)


def bytes_of_a_run(config: RunConfig, d_vocab: int) -> int:
    """Return the bytes that the weights of one member take, with gradients and optimiser."""
    shapes = parameter_shapes(config.model, d_vocab, config.task.context)
    return _FLOAT * _COPIES * sum(math.prod(shape) for shape in shapes.values())


def bytes_of_a_sequence(config: RunConfig, d_vocab: int) -> int:
    """Return the bytes that a forward and backward pass keeps for one sequence."""
    model = config.model
    hidden = model.hidden if model.feed_forward in ("relu", "gelu") else 0
    each_layer = 10 * model.d_model + 2 * hidden + model.n_heads
    return _FLOAT * config.task.context * (model.n_layers * each_layer + 4 * d_vocab + 2 * model.d_model)


def how_many_fit(config: RunConfig, d_vocab: int, free: int) -> int:
    """Return how many runs like this one fit, with one sequence of each at a time.

    Example:
        >>> how_many_fit(RunConfig.parse({"model": {"d_model": 64}, "task": {"context": 64}}), 65, 1 << 30)
        532
    """
    each = bytes_of_a_run(config, d_vocab) + bytes_of_a_sequence(config, d_vocab)
    return int(_SHARE * free / each)


def sequences_that_fit(config: RunConfig, d_vocab: int, n_runs: int, free: int) -> int:
    """Return how many sequences a piece may have besides the weights of `n_runs` runs; at least 1."""
    left = _SHARE * free - n_runs * bytes_of_a_run(config, d_vocab)
    return max(1, int(left / bytes_of_a_sequence(config, d_vocab)))
