"""How large the shares of a ledger would be by chance.

For a Gaussian matrix with covariance A between rows and B between columns (both of trace 1), the expected shares have closed
forms in small Gram matrices, and add up to 1 as the shares do. There are three choices of A and B:

    rank      A = I / d,             B = I / d'             nothing is known: a family of rank r gets r / (d d')
    rows      A = W W^T / ||W||^2,   B = I / d'             the covariance of the inputs is known, outputs are random
    columns   A = I / d,             B = W^T W / ||W||^2    the same with the sides exchanged

If a family exceeds `rank` but not `rows`, the matrix reads from its inputs, but nothing shows that it knows their partners.
Associations have one more null: derangements, which pair the same vectors such that no pair is right. Plain permutations of
few entries would keep some right pairs, and the null would be too high.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from birthlens.analysis.memories.gram import Gram
from birthlens.analysis.memories.ledger import RESIDUAL, Family, Ledger, shapley, subsets, unit_rows
from birthlens.analysis.memories.memory import Array
from birthlens.errors import BirthlensError
from birthlens.shapes import Float, Int

NULLS = ("rank", "rows", "columns")


Forms = dict[str, Float[Array, "d d"]]


@dataclass(frozen=True, eq=False)
class Nulls:
    """The expected shares of a ledger's families as quadratic forms: share = <form, covariance of the known side>.

    Example:
        >>> from birthlens.analysis.memories.memory import Codebook
        >>> book = Codebook("W_E", np.eye(8)[:2], ("a", "b"))
        >>> nulls = Nulls.of(Ledger([book], [book]))
        >>> {name: float(share) for name, share in nulls.shares(np.eye(8))["rank"].items()}
        {'W_E x W_E': 0.0625, 'residual': 0.9375}
    """

    rows: Forms
    columns: Forms

    @classmethod
    def of(cls, ledger: Ledger) -> Nulls:
        """Build the forms once, for use at every checkpoint."""
        return cls(
            _forms(ledger, ledger.u, ledger.v, ledger.input_parts, ledger.output_parts, "{0} x {1}"),
            _forms(ledger, ledger.v, ledger.u, ledger.output_parts, ledger.input_parts, "{1} x {0}"),
        )

    def shares(self, matrix: Float[Array, "*step d_in d_out"]) -> dict[str, dict[str, Float[Array, "..."]]]:
        """Return the expected share of every family, by null and name; NaN for a zero matrix (except for `rank`)."""
        exact = matrix.astype(np.float64)
        transposed = exact.swapaxes(-1, -2)
        energy = np.einsum("...ij,...ij->...", exact, exact)[..., None, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            rows = exact @ transposed / energy
            columns = transposed @ exact / energy
        return {
            "rank": {name: np.asarray(np.trace(form) / len(form)) for name, form in self.rows.items()},
            "rows": {name: np.asarray(np.einsum("ij,...ij->...", form, rows)) for name, form in self.rows.items()},
            "columns": {
                name: np.asarray(np.einsum("ij,...ij->...", form, columns)) for name, form in self.columns.items()
            },
        }


def _forms(ledger: Ledger, known: Array, free: Array, known_parts: Forms, free_parts: Forms, cell_name: str) -> Forms:
    # With covariance A on the known side and I / d' on the other, E[b_p b_q] = (u_p A u_q) (v_p v_q) / d', so the
    # expectation of each quadratic form b^T K b is <A, U^T (K o V V^T / d') U>.
    width = free.shape[1]
    everything = tuple(range(len(ledger.families)))
    overlap = free @ free.T / width
    explained = {}
    for subset in subsets(len(everything)):
        members = ledger.members(subset)
        kernel = ledger.gram_inverse(subset) * overlap[np.ix_(members, members)]
        explained[subset] = known[members].T @ kernel @ known[members]
    forms = {family.name: shapley(explained, i, len(everything)) for i, family in enumerate(ledger.families)}
    if not ledger.has_cells:
        return forms | {RESIDUAL: np.eye(known.shape[1]) - explained[everything]}
    inverse = ledger.gram_inverse(everything)
    for (known_name, m), (free_name, n) in product(known_parts.items(), free_parts.items()):
        # <M D N, D> with D = grid - fit: the cell itself, minus twice its overlap with the fit, plus the fit's own part.
        between = free @ n @ free.T
        crossed = (known @ m).T @ (inverse * between / width) @ known
        own = known.T @ ((inverse @ ((known @ m @ known.T) * between) @ inverse) * overlap) @ known
        forms[cell_name.format(known_name, free_name)] = m * np.trace(n) / width - 2 * crossed + own
    spanned = np.sum(list(known_parts.values()), axis=0)
    rank = sum(float(np.trace(n)) for n in free_parts.values())
    forms[RESIDUAL] = np.eye(len(spanned)) - spanned * rank / width
    return forms


@dataclass(frozen=True, eq=False)
class Derangements:
    """Wrong pairings of one family: the share that each explains alone, for comparison with the right pairing."""

    u: Float[Array, "pair d_in"]
    v: Float[Array, "draw pair d_out"]
    grams: tuple[Gram, ...]

    @classmethod
    def of(cls, ledger: Ledger, family: Family, draws: int, generator: np.random.Generator) -> Derangements:
        """Draw wrong pairings; raise BirthlensError if there are fewer than two pairs."""
        u, v = map(unit_rows, ledger.outer_products(family))
        orders = np.stack([derangement(len(u), generator) for _ in range(draws)])
        shuffled = v[orders]
        same = u @ u.T
        return cls(u, shuffled, tuple(Gram.of(same * (drawn @ drawn.T)) for drawn in shuffled))

    def shares(self, matrix: Float[Array, "*step d_in d_out"]) -> Float[Array, "*step draw"]:
        """Return the share of ||W||^2 that each wrong pairing explains alone."""
        exact = matrix.astype(np.float64)
        reads = self.u @ exact
        scores = np.einsum("...pj,npj->...np", reads, self.v, optimize=True)
        explained = np.stack([gram.explained(scores[..., n, :]) for n, gram in enumerate(self.grams)], axis=-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(explained / np.einsum("...ij,...ij->...", exact, exact)[..., None])


def derangement(n: int, generator: np.random.Generator) -> Int[Array, "n"]:
    """Draw a permutation without fixed points, uniformly (by rejection: e attempts on average).

    Example:
        >>> order = derangement(5, np.random.default_rng(0))
        >>> sorted(order.tolist()), bool((order == np.arange(5)).any())
        ([0, 1, 2, 3, 4], False)
    """
    if n < 2:
        raise BirthlensError(f"n = {n}: a derangement needs at least two entries.")
    while True:
        order = generator.permutation(n)
        if not (order == np.arange(n)).any():
            return order
