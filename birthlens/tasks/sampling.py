"""The chain's inner loop: many sequences from one table of uniforms, compiled if numba is available, otherwise in numpy.

Both paths draw by inverse CDF from the same uniforms and give the same tokens bit for bit. Uniforms are multiples of
2^-32, so that `row + u` is exact and one sorted array holds the CDFs of all rows.
"""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any

import numpy as np

from birthlens.shapes import Float, Int

Array = np.ndarray
_BUCKETS = 256
_OUT_OF_RANGE = "A token of start or overrides is not in the vocabulary, or a uniform is not in [0, 1)."


class Categorical:
    """Rows of distributions, prepared for drawing by inverse CDF.

    Raises:
        ValueError: if a row contains a number that is negative or not finite, or does not sum to a positive number.
    """

    def __init__(self, rows: Float[Array, "rows d_vocab"]) -> None:
        cdf = np.cumsum(rows, axis=-1)
        if not (cdf[:, -1] > 0).all() or not np.isfinite(cdf[:, -1]).all() or not (rows >= 0).all():
            raise ValueError("Every row must hold a positive probability, and no negative or infinite one.")
        cdf /= cdf[:, -1:]
        self.shape = rows.shape
        self.flat = (cdf + np.arange(len(rows))[:, None]).reshape(-1)

    def draw(self, row: Int[Array, "n"], uniform: Float[Array, "n"]) -> Int[Array, "n"]:
        """Draw one token for each given row."""
        return np.searchsorted(self.flat, row + uniform, side="right") - row * self.shape[1]

    @cached_property
    def guide(self) -> Int[Array, "rows buckets"]:
        """For each row and each of 256 equal parts of [0, 1), the first token that a uniform from there can give."""
        rows = np.arange(self.shape[0])[:, None]
        starts = rows + np.arange(_BUCKETS) / _BUCKETS
        found = np.searchsorted(self.flat, starts, side="right") - rows * self.shape[1]
        return found.clip(0, self.shape[1] - 1).astype(np.int32)  # compiled code does not check indices


def uniforms(shape: tuple[int, ...], generator: np.random.Generator) -> Float[Array, "..."]:
    """Draw uniforms on the multiples of 2^-32 in [0, 1)."""
    return generator.integers(0, 2**32, size=shape, dtype=np.uint32) * 2.0**-32


def chain(
    start: Int[Array, "batch prefix"],
    length: int,
    rows: Categorical,
    overrides: Int[Array, "batch d_vocab"],
    uniform: Float[Array, "batch length"],
    compiled: bool | None = None,
) -> tuple[Int[Array, "batch length"], Int[Array, "batch length"]]:
    """Continue each prefix to `length` tokens: z_{t+1} = overrides[z_t] if that is >= 0, else ~ rows[z_t].

    Returns the tokens and, for each position, how often its token has occurred so far if it has an override, else 0.
    The chain begins with the last token of the prefix: earlier ones are copied and not counted.
    Column t of `uniform` is used to draw token t. `compiled=None` uses numba if possible.

    Raises:
        ValueError: if shapes do not fit, or a token or a uniform is out of range.
    """
    n = rows.shape[1]
    if rows.shape[0] != n or overrides.shape != (len(start), n) or uniform.shape != (len(start), length):
        raise ValueError(f"overrides {overrides.shape} and uniform {uniform.shape} do not fit {rows.shape} rows.")
    if not 1 <= start.shape[1] <= length:
        raise ValueError(f"A prefix of {start.shape[1]} tokens does not fit a sequence of {length}.")
    kernel = _kernel() if compiled is not False else None
    if compiled and kernel is None:
        raise ValueError("The compiled sampler needs numba.")
    if kernel is not None:
        tokens = np.empty((len(start), length), dtype=np.int64)
        occurrence = np.empty_like(tokens)
        if not kernel(start, rows.flat, rows.guide, overrides, uniform, tokens, occurrence):
            raise ValueError(_OUT_OF_RANGE)
        return tokens, occurrence
    if not ((start >= 0) & (start < n)).all() or (overrides >= n).any() or not ((uniform >= 0) & (uniform < 1)).all():
        raise ValueError(_OUT_OF_RANGE)
    return _chain_in_numpy(start, length, rows, overrides, uniform)


def _chain_in_numpy(
    start: Array, length: int, rows: Categorical, overrides: Array, uniform: Array
) -> tuple[Array, Array]:
    batch, prefix = start.shape
    each = np.arange(batch)
    tokens = np.empty((batch, length), dtype=np.int64)
    tokens[:, :prefix] = start
    for t in range(prefix, length):
        last = tokens[:, t - 1]
        forced = overrides[each, last]
        tokens[:, t] = np.where(forced >= 0, forced, rows.draw(last, uniform[:, t]))
    seen = np.zeros_like(overrides)
    occurrence = np.zeros_like(tokens)
    for t in range(prefix - 1, length):
        now = tokens[:, t]
        is_trigger = overrides[each, now] >= 0
        seen[each, now] += is_trigger
        occurrence[:, t] = np.where(is_trigger, seen[each, now], 0)
    return tokens, occurrence


@cache
def _kernel() -> Any:
    """Compile the loop once (cached on disk by numba), or return None if it cannot be."""
    try:
        from birthlens.tasks import sampling_kernel
    except (ImportError, RuntimeError):  # RuntimeError: numba finds no directory for its cache
        return None
    return sampling_kernel.chain
