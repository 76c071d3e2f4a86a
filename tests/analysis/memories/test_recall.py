"""Readings of a score table against a plain loop, and the strongest associations against a full sort."""

from __future__ import annotations

import tracemalloc
from itertools import combinations

import numpy as np
import pytest

from birthlens.analysis.memories import memory as memories
from birthlens.analysis.memories.memory import AssociativeMemory, Circuit, Codebook
from birthlens.analysis.memories.recall import (
    READINGS,
    Association,
    chance_level,
    frobenius_share,
    matched_recall,
    pair_readings,
    readings,
)
from birthlens.analysis.memories.top_associations import top_associations_table
from birthlens.errors import BirthlensError


def memory_of(table: np.ndarray) -> AssociativeMemory:
    """A memory whose raw scores are the given table."""

    def book(name: str, size: int) -> Codebook:
        return Codebook(name, np.eye(size, dtype=table.dtype), tuple(f"{name}{i}" for i in range(size)))

    return AssociativeMemory(Circuit("W", table), book("q", table.shape[-2]), book("k", table.shape[-1]))


def drawn_recall(rank: int, choices: int, ways: int) -> float:
    """The share of draws of ways - 1 wrong entries, all listed, in which the one of this rank among all is the best."""
    others = [place for place in range(1, choices + 1) if place != rank]
    return float(np.mean([rank < min(drawn) for drawn in combinations(others, ways - 1)]))


def loop(
    table: np.ndarray, pairs: list[tuple[int, int]], candidates: list[int], scale: float, ways: int
) -> dict[str, float]:
    rows, squares, choices = [], [], []
    for query, right in pairs:
        rights = {r for q, r in pairs if q == query}
        wrong = np.array([table[query, c] for c in candidates if c not in rights])
        score = table[query, right]
        rank = 1 + (wrong > score).sum() + (wrong == score).sum() / 2
        mass = np.exp(scale * score) / (np.exp(scale * score) + np.exp(scale * wrong).sum())
        lead = score - wrong.mean()
        squares.append(wrong.var())
        choices.append(len(wrong) + 1)
        rows.append((score > wrong.max(), mass, rank, scale * (score - wrong.max()), lead / wrong.std(), lead))
    recall, soft, rank, margin, standardised, lead = np.mean(np.array(rows, dtype=float), axis=0)
    chance = np.mean([1 / count for count in choices])
    matched = [drawn_recall(int(row[2]), count, ways) for row, count in zip(rows, choices, strict=True)]
    return {
        "recall": recall,
        "corrected_recall": (recall - chance) / (1 - chance),
        "matched_recall": float(np.mean(matched)),
        "soft_recall": soft,
        "rank": rank,
        "margin": margin,
        "standardised": standardised,
        "signal_to_interference": lead / np.sqrt(np.mean(squares)),
    }


ASSOCIATIONS = {
    "identity": Association.identity(9),
    "few queries": Association.identity(9, queries=[3, 0, 7]),
    "few of both": Association.identity(9, [1, 4, 6, 8], [1, 4, 6, 8]),
    "shift": Association.shift(9),
    "several right": Association.of([(0, 1), (2, 3), (0, 4), (5, 5), (2, 2)], candidates=range(9)),
}


@pytest.mark.parametrize("name", ASSOCIATIONS)
@pytest.mark.parametrize(("entries", "rows"), [(7, 2), (200, 64), (4_000_000, 64)])
def test_every_metric_against_a_plain_loop(name: str, entries: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memories, "BLOCK_ENTRIES", entries)
    monkeypatch.setattr(memories, "BLOCK_ROWS", rows)
    association = ASSOCIATIONS[name]
    tables = np.random.default_rng(0).standard_normal((4, 9, 9))
    found = readings(memory_of(tables), association, scale=0.7, ways=3)
    assert tuple(found) == READINGS
    for step, table in enumerate(tables):
        expected = loop(table, association.pairs, association.candidates.tolist(), 0.7, 3)
        for metric in READINGS:
            assert found[metric][step] == pytest.approx(expected[metric]), metric


