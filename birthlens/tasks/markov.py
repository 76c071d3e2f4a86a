"""In-context Markov chains (Edelman et al. 2024; with finitely many chains, Park et al. 2024).

Each sequence has a chain of its own. With order m, the next token follows the row of the m last tokens:

    rows ~ Dirichlet(concentration, ..., concentration)      z_1 .. z_m uniform      z_{t+1} ~ row(z_{t-m+1} .. z_t)

With a uniform start, the Dirichlet posterior of the row is the exact distribution of the next token. The published start,
from the stationary distribution of the chain, contains some more information about the rows; no predictor here is exact
then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from birthlens.config.task import MarkovConfig
from birthlens.labels import counted
from birthlens.shapes import Float, Int
from birthlens.tasks.baselines import uniform
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.corpus import BigramStatistics
from birthlens.tasks.task import Predictor, Task, plain_batch

Array = np.ndarray


class MarkovTask(Task):
    """Sample batches of sequences that each follow a Markov chain of their own."""

    Config = MarkovConfig
    needs_corpus = False
    title = "in-context Markov chains"
    roles = {
        "in_context": "a history that occurred before in the sequence: what followed it is a sample of its row",
        "unpredictable": "a history that occurs for the first time: nothing is known about its row",
    }
    shown_roles = {"in_context": "in-context"}
    config: MarkovConfig

    @classmethod
    def chain(cls, config: MarkovConfig, corpus: BigramStatistics | None) -> BigramStatistics:
        """Return the average chain: every token is as probable as any other, after every token."""
        n = config.states
        return BigramStatistics(tuple(str(i) for i in range(n)), np.full(n, 1 / n), np.full((n, n), 1 / n))

    @property
    def histories(self) -> int:
        """The number of rows of a chain: one for each sequence of `order` tokens."""
        return self.config.states**self.config.order

    @cached_property
    def pool(self) -> Float[Array, "chain history d_vocab"] | None:
        """The chains that sequences follow, if their number is finite; all are equally probable."""
        if not self.config.chains:
            return None
        return self._rows(self.config.chains, np.random.default_rng(self.config.chains_seed))

    @property
    def exact(self) -> str | None:
        """The predictor that is exactly the distribution of the next token; None for a stationary start."""
        if self.config.start == "stationary":
            return None
        return "retrieval" if self.config.chains else "bigram" if self.config.order == 1 else "trigram"

    @property
    def setting(self) -> str:
        """The numbers of states and chains."""
        chains = f", {self.config.chains} chains" if self.config.chains else ""
        return f"{self.config.states} states, order {self.config.order}{chains}"

    @property
    def predictors(self) -> Mapping[str, Predictor]:
        """The reference predictors, from the least to the best informed."""
        found: dict[str, Predictor] = {"uniform": uniform, "unigram": unigram, "bigram": bigram}
        if self.config.order == 2:
            found["trigram"] = trigram
        if self.config.chains:
            found["retrieval"] = retrieval
        return found

    def story(self, source: str, labels: Sequence[str]) -> str:
        """Return what sequences follow; see `Task.story`."""
        config = self.config
        last = "last token" if config.order == 1 else f"last {config.order} tokens"
        where = (
            f"one of {counted(config.chains, 'chain')}, a new choice for each sequence"
            if config.chains
            else "a new Markov chain for each sequence"
        )
        return (
            f"of {config.context} tokens out of {config.states}, which follow {where}. The next token depends on the "
            f"{last}; how, must be read from the context: by counting tokens (unigrams), or better by counting what "
            f"followed the {last} before."
        )

    def sample(self, n: int, generator: np.random.Generator) -> TokenBatch:
        """Draw n sequences; the same state of the generator gives the same batch."""
        config = self.config
        states = config.states
        order = config.order
        length = config.context + 1
        rows = self._rows(n, generator) if self.pool is None else self.pool[generator.integers(config.chains, size=n)]
        steps = rows.cumsum(-1)
        uniform = generator.random((n, length))
        each = np.arange(n)
        tokens = np.empty((n, length), dtype=np.int64)
        if config.start == "stationary":
            tokens[:, 0] = _drawn(stationary_laws(rows).cumsum(-1), uniform[:, 0])
        else:
            tokens[:, :order] = np.minimum((uniform[:, :order] * states).astype(np.int64), states - 1)
        for t in range(order, length):
            history = history_of(tokens[:, t - order : t], states)
            tokens[:, t] = _drawn(steps[each, history], uniform[:, t])
        histories = histories_of(tokens[:, :-1], states, order)
        occurrence = occurrences(histories, self.histories)
        return plain_batch(tokens, occurrence, {"in_context": occurrence >= 2, "unpredictable": occurrence <= 1})

    def _rows(self, n: int, generator: np.random.Generator) -> Float[Array, "chain history d_vocab"]:
        weights = generator.standard_gamma(self.config.concentration, (n, self.histories, self.config.states))
        weights = np.maximum(weights, np.finfo(float).tiny)  # a tiny concentration can underflow a whole row to zero
        return np.asarray(weights / weights.sum(-1, keepdims=True))


def history_of(tokens: Int[Array, "*batch order"], states: int) -> Int[Array, "*batch"]:
    """Return the number of a history: its tokens as digits."""
    number = np.zeros(tokens.shape[:-1], dtype=np.int64)
    for place in range(tokens.shape[-1]):
        number = number * states + tokens[..., place]
    return number


def histories_of(tokens: Int[Array, "batch pos"], states: int, order: int) -> Int[Array, "batch pos"]:
    """Return the history at every position, or -1 if fewer than `order` tokens have been seen."""
    found = np.full(tokens.shape, -1, dtype=np.int64)
    for t in range(order - 1, tokens.shape[1]):
        found[:, t] = history_of(tokens[:, t - order + 1 : t + 1], states)
    return found


def occurrences(values: Int[Array, "batch pos"], n: int) -> Int[Array, "batch pos"]:
    """Count how many times the value at each position has occurred up to and including it; 0 if it is negative."""
    batch, length = values.shape
    each = np.arange(batch)
    counts = np.zeros((batch, n + 1), dtype=np.int64)
    found = np.zeros(values.shape, dtype=np.int64)
    for t in range(length):
        counts[each, values[:, t]] += 1
        found[:, t] = np.where(values[:, t] >= 0, counts[each, values[:, t]], 0)
    return found


def stationary_laws(rows: Float[Array, "chain state state"]) -> Float[Array, "chain state"]:
    """Return the stationary distribution of each chain, from pi (P - 1) = 0 and sum pi = 1."""
    n = rows.shape[-1]
    system = np.swapaxes(rows, -1, -2) - np.eye(n)
    system[:, -1] = 1.0
    right = np.zeros((len(rows), n, 1))
    right[:, -1] = 1.0
    laws = np.maximum(np.linalg.solve(system, right)[..., 0], 0.0)
    return np.asarray(laws / laws.sum(-1, keepdims=True))


def _drawn(steps: Float[Array, "batch d_vocab"], uniform: Float[Array, "batch"]) -> Int[Array, "batch"]:
    """Invert distribution functions; the last step counts as 1, whatever it was rounded to."""
    return (steps[:, :-1] <= uniform[:, None]).sum(-1)


def unigram(task: MarkovTask, batch: TokenBatch) -> Float[Array, "batch pos d_vocab"]:
    """Return (n_j + c) / (t + k c), n_j being how often token j has occurred."""
    hot = np.eye(task.config.states)[batch.tokens.numpy()]
    return _posterior(hot.cumsum(1), task.config.concentration)


def bigram(task: MarkovTask, batch: TokenBatch) -> Float[Array, "batch pos d_vocab"]:
    """Return (n_ij + c) / (n_i. + k c), i being the last token and n_ij how often j has followed i."""
    return _posterior(_followed(task, batch, 1), task.config.concentration)


def trigram(task: MarkovTask, batch: TokenBatch) -> Float[Array, "batch pos d_vocab"]:
    """Return the same for the last two tokens; uniform if there is only one."""
    return _posterior(_followed(task, batch, 2), task.config.concentration)


def retrieval(task: MarkovTask, batch: TokenBatch) -> Float[Array, "batch pos d_vocab"]:
    """Return the mixture of the pool's chains by their posterior probability given the prefix."""
    assert task.pool is not None
    tokens = batch.tokens.numpy()
    order = task.config.order
    histories = histories_of(tokens, task.config.states, order)
    with np.errstate(divide="ignore"):
        log_rows = np.log(task.pool)
    evidence = np.zeros((len(tokens), len(task.pool)))
    if task.config.start == "stationary":
        evidence += np.log(stationary_laws(task.pool))[:, tokens[:, 0]].T
    found = np.full((*tokens.shape, task.config.states), 1 / task.config.states)
    for t in range(order - 1, tokens.shape[1]):
        if t >= order:
            evidence += log_rows[:, histories[:, t - 1], tokens[:, t]].T
        posterior = np.exp(evidence - evidence.max(1, keepdims=True))
        posterior /= posterior.sum(1, keepdims=True)
        found[:, t] = np.einsum("bm,mbj->bj", posterior, task.pool[:, histories[:, t]])
    return found


def _followed(task: MarkovTask, batch: TokenBatch, order: int) -> Float[Array, "batch pos d_vocab"]:
    """Count, at each position, the earlier successors of its history of `order` tokens."""
    tokens = batch.tokens.numpy()
    states = task.config.states
    histories = histories_of(tokens, states, order)
    each = np.arange(len(tokens))
    counts = np.zeros((len(tokens), states**order + 1, states))
    found = np.zeros((*tokens.shape, states))
    for t in range(tokens.shape[1]):
        if t and t >= order:
            counts[each, histories[:, t - 1], tokens[:, t]] += 1
        known = histories[:, t] >= 0
        found[known, t] = counts[each[known], histories[known, t]]
    return found


def _posterior(counts: Float[Array, "batch pos d_vocab"], prior: float) -> Float[Array, "batch pos d_vocab"]:
    weights = counts + prior
    return np.asarray(weights / weights.sum(-1, keepdims=True))
