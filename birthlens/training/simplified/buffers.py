"""The memory of the compiled kernels, allocated once: the tables that they read and the scratch of one worker.

Numba's disk cache does not notice edits of this file or of the tuples in `folding`. If you reorder fields there, edit
`kernels` too; otherwise the cached code would read them in the old order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from birthlens.shapes import Float32, Int64, UInt32
from birthlens.training.simplified.folding import Sums, Tables

Array = np.ndarray

ROWS = 32
KEYS = 64
"""Attention is stored in tiles of some queries (32 in layer 0, up to 60 in layer 1) by 64 keys.

Products of that size take the fast path of BLAS for small matrices, which packs nothing, provided that rows start on cache
lines and that no factor is read across its rows (hence the transposed keys). Only the queries that see a tile are in its
products, which is what causality saves. Loops over a row of a tile have a constant length, which LLVM vectorises best.
"""

_SMALL_PRODUCT = 10**6
"""Largest number of multiplications of a matrix product for which OpenBLAS packs nothing."""


class KernelTables(NamedTuple):
    """The tables of `folding.Tables`, and transposes of those that are multiplied from both sides."""

    codebook: Float32[Array, "entry d_model"]
    values: Float32[Array, "entry d_model"]
    scores: Float32[Array, "entry entry"]
    bilinear: Float32[Array, "d_model d_model"]
    bilinear_T: Float32[Array, "d_model d_model"]
    direct: Float32[Array, "d_model d_vocab"]
    direct_T: Float32[Array, "d_vocab d_model"]
    attended: Float32[Array, "d_model d_vocab"]
    attended_T: Float32[Array, "d_vocab d_model"]


class Scratch(NamedTuple):
    """Arrays that one worker reuses for every sequence; `pos` is a multiple of KEYS, `row` counts queries of layer 1."""

    tokens: UInt32[Array, " pos"]
    seen_from: Int64[Array, " key_tile"]  # the first of the current rows that sees any key of the tile
    value: Float32[Array, "pos d_model"]
    resid: Float32[Array, "pos d_model"]  # x1
    keys_T: Float32[Array, "key_tile d_model KEYS"]  # x1, later the values of layer 0
    d_resid: Float32[Array, "pos d_model"]
    pattern: Float32[Array, "query_tile key_tile ROWS KEYS"]  # attention of layer 0
    tiles: Float32[Array, "key_tile 2*row KEYS"]  # attention of layer 1; below it, the gradient of its scores
    folded: Float32[Array, "2*row d_model"]  # gradient of what is attended to; below it, the queries x1 B
    query: Float32[Array, "row d_model"]
    context: Float32[Array, "row d_model"]  # what is attended to
    d_query: Float32[Array, "row d_model"]
    product: Float32[Array, "2*row d_model"]
    logits: Float32[Array, "row d_vocab"]
    logits_product: Float32[Array, "row d_vocab"]
    square: Float32[Array, "d_model d_model"]
    readout: Float32[Array, "d_model d_vocab"]
    by_token: Float32[Array, " d_vocab"]


def new_tables(entries: int, d_model: int, d_vocab: int) -> KernelTables:
    """Allocate the tables; `fill` writes them."""
    tall = (entries, d_model)
    square = (d_model, d_model)
    wide = (d_model, d_vocab)
    shapes = (tall, tall, (entries, entries), square, square, wide, wide[::-1], wide, wide[::-1])
    return KernelTables(*map(_aligned, shapes))


def fill(model: KernelTables, tables: Tables) -> None:
    """Copy the tables of a step, and their transposes, to where the kernels read them."""
    bilinear = tables.bilinear
    direct = tables.direct
    attended = tables.attended
    sources = (*tables[:3], bilinear, bilinear.T, direct, direct.T, attended, attended.T)
    for target, source in zip(model, sources, strict=True):
        np.copyto(target, source)


def new_sums(entries: int, d_model: int, d_vocab: int) -> Sums:
    """Allocate the gradients of one part of a batch."""
    return Sums(*map(_aligned, ((entries, entries), (d_model, d_model), (d_model, d_vocab), (d_model, d_vocab))))


def new_scratch(n_pos: int, d_model: int, d_vocab: int) -> Scratch:
    """Allocate one worker's scratch."""
    tiles = n_pos // KEYS
    rows = min(60, max(ROWS, _SMALL_PRODUCT // (2 * KEYS * d_model)))
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("value", "resid", "d_resid"), (n_pos, d_model)),
        "keys_T": (tiles, d_model, KEYS),
        "pattern": (n_pos // ROWS, tiles, ROWS, KEYS),
        "tiles": (tiles, 2 * rows, KEYS),
        **dict.fromkeys(("folded", "product"), (2 * rows, d_model)),
        **dict.fromkeys(("query", "context", "d_query"), (rows, d_model)),
        **dict.fromkeys(("logits", "logits_product"), (rows, d_vocab)),
        "square": (d_model, d_model),
        "readout": (d_model, d_vocab),
        "by_token": (d_vocab,),
    }
    memory = {name: _aligned(shape) for name, shape in shapes.items()}
    return Scratch(tokens=np.zeros(n_pos, np.uint32), seen_from=np.zeros(tiles, np.int64), **memory)


def _aligned(shape: tuple[int, ...]) -> Array:
    """Allocate float32 zeros that start on a cache line, which makes small products 1.5 times as fast."""
    size = math.prod(shape)
    memory = np.zeros(size + 16, np.float32)
    start = -memory.ctypes.data % 64 // memory.itemsize
    return memory[start : start + size].reshape(shape)
