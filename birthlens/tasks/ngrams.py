"""Predictors that know how often tokens follow each other in a text: n-grams with back-off (Witten and Bell 1991).

    p(w | h) = (c(h, w) + T(h) p(w | h')) / (c(h) + T(h))

c counts in the training part of the text, h' is the history h without its first token, and T(h) is the number of different
tokens that have followed h. A history that never occurred backs off to h' completely. Below the unigram is the uniform
distribution, so that every token has some probability.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from scipy.sparse import csr_array

from birthlens.shapes import Float, Int

Array = np.ndarray


class NGrams:
    """Unigrams, bigrams and trigrams of a stream of token ids."""

    def __init__(self, stream: Int[Array, "token"], d_vocab: int) -> None:
        self._stream = stream
        self.d_vocab = d_vocab

    @cached_property
    def unigram(self) -> Float[Array, "d_vocab"]:
        """p(w)."""
        counts = np.bincount(self._stream, minlength=self.d_vocab).astype(float)
        kinds = np.count_nonzero(counts)
        return np.asarray((counts + kinds / self.d_vocab) / (len(self._stream) + kinds))

    @cached_property
    def _counts(self) -> list[csr_array]:
        """How often each token has followed each history of one and of two tokens."""
        n = self.d_vocab
        now = self._stream.astype(np.int64)
        ones = np.ones(len(now))
        pairs = csr_array((ones[1:], (now[:-1], now[1:])), shape=(n, n))
        triples = csr_array((ones[2:], (now[:-2] * n + now[1:-1], now[2:])), shape=(n * n, n))
        for table in (pairs, triples):
            table.sum_duplicates()
        return [pairs, triples]

    def _backed_off(
        self, order: int, history: Int[Array, "row"], lower: Float[Array, "row d_vocab"]
    ) -> Float[Array, "row d_vocab"]:
        counts = self._counts[order - 1][history].toarray()
        kinds = np.count_nonzero(counts, axis=1)[:, None]
        total = counts.sum(1, keepdims=True) + kinds
        return np.asarray(np.where(total > 0, (counts + kinds * lower) / np.maximum(total, 1), lower))

    def bigram(self, tokens: Int[Array, "batch pos"]) -> Float[Array, "batch pos d_vocab"]:
        """Return p(w | z_t) at every position."""
        last = tokens.reshape(-1)
        lower = np.broadcast_to(self.unigram, (len(last), self.d_vocab))
        return self._backed_off(1, last, lower).reshape(*tokens.shape, self.d_vocab)

    def trigram(self, tokens: Int[Array, "batch pos"]) -> Float[Array, "batch pos d_vocab"]:
        """Return p(w | z_{t-1}, z_t) at every position; at the first, which has one token only, p(w | z_t)."""
        found = self.bigram(tokens)
        history = (tokens[:, :-1] * self.d_vocab + tokens[:, 1:]).reshape(-1)
        lower = found[:, 1:].reshape(-1, self.d_vocab)
        found[:, 1:] = self._backed_off(2, history, lower).reshape(found[:, 1:].shape)
        return found
