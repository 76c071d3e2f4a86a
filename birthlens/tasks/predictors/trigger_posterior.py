"""Which tokens are triggers, given the prefix: the posterior behind the Bayes-optimal predictor with random triggers.

Triggers Q are K draws from pi_u without replacement: the K first of independent clocks T_a ~ Exp(pi_a). Given Q, a prefix
has likelihood prod_{a in Q} I_a prod_{a not in Q} O_a, up to what does not depend on Q, where over the successors seen of a

    O_a = prod pi_b(successor | a)          I_a = P(output of a) at the one successor, 0 if two differ, 1 where none

Conditioning on the time s of the K-th clock makes tokens independent, so that the sum over all sets Q is one integral:

    sum_Q P(Q) ... = int ds [y^K] d/d(last)  prod_a ( O_a e^{-pi_a s} + y I_a ( (1 - e^{-pi_a s}) + last pi_a e^{-pi_a s} ) )

a product of polynomials, all terms positive, and a double-exponential quadrature: exact to rounding wherever the
distribution of a's output depends on a alone. With cycles="clean" it depends on the other triggers too. There the pairs that
exclude each other are exact between the current token and every other token and neglected among the others, and the
normaliser of an output distribution is its mean over Q given a; exact if outputs are uniform over the whole vocabulary.
`BigramTask.approximation` states the measured error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from birthlens.shapes import Bool, Float, Int
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.bigram import BigramTask

Array = np.ndarray
_BLOCK = 512
_ENTRIES = 4_000_000  # of a table over batch, pos and d_vocab that is held at once
_LOWEST = -40.0


@dataclass(frozen=True, eq=False)
class TriggerPosterior:
    """The posterior over random triggers, and the predictive distribution of a trigger's output."""

    task: BigramTask

    @cached_property
    def output_weights(self) -> Float[Array, "d_vocab d_vocab"]:
        """Weight of each output, given that the row is a trigger and the output is no other trigger; rows sum to >= 1."""
        config = self.task.config
        statistics = self.task.statistics
        n = len(statistics)
        laws = self.task.output_distribution(np.arange(n)[:, None])[:, 0]
        return laws / self._outside(laws) if config.cycles == "clean" else laws

    @cached_property
    def output_law(self) -> Float[Array, "d_vocab d_vocab"]:
        """Distribution of the output of each token if it is a trigger, over all other triggers (rows sum to 1)."""
        if self.task.config.cycles != "clean":
            return self.output_weights
        return np.asarray(self.output_weights * (1 - self._pair_inclusion))

    def _outside(self, laws: Float[Array, "d_vocab d_vocab"]) -> Float[Array, "d_vocab 1"]:
        return (laws * (1 - self._pair_inclusion)).sum(-1, keepdims=True)

    @cached_property
    def _quadrature(self) -> tuple[Float[Array, "node"], Float[Array, "node"]]:
        """Nodes and weights on (0, inf): s = exp(v - exp(-v)), trapezoidal in v."""
        unigram = np.sort(self.task.statistics.unigram)
        unigram = unigram[unigram > 0]
        slowest = unigram[: len(unigram) - self.task.config.n_triggers + 1].sum()
        v = np.arange(-3.2, np.log(40 / slowest), 0.2)
        s = np.exp(v - np.exp(-v))
        return s, 0.2 * s * (1 + np.exp(-v))

    @cached_property
    def _pair_inclusion(self) -> Float[Array, "d_vocab d_vocab"]:
        """P(b in Q | a in Q) a priori, for rows a; 0 on the diagonal."""
        n = len(self.task.statistics)
        share = np.zeros((n, n))
        for a in range(n):
            outside = np.ones((n, n))
            outside[:, a] = 0
            without, with_ = self._masses(np.ones((n, n)), outside, np.arange(n))
            share[a] = np.divide(with_, without + with_, out=share[a], where=without + with_ > 0)
        np.fill_diagonal(share, 0)
        return share

    def current_is_trigger(self, batch: TokenBatch) -> Float[Array, "batch pos"]:
        """Return the posterior probability, given the prefix up to each position, that its token is a trigger."""
        rows = max(1, _ENTRIES // (batch.tokens.shape[1] * len(self.task.statistics)))
        return np.concatenate([self._chances(part.tokens.numpy()) for part in batch.chunks(rows)])

    def _chances(self, tokens: Int[Array, "batch pos"]) -> Float[Array, "batch pos"]:
        inside, outside, successor = self._evidence(tokens)
        undecided = np.take_along_axis(inside, tokens[..., None], -1)[..., 0] > 0
        posterior = np.zeros(tokens.shape)
        posterior[undecided] = self._posterior(
            inside[undecided], outside[undecided], successor[undecided], tokens[undecided]
        )
        return posterior

    def _evidence(
        self, tokens: Int[Array, "batch pos"]
    ) -> tuple[Float[Array, "batch pos d_vocab"], Float[Array, "batch pos d_vocab"], Int[Array, "batch pos d_vocab"]]:
        """Return I and O (the larger of the two scaled to 1), and the first successor of each token (-1: none yet)."""
        n_rows, length = tokens.shape
        n = len(self.task.statistics)
        each = np.arange(n_rows)
        with np.errstate(divide="ignore"):
            log_bigram = np.log(self.task.statistics.bigram)
            log_output = np.log(self.output_law)
        first = np.full((n_rows, n), -1)
        log_in = np.zeros((n_rows, n))
        log_out = np.zeros((n_rows, n))
        inside = np.empty((n_rows, length, n))
        outside = np.empty((n_rows, length, n))
        successor = np.empty((n_rows, length, n), dtype=np.int64)
        for t in range(length):
            if t > 0:
                a = tokens[:, t - 1]
                b = tokens[:, t]
                fresh = first[each, a] < 0
                first[each, a] = np.where(fresh, b, first[each, a])
                log_in[each, a] += np.where(fresh, log_output[a, b], np.where(first[each, a] == b, 0, -np.inf))
                log_out[each, a] += log_bigram[a, b]
            top = np.maximum(np.maximum(log_in, log_out), -1e300)
            inside[:, t] = np.exp(log_in - top)
            outside[:, t] = np.exp(np.maximum(log_out - top, _LOWEST))
            successor[:, t] = first
        return inside, outside, successor

    def _posterior(
        self,
        inside: Float[Array, "n d_vocab"],
        outside: Float[Array, "n d_vocab"],
        successor: Int[Array, "n d_vocab"],
        token: Int[Array, "n"],
    ) -> Float[Array, "n"]:
        without, with_ = self._masses(inside, outside, token)
        if self.task.config.cycles == "clean":
            with_ = self._masses(*self._exclusive(inside, outside, successor, token), token)[1]
        total = without + with_
        return np.divide(with_, total, out=np.zeros(len(token)), where=total > 0)

    def _exclusive(
        self, inside: Array, outside: Array, successor: Array, token: Array
    ) -> tuple[Float[Array, "n d_vocab"], Float[Array, "n d_vocab"]]:
        """Rule out, given that `token` is a trigger, its successor and all whose successor it is."""
        each = np.arange(len(token))
        n = inside.shape[1]
        seen = successor[each, token]
        rivals: Bool[Array, "n d_vocab"] = (successor == token[:, None]) | (np.arange(n) == seen[:, None])
        changed = np.where(rivals, 0.0, inside)
        # The distribution of the current token's output no longer averages over whether that output is a trigger.
        gain = np.where(seen >= 0, self.output_weights[token, seen] / _positive(self.output_law[token, seen]), 1.0)
        changed[each, token] = inside[each, token] * gain
        return changed, outside

    def _masses(
        self, inside: Float[Array, "n d_vocab"], outside: Float[Array, "n d_vocab"], token: Int[Array, "n"]
    ) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
        """Sum over all sets Q without, and with, `token`: P(Q) prod_{a in Q} inside_a prod_{a not in Q} outside_a."""
        parts = [
            self._block_masses(inside[rows], outside[rows], token[rows])
            for rows in (slice(first, first + _BLOCK) for first in range(0, len(token), _BLOCK))
        ]
        without, with_ = (np.concatenate(part) for part in zip(*parts, strict=True)) if parts else (np.zeros(0),) * 2
        return without, with_

    def _block_masses(self, inside: Array, outside: Array, token: Array) -> tuple[Array, Array]:
        s, weight = self._quadrature
        unigram = self.task.statistics.unigram
        k = self.task.config.n_triggers
        late = np.exp(-unigram[:, None] * s)  # P(the clock of a rings after s), [d_vocab node]
        early = -np.expm1(-unigram[:, None] * s)
        # chosen[i]: i triggers so far, all before s; closed[i]: the last of them rings at s itself.
        chosen = np.zeros((k + 1, len(token), len(s)))
        closed = np.zeros_like(chosen)
        chosen[0] = 1
        for a in range(len(unigram)):
            mine = token == a
            stay = np.where(mine, 1.0, outside[:, a])[:, None] * np.where(mine[:, None], 1.0, late[a])
            come = np.where(mine, 0.0, inside[:, a])[:, None]
            join = come * early[a]
            last = come * (unigram[a] * late[a])
            closed[1:] = closed[1:] * stay + closed[:-1] * join + chosen[:-1] * last
            chosen[1:] = chosen[1:] * stay + chosen[:-1] * join
            chosen[0] *= stay
        each = np.arange(len(token))
        without = outside[each, token] * ((closed[k] * late[token]) @ weight)
        ringing = closed[k - 1] * early[token] + chosen[k - 1] * (unigram[token, None] * late[token])
        return without, inside[each, token] * (ringing @ weight)


def _positive(values: Array) -> Array:
    return np.where(values > 0, values, 1.0)
