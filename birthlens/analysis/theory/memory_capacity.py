"""How many associations one linear memory can store if its matrix is learned, not summed.

There are N inputs e_x and N outputs u_x, uniform on the unit sphere, with one output for each input. W minimises the
cross-entropy of the logits 10 e_x W u_y^T over all inputs (Adam). The capacity is the largest N with accuracy 0.99. Nichani,
Lee and Bietti 2024 (arXiv 2412.06538) find that a memory of d^2 parameters stores N log N ~ d^2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import softmax

from birthlens.analysis.theory.outer_products import ZipfMemory
from birthlens.shapes import Float

Array = np.ndarray
_TEMPERATURE = 10.0


def learned_accuracy(memory: ZipfMemory, rate: float = 0.05, steps: int = 400, enough: float = 1.0) -> float:
    """Return the share of tokens that a memory recalls after full-batch Adam, which stops once `enough` are recalled."""
    inputs, outputs = memory.codebooks
    each = np.arange(memory.tokens)
    matrix = np.zeros((memory.d_model, memory.d_model))
    mean = np.zeros_like(matrix)
    square = np.zeros_like(matrix)
    best = 0.0
    for step in range(1, steps + 1):
        scores = _TEMPERATURE * memory.scores(matrix)
        best = max(best, float((scores.argmax(1) == memory.right).mean())) if step > 1 else best
        if best >= enough:
            break
        wrong = softmax(scores, axis=1)
        wrong[each, memory.right] -= 1
        gradient: Float[Array, "d_model d_model"] = _TEMPERATURE * inputs.T @ wrong @ outputs / memory.tokens
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        size = np.sqrt(square / (1 - 0.999**step)) + 1e-8
        matrix = matrix - rate * (mean / (1 - 0.9**step)) / size
    return best


def capacity_of(d_model: int, seed: int = 0, accuracy: float = 0.99) -> int:
    """Return the largest number of associations that is recalled with this accuracy, by bisection."""
    low = 2
    high = 4 * d_model
    while learned_accuracy(ZipfMemory(high, d_model, seed=seed), enough=accuracy) >= accuracy:
        low = high
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        if learned_accuracy(ZipfMemory(middle, d_model, seed=seed), enough=accuracy) >= accuracy:
            low = middle
        else:
            high = middle
    return low


def learned_capacity_table(widths: Sequence[int], seeds: Sequence[int] = (0,)) -> pd.DataFrame:
    """Measure the capacity at each width; columns: d_model, seed, capacity, ratio (N log N / d^2)."""
    rows = []
    for seed in seeds:
        for width in widths:
            n = capacity_of(width, seed)
            rows.append((width, seed, n, n * np.log(n) / width**2))
    return pd.DataFrame(rows, columns=["d_model", "seed", "capacity", "ratio"])
