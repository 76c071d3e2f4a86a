"""The memory that the compiled kernels work in, allocated once: the tables they read and one worker's scratch.

Numba's disk cache does not notice edits of this file or of the tuples in `folding`: who reorders fields there must also
touch `fused_kernels`, or the old code would read the new order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt32

from birthlens.training.folding import Sums, Tables
from birthlens.training.fused_kernels import KEYS, ROWS

Array = np.ndarray


class Model(NamedTuple):
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
    """What one worker reuses for every sequence; `pos` is a multiple of KEYS, and a row is ROWS queries' worth."""

    tokens: UInt32[Array, " pos"]
    value: Float32[Array, "pos d_model"]
    value_T: Float32[Array, "key_tile d_model KEYS"]
    resid: Float32[Array, "pos d_model"]  # x1
    resid_T: Float32[Array, "key_tile d_model KEYS"]
    d_resid: Float32[Array, "pos d_model"]
    pattern: Float32[Array, "query_tile key_tile ROWS KEYS"]  # attention of layer 0
    tiles: Float32[Array, "key_tile 2*ROWS KEYS"]  # attention of layer 1; below it, the gradient of its scores
    folded: Float32[Array, "2*ROWS d_model"]  # gradient of what is attended to; below it, the queries x1 B
    query: Float32[Array, "ROWS d_model"]
    context: Float32[Array, "ROWS d_model"]  # what is attended to
    d_query: Float32[Array, "ROWS d_model"]
    product: Float32[Array, "2*ROWS d_model"]
    logits: Float32[Array, "ROWS d_vocab"]
    logits_product: Float32[Array, "ROWS d_vocab"]
    square: Float32[Array, "d_model d_model"]
    readout: Float32[Array, "d_model d_vocab"]
    by_token: Float32[Array, " d_vocab"]


def new_model(entries: int, d_model: int, d_vocab: int) -> Model:
    """Allocate the tables; `fill` writes them."""
    tall, square, wide = (entries, d_model), (d_model, d_model), (d_model, d_vocab)
    shapes = (tall, tall, (entries, entries), square, square, wide, wide[::-1], wide, wide[::-1])
    return Model(*map(_aligned, shapes))


def fill(model: Model, tables: Tables) -> None:
    """Copy a step's tables, and their transposes, to where the kernels read them."""
    bilinear, direct, attended = tables.bilinear, tables.direct, tables.attended
    sources = (*tables[:3], bilinear, bilinear.T, direct, direct.T, attended, attended.T)
    for target, source in zip(model, sources, strict=True):
        np.copyto(target, source)


def new_sums(entries: int, d_model: int, d_vocab: int) -> Sums:
    """Allocate the gradients of one part of a batch."""
    return Sums(*map(_aligned, ((entries, entries), (d_model, d_model), (d_model, d_vocab), (d_model, d_vocab))))


def new_scratch(n_pos: int, d_model: int, d_vocab: int) -> Scratch:
    """Allocate one worker's scratch."""
    tiles = n_pos // KEYS
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("value", "resid", "d_resid"), (n_pos, d_model)),
        **dict.fromkeys(("value_T", "resid_T"), (tiles, d_model, KEYS)),
        "pattern": (n_pos // ROWS, tiles, ROWS, KEYS),
        "tiles": (tiles, 2 * ROWS, KEYS),
        **dict.fromkeys(("folded", "product"), (2 * ROWS, d_model)),
        **dict.fromkeys(("query", "context", "d_query"), (ROWS, d_model)),
        **dict.fromkeys(("logits", "logits_product"), (ROWS, d_vocab)),
        "square": (d_model, d_model),
        "readout": (d_model, d_vocab),
        "by_token": (d_vocab,),
    }
    return Scratch(tokens=np.zeros(n_pos, np.uint32), **{name: _aligned(shape) for name, shape in shapes.items()})


def _aligned(shape: tuple[int, ...]) -> Array:
    """Allocate float32 zeros that start on a cache line, which makes small products half as fast again."""
    size = math.prod(shape)
    memory = np.zeros(size + 16, np.float32)
    start = -memory.ctypes.data % 64 // memory.itemsize
    return memory[start : start + size].reshape(shape)
