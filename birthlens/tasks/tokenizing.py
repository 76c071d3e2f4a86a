"""How a text is divided into tokens: characters, or byte pairs that the `tokenizers` library builds from the text itself.

Byte pairs never cross the boundary of a word. A word is a space (if there is one) with the letters after it, and every other
character is a word of its own. The tokenizer is saved as JSON, so that a run needs no other file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from birthlens.errors import BirthlensError
from birthlens.labels import shown
from birthlens.shapes import Int
from birthlens.tasks.corpus import BigramStatistics

Array = np.ndarray
WORD = r" ?\w+|[^\w]"
"""The boundaries that byte pairs may not cross."""


def built(text: str, alphabet: Sequence[str], vocabulary: int) -> str:
    """Build byte pairs from a text, and return the tokenizer as JSON; `alphabet` lists the single characters.

    Raises:
        BirthlensError: if the alphabet alone is larger than the vocabulary, or the text has too few pairs to fill it.
    """
    if len(alphabet) >= vocabulary:
        raise BirthlensError(
            f"task.vocabulary = {vocabulary}: the text has {len(alphabet)} distinct characters, and pairs come on top; "
            "use a larger vocabulary, or task.tokens = characters."
        )
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="isolated")
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=list(alphabet), show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    if tokenizer.get_vocab_size() < vocabulary:
        raise BirthlensError(
            f"task.vocabulary = {vocabulary}: the text gives only {tokenizer.get_vocab_size()} tokens; use at most that."
        )
    return str(tokenizer.to_str())


def vocabulary_of(tokenizer: str) -> tuple[str, ...]:
    """Return the tokens of a tokenizer, by id."""
    ids = _loaded(tokenizer).get_vocab()
    return tuple(sorted(ids, key=ids.__getitem__))


def encoded(statistics: BigramStatistics, text: str) -> list[int]:
    """Return the ids of a text in a run's vocabulary.

    Raises:
        BirthlensError: for a character that is not in it.
    """
    places = {token: i for i, token in enumerate(statistics.vocab)}
    if missing := sorted(set(text) - places.keys()):
        raise BirthlensError(
            f"text holds {shown(missing[:5])}, which the run's vocabulary of {len(places)} tokens lacks."
        )
    if statistics.tokenizer:
        return encoded_pairs(statistics.tokenizer, text).tolist()
    return [places[character] for character in text]


def encoded_pairs(tokenizer: str, text: str) -> Int[Array, "token"]:
    """Return the ids of a text in byte pairs."""
    return np.array(_loaded(tokenizer).encode(text, add_special_tokens=False).ids, dtype=np.int64)


def _loaded(tokenizer: str):  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(tokenizer)
    except Exception as error:  # the library raises bare Exceptions
        raise BirthlensError(f"the tokenizer cannot be read ({shown(str(error), 80)}); the run is damaged.") from None
