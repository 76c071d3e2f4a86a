"""Bigram-Backcopy (Guo et al. 2024): a task on which heads attend to the first token when they have nothing to copy.

    position 0 is <bos>      z_1 ~ pi_u without the triggers      after a trigger: the token before it      else pi_b

The first token after `<bos>` is not a trigger, so a trigger always stands between two copies of the same token, which is
not a trigger: triggers are never adjacent, and nothing is absorbed. Every target is predictable: the exact distribution is
the rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from birthlens.config.task import BackcopyConfig
from birthlens.errors import BirthlensError
from birthlens.labels import counted
from birthlens.shapes import Float, Int
from birthlens.tasks.baselines import global_bigram, uniform, unigram
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.corpus import BigramStatistics
from birthlens.tasks.noise import with_token
from birthlens.tasks.sampling import Categorical, uniforms
from birthlens.tasks.task import Predictor, Task, others_of, plain_batch, sequences_of, shifts

Array = np.ndarray
BOS = "<bos>"


class BackcopyTask(Task):
    """Sample batches in which a trigger is followed by the token before it.

    Raises:
        BirthlensError: if the corpus leaves no token that is not a trigger.
    """

    Config = BackcopyConfig
    title = "bigrams and back-copies"
    roles = {
        "in_context": "a trigger: the token before it follows",
        "global": "a token that is not a trigger: the next token follows the bigrams of the corpus",
    }
    corruptions = ("other_copies", "other_sequence")
    config: BackcopyConfig

    def __init__(self, config: BackcopyConfig, statistics: BigramStatistics) -> None:
        super().__init__(config, statistics)
        self.bos = len(statistics) - 1
        self._triggers = _triggers(config, statistics)
        self._first = Categorical(statistics.bigram[self.bos][None])
        self._rows = Categorical(statistics.bigram)

    @classmethod
    def chain(cls, config: BackcopyConfig, corpus: BigramStatistics | None) -> BigramStatistics:
        """Return the corpus's chain with `<bos>`, which never follows a token and is followed by a non-trigger."""

        def row(unigram: Float[Array, "d_vocab"]) -> Float[Array, "d_vocab"]:
            assert corpus is not None
            others = unigram.copy()
            others[_triggers(config, corpus)] = 0.0
            if others.sum() == 0:
                raise BirthlensError(
                    f"task.n_triggers = {config.n_triggers}: the corpus of {len(corpus)} tokens leaves none that is not a "
                    "trigger; use fewer."
                )
            return np.asarray(others / others.sum())

        return with_token(corpus, BOS, row)

    @property
    def fixed_triggers(self) -> Int[Array, "n_triggers"]:
        """Ids of the triggers, the same for all sequences."""
        return self._triggers

    @property
    def exact(self) -> str | None:
        """The predictor that is the exact distribution of the next token given the prefix."""
        return "law"

    @property
    def setting(self) -> str:
        """The number of triggers."""
        return f"K = {self.config.n_triggers}"

    @property
    def predictors(self) -> Mapping[str, Predictor]:
        """The reference predictors, from the least to the best informed."""
        return PREDICTORS

    def story(self, source: str, labels: Sequence[str]) -> str:
        """Return what sequences follow; see `Task.story`."""
        which = " ".join(labels[i] for i in self._triggers)
        return (
            f"of {self.config.context} tokens that start with <bos> and follow {source} except after "
            f"{counted(len(self._triggers), 'trigger')} ({which}): the token before a trigger follows it again. A head that "
            "copies it has nothing to do at the other tokens, and may rest its attention on the first one."
        )

    def sample(self, n: int, generator: np.random.Generator) -> TokenBatch:
        """Draw n sequences; the same state of the generator gives the same batch."""
        length = self.config.context + 1
        uniform = uniforms((n, length), generator)
        is_trigger = np.zeros(len(self.statistics), dtype=bool)
        is_trigger[self._triggers] = True
        tokens = np.empty((n, length), dtype=np.int64)
        tokens[:, 0] = self.bos
        for t in range(1, length):
            last = tokens[:, t - 1]
            back = tokens[:, max(t - 2, 0)]
            tokens[:, t] = np.where(is_trigger[last], back, self._rows.draw(last, uniform[:, t]))
        return self._labelled(tokens)

    def corrupted(self, name: str, batch: TokenBatch, generator: np.random.Generator) -> TokenBatch:
        """Return corrupted sequences; "other_copies" puts another token before and after every trigger."""
        if name != "other_copies":
            return super().corrupted(name, batch, generator)
        tokens = sequences_of(batch)
        is_trigger = np.isin(tokens, self._triggers)
        others = np.setdiff1d(np.arange(self.bos), self._triggers)
        shift = shifts(others, tokens.shape, generator)
        for t in range(1, tokens.shape[1]):
            # A token between two triggers is a copy of the one before the first, so it changes with it.
            if t > 1:
                tokens[:, t] = np.where(is_trigger[:, t - 1], tokens[:, t - 2], tokens[:, t])
            if t + 1 < tokens.shape[1]:
                first = is_trigger[:, t + 1] & ~is_trigger[:, t - 1]
                fresh = others_of(np.where(first, tokens[:, t], others[0]), others, shift[:, t])
                tokens[:, t] = np.where(first, fresh, tokens[:, t])
        return self._labelled(tokens)

    def _labelled(self, tokens: Int[Array, "batch pos_plus_one"]) -> TokenBatch:
        current = tokens[:, :-1]
        acting = np.isin(current, self._triggers)
        occurrence = np.zeros(current.shape, dtype=np.int64)
        for trigger in self._triggers:
            here = current == trigger
            occurrence[here] = here.cumsum(1)[here]
        return plain_batch(tokens, occurrence, {"in_context": acting, "global": ~acting})


def _triggers(config: BackcopyConfig, statistics: BigramStatistics) -> Int[Array, "n_triggers"]:
    return statistics.most_frequent(config.n_triggers, config.offset)


def law(task: BackcopyTask, batch: TokenBatch) -> Float[Array, "batch pos d_vocab"]:
    """Return the exact distribution: the token before a trigger, otherwise the global bigrams."""
    tokens = batch.tokens.numpy()
    probabilities = global_bigram(task, batch)
    rows, places = np.nonzero(np.isin(tokens, task.fixed_triggers))
    probabilities[rows, places] = 0.0
    probabilities[rows, places, tokens[rows, places - 1]] = 1.0
    return probabilities


PREDICTORS: Mapping[str, Predictor] = {"uniform": uniform, "unigram": unigram, "bigram": global_bigram, "law": law}
"""The predictors by name, from the least to the best informed."""
