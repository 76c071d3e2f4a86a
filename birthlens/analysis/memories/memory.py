"""Matrices as associative memories, read between two named codebooks (paper section 7).

A memory W = sum_ij A_ij u_i^T v_j stores the table A between input vectors u_i and output vectors v_j (rows, so scores are
u W v^T). It can be read in two bases:

    raw    u_i W v_j^T                what the model itself computes; equals A only for orthonormal codebooks
    dual   (U^+)_i^T W (V^+)_j        through pseudo-inverses; equals A if each codebook is linearly independent,
                                      and its least-norm version (U U^+) A (V V^+) if not

Every codebook and every side of a circuit names its space, so a memory cannot be read in the wrong basis:

    residual   states of the residual stream: token and position embeddings, and what earlier heads wrote
    readout    directions along which the residual stream is read: the columns of W_U

A QK circuit pairs two residual states (query on the left, key on the right). An OV circuit maps a residual state to a
readout direction. A codebook also stores the first layer whose input contains it: what L0H0 writes cannot be a key of
layer 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from birthlens.analysis.memories.duals import dual_vectors
from birthlens.errors import BirthlensError
from birthlens.model.sites import Head
from birthlens.shapes import Float

Array = np.ndarray
Basis = Literal["raw", "dual"]
Space = Literal["residual", "readout"]

BLOCK_ENTRIES = 1 << 19
"""Entries of score tables that are read at once (2 MB in float32): more exceeds the cache, fewer adds Python overhead."""
BLOCK_ROWS = 64
"""The smallest number of rows in a block, for any width: with fewer, the matrix product is bound by memory bandwidth."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """A named family of vectors with one label for each entry; leading axes (checkpoints) are allowed.

    `space` says what the vectors are; `layer` is the first layer whose input contains them.

    Raises:
        BirthlensError: if labels and vectors differ in number, or a vector is not finite.

    Example:
        >>> book = Codebook("W_E", np.eye(3), ("a", "b", "c"))
        >>> len(book), book.subset([2, 0]).labels
        (3, ('c', 'a'))
    """

    name: str
    vectors: Float[Array, "*step entry d"]
    labels: tuple[str, ...]
    space: Space = "residual"
    layer: int = 0

    def __post_init__(self) -> None:
        if self.vectors.ndim < 2:
            raise BirthlensError(f"codebook {self.name}: vectors have shape {self.vectors.shape}; give [entry, d].")
        if len(self.labels) != self.vectors.shape[-2]:
            raise BirthlensError(
                f"codebook {self.name}: {len(self.labels)} labels for {self.vectors.shape[-2]} vectors; "
                "give one label for each entry."
            )
        if not np.isfinite(self.vectors).all():
            raise BirthlensError(f"codebook {self.name}: some vectors are not finite; the checkpoint has diverged.")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def width(self) -> int:
        """Number of components of each vector."""
        return int(self.vectors.shape[-1])

    @cached_property
    def dual(self) -> Float[Array, "*step entry d"]:
        """The dual vectors (U^+)^T, one in each row: u_i dual_j^T = 1{i = j} if the entries are linearly independent."""
        return dual_vectors(self.vectors)

    def subset(self, entries: Sequence[int], name: str | None = None) -> Codebook:
        """Return the given entries only, in the given order; their duals are computed among themselves."""
        picked = list(entries)
        labels = tuple(self.labels[entry] for entry in picked)
        return replace(
            self, name=name or f"{self.name}[{len(picked)}]", vectors=self.vectors[..., picked, :], labels=labels
        )

    def through(self, circuit: Circuit) -> Codebook:
        """Return what `circuit` writes when it reads each entry, such as w_1(k) = w_E(k) W_V W_O of an earlier head."""
        if circuit.writes != "readout":
            raise BirthlensError(
                f"{circuit.name} scores pairs of states and writes nothing; remap through an OV circuit."
            )
        circuit.check(self, "input")
        name = f"{self.name}>{circuit.name}"
        written = self.vectors @ circuit.left
        written = written if circuit.right is None else written @ circuit.right
        return Codebook(name, written, self.labels, "residual", circuit.layer + 1)

    def as_readout(self) -> Codebook:
        """Return the same vectors as readout directions of the residual stream; this choice has to be explicit."""
        return replace(self, space="readout", layer=0)


@dataclass(frozen=True, eq=False)
class Circuit:
    """A bilinear form u @ left @ right @ v^T of a layer, with the space of each side; `right=None` is the identity.

    Low-rank products (one head of many) stay factored: `left` [d_in, rank], `right` [rank, d_out]. Leading axes
    (checkpoints) are allowed. A matrix of your own is `Circuit("mine", matrix)`. A path through several layers ends in
    `layer` and starts in `first_layer` (None: the same layer), and reads the input of the first. `head` is the head whose
    weights these are (None: they are not those of one head).
    """

    name: str
    left: Float[Array, "... d_in rank"]
    right: Float[Array, "... rank d_out"] | None = None
    reads: Space = "residual"
    writes: Space = "residual"
    layer: int = 0
    first_layer: int | None = None
    head: Head | None = None

    @property
    def reading_layer(self) -> int:
        """The layer whose input is on the input side."""
        return self.layer if self.first_layer is None else self.first_layer

    @cached_property
    def matrix(self) -> Float[Array, "*step d_in d_out"]:
        """The product as a dense matrix."""
        return self.left if self.right is None else self.left @ self.right

    @property
    def width(self) -> tuple[int, int]:
        """Dimensions of the two sides."""
        return int(self.left.shape[-2]), int((self.left if self.right is None else self.right).shape[-1])

    def then(self, later: Circuit) -> Circuit:
        """Return the path through this circuit and one of a later layer, both OV."""
        if later.reading_layer <= self.layer or "residual" in (self.writes, later.writes):
            raise BirthlensError(
                f"{self.name} cannot be followed by {later.name}: a path goes through OV circuits of increasing layers."
            )
        right = later.matrix if self.right is None else self.right @ later.matrix
        name = f"{self.name}>{later.name}"
        return replace(self, name=name, right=right, layer=later.layer, first_layer=self.reading_layer, head=None)

    def check(self, codebook: Codebook, side: Literal["input", "output"]) -> None:
        """Raise BirthlensError, naming both, unless `codebook` fits this side."""
        space, width = (self.reads, self.width[0]) if side == "input" else (self.writes, self.width[1])
        layer = self.reading_layer if side == "input" else self.layer
        if codebook.space != space:
            raise BirthlensError(
                f"{self.name} has the {space} space on its {side} side, and codebook {codebook.name} is of the "
                f"{codebook.space} space: choose another codebook, or swap the sides."
            )
        if space == "residual" and codebook.layer > layer:
            raise BirthlensError(
                f"{self.name} reads the input of layer {layer}, and codebook {codebook.name} exists only from layer "
                f"{codebook.layer} on: choose a later circuit."
            )
        if codebook.width != width:
            raise BirthlensError(
                f"{self.name} has {width} dimensions on its {side} side, and codebook {codebook.name} has {codebook.width}."
            )

    def singular_values(self) -> Float[Array, "*step rank"]:
        """Return the singular values of the matrix, largest first."""
        return np.linalg.svd(self.matrix, compute_uv=False)

    def effective_rank(self) -> Float[Array, "*step"]:
        """Return the participation ratio (sum s^2)^2 / sum s^4 of the singular values s; NaN for a zero matrix."""
        matrix = self.matrix
        gram = matrix @ matrix.swapaxes(-1, -2)
        trace = np.trace(gram, axis1=-2, axis2=-1)
        with np.errstate(invalid="ignore"):
            return np.asarray(trace**2 / np.einsum("...ij,...ij->...", gram, gram))


@dataclass(frozen=True, eq=False)
class AssociativeMemory:
    """A circuit between two codebooks: the table of scores u_i W v_j^T, in factored form.

    Raises:
        BirthlensError: if a codebook's space, layer or width does not fit its side of the circuit.

    Example:
        >>> book = Codebook("W_E", np.eye(3), ("a", "b", "c"))
        >>> AssociativeMemory(Circuit("W", np.diag([3.0, 2.0, 1.0])), book, book).scores().diagonal().tolist()
        [3.0, 2.0, 1.0]
    """

    circuit: Circuit
    inputs: Codebook
    outputs: Codebook

    def __post_init__(self) -> None:
        self.circuit.check(self.inputs, "input")
        self.circuit.check(self.outputs, "output")

    @property
    def name(self) -> str:
        """Circuit and codebooks, such as 'L1H0.QK: W_E -> W_E>L0H0.OV'."""
        return f"{self.circuit.name}: {self.inputs.name} -> {self.outputs.name}"

    def vectors(self, basis: Basis = "raw") -> tuple[Float[Array, "... input d_in"], Float[Array, "... output d_out"]]:
        """Return the vectors on both sides of the matrix in this basis: the codebooks' vectors, or their duals."""
        if basis not in ("raw", "dual"):
            raise BirthlensError(f"basis = {basis!r} is unknown; valid bases are raw and dual.")
        if basis == "raw":
            return self.inputs.vectors, self.outputs.vectors
        return self.inputs.dual, self.outputs.dual

    def factors(self, basis: Basis = "raw") -> tuple[Float[Array, "... input rank"], Float[Array, "... output rank"]]:
        """Return A and B with scores A @ B^T; they have the circuit's rank, so they are much smaller than the table."""
        inputs, outputs = self.vectors(basis)
        right = self.circuit.right
        return inputs @ self.circuit.left, outputs if right is None else outputs @ right.swapaxes(-1, -2)

    def scores(self, basis: Basis = "raw") -> Float[Array, "*step input output"]:
        """Return the whole table; for large vocabularies use `readings` or `top_associations_table`, which use blocks."""
        rows, columns = self.factors(basis)
        return rows @ columns.swapaxes(-1, -2)

    @property
    def steps(self) -> tuple[int, ...]:
        """Shape of the leading axes: () for one checkpoint, [step] for a stack."""
        parts = (self.inputs.vectors, self.circuit.left, self.circuit.right, self.outputs.vectors)
        return np.broadcast_shapes(*(part.shape[:-2] for part in parts if part is not None))

    def blocks(
        self, queries: Array, candidates: Array, basis: Basis = "raw"
    ) -> Iterator[tuple[tuple[slice, ...], slice, Float[Array, "*step row candidate"]]]:
        """Yield the table of `queries` x `candidates` in blocks: of several checkpoints, or of some rows of one.

        Each block comes with its steps (none for a single checkpoint) and its slice of `queries`; its place is
        `[*steps, ..., rows, :]`. All blocks share one buffer: a block may be modified, and the next one overwrites it.
        """
        (inputs, outputs) = self.vectors(basis)
        left = self.circuit.left
        right = self.circuit.right
        inputs = inputs[..., queries, :] @ left
        outputs = outputs[..., candidates, :]
        width = len(candidates)
        height = min(len(queries), max(BLOCK_ROWS, BLOCK_ENTRIES // width))
        depth = max(1, BLOCK_ENTRIES // (height * width * math.prod(self.steps[1:])))
        stacks: list[tuple[slice, ...]] = [()]
        if self.steps:
            stacks = [(slice(first, first + depth),) for first in range(0, self.steps[0], depth)]
        buffer = np.empty(0, dtype=np.result_type(inputs, outputs, left if right is None else right))
        for steps in stacks:
            rows = self._at(inputs, steps)
            columns = self._at(outputs, steps)
            # Computed for each block: the products of all steps at once would leave the cache before they are read.
            columns = columns if right is None else columns @ self._at(right, steps).swapaxes(-1, -2)
            axes = np.broadcast_shapes(rows.shape[:-2], columns.shape[:-2])
            for first in range(0, len(queries), height):
                block = slice(first, min(first + height, len(queries)))
                shape = (*axes, block.stop - first, width)
                buffer = buffer if buffer.size >= math.prod(shape) else np.empty(math.prod(shape), buffer.dtype)
                scores = buffer[: math.prod(shape)].reshape(shape)
                yield steps, block, np.matmul(rows[..., block, :], columns.swapaxes(-1, -2), out=scores)

    def _at(self, part: Array, steps: tuple[slice, ...]) -> Array:
        """Return some steps of a part; a part without a step axis is used at every step."""
        return part[steps] if part.ndim == len(self.steps) + 2 and len(part) > 1 else part
