"""Ledgers of the two factors of a circuit, each between the codebooks on its own sides.

A circuit is a product A B: W_V W_O, or W_Q W_K^T with the query side on the left. For inputs u and outputs v,

    u A B v^T = (u A) B v^T = u A (v B^T)^T

so B is read between v and the inputs as A passes them on, and A is read between u and the outputs as B reads them. Training
writes to the factor: with frozen W_V, the memory that W_O learns is sum_k (w_E(k) W_V)^T w_U(k). The share of the product
can be much smaller, because A is not an isometry: the product stretches some directions of B more than others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from birthlens.analysis.memories.ledger import Ledger
from birthlens.analysis.memories.memory import Array, Circuit, Codebook
from birthlens.errors import BirthlensError
from birthlens.shapes import Float

Factor = Literal["left", "right"]


def factor_ledger(ledger: Ledger, circuit: Circuit, factor: Factor) -> Ledger:
    """Return the ledger of one factor of `circuit`, from the ledger of the product.

    "left" is W_Q or W_V; "right" is W_K (as W_K^T, query side left) or W_O. The associations and their pairs stay the same.

    Raises:
        BirthlensError: if the circuit is a single matrix.

    Example:
        >>> import numpy as np
        >>> from birthlens.analysis.memories.ledger import Family
        >>> from birthlens.analysis.memories.recall import Association
        >>> book = Codebook("W_E", np.eye(4)[:3], ("a", "b", "c"))
        >>> product = Ledger([book], [book], [Family("copy", "W_E", "W_E", Association.identity(3))])
        >>> circuit = Circuit("L1H0.OV", np.diag([1.0, 2.0, 3.0, 4.0]), np.eye(4))
        >>> factor_ledger(product, circuit, "right").u.diagonal().tolist()
        [1.0, 2.0, 3.0]
    """
    if circuit.right is None:
        raise BirthlensError(f"{circuit.name} is a single matrix, not a product; use the ledger of the matrix itself.")
    inputs = {name: name for name in ledger.inputs}
    outputs = {name: name for name in ledger.outputs}
    if factor == "right":
        passed = [
            _mapped(book, circuit.left, "W_V" if circuit.writes == "readout" else "W_Q")
            for book in ledger.inputs.values()
        ]
        inputs = dict(zip(ledger.inputs, (book.name for book in passed), strict=True))
        sides = (passed, list(ledger.outputs.values()))
    else:
        other = "W_O" if circuit.writes == "readout" else "W_K"
        read = [_mapped(book, circuit.right.swapaxes(-1, -2), other) for book in ledger.outputs.values()]
        outputs = dict(zip(ledger.outputs, (book.name for book in read), strict=True))
        sides = (list(ledger.inputs.values()), read)
    families = [
        replace(family, inputs=inputs[family.inputs], outputs=outputs[family.outputs]) for family in ledger.families
    ]
    return Ledger(*sides, families, ledger.has_cells)


def _mapped(book: Codebook, matrix: Float[Array, "d_in d_out"], name: str) -> Codebook:
    return replace(book, name=f"{book.name}·{name}", vectors=book.vectors @ matrix)
