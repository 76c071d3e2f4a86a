"""In-context Markov chains (Edelman et al. 2024; with finitely many chains, Park et al. 2024).

Each sequence has a chain of its own. With order m, the next token follows the row of the m last tokens:

    rows ~ Dirichlet(concentration, ..., concentration)      z_1 .. z_m uniform      z_{t+1} ~ row(z_{t-m+1} .. z_t)

or rows of a doubly stochastic chain (`chains`).

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
from birthlens.tasks.chains import drawn_chains, stationary_laws
from birthlens.tasks.corpus import BigramStatistics
from birthlens.tasks.task import Predictor, Task, plain_batch

Array = np.ndarray
SAMPLED = 8192
"""How many chains stand for the distribution of doubly stochastic ones in `bayes`."""
MOST_STATES = 3
"""With more states the sample would be too small."""
LAWS = {"doubly_stochastic": "uniform", "sinkhorn": "Sinkhorn"}


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
        return drawn_chains(self.config, self.config.chains, np.random.default_rng(self.config.chains_seed))

    @cached_property
    def sample_of_chains(self) -> Float[Array, "chain history d_vocab"]:
        """Chains drawn from their distribution, in place of it (`bayes`)."""
        return drawn_chains(self.config, SAMPLED, np.random.default_rng(0))

    @property
    def exact(self) -> str | None:
        """The predictor that is the distribution of the next token, exactly or nearly; None if there is none."""
        config = self.config
        if config.rows != "dirichlet":
            return "retrieval" if config.chains else "bayes" if config.states <= MOST_STATES else None
        if config.start == "stationary":
            return None
        return "retrieval" if config.chains else "bigram" if config.order == 1 else "trigram"

    @property
    def approximation(self) -> str:
        """How far the mixture of sampled chains is from the exact distribution; empty for an exact predictor."""
        if self.exact != "bayes" or closed(self.config):
            return ""
        return (
            f"For doubly stochastic chains it is an approximation: a mixture of {SAMPLED:,} chains drawn at random. "
            "Its mean KL divergence from a mixture of 100,000 others is 0.0002 nats (3 states, 64 tokens)."
        )

    @property
    def setting(self) -> str:
        """The numbers of states and chains."""
        chains = f", {self.config.chains} chains" if self.config.chains else ""
        law = "" if self.config.rows == "dirichlet" else f", doubly stochastic ({LAWS[self.config.rows]})"
        return f"{self.config.states} states, order {self.config.order}{law}{chains}"

    @property
    def predictors(self) -> Mapping[str, Predictor]:
        """The reference predictors, from the least to the best informed."""
        found: dict[str, Predictor] = {"uniform": uniform, "unigram": unigram, "bigram": bigram}
        if self.config.order == 2:
            found["trigram"] = trigram
        if self.config.chains:
            found["retrieval"] = retrieval
        elif self.exact == "bayes":
            found["bayes"] = bayes
        return found

    def story(self, source: str, labels: Sequence[str]) -> str:
        """Return what sequences follow; see `Task.story`."""
        config = self.config
        last = "last token" if config.order == 1 else f"last {config.order} tokens"
        kind = "" if config.rows == "dirichlet" else "doubly stochastic "
        where = (
            f"one of {counted(config.chains, f'{kind}chain')}, a new choice for each sequence"
            if config.chains
            else f"a new {kind}Markov chain for each sequence"
        )
        how = (
            "by counting tokens (unigrams), or better by counting"
            if config.rows == "dirichlet"
            else "in the long run every token is as frequent as any other, so only counting helps"
        )
        return (
            f"of {config.context} tokens out of {config.states}, which follow {where}. The next token depends on the "
            f"{last}; how, must be read from the context: {how} what followed the {last} before."
        )

    def sample(self, n: int, generator: np.random.Generator) -> TokenBatch:
        """Draw n sequences; the same state of the generator gives the same batch."""
        config = self.config
        states = config.states
        order = config.order
        length = config.context + 1
        rows = (
            drawn_chains(config, n, generator)
            if self.pool is None
            else self.pool[generator.integers(config.chains, size=n)]
        )
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
    return _mixture(task, batch, task.pool)


def bayes(task: MarkovTask, batch: TokenBatch) -> Float[Array, "batch pos d_vocab"]:
    """Return the distribution of the next token, for doubly stochastic chains: a mixture of sampled chains.

    With two states and `doubly_stochastic` it is exact: after n transitions, s of them to the same token, the next one goes
    to the same token with probability (s + 1) / (n + 2).
    """
    if not closed(task.config):
        return _mixture(task, batch, task.sample_of_chains)
    tokens = batch.tokens.numpy()
    same = np.zeros(tokens.shape)
    same[:, 1:] = (tokens[:, 1:] == tokens[:, :-1]).cumsum(1)
    stays = (same + 1) / (np.arange(tokens.shape[1]) + 2)
    return np.where(np.arange(2) == tokens[..., None], stays[..., None], 1 - stays[..., None])


def closed(config: MarkovConfig) -> bool:
    """Return whether the distribution of the next token is known in closed form."""
    return config.rows == "doubly_stochastic" and config.states == 2


def _mixture(
    task: MarkovTask, batch: TokenBatch, chains: Float[Array, "chain history d_vocab"]
) -> Float[Array, "batch pos d_vocab"]:
    tokens = batch.tokens.numpy()
    order = task.config.order
    histories = histories_of(tokens, task.config.states, order)
    with np.errstate(divide="ignore"):
        log_rows = np.log(chains)
    evidence = np.zeros((len(tokens), len(chains)))
    if task.config.start == "stationary":
        evidence += np.log(stationary_laws(chains))[:, tokens[:, 0]].T
    found = np.full((*tokens.shape, task.config.states), 1 / task.config.states)
    for t in range(order - 1, tokens.shape[1]):
        if t >= order:
            evidence += log_rows[:, histories[:, t - 1], tokens[:, t]].T
        posterior = np.exp(evidence - evidence.max(1, keepdims=True))
        posterior /= posterior.sum(1, keepdims=True)
        found[:, t] = np.einsum("bm,mbj->bj", posterior, chains[:, histories[:, t]])
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