@pytest.mark.parametrize(
    "association",
    [Association.identity(6), Association.of([(0, 1), (0, 2), (0, 4), (3, 3), (5, 0), (5, 5)], range(6))],
    ids=["one right each", "several right"],
)
def test_random_tables_read_at_chance(association: Association) -> None:
    tables = np.random.default_rng(1).standard_normal((3000, 6, 6))
    found = readings(memory_of(tables), association, ways=3)
    for metric in set(READINGS) - {"margin"}:
        spread = found[metric].std() / np.sqrt(3000)
        expected = chance_level(metric, association, ways=3)
        # The softmax is convex, so its mean is exact by symmetry, and the standardised scores are symmetric about 0.
        assert abs(found[metric].mean() - expected) < 4.5 * spread, metric


def test_a_zero_matrix_recalls_nothing_and_ranks_in_the_middle() -> None:
    found = readings(memory_of(np.zeros((5, 5))), Association.identity(5))
    assert found["recall"] == 0 and found["rank"] == 3 and found["soft_recall"] == pytest.approx(0.2)
    assert np.isnan(found["standardised"])


def test_ties_are_ties_in_single_precision_too() -> None:
    table = np.array([[7, 3, 7, 1], [0, 5, 2, 2], [9, 9, 9, 4], [0.5, 0.5, 0.5, 0.5]], dtype=np.float32)
    found = pair_readings(memory_of(table / 3), Association.identity(4))  # no row's mean is a float32
    assert found.rank.tolist() == [1.5, 1, 2, 2.5]
    assert readings(memory_of(table / 3), Association.identity(4))["recall"] == 0.25


@pytest.mark.parametrize("ways", [2, 3, 4, 6])
def test_matched_recall_is_the_mean_over_every_choice_of_wrong_candidates(ways: int) -> None:
    scores = np.random.default_rng(2).standard_normal(6)
    for right in range(6):
        others = [other for other in range(6) if other != right]
        wins = [all(scores[right] > scores[o] for o in drawn) for drawn in combinations(others, ways - 1)]
        rank = 1 + (scores > scores[right]).sum()
        found = matched_recall(np.array([float(rank)]), np.array([6]), ways)
        assert float(found[0]) == pytest.approx(np.mean(wins))


def test_a_query_with_many_right_entries_is_grouped_not_compared_pair_by_pair() -> None:
    n = 30_000  # a table of pairs by pairs would take 900 MB
    association = Association.of([(q, q) for q in range(n)] + [(7, r) for r in range(100)], range(n))
    tracemalloc.start()
    choices = association.choices
    pair, column = association.rights(slice(6, 9))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6
    # The pair (7, 7) is there twice and counts once.
    assert pair.tolist() == [0] + [1] * 100 + [2] and column.tolist() == [6, *range(100), 8]
    assert choices[7] == choices[-1] == n - 99 and (np.delete(choices[:n], 7) == n).all()


def test_frobenius_share_is_the_squared_cosine_with_the_ideal_memory() -> None:
    generator = np.random.default_rng(3)
    u, v, matrices = (
        generator.standard_normal((5, 7)),
        generator.standard_normal((6, 7)),
        generator.standard_normal((2, 7, 7)),
    )
    inputs, outputs = Codebook("u", u, tuple("abcde")), Codebook("v", v, tuple("abcdef"))
    association = Association.of([(0, 3), (4, 1)])
    ideal = np.outer(u[0], v[3]) + np.outer(u[4], v[1])
    found = frobenius_share(AssociativeMemory(Circuit("W", matrices), inputs, outputs), association)
    expected = [(m * ideal).sum() ** 2 / (m**2).sum() / (ideal**2).sum() for m in matrices]
    np.testing.assert_allclose(found, expected)
    assert frobenius_share(AssociativeMemory(Circuit("W", 3 * ideal), inputs, outputs), association) == pytest.approx(1)


