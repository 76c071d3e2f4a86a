"""Noisy in-context recall (Chen, Bruna, Bietti 2024): one layer stores the noise, another one recalls.

    z_1 ~ pi_u        after a trigger q_k: <noise> with probability alpha, else o_k       after <noise>: pi_u
    else              z_{t+1} ~ pi_b(. | z_t)

Outputs o_k are uniform over the tokens that are not triggers, so that nothing is absorbed. `<noise>` is a token of its
own, the last of the vocabulary; the authors' code uses one of the characters instead. The distribution of what follows it
is our choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from birthlens.config.task import NoiseConfig
from birthlens.errors import BirthlensError
from birthlens.labels import counted
from birthlens.shapes import Float, Int
from birthlens.tasks.baselines import uniform, unigram
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.corpus import BigramStatistics
from birthlens.tasks.sampling import Categorical, uniforms
from birthlens.tasks.task import ExpectedMemory, Predictor, Task, others_of, plain_batch, sequences_of, shifts

Array = np.ndarray
NOISE = "<noise>"


class NoiseTask(Task):
    """Sample batches in which a trigger's output is replaced by the noise token with probability alpha.

    Raises:
        BirthlensError: if the corpus is too small for the triggers, or holds the noise token.
    """

    Config = NoiseConfig
    title = "noisy in-context recall"
    roles = {
        "in_context": "a trigger whose output follows, and followed it before",
        "noise": "a trigger that the noise token follows: known no better than its rate alpha",
        "unpredictable": "a trigger whose output follows for the first time",
        "later_occurrence": "a trigger's second or later occurrence, whatever follows",
        "first_occurrence": "a trigger's first occurrence",
        "global": "a token that is not a trigger: the next token follows the bigrams of the corpus",
    }
    shown_roles = {"in_context": "in-context", "noise": "noise", "global": "global"}
    corruptions = ("new_outputs", "other_sequence")
    config: NoiseConfig

    def __init__(self, config: NoiseConfig, statistics: BigramStatistics) -> None:
        super().__init__(config, statistics)
        tokens = len(statistics) - 1
        if config.n_triggers + config.offset >= tokens:
            raise BirthlensError(
                f"task.n_triggers = {config.n_triggers}: the corpus of {tokens} tokens leaves "
                f"{max(tokens - config.offset - 1, 0)} (task.offset = {config.offset}); choose at most that many."
            )
        self.noise = tokens
        self._triggers = statistics.most_frequent(config.n_triggers, config.offset)
        self.outputs = np.setdiff1d(np.arange(tokens), self._triggers)
        self._first = Categorical(statistics.unigram[None])
        self._rows = Categorical(statistics.bigram)

    @classmethod
    def chain(cls, config: NoiseConfig, corpus: BigramStatistics | None) -> BigramStatistics:
        """Return the corpus's chain with the noise token, which never follows a token and is followed by pi_u."""
        return with_token(corpus, NOISE, lambda unigram: unigram)

    @property
    def fixed_triggers(self) -> Int[Array, "n_triggers"]:
        """Ids of the triggers, the same for all sequences."""
        return self._triggers

    @property
    def exact(self) -> str | None:
        """The predictor that is the exact distribution of the next token given the prefix."""
        return "bayes"

    @property
    def roles_are_known(self) -> bool:
        """False: the prefix does not determine whether the noise token or the output follows."""
        return False

    @property
    def setting(self) -> str:
        """The number of triggers, and how often noise follows them."""
        return f"K = {self.config.n_triggers}, alpha = {self.config.alpha:g}"

    @property
    def predictors(self) -> Mapping[str, Predictor]:
        """The reference predictors, from the least to the best informed."""
        return PREDICTORS

    @property
    def memories(self) -> tuple[ExpectedMemory, ...]:
        """The noise association: every trigger leads to the noise token, in the last feed-forward."""
        queries = tuple(self._triggers.tolist())
        return (ExpectedMemory("noise_memory", "feed_forward_memory", queries, (self.noise,) * len(queries)),)

    def story(self, source: str, labels: Sequence[str]) -> str:
        """Return what sequences follow; see `Task.story`."""
        which = " ".join(labels[i] for i in self._triggers)
        return (
            f"of {self.config.context} tokens, which follow {source} except after {counted(len(self._triggers), 'trigger')} "
            f"({which}): with probability {self.config.alpha:g} the noise token follows a trigger, else the output that the "
            "trigger has in this sequence. The noise can be learned as a global association; the output must be copied from "
            "the context."
        )

    def clean(self) -> NoiseTask:
        """Return the same task without noise, on which recall is tested."""
        return NoiseTask(self.config.changed(alpha=0.0), self.statistics)

    def corrupted(self, name: str, batch: TokenBatch, generator: np.random.Generator) -> TokenBatch:
        """Return corrupted sequences; "new_outputs" gives every trigger another output wherever its own followed it."""
        if name != "new_outputs":
            return super().corrupted(name, batch, generator)
        tokens = sequences_of(batch)
        k = len(self._triggers)
        index = self._places()
        trigger = index[tokens[:, :-1]]
        answers = (trigger >= 0) & (tokens[:, 1:] != self.noise)
        shift = np.take_along_axis(shifts(self.outputs, (len(tokens), k), generator), np.maximum(trigger, 0), axis=1)
        fresh = others_of(np.where(answers, tokens[:, 1:], self.outputs[0]), self.outputs, shift)
        tokens[:, 1:] = np.where(answers, fresh, tokens[:, 1:])
        return labelled(tokens, index, k, self.noise)

    def _places(self) -> Int[Array, "d_vocab"]:
        """Return each token's number among the triggers, or -1."""
        index = np.full(len(self.statistics), -1)
        index[self._triggers] = np.arange(len(self._triggers))
        return index

    def sample(self, n: int, generator: np.random.Generator) -> TokenBatch:
        """Draw n sequences; the same state of the generator gives the same batch."""
        k = len(self._triggers)
        length = self.config.context + 1
        outputs = self.outputs[generator.integers(len(self.outputs), size=(n, k))]
        uniform = uniforms((n, length), generator)
        noisy = uniforms((n, length), generator) < self.config.alpha
        index = self._places()
        each = np.arange(n)
        tokens = np.empty((n, length), dtype=np.int64)
        tokens[:, 0] = self._first.draw(np.zeros(n, dtype=np.int64), uniform[:, 0])
        for t in range(1, length):
            last = tokens[:, t - 1]
            trigger = index[last]
            answer = np.where(noisy[:, t], self.noise, outputs[each, trigger])
            tokens[:, t] = np.where(trigger >= 0, answer, self._rows.draw(last, uniform[:, t]))
        return labelled(tokens, index, k, self.noise)


