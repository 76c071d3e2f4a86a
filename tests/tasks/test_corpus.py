"""Corpus statistics against plain counting."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from birthlens.config.run import CorpusConfig, TaskConfig
from birthlens.errors import BirthlensError
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.corpus import embedded_text, from_counts, from_file, from_text, statistics_of

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=2, max_size=60).filter(
    lambda text: len(set(text)) >= 2
)


@given(texts)
def test_counts_equal_a_plain_loop(text: str) -> None:
    statistics = from_text(text)
    pairs, letters = Counter(itertools.pairwise(text)), Counter(text)
    assert statistics.vocab == tuple(sorted(letters))
    for i, a in enumerate(statistics.vocab):
        assert math.isclose(statistics.unigram[i], letters[a] / len(text))
        total = sum(n for (first, _), n in pairs.items() if first == a)
        for j, b in enumerate(statistics.vocab):
            expected = pairs[a, b] / total if total else letters[b] / len(text)
            assert math.isclose(statistics.bigram[i, j], expected)


@given(texts)
def test_every_row_is_a_distribution_and_can_be_sampled(text: str) -> None:
    statistics = from_text(text)
    np.testing.assert_allclose(statistics.bigram.sum(1), 1)
    task = BigramTask(TaskConfig(context=8, n_triggers=1), statistics)
    tokens = task.sample(5, np.random.default_rng(0)).tokens
    assert int(tokens.min()) >= 0 and int(tokens.max()) < len(statistics)


def test_a_token_without_successor_continues_with_the_unigrams() -> None:
    statistics = from_text("aabz")
    np.testing.assert_allclose(statistics.bigram[2], statistics.unigram)


def test_the_embedded_corpus_is_close_to_tiny_shakespeare() -> None:
    text = embedded_text()
    statistics = from_text(text)
    assert 1_100_000 < len(text) < 1_200_000 and len(statistics) in (64, 65)
    assert abs(statistics.unigram_entropy - 3.313) < 0.005
    assert abs(statistics.conditional_entropy - 2.453) < 0.005
    assert [statistics.vocab[i] for i in statistics.most_frequent(5)] == [" ", "e", "t", "o", "a"]


def test_counts_from_json_and_csv_agree(tmp_path: Path) -> None:
    counts = [[0, 3, 1], [2, 0, 0], [0, 1, 0]]
    (tmp_path / "c.json").write_text(json.dumps({"vocab": ["a", "b", "c"], "counts": counts}))
    (tmp_path / "c.csv").write_text(",a,b,c\na,0,3,1\nb,2,0,0\nc,0,1,0\n")
    one, two = from_file(tmp_path / "c.json"), from_file(tmp_path / "c.csv")
    np.testing.assert_array_equal(one.bigram, two.bigram)
    np.testing.assert_allclose(one.bigram[0], [0, 0.75, 0.25])
    assert one.vocab == two.vocab == ("a", "b", "c")


@given(st.floats(1e-3, 1e3))
def test_the_scale_of_a_table_does_not_matter(scale: float) -> None:
    counts = np.array([[1.0, 2, 0], [0, 0, 0], [3, 4, 1]])
    one, two = from_counts(("a", "b", "c"), counts), from_counts(("a", "b", "c"), scale * counts)
    np.testing.assert_allclose(two.bigram, one.bigram)
    np.testing.assert_allclose(two.unigram, one.unigram)
    np.testing.assert_allclose(two.bigram.sum(1), 1)


def test_a_markov_chain_is_seeded_and_zipf() -> None:
    config = CorpusConfig(source="markov", vocabulary=50, zipf_exponent=1.2, seed=3)
    one, two = statistics_of(config), statistics_of(config)
    np.testing.assert_array_equal(one.bigram, two.bigram)
    assert np.isclose(one.unigram[0] / one.unigram[9], 10**1.2)
    assert not np.array_equal(one.bigram, statistics_of(config.changed(seed=4)).bigram)
    np.testing.assert_allclose(one.bigram.sum(1), 1)


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"", "0 distinct"), (b"aaaa", "1 distinct"), (b"\x00\x01\x02", "NUL"), (b"\xff\xfe\x00a", "not UTF-8")],
)
def test_texts_that_cannot_be_a_corpus(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(BirthlensError, match=word):
        from_file(path)


def test_counts_that_cannot_be_a_chain(tmp_path: Path) -> None:
    with pytest.raises(BirthlensError, match="square"):
        from_counts(("a", "b"), np.ones((2, 3)))
    with pytest.raises(BirthlensError, match="at least 0"):
        from_counts(("a", "b"), np.array([[1, -1], [0, 1]]))
    with pytest.raises(BirthlensError, match="twice"):
        from_counts(("a", "a"), np.ones((2, 2)))
    with pytest.raises(BirthlensError, match="finite"):
        from_counts(("a", "b"), np.ones((2, 2)), np.array([np.inf, 1]))
    with pytest.raises(BirthlensError, match="cannot be read"):
        from_file(tmp_path / "absent.txt")
    with pytest.raises(BirthlensError, match="at most 16384"):
        from_text("".join(map(chr, range(1, 20_000))))
    with pytest.raises(BirthlensError, match="lone surrogate"):
        from_text("ab\ud800")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("c.json", '{"vocab": ["a", "b"]}', "must map 'vocab', 'counts'"),
        ("c.json", "[1]", "must map 'vocab', 'counts'"),
        ("c.json", "{", "is not JSON .line 1"),
        ("c.json", '{"vocab": 2, "counts": [[1, 2], [2, 1]]}', "'vocab' must list the tokens"),
        (
            "c.json",
            '{"vocab": ["a", "b"], "counts": [[1, 2], [2]]}',
            "'counts' must hold rows of numbers, all of the same",
        ),
        ("c.json", '{"vocab": ["a", "b"], "counts": [["x", 2], [2, 1]]}', "'counts' must hold rows of numbers"),
        ("c.json", '{"vocab": ["a", "b"], "counts": [1, 2]}', "'counts' must hold rows of numbers"),
        ("c.json", '{"vocab": ["a", "b"], "counts": [[1, 2], [2, 1]], "unigram": [[1]]}', "'unigram' must hold a list"),
        ("c.json", '{"vocab": ["a", "b"], "counts": [[1, 2], [2, 1]], "unigram": [Infinity, 1]}', "finite"),
        ("c.json", '{"vocab": ["a", "\\ud800"], "counts": [[1, 2], [2, 1]]}', "lone surrogate"),
        ("c.json", '{"vocab": ["a", "b"], "counts": [[1, 1e17], [2, 1]]}', "more than 2..53 bigrams"),
        ("c.json", '{"vocab": ["a", "b"], "counts": [[1, 1e308], [1e308, 1]]}', "more than 2..53 bigrams"),
        ("c.json", '{"vocab": ["a", "b"], "counts": [[1, ' + "1" * 30 + "], [2, 1]]}", "'counts' must hold rows"),
        ("c.json", '{"vocab": ["a", "b"], "counts": [[1, true], [2, 1]]}', "'counts' must hold rows"),
        ("c.json", "[" * 100_000, "levels deep"),
        ("c.json", '{"vocab": [["a"], "b"], "counts": [[1, 2], [2, 1]]}', "'vocab' must list the tokens"),
        ("c.csv", "a" * 200_000, "is not CSV"),
        ("c.csv", ",a,b\na,1,inf\nb,1,2\n", "finite"),
        ("c.csv", "", "must hold rows of numbers"),
        ("c.csv", ",a,b\na,1,x\nb,1,2\n", "'x' is not a number"),
        ("c.csv", ",a,b\na,1\nb,1,2\n", "all of the same length"),
        ("c.csv", ",a,b\nb,1,2\na,1,2\n", "the labels of its rows"),
    ],
)
def test_files_that_hold_no_table(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BirthlensError, match=said) as error:
        from_file(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)
