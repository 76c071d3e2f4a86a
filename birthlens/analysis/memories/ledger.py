"""What a matrix is made of: its squared norm divided among named families of outer products (paper section 7).

There are two kinds of family, both between named codebooks (u: inputs, v: outputs):

    association   pairs (i, j) with one coefficient each:    W ~ sum_p a_p u_{i_p}^T v_{j_p}
    cell          every pair of two codebooks, a bilinear span: W ~ sum_ij A_ij u_i^T v_j, that is P W Q for projections P, Q

A ledger has codebooks on its two sides, which form a grid of cells, and associations between codebooks of that grid. What
the grid cannot express is the residual. Embeddings are not orthogonal, so families overlap. The least squares problem over
all of them is solved exactly, and the shares of ||W||^2 are defined such that they add up to 1:

1. Associations come first, since they are the hypotheses. Together they explain E = b^T G^+ b, where
   G = (U U^T) o (V V^T) is the Gram matrix of their outer products and b_p = u_p W v_p^T. The share of each is its Shapley
   value: the mean gain in E over all orders in which families can be added (LMG). A family that overlaps the true one gets
   part of the credit; the coefficients tell them apart.
2. Cells share what the associations leave, D = P W Q - fit. The share is <M_a D N_b, D>, where M_a is the mean, over all
   orders of the input codebooks, of the projection on what codebook a adds to those before it; N_b is the same for outputs.
   The M sum to P and the N to Q, so the cells sum to ||D||^2, the exact least squares solution of the whole grid.
3. The residual is ||W - P W Q||^2. If the codebooks span the whole space, it is zero. With `cells=False` the grid is left
   out, and the residual is everything that the associations do not explain.

`ledger_nulls` computes how large a share would be by chance. A span of rank r explains r / (d d') of a random matrix: 26 %
for tokens x tokens at d = 128, and all of it for positions x positions with more positions than dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import factorial

import numpy as np

from birthlens.analysis.memories.gram import pseudo_inverse
from birthlens.analysis.memories.memory import Array, Codebook
from birthlens.analysis.memories.recall import Association
from birthlens.errors import BirthlensError
from birthlens.shapes import Float

RESIDUAL = "residual"
_MOST_ASSOCIATIONS = 8  # 2^8 subsets of Gram systems
_MOST_CODEBOOKS = 5  # 5! orders on each side


@dataclass(frozen=True, eq=False)
class Family:
    """Associations between two codebooks of the ledger's grid, by name: one outer product for each pair."""

    name: str
    inputs: str
    outputs: str
    association: Association


@dataclass(frozen=True, eq=False)
class Shares:
    """What `Ledger.shares` returns; every array has the matrix's leading axes, and shares + cells + residual = 1."""

    associations: dict[str, Float[Array, "*step"]]
    alone: dict[str, Float[Array, "*step"]]
    cells: dict[str, Float[Array, "*step"]]
    residual: Float[Array, "*step"]