def labelled(
    tokens: Int[Array, "batch pos_plus_one"],
    index: Int[Array, "d_vocab"],
    n_triggers: int,
    noise: int,
) -> TokenBatch:
    """Mark the roles of sequences; `index` gives a trigger's number, -1 for other tokens."""
    current = tokens[:, :-1]
    following = tokens[:, 1:]
    n, context = current.shape
    each = np.arange(n)
    occurrence = np.zeros((n, context), dtype=np.int64)
    seen = np.zeros((n, context), dtype=bool)
    counts = np.zeros((n, n_triggers), dtype=np.int64)
    recalled = np.zeros((n, n_triggers), dtype=bool)
    for t in range(context):
        trigger = index[current[:, t]]
        here = trigger >= 0
        counts[each[here], trigger[here]] += 1
        occurrence[:, t] = np.where(here, counts[each, trigger], 0)
        seen[:, t] = here & recalled[each, trigger]
        shown = here & (following[:, t] != noise)
        recalled[each[shown], trigger[shown]] = True
    is_trigger = occurrence > 0
    is_noise = is_trigger & (following == noise)
    marks = {
        "in_context": seen & ~is_noise,
        "noise": is_noise,
        "unpredictable": is_trigger & ~is_noise & ~seen,
        "later_occurrence": occurrence >= 2,
        "global": ~is_trigger,
    }
    return plain_batch(tokens, occurrence, marks)


def with_token(corpus: BigramStatistics | None, label: str, row: Any) -> BigramStatistics:
    """Append a special token that never follows a token; `row` maps the unigram distribution to that of its successors."""
    assert corpus is not None
    if label in corpus.vocab:
        raise BirthlensError(f"the corpus holds the token {label!r}, which this task uses itself; rename it there.")
    n = len(corpus)
    unigram = np.append(corpus.unigram, 0.0)
    bigram = np.zeros((n + 1, n + 1))
    bigram[:n, :n] = corpus.bigram
    bigram[n, :n] = row(corpus.unigram)
    return BigramStatistics((*corpus.vocab, label), unigram, bigram)


def distributional(task: NoiseTask, batch: TokenBatch) -> Float[Array, "batch pos d_vocab"]:
    """Return the distribution of the next token given the last one alone: the noise is known, the outputs are not."""
    return _law(task, batch, np.zeros((*batch.tokens.shape, len(task.statistics))))


def bayes_optimal(task: NoiseTask, batch: TokenBatch) -> Float[Array, "batch pos d_vocab"]:
    """Return the distribution of the next token given the whole prefix: exact, because the triggers are known."""
    tokens = batch.tokens.numpy()
    n, context = tokens.shape
    each = np.arange(n)
    is_trigger = np.isin(tokens, task.fixed_triggers)
    answers = np.full((n, len(task.statistics)), -1)
    copied = np.zeros((n, context, len(task.statistics)))
    for t in range(context):
        known = answers[each, tokens[:, t]]
        found = is_trigger[:, t] & (known >= 0)
        copied[each[found], t, known[found]] = 1.0
        if t + 1 < context:
            shown = is_trigger[:, t] & (tokens[:, t + 1] != task.noise)
            answers[each[shown], tokens[shown, t]] = tokens[shown, t + 1]
    return _law(task, batch, copied)


def _law(
    task: NoiseTask, batch: TokenBatch, copied: Float[Array, "batch pos d_vocab"]
) -> Float[Array, "batch pos d_vocab"]:
    """Mix noise and output after triggers; the output is `copied` if that is not all zero, otherwise uniform."""
    tokens = batch.tokens.numpy()
    guess = np.zeros(len(task.statistics))
    guess[task.outputs] = 1 / len(task.outputs)
    output = np.where(copied.any(-1, keepdims=True), copied, guess)
    after_trigger = (1 - task.config.alpha) * output
    after_trigger[..., task.noise] += task.config.alpha
    is_trigger = np.isin(tokens, task.fixed_triggers)[..., None]
    return np.where(is_trigger, after_trigger, task.statistics.bigram[tokens])


PREDICTORS: Mapping[str, Predictor] = {
    "uniform": uniform,
    "unigram": unigram,
    "distributional": distributional,
    "bayes": bayes_optimal,
}
"""The predictors by name, from the least to the best informed."""
