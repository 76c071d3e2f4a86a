"""Truncation of a matrix, or of its change since the first step, to some of its singular components.

With W = sum_i s_i u_i v_i^T (s_1 >= s_2 >= ...) and W_0 the matrix at the first step:

    rank:R           the sum of the first R components of W
    without_rank:R   W without these components
    change_rank:R    W_0 plus the first R components of W - W_0

As an intervention of a suite (`MatrixIntervention`) it replays on every checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from birthlens.analysis.memories.projections import largest_components
from birthlens.config.model import ModelConfig, parameter_names
from birthlens.errors import BirthlensError
from birthlens.labels import shown
from birthlens.model.components import Sizes
from birthlens.model.weights import Weights
from birthlens.shapes import Float

Array = np.ndarray
TRUNCATIONS = ("rank", "without_rank", "change_rank")


@dataclass(frozen=True)
class Truncation:
    """A matrix, or its change, restricted to some singular components; written `rank:R`, `without_rank:R`, `change_rank:R`.

    Example:
        >>> Truncation.parse("change_rank:4")
        Truncation(how='change_rank', rank=4)
        >>> Truncation.parse("ledger") is None
        True
    """

    how: str
    rank: int

    def __str__(self) -> str:
        return f"{self.how}:{self.rank}"

    @classmethod
    def parse(cls, source: str) -> Truncation | None:
        """Parse a source; return None if it is not a truncation.

        Raises:
            BirthlensError: if the rank is not a whole number.
        """
        how, colon, text = source.partition(":")
        if how not in TRUNCATIONS or not colon:
            return None
        if not (text.isascii() and text.isdigit()) or len(text) > 9:
            raise BirthlensError(f"source = {source!r}: write {how}:R with R = 1, 2, ...")
        return cls(how, int(text))

    def of(
        self, matrix: Float[Array, "*head rows columns"], initial: Float[Array, "*head rows columns"] | None
    ) -> Float[Array, "*head rows columns"]:
        """Return the truncated matrix; with several heads, each is truncated alone.

        Raises:
            BirthlensError: for a rank that the matrix does not have, values that are not finite, or a missing initial
                matrix.
        """
        full = min(matrix.shape[-2:])
        if not 1 <= self.rank <= full:
            raise BirthlensError(f"source = '{self}': write {self.how}:R with R from 1 to {full}.")
        whole = matrix.astype(np.float64)
        start = np.zeros_like(whole)
        if self.how == "change_rank":
            if initial is None:
                raise BirthlensError(f"source = '{self}': give the initial weights, which the change starts from.")
            start = initial.astype(np.float64)
        if not (np.isfinite(whole).all() and np.isfinite(start).all()):
            raise BirthlensError(f"source = '{self}': the matrix contains values that are not finite.")
        kept = largest_components(whole - start, self.rank)
        found = whole - kept if self.how == "without_rank" else start + kept
        return np.asarray(found.astype(matrix.dtype))


@dataclass(frozen=True)
class MatrixIntervention:
    """Replace a parameter by a truncation of it.

    Example:
        >>> MatrixIntervention("L1.W_F", Truncation("without_rank", 1)).to_json()
        {'matrix': 'L1.W_F', 'method': 'without_rank:1'}
    """

    matrix: str
    truncation: Truncation

    @classmethod
    def from_json(cls, data: Mapping[Any, Any]) -> MatrixIntervention:
        """Read the output of `to_json`.

        Raises:
            BirthlensError: for other keys, or a method that is no truncation.
        """
        if set(data) != {"matrix", "method"}:
            raise BirthlensError(f"intervention = {shown(dict(data))}: a matrix has a method and nothing else.")
        method = data["method"]
        truncation = Truncation.parse(method) if isinstance(method, str) else None
        if truncation is None:
            valid = ", ".join(f"{how}:R" for how in TRUNCATIONS)
            raise BirthlensError(f"method = {shown(method)}: a matrix is truncated by {valid} with R = 1, 2, ...")
        return cls(data["matrix"], truncation)

    @property
    def method(self) -> str:
        """The truncation as text, for tables."""
        return str(self.truncation)

    def check(self, sizes: Sizes) -> None:
        """Raise BirthlensError, listing the valid ones, if the model has no such matrix, or is no model of weights."""
        if not isinstance(sizes, ModelConfig):
            raise BirthlensError(
                f"matrix = {shown(self.matrix)}: matrices are truncated in the checkpoints of a run only."
            )
        valid = [name for name in parameter_names(sizes) if name.rpartition(".")[2].startswith("W_")]
        if self.matrix not in valid:
            raise BirthlensError(f"matrix = {shown(self.matrix)} does not exist; valid are {', '.join(valid)}.")

    def of(self, weights: Weights, initial: Weights | None) -> Weights:
        """Return the weights with the truncated matrix.

        Raises:
            BirthlensError: as `Truncation.of`.
        """
        before = None if initial is None else initial[self.matrix]
        return weights.replaced({self.matrix: self.truncation.of(weights[self.matrix], before)})

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"matrix": self.matrix, "method": self.method}

    def __str__(self) -> str:
        return f"{self.matrix} {self.method}"