class Ledger:
    """Families of outer products for dividing up a matrix; built once for frozen codebooks and used at every checkpoint.

    Raises:
        BirthlensError: if names repeat, codebooks on one side differ in width, a family uses an unknown codebook, or there
            are too many families to average over.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> book = Codebook("W_E", generator.standard_normal((4, 16)), ("a", "b", "c", "d"))
        >>> ledger = Ledger([book], [book], [Family("copy", "W_E", "W_E", Association.identity(4))])
        >>> shares = ledger.shares(book.vectors.T @ book.vectors)
        >>> round(float(shares.associations["copy"]), 6), abs(round(float(shares.residual), 6))
        (1.0, 0.0)
    """

    def __init__(
        self,
        inputs: Sequence[Codebook],
        outputs: Sequence[Codebook],
        associations: Sequence[Family] = (),
        cells: bool = True,
    ) -> None:
        self.has_cells = cells
        self.inputs = _side("inputs", inputs)
        self.outputs = _side("outputs", outputs)
        self.families = tuple(associations)
        if len({family.name for family in self.families}) < len(self.families):
            raise BirthlensError("ledger: two associations have the same name; names are the columns of its table.")
        if len(self.families) > _MOST_ASSOCIATIONS:
            raise BirthlensError(
                f"ledger: {len(self.families)} associations; at most {_MOST_ASSOCIATIONS} can be averaged over."
            )
        for family in self.families:
            for name, side in ((family.inputs, self.inputs), (family.outputs, self.outputs)):
                if name not in side:
                    raise BirthlensError(
                        f"ledger: association {family.name} needs codebook {name!r} on that side; it has {', '.join(side)}."
                    )
        pairs = [self.outer_products(family) for family in self.families]
        width = next(iter(self.inputs.values())).width, next(iter(self.outputs.values())).width
        self.u = np.concatenate([u for u, _ in pairs] or [np.empty((0, width[0]))])
        self.v = np.concatenate([v for _, v in pairs] or [np.empty((0, width[1]))])
        ends = np.cumsum([0, *(len(u) for u, _ in pairs)])
        self.slices = [slice(start, stop) for start, stop in pairwise(ends)]
        self.input_parts = _mean_projections(self.inputs)
        self.output_parts = _mean_projections(self.outputs)

    def outer_products(self, family: Family) -> tuple[Float[Array, "pair d_in"], Float[Array, "pair d_out"]]:
        """Return the input and output vectors of a family's pairs, in float64."""
        u = self.inputs[family.inputs].vectors[family.association.queries]
        v = self.outputs[family.outputs].vectors[family.association.right]
        return u.astype(np.float64), v.astype(np.float64)

    @property
    def cell_names(self) -> list[str]:
        """Names of the grid's cells, 'inputs x outputs'; empty if cells are left out."""
        return [f"{a} x {b}" for a in self.inputs for b in self.outputs if self.has_cells]

    def coefficients(self, matrix: Float[Array, "*step d_in d_out"]) -> dict[str, Float[Array, "*step pair"]]:
        """Return one coefficient for each association: the joint least squares solution over all families.

        If it is not unique, return the one of least norm when outer products are scaled to norm 1, so that units do not
        matter.
        """
        solution = self.scores(matrix) @ self.gram_inverse(tuple(range(len(self.families))))
        return {f.name: solution[..., part] for f, part in zip(self.families, self.slices, strict=True)}

    def shares(self, matrix: Float[Array, "*step d_in d_out"]) -> Shares:
        """Split the squared norm of each matrix into associations, cells and residual; the shares add up to 1.

        A zero matrix has shares NaN. `alone` is what each association explains as the only family.
        """
        matrix = self._checked(matrix)
        energy = np.einsum("...ij,...ij->...", matrix, matrix)
        scores = self.scores(matrix)
        explained = {subset: self._explained(scores, subset) for subset in subsets(len(self.families))}
        inputs = sum(self.input_parts.values())
        outputs = sum(self.output_parts.values())
        spanned = inputs @ matrix @ outputs
        coefficients = scores @ self.gram_inverse(tuple(range(len(self.families))))
        rest = spanned - (coefficients[..., None, :] * self.u.T) @ self.v
        names = [family.name for family in self.families]
        parts = {name: rest @ part for name, part in self.output_parts.items()}
        cells = {
            f"{a} x {b}": np.einsum("...ij,...ij->...", left @ rest, parts[b])
            for a, left in self.input_parts.items()
            for b in self.output_parts
            if self.has_cells
        }
        unexplained = matrix - spanned if self.has_cells else matrix - spanned + rest

        def share(part: Array | float) -> Array:
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.asarray(part / energy)

        return Shares(
            {name: share(shapley(explained, i, len(names))) for i, name in enumerate(names)},
            {name: share(explained[(i,)]) for i, name in enumerate(names)},
            {name: share(part) for name, part in cells.items()},
            share(np.einsum("...ij,...ij->...", unexplained, unexplained)),
        )

    def _checked(self, matrix: Array) -> Array:
        width = self.u.shape[1], self.v.shape[1]
        if matrix.shape[-2:] != width:
            raise BirthlensError(f"ledger: the matrix has shape {matrix.shape[-2:]}, the codebooks need {width}.")
        return matrix.astype(np.float64, copy=False)

    def scores(self, matrix: Array) -> Float[Array, "*step pair"]:
        """Return b_p = u_p W v_p^T of every pair of every family."""
        return np.einsum("...pj,pj->...p", self.u @ self._checked(matrix), self.v)

    def _explained(self, scores: Array, subset: tuple[int, ...]) -> Float[Array, "*step"]:
        picked = scores[..., self.members(subset)]
        return np.asarray(np.einsum("...p,...p->...", picked @ self.gram_inverse(subset), picked))

    def members(self, subset: tuple[int, ...]) -> Array:
        """Return the rows of `u` and `v` that belong to the given families."""
        return np.concatenate([np.arange(len(self.u))[self.slices[i]] for i in subset] or [np.empty(0, dtype=np.int64)])

    @cached_property
    def _gram(self) -> Float[Array, "pair pair"]:
        u = unit_rows(self.u)
        v = unit_rows(self.v)
        return np.asarray((u @ u.T) * (v @ v.T))

    @cached_property
    def _norms(self) -> Float[Array, "pair"]:
        norms = np.linalg.norm(self.u, axis=1) * np.linalg.norm(self.v, axis=1)
        return np.where(norms > 0, norms, 1)

    @cached_property
    def _inverses(self) -> dict[tuple[int, ...], Array]:
        return {}

    def gram_inverse(self, subset: tuple[int, ...]) -> Array:
        """Return the inverse of the Gram matrix of the outer products of the given families.

        The pseudo-inverse uses outer products scaled to norm 1. A Gram matrix contains norms to the fourth power, so the
        cut-off would otherwise mistake short vectors for dependent ones.
        """
        if subset not in self._inverses:
            members = self.members(subset)
            inverse = pseudo_inverse(self._gram[np.ix_(members, members)])
            self._inverses[subset] = inverse / np.outer(self._norms[members], self._norms[members])
        return self._inverses[subset]


