"""The compiled inner loop of the fused step: one sequence at a time, with all its data in the cache of one core.

The equations are those of `folding`. Everything that a compiled function calls is in this file, because Numba's disk cache
notices only edits of the file of the entry point. Matrix products are `np.dot(a, b, out)`, which Numba passes to BLAS by
symbol name; code with a function pointer could not be cached.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

from birthlens.training.simplified.buffers import KEYS as KEYS
from birthlens.training.simplified.buffers import ROWS as ROWS

if TYPE_CHECKING:
    from birthlens.training.simplified.buffers import KernelTables, Scratch
    from birthlens.training.simplified.folding import Batch, Needs, StepOutcome, Sums

Array = np.ndarray

# Reassociation allows sums to be vectorised. No flag may assume finite numbers: a diverged run must give a loss of NaN.
_EXACT: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz"}}
_SUMS: dict[str, Any] = {**_EXACT, "fastmath": {"contract", "nsz", "reassoc"}}

_SIGN = np.int32(31)
_MAGNITUDE = np.int32(2**31 - 1)
_LOG2_E = np.float32(1 / math.log(2))
_ZERO = np.float32(0)
_HALF = np.float32(0.5)
_ONE = np.float32(1)
_NEGLIGIBLE = np.float32(-40)
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(math.log(2) ** k / math.factorial(k)) for k in range(7))


@njit(cache=True, **_SUMS)
def run_sequences(
    order: Array, batch: Batch, model: KernelTables, needs: Needs, scratch: Scratch, outcome: StepOutcome, sums: Sums
) -> None:
    """Run the sequences listed in `order`: fill their part of `outcome` and add their gradients to `sums`."""
    for b in order:
        first = batch.starts[b]
        last = batch.starts[b + 1]
        if first == last:
            continue
        n_tiles = batch.positions[last - 1] // KEYS + 1
        attend_layer_0(batch.tokens[b], n_tiles, model, scratch)
        transpose(scratch.resid, scratch.keys_T, n_tiles)
        scratch.d_resid.fill(_ZERO)
        blocks = (last - first + len(scratch.query) - 1) // len(scratch.query)
        for block in range(blocks):
            start = first + (last - first) * block // blocks
            stop = first + (last - first) * (block + 1) // blocks
            read_layer_1(start, stop, batch, model, scratch, outcome)
            if needs.scores or needs.bilinear or needs.direct or needs.attended:
                differentiate_layer_1(start, stop, batch.positions, model, needs, scratch, sums)
        if needs.scores:
            transpose(scratch.value, scratch.keys_T, n_tiles)
            differentiate_layer_0(n_tiles, scratch, sums.scores)


@njit(**_SUMS)
def attend_layer_0(sequence: Array, n_tiles: int, model: KernelTables, scratch: Scratch) -> None:
    """Fill the attention pattern and the output x1 of layer 0, for the given number of key tiles."""
    d_model, d_vocab = model.direct.shape
    scores = model.scores
    values = model.values
    codebook = model.codebook
    by_token = scratch.by_token
    value = scratch.value
    resid = scratch.resid
    tokens = scratch.tokens
    n_pos = len(scratch.tokens)
    scratch.seen_from.fill(0)
    for t in range(n_tiles * KEYS):
        tokens[t] = sequence[t] if t < len(sequence) else 0
        z = n_pos + tokens[t]
        for i in range(d_model):
            value[t, i] = values[t, i] + values[z, i]
    for block in range(n_tiles * KEYS // ROWS):
        tiles = scratch.pattern[block]
        reach = block * ROWS // KEYS + 1
        for i in range(ROWS):
            t = block * ROWS + i
            z = n_pos + tokens[t]
            for j in range(d_vocab):
                by_token[j] = scores[t, n_pos + j] + scores[z, n_pos + j]
            for k in range(reach):
                for j in range(KEYS):
                    s = k * KEYS + j
                    tiles[k, i, j] = scores[t, s] + scores[z, s] + by_token[tokens[s]]
            softmax(tiles, i, t + 1)
        attend(tiles, 0, reach, value, resid[block * ROWS : (block + 1) * ROWS], scratch)
    for t in range(n_tiles * KEYS):
        z = n_pos + tokens[t]
        for i in range(d_model):
            resid[t, i] += codebook[t, i] + codebook[z, i]


@njit(**_SUMS)
def read_layer_1(
    start: int, stop: int, batch: Batch, model: KernelTables, scratch: Scratch, outcome: StepOutcome
) -> None:
    """Attend from the targets `start` to `stop`, write their outcome, and store the gradient of the logits in `logits`."""
    n = stop - start
    reach = batch.positions[stop - 1] // KEYS + 1
    i = 0
    query = scratch.query[:n]
    context = scratch.context[:n]
    folded = scratch.folded[n : 2 * n]
    logits = scratch.logits[:n]
    product = scratch.logits_product[:n]
    tiles = scratch.tiles
    weight = _ONE / np.float32(len(batch.targets))
    for row in range(n):
        t = batch.positions[start + row]
        for j in range(query.shape[1]):
            query[row, j] = scratch.resid[t, j]
    np.dot(query, model.bilinear, folded)
    for k in range(reach):
        while batch.positions[start + i] < k * KEYS:
            i += 1
        scratch.seen_from[k] = i
        np.dot(folded[i:], scratch.keys_T[k], tiles[k][i:n])
    for row in range(n):
        softmax(tiles, row, batch.positions[start + row] + 1)
    attend(tiles, 0, reach, scratch.resid, context, scratch)
    np.dot(query, model.direct, logits)
    np.dot(context, model.attended, product)
    add(product, logits)
    if len(outcome.logits):
        add(logits, outcome.logits[start:stop])
    for i in range(n):
        row = logits[i]
        target = batch.targets[start + i]
        best = argmax(logits[i])
        target_logit = row[target]
        top = row[best]
        total = _ZERO
        for j in range(len(row)):
            row[j] = exp2((row[j] - top) * _LOG2_E)
            total += row[j]
        outcome.predictions[start + i] = best
        outcome.losses[start + i] = np.log(total) + (top - target_logit)
        for j in range(len(row)):
            row[j] *= weight / total
        row[target] -= weight


@njit(**_SUMS)
def differentiate_layer_1(
    start: int, stop: int, positions: Array, model: KernelTables, needs: Needs, scratch: Scratch, sums: Sums
) -> None:
    """Add the gradients of the targets `start` to `stop`, and their part of the gradient of x1."""
    n = stop - start
    reach = positions[stop - 1] // KEYS + 1
    query = scratch.query[:n]
    context = scratch.context[:n]
    d_logits = scratch.logits[:n]
    tiles = scratch.tiles
    d_context = scratch.folded[:n]
    d_folded = scratch.d_query[:n]
    if needs.attended:
        np.dot(context.T, d_logits, scratch.readout)
        add(scratch.readout, sums.attended)
    if needs.direct:
        np.dot(query.T, d_logits, scratch.readout)
        add(scratch.readout, sums.direct)
    if not (needs.bilinear or needs.scores):
        return
    np.dot(d_logits, model.attended_T, d_context)
    for k in range(reach):
        i = scratch.seen_from[k]
        np.dot(d_context[i:], scratch.keys_T[k], tiles[k][n + i : 2 * n])
    for i in range(n):
        seen = positions[start + i] // KEYS + 1
        differentiate_softmax(tiles, i, tiles, n + i, seen)
        for k in range(seen, reach):
            for j in range(KEYS):
                tiles[k, n + i, j] = _ZERO
    attend(tiles, n, reach, scratch.resid, d_folded, scratch)
    if needs.bilinear:
        np.dot(query.T, d_folded, scratch.square)
        add(scratch.square, sums.bilinear)
    if not needs.scores:
        return
    # x1 gets the gradient of the context through the attention, and that of the queries through the scores.
    for k in range(reach):
        i = scratch.seen_from[k]
        np.dot(tiles[k][i : 2 * n].T, scratch.folded[i : 2 * n], scratch.product[:KEYS])
        add(scratch.product[:KEYS], scratch.d_resid[k * KEYS : (k + 1) * KEYS])
    np.dot(d_folded, model.bilinear_T, query)
    np.dot(d_logits, model.direct_T, context)
    for i in range(n):
        t = positions[start + i]
        for j in range(query.shape[1]):
            scratch.d_resid[t, j] += query[i, j] + context[i, j]


@njit(**_SUMS)
def differentiate_layer_0(n_tiles: int, scratch: Scratch, d_scores: Array) -> None:
    """Add the gradient of the scores of layer 0 to the gradient of their table."""
    tokens = scratch.tokens
    by_token = scratch.by_token
    tiles = scratch.tiles
    n_pos = len(tokens)
    d_vocab = len(by_token)
    for block in range(n_tiles * KEYS // ROWS):
        reach = block * ROWS // KEYS + 1
        for k in range(reach):
            np.dot(scratch.d_resid[block * ROWS : (block + 1) * ROWS], scratch.keys_T[k], tiles[k][:ROWS])
        for i in range(ROWS):
            t = block * ROWS + i
            z = n_pos + tokens[t]
            differentiate_softmax(scratch.pattern[block], i, tiles, i, reach)
            for j in range(d_vocab):
                by_token[j] = _ZERO
            for k in range(reach):
                for j in range(min(KEYS, t + 1 - k * KEYS)):
                    by_token[tokens[k * KEYS + j]] += tiles[k, i, j]
                for j in range(KEYS):
                    d_scores[t, k * KEYS + j] += tiles[k, i, j]
                for j in range(KEYS):
                    d_scores[z, k * KEYS + j] += tiles[k, i, j]
            for j in range(d_vocab):
                d_scores[t, n_pos + j] += by_token[j]
                d_scores[z, n_pos + j] += by_token[j]


@njit(**_SUMS)
def attend(tiles: Array, start: int, reach: int, source: Array, target: Array, scratch: Scratch) -> None:
    """Fill `target` with the rows of the tiles from `start` on, times the keys' vectors in `source`."""
    n = len(target)
    product = scratch.product
    np.dot(tiles[0][start : start + n], source[:KEYS], target)
    for k in range(1, reach):
        i = scratch.seen_from[k]
        np.dot(tiles[k][start + i : start + n], source[k * KEYS : (k + 1) * KEYS], product[i:n])
        add(product[i:n], target[i:])


