"""What a memory remembers: recall, ranks, margins and interference of a target association (paper section 4).

A target association is a set of pairs (query, right entry) and a set of candidates among which the right entry should win.
Let S be the scores. For one pair, the wrong entries are all candidates that are not a right entry of the same query. The
choices of the pair are the wrong entries and its right entry.

    recall                  mean of 1{right > every wrong}; ties count as lost, so a zero matrix recalls nothing
    corrected_recall        (recall - chance) / (1 - chance), chance = mean of 1 / choices
    matched_recall          recall among `ways` candidates: the right one and ways - 1 drawn from the wrong ones. It is the
                            exact expectation over draws, and gives different candidate sets the same chance 1 / ways
    soft_recall             mean softmax probability of the right entry, with scores times `scale`
    rank                    mean rank of the right entry; 1 is the best, ties count half
    margin                  mean of right - best wrong, times `scale`
    standardised            mean over pairs of (right - mean wrong) / std wrong
    signal_to_interference  mean (right - mean wrong) / root mean square over the whole table of (wrong - its query's mean)

Tables are read in blocks of rows: the V x V table is never formed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from birthlens.analysis.memories.memory import Array, AssociativeMemory, Basis
from birthlens.errors import BirthlensError
from birthlens.shapes import Bool, Float, Int

READINGS = (
    "recall",
    "corrected_recall",
    "matched_recall",
    "soft_recall",
    "rank",
    "margin",
    "standardised",
    "signal_to_interference",
)
"""The names of what `readings` returns."""


@dataclass(frozen=True, eq=False)
class Association:
    """Pairs (query, right entry) and the candidates of the argmax, all as indices into the two codebooks.

    A query may have several right entries, with one pair for each. The other right entries do not count as wrong.

    Raises:
        BirthlensError: if a right entry is not a candidate, or there is nothing to choose from.

    Example:
        >>> Association.shift(4).pairs
        [(1, 0), (2, 1), (3, 2)]
        >>> len(Association.identity(65, queries=[0, 5, 9]).candidates)
        65
    """

    name: str
    queries: Int[Array, "pair"]
    right: Int[Array, "pair"]
    candidates: Int[Array, "candidate"]

    def __post_init__(self) -> None:
        missing = sorted(set(self.right.tolist()) - set(self.candidates.tolist()))
        if missing:
            raise BirthlensError(f"association {self.name}: right entries {missing[:5]} are not among the candidates.")
        if len(self.queries) == 0 or len(self.candidates) < 2:
            raise BirthlensError(f"association {self.name}: needs at least one query and two candidates.")

    @classmethod
    def of(
        cls, pairs: Iterable[tuple[int, int]], candidates: Sequence[int] | None = None, name: str = "own"
    ) -> Association:
        """Build from pairs (query, right entry); candidates default to all right entries."""
        listed = list(pairs)
        queries = np.array([q for q, _ in listed], dtype=np.int64)
        right = np.array([r for _, r in listed], dtype=np.int64)
        return cls(name, queries, right, _distinct(right if candidates is None else np.array(candidates, np.int64)))

    @classmethod
    def identity(
        cls,
        entries: int,
        queries: Sequence[int] | None = None,
        candidates: Sequence[int] | None = None,
        name: str = "all",
    ) -> Association:
        """Pair each query with itself; queries and candidates default to every entry."""
        asked = range(entries) if queries is None else queries
        return cls.of(((q, q) for q in asked), range(entries) if candidates is None else candidates, name)

    @classmethod
    def shift(cls, entries: int, name: str = "all") -> Association:
        """Pair position t with t - 1, from the second position on; the candidates are all positions except the last."""
        return cls.of(((t, t - 1) for t in range(1, entries)), name=name)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The pairs (query, right entry)."""
        return list(zip(self.queries.tolist(), self.right.tolist(), strict=True))

    @cached_property
    def choices(self) -> Int[Array, "pair"]:
        """The number of choices of each pair: its right entry and the candidates that are wrong for its query."""
        _, _, count = self._rights
        return len(self.candidates) - count + 1

    @cached_property
    def chance(self) -> float:
        """Recall of a random table: the mean of one over the number of choices."""
        levels = 1 / self.choices
        return float(levels[0] + (levels - levels[0]).mean())  # exact if all have the same number

    @cached_property
    def columns(self) -> Int[Array, "pair"]:
        """The index of each right entry among the candidates, which are sorted."""
        return np.searchsorted(self.candidates, self.right)

    def rights(self, pairs: slice) -> tuple[Int[Array, "hit"], Int[Array, "hit"]]:
        """Return (place among `pairs`, candidate column) of every right entry of each of these pairs' queries."""
        columns, start, count = self._rights
        start = start[pairs]
        count = count[pairs]
        pair = np.repeat(np.arange(len(count)), count)
        before = np.cumsum(count) - count
        return pair, columns[np.arange(len(pair)) + (start - before)[pair]]

    @cached_property
    def _rights(self) -> tuple[Int[Array, "right"], Int[Array, "pair"], Int[Array, "pair"]]:
        """The columns of right entries grouped by query, with the start and size of each pair's group."""
        width = len(self.candidates)
        coded = _distinct(self.queries * width + self.columns)
        start, stop = (np.searchsorted(coded // width, self.queries, side) for side in ("left", "right"))
        return coded % width, start, stop - start


def _distinct(values: Int[Array, "value"]) -> Int[Array, "distinct"]:
    """Return the sorted distinct values; np.unique imports masked arrays first, 2 % of the time of `birthlens probe`."""
    return np.array(sorted(set(values.tolist())), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class PairReadings:
    """For each pair: the right score, the spread of the wrong ones, and the rank; scores are not scaled."""

    right: Float[Array, "*step pair"]
    best_wrong: Float[Array, "*step pair"]
    mean_wrong: Float[Array, "*step pair"]
    std_wrong: Float[Array, "*step pair"]
    rank: Float[Array, "*step pair"]
    soft_recall: Float[Array, "*step pair"]


def pair_readings(
    memory: AssociativeMemory, association: Association, basis: Basis = "raw", scale: float = 1.0
) -> PairReadings:
    """Read every pair of the association, in blocks of rows."""
    columns = association.columns
    wrong = association.choices - 1
    found = np.empty((6, *memory.steps, len(columns)))
    for steps, rows, scores in memory.blocks(association.queries, association.candidates, basis):
        hits = (..., *association.rights(rows))
        counts = wrong[rows]
        right = scores[..., np.arange(scores.shape[-2]), columns[rows]]
        scores[hits] = 0
        # Keep the scores' own precision: otherwise entries that tie with the right one would no longer tie.
        mean = (scores.sum(-1) / np.maximum(counts, 1)).astype(scores.dtype)
        scores -= mean[..., None]
        scores[hits] = 0
        squares = np.einsum("...rc,...rc->...r", scores, scores)
        std = np.sqrt(squares / np.where(counts > 1, counts, np.nan))  # a single wrong entry has no spread
        scores[hits] = -np.inf
        lead = right - mean
        best = scores.max(-1)
        rank = 1 + _count(scores > lead[..., None]) + _count(scores == lead[..., None]) / 2
        rank[np.isnan(lead)] = np.nan  # every comparison with NaN is false, which would give the best rank
        top = np.maximum(lead, best)
        scores -= top[..., None]
        scores *= scale
        mass = np.exp(scale * (lead - top))
        soft = mass / (mass + np.exp(scores, out=scores).sum(-1))
        for place, values in zip(found, (right, best + mean, mean, std, rank, soft), strict=True):
            place[(*steps, ..., rows)] = values
    return PairReadings(*found)


def _count(mask: Bool[Array, "*axes candidate"]) -> Int[Array, "*axes"]:
    """Count the true entries of each row, as bytes, which numpy adds faster than booleans. Most tie masks are empty."""
    if not mask.any():
        return np.zeros(mask.shape[:-1], dtype=np.int32)
    return np.asarray(mask.view(np.uint8).sum(-1, dtype=np.int32))


def readings(
    memory: AssociativeMemory,
    association: Association,
    basis: Basis = "raw",
    scale: float = 1.0,
    ways: int | None = None,
) -> dict[str, Float[Array, "*step"]]:
    """Return every metric of `READINGS` (see the module), one number for each checkpoint.

    `scale` is the model's factor for these scores (`weights.score_scale` for attention). `ways` is the number of choices of
    `matched_recall` (default: all choices of each pair).

    Example:
        >>> from birthlens.analysis.memories.memory import Circuit, Codebook
        >>> book = Codebook("W_E", np.eye(3), ("a", "b", "c"))
        >>> memory = AssociativeMemory(Circuit("W", np.diag([2.0, 2.0, -1.0])), book, book)
        >>> float(readings(memory, Association.identity(3))["recall"].round(3))
        0.667
    """
    pairs = pair_readings(memory, association, basis, scale)
    chance = association.chance
    recall = matched_recall(pairs.rank, association.choices, None).mean(-1)
    lead = pairs.right - pairs.mean_wrong
    with np.errstate(invalid="ignore", divide="ignore"):
        standardised = (lead / pairs.std_wrong).mean(-1)
        signal = lead.mean(-1) / np.sqrt((pairs.std_wrong**2).mean(-1))
    found = {
        "recall": recall,
        "corrected_recall": (recall - chance) / (1 - chance),
        "matched_recall": matched_recall(pairs.rank, association.choices, ways).mean(-1),
        "soft_recall": pairs.soft_recall.mean(-1),
        "rank": pairs.rank.mean(-1),
        "margin": scale * (pairs.right - pairs.best_wrong).mean(-1),
        "standardised": standardised,
        "signal_to_interference": signal,
    }
    return {metric: np.asarray(value) for metric, value in found.items()}


def chance_level(metric: str, association: Association, ways: int | None = None) -> float:
    """Return the metric's value for a random table; NaN for the margin, which has no scale of its own."""
    levels = {
        "recall": association.chance,
        "matched_recall": association.chance if ways is None else 1 / ways,
        "soft_recall": association.chance,
        "rank": float((association.choices + 1).mean() / 2),
        "margin": float("nan"),
    }
    return levels.get(metric, 0.0)


def matched_recall(
    rank: Float[Array, "*axes pair"], choices: Int[Array, "#pair"], ways: int | None
) -> Float[Array, "*axes pair"]:
    """Return the probability that an entry of this rank beats ways - 1 wrong ones drawn without replacement.

    It is prod_{i=1}^{ways-1} (choices - rank - i + 1) / (choices - i). ways = choices gives recall, and ways = 2 the share
    of wrong entries that the right one beats. `choices` is the number of entries that each pair is ranked among.

    Example:
        >>> matched_recall(np.array([1.0, 2.0, 5.0]), choices=np.array([5]), ways=2).tolist()
        [1.0, 0.75, 0.0]
    """
    if ways is None:
        return np.where(np.isnan(rank), np.nan, rank == 1)
    if not 2 <= ways <= choices.min():
        raise BirthlensError(f"ways = {ways}: choose from 2 to the smallest number of choices, {choices.min()}.")
    beaten = np.ones(rank.shape)
    for drawn in range(1, ways):
        beaten *= np.clip(choices - rank - drawn + 1, 0, None) / (choices - drawn)
    return np.where(
        (choices == ways) & ~np.isnan(rank), rank == 1, beaten
    )  # against all wrong entries, ties count as lost, as in recall


def frobenius_share(memory: AssociativeMemory, association: Association) -> Float[Array, "*step"]:
    """Return the share of ||W||^2 along the ideal memory M = sum of u_q^T v_r over the pairs: <W, M>^2 / ||W||^2 ||M||^2.

    There is one coefficient for all pairs; the ledger has one for each. A random matrix has 1 / (d_in d_out) on average.
    """
    inputs = memory.inputs.vectors[..., association.queries, :]
    ideal = inputs.swapaxes(-1, -2) @ memory.outputs.vectors[..., association.right, :]
    matrix = memory.circuit.matrix
    with np.errstate(invalid="ignore", divide="ignore"):
        overlap = np.einsum("...ij,...ij->...", matrix, ideal)
        energy = [np.einsum("...ij,...ij->...", array, array) for array in (matrix, ideal)]
        return np.asarray(overlap**2 / (energy[0] * energy[1]))