def unit_rows(vectors: Float[Array, "*axes d"]) -> Float[Array, "*axes d"]:
    """Return the vectors divided by their norms; zero vectors stay zero."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1))


def projection(vectors: Float[Array, "entry d"]) -> Float[Array, "d d"]:
    """Return the orthogonal projection on the span of the rows (rank as numpy's `matrix_rank` counts it)."""
    _, singular, basis = np.linalg.svd(vectors.astype(np.float64), full_matrices=False)
    tolerance = max(vectors.shape) * float(np.finfo(vectors.dtype).eps)
    kept = basis[singular > tolerance * singular[0]]
    return np.asarray(kept.T @ kept)


def _mean_projections(codebooks: dict[str, Codebook]) -> dict[str, Float[Array, "d d"]]:
    """Return, for each codebook, the mean over all orders of the projection on what it adds to those before it."""
    names = tuple(codebooks)
    spans = {}
    for subset in subsets(len(names)):
        vectors = [codebooks[names[i]].vectors for i in subset]
        width = codebooks[names[0]].width
        spans[subset] = projection(unit_rows(np.concatenate(vectors))) if vectors else np.zeros((width, width))
    return {name: shapley(spans, i, len(names)) for i, name in enumerate(names)}


def shapley(values: dict[tuple[int, ...], Array], player: int, players: int) -> Array:
    """Return the mean gain in value from adding `player`, over all orders; the gains sum to the value of all players."""
    orders = factorial(players)
    total = np.zeros_like(next(iter(values.values())))
    for subset, value in values.items():
        if player in subset:
            without = tuple(other for other in subset if other != player)
            weight = factorial(len(without)) * factorial(players - len(subset)) / orders
            total = total + weight * (value - values[without])
    return np.asarray(total)


def subsets(count: int) -> list[tuple[int, ...]]:
    """Return every subset of range(count), each in ascending order."""
    return [tuple(i for i in range(count) if mask >> i & 1) for mask in range(2**count)]


def _side(name: str, codebooks: Sequence[Codebook]) -> dict[str, Codebook]:
    named = {book.name: book for book in codebooks}
    if not 0 < len(codebooks) <= _MOST_CODEBOOKS or len(named) < len(codebooks):
        raise BirthlensError(f"ledger {name}: give 1 to {_MOST_CODEBOOKS} codebooks with different names.")
    if len({book.width for book in codebooks}) > 1:
        widths = ", ".join(f"{book.name} has {book.width}" for book in codebooks)
        raise BirthlensError(f"ledger {name}: codebooks must share one width; {widths}.")
    if any(book.vectors.ndim > 2 for book in codebooks):
        raise BirthlensError(
            f"ledger {name}: codebooks must be of one checkpoint; build one ledger for each checkpoint if they move."
        )
    return named
