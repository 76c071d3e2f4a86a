"""Distributions of Markov chains, from which the task of in-context chains draws a chain for each sequence.

    dirichlet           every row ~ Dirichlet(c, ..., c)
    doubly_stochastic   uniform over the matrices whose rows and columns sum to 1, by rejection
    sinkhorn            Dirichlet rows, scaled until rows and columns sum to 1; their distribution is not uniform

The stationary distribution of a doubly stochastic chain is uniform: how often a token has occurred says nothing about the
next one.
"""

from __future__ import annotations

import numpy as np

from birthlens.config.task import MarkovConfig
from birthlens.shapes import Float

Array = np.ndarray
SMALLEST = 1e-9
"""The smallest probability of rows that are balanced; with smaller ones the factors would leave double precision."""
ROUNDS = 100
"""The most rounds of Newton's method; ten are usual."""
BALANCED = 1e-12
"""How far from 1 the sum of a column may be at the end of the scaling."""
LONGEST_STEP = 2.0
"""The most by which a round changes the logarithm of a factor: far from the end, Newton's steps are too long."""


def drawn_chains(config: MarkovConfig, n: int, generator: np.random.Generator) -> Float[Array, "chain history d_vocab"]:
    """Draw n chains, each a row of probabilities for every history.

    Example:
        >>> chains = drawn_chains(MarkovConfig(states=3, rows="doubly_stochastic"), 2, np.random.default_rng(0))
        >>> chains.sum(1).round(6).tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    if config.rows == "doubly_stochastic":
        return uniform_doubly_stochastic(n, config.states, generator)
    rows = dirichlet_rows((n, config.states**config.order, config.states), config.concentration, generator)
    return balanced(np.maximum(rows, SMALLEST)) if config.rows == "sinkhorn" else rows


def dirichlet_rows(
    shape: tuple[int, int, int], concentration: float, generator: np.random.Generator
) -> Float[Array, "chain history d_vocab"]:
    """Draw rows from the symmetric Dirichlet distribution."""
    weights = generator.standard_gamma(concentration, shape)
    weights = np.maximum(weights, np.finfo(float).tiny)  # a tiny concentration can underflow a whole row to zero
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def uniform_doubly_stochastic(n: int, states: int, generator: np.random.Generator) -> Float[Array, "chain state state"]:
    """Draw uniformly from the matrices whose rows and columns sum to 1.

    All rows but the last are uniform. They are accepted if no column sums to more than 1, and the last row is the rest.
    The share that is accepted is 1, 1/2, 0.21 and 0.07 for 2, 3, 4 and 5 states.
    """
    found = np.empty((0, states, states))
    while len(found) < n:
        first = dirichlet_rows((4 * n, states - 1, states), 1.0, generator)
        rest = 1 - first.sum(1, keepdims=True)
        accepted = np.concatenate([first, rest], axis=1)[(rest >= 0).all((1, 2))]
        found = np.concatenate([found, accepted])
    return found[:n]


def balanced(rows: Float[Array, "chain state state"]) -> Float[Array, "chain state state"]:
    """Multiply rows and columns by factors until all sum to 1: the limit of Sinkhorn's rounds, by Newton's method.

    With column factors exp(b) and rows normalised, the sums of the columns minus 1 are the gradient of a convex function of
    b, whose Hessian is diag(sums) - P^T P.
    """
    states = rows.shape[-1]
    logs = np.zeros((len(rows), states))
    for _ in range(ROUNDS):
        scaled = rows * np.exp(logs)[:, None]
        scaled /= scaled.sum(-1, keepdims=True)
        sums = scaled.sum(-2)
        if np.abs(sums - 1).max() < BALANCED:
            break
        # Adding a constant to b changes nothing; the constant matrix removes this direction.
        hessian = sums[:, None] * np.eye(states) - scaled.swapaxes(-1, -2) @ scaled + 1 / states
        step = np.linalg.solve(hessian, (sums - 1)[..., None])[..., 0]
        logs -= step * np.minimum(1, LONGEST_STEP / np.maximum(np.abs(step).max(-1, keepdims=True), 1e-300))
    return scaled


def stationary_laws(rows: Float[Array, "chain state state"]) -> Float[Array, "chain state"]:
    """Return the stationary distribution of each chain, from pi (P - 1) = 0 and sum pi = 1."""
    n = rows.shape[-1]
    system = np.swapaxes(rows, -1, -2) - np.eye(n)
    system[:, -1] = 1.0
    right = np.zeros((len(rows), n, 1))
    right[:, -1] = 1.0
    laws = np.maximum(np.linalg.solve(system, right)[..., 0], 0.0)
    return np.asarray(laws / laws.sum(-1, keepdims=True))