@njit(**_EXACT)
def softmax(tiles: Array, i: int, length: int) -> None:
    """Replace row i of scores by attention to the first `length` keys, zero in the rest of the last tile that it sees."""
    whole = (length - 1) // KEYS
    for j in range(KEYS):
        if whole * KEYS + j >= length:
            tiles[whole, i, j] = -np.inf
    scale = _ONE / exponentials(tiles, i, whole + 1, largest(tiles, i, whole + 1))
    for k in range(whole + 1):
        for j in range(KEYS):
            tiles[k, i, j] *= scale


@njit(**_SUMS)
def differentiate_softmax(pattern: Array, i: int, gradient: Array, g: int, reach: int) -> None:
    """Replace row g, the gradient of attention row i, by the gradient of its scores."""
    mean = _ZERO
    for k in range(reach):
        for j in range(KEYS):
            mean += pattern[k, i, j] * gradient[k, g, j]
    for k in range(reach):
        for j in range(KEYS):
            gradient[k, g, j] = pattern[k, i, j] * (gradient[k, g, j] - mean)


@njit(**_SUMS)
def exponentials(tiles: Array, i: int, reach: int, top: float) -> Any:
    """Replace the scores of row i by exp(score - top); return their sum."""
    total = _ZERO
    for k in range(reach):
        for j in range(KEYS):
            tiles[k, i, j] = exp2((tiles[k, i, j] - top) * _LOG2_E)
            total += tiles[k, i, j]
    return total


