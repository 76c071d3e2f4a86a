"""Projections of a matrix that training can impose: on the associations of its ledger, or on low rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from birthlens.analysis.memories.names import MEMORY_PARAMETERS
from birthlens.analysis.memories.paper_ledgers import paper_circuits, paper_ledgers
from birthlens.errors import BirthlensError
from birthlens.model.alignment import partner_of
from birthlens.model.weights import Weights
from birthlens.shapes import Float

Array = np.ndarray
Matrices = dict[str, Float[Array, "..."]]


class LedgerProjection:
    """The projection of each matrix on the associations of its ledger, for frozen codebooks; built once, used at any step.

    Raises:
        BirthlensError: for any model other than the two-layer simplified one.
    """

    def __init__(
        self,
        weights: Weights,
        triggers: Sequence[int] | None = None,
        bigram: Float[Array, "d_vocab d_vocab"] | None = None,
    ) -> None:
        if weights.config.family != "simplified" or weights.n_layers != 2:
            raise BirthlensError("source = 'ledger': only the two-layer simplified model has the paper's ledgers.")
        found = paper_ledgers(weights, triggers, cells=False, bigram=bigram)
        self._ledgers = {role: ledger for role, (_, ledger) in found.items()}

    def __call__(self, weights: Weights) -> Matrices:
        """Return the projections of a model's matrices, by parameter."""
        circuits = paper_circuits(weights)
        found: Matrices = {}
        for role, ledger in self._ledgers.items():
            coefficients = np.concatenate(list(ledger.coefficients(circuits[role].matrix).values()))
            fit = (coefficients * ledger.u.T) @ ledger.v
            name = MEMORY_PARAMETERS[role]
            partner = partner_of(name)
            if partner is None:
                found[name] = fit
                continue
            # The partner stays: W_Q W_K^T or W_V W_O is the fit.
            inner = np.linalg.lstsq(weights[partner][0].astype(np.float64), fit, rcond=None)[0]
            found[name] = (inner.T if name.endswith("W_K") else inner)[None]
        return found


def low_rank(matrix: Float[Array, "*head d_in d_out"], rank: int) -> Float[Array, "*head d_in d_out"]:
    """Return the `rank` largest singular components of a matrix (of each head).

    Raises:
        BirthlensError: if the matrix has fewer components.

    Example:
        >>> int(np.linalg.matrix_rank(low_rank(np.eye(4), 2)))
        2
    """
    most = min(matrix.shape[-2:])
    if not 1 <= rank <= most:
        raise BirthlensError(f"rank = {rank}: valid are 1 to {most}.")
    return np.asarray(largest_components(matrix.astype(np.float64), rank).astype(matrix.dtype))


def largest_components(matrix: Float[Array, "*head d_in d_out"], rank: int) -> Float[Array, "*head d_in d_out"]:
    """Return the sum of the `rank` largest singular components of a matrix (of each head); zero for rank 0."""
    left, singular, right = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((left[..., :rank] * singular[..., None, :rank]) @ right[..., :rank, :])
