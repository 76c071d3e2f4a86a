"""Dual vectors of a codebook, used to read a memory whose entries are not orthonormal (paper section 7)."""

from __future__ import annotations

import numpy as np

from birthlens.shapes import Float

Array = np.ndarray


def dual_vectors(vectors: Float[Array, "*step entry d"]) -> Float[Array, "*step entry d"]:
    """Return the rows of (U^+)^T, from the eigenvalues of the smaller Gram matrix in float64.

    Singular values below min(entry, d) machine epsilons of the largest count as zero.
    """
    entries, width = vectors.shape[-2:]
    if entries <= width:
        exact = vectors.astype(np.float64)
        inverse = _gram_inverse(exact @ exact.swapaxes(-1, -2), vectors.dtype)
        return (inverse @ exact).astype(vectors.dtype)
    # Process tall codebooks in blocks, so that a vocabulary of 50,000 is not copied to float64 as a whole.
    blocks = [slice(start, start + 4096) for start in range(0, entries, 4096)]
    gram = np.zeros((*vectors.shape[:-2], width, width))
    for block in blocks:
        exact = vectors[..., block, :].astype(np.float64)
        gram += exact.swapaxes(-1, -2) @ exact
    inverse = _gram_inverse(gram, vectors.dtype)
    dual = np.empty_like(vectors)
    for block in blocks:
        dual[..., block, :] = vectors[..., block, :].astype(np.float64) @ inverse
    return dual


def _gram_inverse(gram: Float[Array, "*step n n"], dtype: np.dtype[np.floating]) -> Float[Array, "*step n n"]:
    values, basis = np.linalg.eigh(gram)
    # Rounding of a Gram matrix in float64 hides singular values below 1e-7 of the largest, whatever the input's precision.
    tolerance = max(gram.shape[-1] * float(np.finfo(dtype).eps), 1e-7)
    kept = values > values[..., -1:] * tolerance**2
    inverse = np.where(kept, 1 / np.where(kept, values, 1), 0)
    return np.asarray((basis * inverse[..., None, :]) @ basis.swapaxes(-1, -2))