@njit(**_EXACT)
def exp2(y: Any) -> Any:
    """Compute 2^y for y <= 0 so that LLVM vectorises it: 2^n from the bits of an exponent, times a series for the rest.

    Results far below the float32 resolution of a sum that contains 1 become zero, since denormal numbers would make the
    products a hundred times slower. With the comparison in this order a NaN stays a NaN.
    """
    n = np.floor(y + _HALF)
    r = y - n
    series = _C0 + r * (_C1 + r * (_C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * _C6)))))
    bits = (np.int32(n) + np.int32(127)) << np.int32(23)
    return _ZERO if y < _NEGLIGIBLE else series * np.int32(bits).view(np.float32)


@njit(**_EXACT)
def largest(tiles: Array, i: int, reach: int) -> Any:
    """Return the largest score of row i by comparing bits as integers, since LLVM vectorises no maximum of floats."""
    bits = tiles.view(np.int32)
    top = np.int32(-(2**31))
    for k in range(reach):
        for j in range(KEYS):
            ordered = np.int32(bits[k, i, j] ^ np.int32(np.int32(bits[k, i, j] >> _SIGN) & _MAGNITUDE))
            top = ordered if ordered > top else top
    return np.int32(top ^ (np.int32(top >> _SIGN) & _MAGNITUDE)).view(np.float32)


@njit(**_EXACT)
def argmax(row: Array) -> int:
    """Return the first index of the largest entry."""
    best = 0
    for i in range(len(row)):
        best = i if row[i] > row[best] else best
    return best


@njit(**_SUMS)
def transpose(source: Array, target: Array, n_tiles: int) -> None:
    """Copy rows of keys to tiles of columns."""
    for k in range(n_tiles):
        for i in range(source.shape[1]):
            for j in range(KEYS):
                target[k, i, j] = source[k * KEYS + j, i]


@njit(**_SUMS)
def add(source: Array, target: Array) -> None:
    """Add one matrix to another."""
    for i in range(len(source)):
        for j in range(source.shape[1]):
            target[i, j] += source[i, j]