@pytest.mark.parametrize("name", ["identity", "few queries", "several right"])
def test_strongest_associations_against_a_full_sort(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memories, "BLOCK_ENTRIES", 20)
    monkeypatch.setattr(memories, "BLOCK_ROWS", 2)
    association, table = ASSOCIATIONS[name], np.random.default_rng(4).standard_normal((9, 9))
    found = top_associations_table(memory_of(table), 4, association)
    right = sorted((table[q, r], f"q{q}", f"k{r}") for q, r in association.pairs)[::-1][:4]
    wrong = sorted(
        (table[q, c], f"q{q}", f"k{c}")
        for q in {q for q, _ in association.pairs}
        for c in association.candidates.tolist()
        if (q, c) not in association.pairs
    )[::-1][:4]
    for kind, expected in (("right", right), ("wrong", wrong)):
        part = found[found["kind"] == kind]
        assert list(zip(part["score"], part["input"], part["output"], strict=True)) == expected
        assert part["place"].tolist() == list(range(1, len(expected) + 1))
    anything = top_associations_table(memory_of(table), 3)
    assert anything["score"].tolist() == sorted(table.ravel())[::-1][:3] and set(anything["kind"]) == {"any"}
    with pytest.raises(BirthlensError, match="stack of several"):
        top_associations_table(memory_of(np.stack([table, table])))


def test_a_gpt2_sized_head_is_read_without_its_table() -> None:
    generator = np.random.default_rng(5)
    vocabulary, queries = 50_000, 4_000
    vectors = generator.standard_normal((vocabulary, 768), dtype=np.float32)
    head = generator.standard_normal((2, 768, 64), dtype=np.float32) / 768**0.5
    head[0, :, 0] += vectors[7]  # one association too strong to miss
    head[1, :, 0] += vectors[9]
    words = Codebook("W_E", vectors, tuple(map(str, range(vocabulary))))
    memory = AssociativeMemory(Circuit("head", head[0], head[1].T), words, words)
    tracemalloc.start()
    found = top_associations_table(memory, 5, Association.identity(vocabulary, queries=range(queries)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    strongest = found[found["kind"] == "wrong"].iloc[0]
    assert (strongest["input"], strongest["output"]) == ("7", "9")
    assert (
        peak < 250e6 < 4 * queries * vocabulary
    )  # the table of these queries alone would be 800 MB, of all of them 10 GB


def test_bad_associations_are_named() -> None:
    with pytest.raises(BirthlensError, match=r"\[5\] are not among the candidates"):
        Association.of([(0, 5)], candidates=[1, 2])
    with pytest.raises(BirthlensError, match="two candidates"):
        Association.of([(0, 0)])
    with pytest.raises(BirthlensError, match="ways = 9: choose from 2 to the smallest number of choices, 5"):
        readings(memory_of(np.eye(5)), Association.identity(5), ways=9)
    several = Association.of([(0, 1), (0, 2), (1, 1)], range(5))
    with pytest.raises(BirthlensError, match="choices, 4"):
        readings(memory_of(np.eye(5)), several, ways=5)


@pytest.mark.parametrize("place", [(0, 0), (0, 2)], ids=["right entry", "wrong entry"])
def test_nan_is_no_good_number(place: tuple[int, int]) -> None:
    table = np.random.default_rng(0).standard_normal((4, 4))
    table[place] = np.nan
    memory = memory_of(table)
    whole = readings(memory, Association.identity(4), ways=2)
    assert all(np.isnan(whole[name]) for name in READINGS)
    assert np.isnan(readings(memory, Association.identity(4))["matched_recall"])
    clean = readings(memory_of(np.nan_to_num(table)), Association.identity(4), ways=2)
    assert all(np.isfinite(clean[name]) for name in READINGS)
