"""Cholesky solutions of Gram matrices against the plain pseudo-inverse."""

from __future__ import annotations

import numpy as np
import pytest

from birthlens.analysis.memories import gram as module
from birthlens.analysis.memories.gram import CUTOFF, Gram, cholesky_factor, pseudo_inverse
from birthlens.analysis.memories.ledger import Family, Ledger
from birthlens.analysis.memories.ledger_nulls import Derangements, Nulls
from birthlens.analysis.memories.memory import Codebook
from birthlens.analysis.memories.recall import Association


def gram_of(pairs: int, d: int, seed: int = 0, repeated: int = 0) -> np.ndarray:
    """The Gram matrix of outer products of unit vectors, the last `repeated` of them equal to the first."""
    generator = np.random.default_rng(seed)
    u, v = (generator.standard_normal((pairs, d)) for _ in range(2))
    for side in (u, v):
        side /= np.linalg.norm(side, axis=1, keepdims=True)
        side[pairs - repeated :] = side[:repeated]
    return (u @ u.T) * (v @ v.T)


@pytest.mark.parametrize(
    ("pairs", "d", "repeated", "regular"),
    [(1, 3, 0, True), (7, 3, 0, True), (40, 8, 0, True), (30, 5, 0, False), (12, 6, 2, False)],
)
def test_the_fast_path_equals_the_plain_pseudo_inverse(pairs: int, d: int, repeated: int, regular: bool) -> None:
    gram = gram_of(pairs, d, repeated=repeated)
    assert (cholesky_factor(gram) is not None) == regular
    plain = np.linalg.pinv(gram, rcond=CUTOFF, hermitian=True)
    np.testing.assert_allclose(pseudo_inverse(gram), plain, rtol=1e-7, atol=1e-9 * np.abs(plain).max())
    scores = np.random.default_rng(1).standard_normal((3, 2, pairs))
    expected = np.einsum("...p,pq,...q->...", scores, plain, scores)
    np.testing.assert_allclose(Gram.of(gram).explained(scores), expected, rtol=1e-7)


def test_nearly_equal_vectors_are_not_told_apart() -> None:
    """Eigenvalues below the cut-off are dropped, which a Cholesky factor would not do."""
    gram = gram_of(9, 6)
    twin = np.concatenate([np.arange(9), [0]])
    doubled = gram[np.ix_(twin, twin)]
    doubled[-1, -1] += 1e-12
    assert cholesky_factor(doubled) is None
    plain = np.linalg.pinv(doubled, rcond=CUTOFF, hermitian=True)
    np.testing.assert_allclose(pseudo_inverse(doubled), plain, atol=1e-9)


def test_a_ledger_of_many_tokens_is_the_same_by_either_path(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(2)
    words = Codebook("W_E", generator.standard_normal((90, 16)), tuple(map(str, range(90))))
    out = Codebook("W_U", generator.standard_normal((90, 16)), tuple(map(str, range(90))), "readout")
    families = [
        Family("copy", "W_E", "W_U", Association.identity(90)),
        Family("next", "W_E", "W_U", Association.of((t, (t + 1) % 90) for t in range(90))),
    ]
    matrices = generator.standard_normal((4, 16, 16))

    def read() -> list[np.ndarray]:
        ledger = Ledger([words], [out], families)
        shares = ledger.shares(matrices)
        wrong = Derangements.of(ledger, families[0], 5, np.random.default_rng(0))
        nulls = Nulls.of(ledger).shares(matrices)["rows"]
        return [*shares.associations.values(), *shares.cells.values(), shares.residual, wrong.shares(matrices),
                *nulls.values(), *ledger.coefficients(matrices).values()]  # fmt: skip

    fast = read()
    monkeypatch.setattr(module, "cholesky_factor", lambda gram: None)
    for quick, plain in zip(fast, read(), strict=True):
        np.testing.assert_allclose(quick, plain, rtol=1e-6, atol=1e-9)
