"""From a text to the global Markov chain of the task: the vocabulary, pi_u(i) and pi_b(j | i) (paper section 4.1)."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from birthlens.config.run import CorpusConfig
from birthlens.errors import BirthlensError
from birthlens.labels import shortened, shown
from birthlens.reading import LARGE, decode_json, read_text
from birthlens.shapes import Float, Int, Num

Array = np.ndarray
_ROWS = "must hold rows of numbers, all of the same length."
MOST_TOKENS = 2**14
"""The most tokens in a vocabulary; its table of bigrams has 2 GB."""
MOST_COUNTED = 2.0**53
"""The largest sum of counts; above it, single counts are lost in rounding."""


@dataclass(frozen=True, eq=False)
class BigramStatistics:
    """The global chain: token labels, unigram distribution, and rows P(next | current).

    `counts` are the bigram counts if the chain was counted, otherwise None. A token that was never seen with a successor
    continues with the unigram distribution, so that every row is a distribution. A task that reads windows of a text keeps
    the text's token ids in `stream`, and how a text is divided into byte pairs in `tokenizer` (JSON).
    """

    vocab: tuple[str, ...]
    unigram: Float[Array, "d_vocab"]
    bigram: Float[Array, "d_vocab d_vocab"]
    counts: Num[Array, "d_vocab d_vocab"] | None = None
    stream: Int[Array, "token"] | None = None
    tokenizer: str = ""

    def __len__(self) -> int:
        return len(self.vocab)

    @property
    def unigram_entropy(self) -> float:
        """Entropy of the unigram distribution, in nats."""
        return entropy(self.unigram)

    @property
    def conditional_entropy(self) -> float:
        """Entropy of the next token given the current one, averaged over the unigram distribution, in nats."""
        return float(sum(p * entropy(row) for p, row in zip(self.unigram, self.bigram, strict=True)))

    def most_frequent(self, n: int, offset: int = 0) -> Int[Array, "n"]:
        """Return the ids of the n most frequent tokens after the `offset` most frequent ones; ties by id."""
        return np.argsort(-self.unigram, kind="stable")[offset : offset + n]


def entropy(distribution: Float[Array, "d_vocab"]) -> float:
    """Return the entropy of a distribution in nats, with 0 log 0 = 0."""
    positive = distribution[distribution > 0]
    return float(-(positive * np.log(positive)).sum())


def from_text(text: str, name: str = "corpus") -> BigramStatistics:
    """Count the characters of a text and all consecutive pairs; the vocabulary is its characters in code-point order.

    Raises:
        BirthlensError: for an empty text, one that contains NUL (a binary file), or one with a single distinct character.

    Example:
        >>> statistics = from_text("abab")
        >>> statistics.vocab, statistics.bigram.tolist()
        (('a', 'b'), [[0.0, 1.0], [1.0, 0.0]])
    """
    if "\0" in text:
        raise BirthlensError(f"{name} holds NUL characters; a corpus is UTF-8 text, not a binary file.")
    try:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.int64)
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise BirthlensError(f"{name} holds the lone surrogate U+{code:04X}, which is not a character.") from None
    occurrences = np.bincount(codes)
    characters = np.flatnonzero(occurrences)
    n = len(characters)
    if not 2 <= n <= MOST_TOKENS:
        raise BirthlensError(
            f"{name} has {n} distinct characters; a corpus needs at least 2 and at most {MOST_TOKENS}."
        )
    index = np.zeros(len(occurrences), dtype=np.int64)
    index[characters] = np.arange(n)
    ids = index[codes]
    counts = np.bincount(ids[:-1] * n + ids[1:], minlength=n * n).reshape(n, n)
    return from_counts(tuple(map(chr, characters)), counts, occurrences[characters], name)


def from_counts(
    vocab: tuple[str, ...],
    counts: Num[Array, "rows columns"],
    unigram_counts: Num[Array, "entries"] | None = None,
    name: str = "counts",
) -> BigramStatistics:
    """Normalise a table of bigram counts (rows: current token); unigrams default to how often a token starts or ends a pair.

    Raises:
        BirthlensError: if the table is not square, not as large as the vocabulary, negative, or empty.
    """
    counts = np.asarray(counts)
    n = len(vocab)
    if n > MOST_TOKENS:
        raise BirthlensError(f"{name} has {n} tokens; at most {MOST_TOKENS} are possible.")
    if counts.shape != (n, n) or n < 2:
        raise BirthlensError(f"{name} has shape {counts.shape} for {n} tokens; it must be square, at least 2 by 2.")
    if len(set(vocab)) != n:
        raise BirthlensError(f"{name} lists a token twice; labels must be distinct.")
    for token in vocab:
        if not token.isascii() and not _is_text(token):
            raise BirthlensError(
                f"{name} has the label {shown(token)} with a lone surrogate, which is not a character."
            )
    if not np.isfinite(counts).all() or (counts < 0).any() or not (counts > 0).any():
        raise BirthlensError(f"{name} must hold finite counts of at least 0 and not only zeros.")
    with np.errstate(over="ignore"):
        total = counts.sum(dtype=np.float64)
    if total > MOST_COUNTED:
        raise BirthlensError(f"{name} counts more than 2**53 bigrams; divide all counts by a number.")
    if unigram_counts is None:
        unigram_counts = counts.sum(0) + counts.sum(1)
    unigram = np.asarray(unigram_counts, dtype=np.float64)
    if unigram.shape != (n,) or not np.isfinite(unigram.sum()) or (unigram < 0).any() or unigram.sum() == 0:
        raise BirthlensError(
            f"{name} has unigram counts of shape {unigram.shape}; it needs {n}, finite, at least 0, not all 0."
        )
    unigram = unigram / unigram.sum()
    totals = counts.sum(1, keepdims=True)
    bigram = np.where(totals > 0, counts / np.where(totals > 0, totals, 1), unigram)
    return BigramStatistics(vocab, unigram, bigram, counts)


def markov_chain(config: CorpusConfig) -> BigramStatistics:
    """Draw a synthetic chain: p_i ~ i^-zipf_exponent, and rows ~ Dirichlet(concentration * d_vocab * p), seeded."""
    generator = np.random.default_rng(config.seed)
    n = config.vocabulary
    unigram = np.arange(1, n + 1, dtype=np.float64) ** -config.zipf_exponent
    unigram /= unigram.sum()
    rows = generator.dirichlet(config.concentration * n * unigram, size=n)
    return BigramStatistics(tuple(str(i) for i in range(n)), unigram, rows)


def statistics_of(config: CorpusConfig) -> BigramStatistics:
    """Return the global chain that a corpus config describes."""
    if config.source == "markov":
        return markov_chain(config)
    if config.source == "embedded":
        return from_text(embedded_text())
    return from_file(Path(config.path or ""), config.source)


def text_of(config: CorpusConfig) -> str:
    """Return the text that a corpus config names.

    Raises:
        BirthlensError: for a source that is not text.
    """
    if config.source == "embedded":
        return embedded_text()
    if config.source == "text":
        return read_text(Path(config.path or ""), "corpus.path", LARGE)
    raise BirthlensError(f"corpus.source = {config.source!r}: this task needs a text; valid are embedded and text.")


def from_file(path: Path, source: str | None = None) -> BigramStatistics:
    """Read a UTF-8 text, or a table of counts (.json or .csv, unless `source` says otherwise).

    JSON: {"vocab": [...], "counts": [[...]], "unigram": [...] (optional)}. CSV: a header of labels, then one row per token,
    its label first.
    """
    if source is None:
        source = "counts" if path.suffix in (".json", ".csv") else "text"
    text = read_text(path, "corpus.path", LARGE)
    if source == "text":
        return from_text(text, str(path))
    return _counts_from_csv(text, str(path)) if path.suffix == ".csv" else _counts_from_json(text, str(path))


def embedded_text() -> str:
    """Return the Shakespeare text that ships with birthlens (data/README.md says where it comes from)."""
    package = Path(__file__).parents[1]
    for candidate in (package / "_data" / "shakespeare.txt", package.parent / "data" / "shakespeare.txt"):
        if candidate.exists():
            return candidate.read_text(encoding="utf-8")
    raise BirthlensError("the embedded corpus is missing from this installation; install birthlens again.")


def _counts_from_json(text: str, name: str) -> BigramStatistics:
    tree = decode_json(text, name)
    if not isinstance(tree, dict) or not {"vocab", "counts"} <= tree.keys() <= {"vocab", "counts", "unigram"}:
        raise BirthlensError(
            f"{name} is not a table of counts: it must map 'vocab', 'counts' and, if known, 'unigram'."
        )
    vocab = tree["vocab"]
    if not isinstance(vocab, list) or not all(isinstance(token, str | int | float) for token in vocab):
        raise BirthlensError(f"{name} is not a table of counts: 'vocab' must list the tokens.")
    unigram = None
    if "unigram" in tree:
        (unigram,) = _numbers([tree["unigram"]], f"{name}: 'unigram' must hold a list of numbers.")
    return from_counts(tuple(map(str, vocab)), _numbers(tree["counts"], f"{name}: 'counts' {_ROWS}"), unigram, name)


def _numbers(rows: object, otherwise: str) -> Num[Array, "rows columns"]:
    """Make an array of nested lists; raise BirthlensError if they are ragged or hold something other than numbers."""
    wrong = BirthlensError(otherwise)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise wrong
    if len({len(row) for row in rows}) > 1 or not all({int, float}.issuperset(map(type, row)) for row in rows):
        raise wrong
    array = np.array(rows)
    if array.dtype.kind not in "iuf":  # whole numbers of more than 64 bits
        raise wrong
    return array


def _counts_from_csv(text: str, name: str) -> BigramStatistics:
    try:
        header, *rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row] or [[]]
    except csv.Error as error:
        raise BirthlensError(f"{name} is not a table of counts: it is not CSV ({error}).") from None
    try:
        cells = [[float(cell) for cell in row[1:]] for row in rows]
    except ValueError as error:
        cell = str(error).rsplit(": ", 1)[-1]
        raise BirthlensError(f"{name} is not a table of counts: {shortened(cell, 80)} is not a number.") from None
    counts = _numbers(cells, f"{name} {_ROWS}")
    if [row[0] for row in rows] != header[1:]:
        raise BirthlensError(f"{name}: the labels of its rows must be those of its columns, in the same order.")
    return from_counts(tuple(header[1:]), counts, None, name)


def _is_text(token: str) -> bool:
    """Return whether a label has no lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in token)
