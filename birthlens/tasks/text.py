"""Windows of a real text: the natural setting of an induction head, with nothing planted.

A sequence is `context` + 1 consecutive tokens from a uniform place of the text. The last part of the text is held out:
batches from `HELD_OUT` on, which is what every evaluation draws, come from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from birthlens.config.task import TextConfig
from birthlens.errors import BirthlensError
from birthlens.shapes import Float, Int
from birthlens.tasks.baselines import uniform
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.corpus import BigramStatistics, from_counts, from_text
from birthlens.tasks.markov import occurrences
from birthlens.tasks.ngrams import NGrams
from birthlens.tasks.task import HELD_OUT, Predictor, Task, others_of, plain_batch, sequences_of, shifts
from birthlens.tasks.tokenizing import built, encoded, encoded_pairs, vocabulary_of

Array = np.ndarray
PAIRS = 512
"""The number of byte pairs in a vocabulary if `task.vocabulary` is not given."""


class TextTask(Task):
    """Sample windows of a text.

    Raises:
        BirthlensError: if the text is too short for one window in each of its two parts.
    """

    Config = TextConfig
    needs_text = True
    title = "language modelling"
    roles = {
        "in_context": "the token occurred before in the window, followed by the same target: copying what followed is right",
        "misled": "the token occurred before in the window, and never followed by this target: copying would be wrong",
        "new": "the token occurs in the window for the first time",
    }
    shown_roles = {"in_context": "in-context", "all": "all tokens"}
    corruptions = ("other_successor", "other_sequence")
    config: TextConfig

    def __init__(self, config: TextConfig, statistics: BigramStatistics) -> None:
        super().__init__(config, statistics)
        if statistics.stream is None:
            raise BirthlensError("task.kind = 'text': it needs the text itself; make its chain with chain_of.")
        self.stream: Int[Array, "token"] = statistics.stream
        self.cut = training_part(config, len(self.stream))
        for part, tokens in (("training", self.cut), ("held-out", len(self.stream) - self.cut)):
            if tokens < config.context + 1:
                raise BirthlensError(
                    f"task.context = {config.context}: the {part} part of the text has {tokens} tokens; use a longer text, "
                    "a shorter context or another task.held_out."
                )

    @classmethod
    def chain_of_text(cls, config: TextConfig, text: str) -> BigramStatistics:
        """Divide the text into tokens and count pairs of neighbours in its training part."""
        characters = from_text(text)
        tokenizer = ""
        vocab = characters.vocab
        if config.tokens == "pairs":
            tokenizer = built(text[: training_part(config, len(text))], vocab, config.vocabulary or PAIRS)
            vocab = vocabulary_of(tokenizer)
            stream = encoded_pairs(tokenizer, text)
        else:
            stream = np.array(encoded(characters, text), dtype=np.int64)
        n = len(vocab)
        seen = stream[: training_part(config, len(stream))]
        if len(seen) < 2:
            raise BirthlensError(f"the training part of the text has {len(seen)} tokens; give a longer text.")
        counts = np.bincount(seen[:-1] * n + seen[1:], minlength=n * n).reshape(n, n)
        found = from_counts(vocab, counts, np.bincount(seen, minlength=n), "the text")
        return BigramStatistics(vocab, found.unigram, found.bigram, counts, stream, tokenizer)

    @property
    def roles_are_known(self) -> bool:
        """False: roles depend on the target, so the prefix does not determine them."""
        return False

    @property
    def setting(self) -> str:
        """The numbers of tokens in the vocabulary and in the text."""
        return f"{len(self.statistics)} {self.config.tokens}, {len(self.stream):,} tokens of text"

    @cached_property
    def ngrams(self) -> NGrams:
        """The n-grams of the training part."""
        return NGrams(self.stream[: self.cut], len(self.statistics))

    @property
    def predictors(self) -> Mapping[str, Predictor]:
        """The reference predictors, from the least to the best informed."""
        return PREDICTORS

    def story(self, source: str, labels: Sequence[str]) -> str:
        """Return what sequences follow; see `Task.story`."""
        kind = "characters" if self.config.tokens == "characters" else "byte pairs, built from the text"
        return (
            f"of {self.config.context} tokens: windows of {source}. The vocabulary has {len(labels)} tokens ({kind}); the "
            f"last {self.config.held_out:.0%} of the text is held out for evaluation. Nothing is planted: where the same "
            "words come again, what followed them before can be copied."
        )

    def batch(self, n: int, seed: int, index: int = 0) -> TokenBatch:
        """Draw batch number `index` of the stream `seed`; from `HELD_OUT` on, it is from the held-out part of the text."""
        first, end = (self.cut, len(self.stream)) if index >= HELD_OUT else (0, self.cut)
        return self._windows(n, np.random.default_rng([seed, index]), first, end)

    def sample(self, n: int, generator: np.random.Generator) -> TokenBatch:
        """Draw n windows of the training part; the same state of the generator gives the same batch."""
        return self._windows(n, generator, 0, self.cut)

    def corrupted(self, name: str, batch: TokenBatch, generator: np.random.Generator) -> TokenBatch:
        """Return corrupted windows; "other_successor" replaces one repeated pair of tokens in each.

        If the last position that is in context has the token a and the target b, every b after a becomes another token.
        """
        if name != "other_successor":
            return super().corrupted(name, batch, generator)
        tokens = sequences_of(batch)
        first = tokens[:, :-1]
        second = tokens[:, 1:]
        possible = batch.in_context.numpy() & (first != second)
        rows = np.arange(len(tokens))
        last = possible.shape[1] - 1 - possible[:, ::-1].argmax(1)
        everything = np.arange(len(self.statistics))
        fresh = others_of(second[rows, last], everything, shifts(everything, last.shape, generator))
        same = (first == first[rows, last][:, None]) & (second == second[rows, last][:, None])
        tokens[:, 1:] = np.where(same & possible.any(1)[:, None], fresh[:, None], second)
        return labelled(tokens, len(self.statistics))

    def _windows(self, n: int, generator: np.random.Generator, first: int, end: int) -> TokenBatch:
        length = self.config.context + 1
        starts = generator.integers(first, end - length + 1, size=n)
        return labelled(self.stream[starts[:, None] + np.arange(length)], len(self.statistics))


def training_part(config: TextConfig, length: int) -> int:
    """Return how many tokens (or characters) of a text with this many come before its held-out part."""
    return length - round(length * config.held_out)


def labelled(sequences: Int[Array, "batch pos_plus_one"], d_vocab: int) -> TokenBatch:
    """Make a batch of windows, with their roles.

    Example:
        >>> batch = labelled(np.array([[0, 1, 0, 1, 0, 2]]), 3)
        >>> batch.in_context[0].tolist(), batch.marks["misled"][0].tolist()
        ([False, False, True, True, False], [False, False, False, False, True])
    """
    tokens = sequences[:, :-1]
    seen = occurrences(tokens, d_vocab)
    pairs = tokens * d_vocab + sequences[:, 1:]
    known = repeated(pairs)
    marks = {"in_context": known, "misled": (seen >= 2) & ~known, "new": seen == 1}
    return plain_batch(sequences, np.where(known, 2, 0), marks)


def repeated(values: Int[Array, "batch pos"]) -> np.ndarray:
    """Return, at each position, whether its value has occurred before in the row."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, 1)
    again = np.zeros(values.shape, dtype=bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    found = np.empty_like(again)
    np.put_along_axis(found, order, again, 1)
    return found


def unigram(task: TextTask, batch: TokenBatch) -> Float[Array, "batch pos d_vocab"]:
    """Return the frequencies in the training part, smoothed so that no token has probability 0."""
    return np.broadcast_to(task.ngrams.unigram, (*batch.tokens.shape, len(task.statistics))).copy()


def bigram(task: TextTask, batch: TokenBatch) -> Float[Array, "batch pos d_vocab"]:
    """Return the bigram distribution with back-off."""
    return task.ngrams.bigram(batch.tokens.numpy())


def trigram(task: TextTask, batch: TokenBatch) -> Float[Array, "batch pos d_vocab"]:
    """Return the trigram distribution with back-off."""
    return task.ngrams.trigram(batch.tokens.numpy())


PREDICTORS: Mapping[str, Predictor] = {"uniform": uniform, "unigram": unigram, "bigram": bigram, "trigram": trigram}
"""The predictors by name, from the least to the best informed."""
