"""The strongest right and wrong associations of a memory, with a limit on memory use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from birthlens.analysis.memories.memory import Array, AssociativeMemory, Basis
from birthlens.analysis.memories.recall import Association
from birthlens.errors import BirthlensError

if TYPE_CHECKING:
    import pandas as pd


def top_associations_table(
    memory: AssociativeMemory,
    k: int = 20,
    association: Association | None = None,
    basis: Basis = "raw",
) -> pd.DataFrame:
    """List the k strongest right and the k strongest wrong associations of one checkpoint, by label.

    Columns: kind ("right", "wrong", or "any" if no association is given), place (from 1), input, output, score.
    The table of scores is read in blocks of rows, so a vocabulary of 50,000 words needs tens of megabytes.

    Raises:
        BirthlensError: for a stack of several checkpoints.
    """
    import pandas as pd

    if max(array.ndim for array in (memory.circuit.matrix, memory.inputs.vectors, memory.outputs.vectors)) > 2:
        raise BirthlensError(
            f"{memory.name}: strongest associations are of one checkpoint; this is a stack of several."
        )
    kind = "any" if association is None else "wrong"
    queries = np.arange(len(memory.inputs)) if association is None else np.unique(association.queries)
    candidates = np.arange(len(memory.outputs)) if association is None else association.candidates
    masked = (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    found: dict[str, tuple[Array, Array, Array]] = {kind: _empty()}
    if association is not None:
        rows, columns = memory.factors(basis)
        scores = np.einsum("pr,pr->p", rows[association.queries], columns[association.right])
        found = {"right": _strongest((scores, association.queries, association.right), k), kind: _empty()}
        order = np.argsort(association.queries, kind="stable")
        masked = (np.searchsorted(queries, association.queries[order]), association.columns[order])
    for _, block, scores in memory.blocks(queries, candidates, basis):
        first, last = np.searchsorted(masked[0], [block.start, block.stop])
        scores[masked[0][first:last] - block.start, masked[1][first:last]] = -np.inf
        best = found[kind]
        floor = best[0][-1] if len(best[0]) == k else -np.inf
        busy = np.flatnonzero(scores.max(axis=1) > floor)
        if len(busy) == 0:
            continue
        # Search only rows that can enter the list, each for at most its k best entries.
        width = min(k, scores.shape[1])
        columns = np.argpartition(scores[busy], -width, axis=1)[:, -width:]
        values = np.take_along_axis(scores[busy], columns, axis=1).ravel()
        fresh = (values, np.repeat(queries[block][busy], width), candidates[columns.ravel()])
        merged = tuple(np.concatenate(pair) for pair in zip(best, fresh, strict=True))
        found[kind] = _strongest((merged[0], merged[1], merged[2]), k)
    return pd.DataFrame(
        [
            (name, place, memory.inputs.labels[query], memory.outputs.labels[entry], float(score))
            for name, listed in found.items()
            for place, (score, query, entry) in enumerate(zip(*listed, strict=True), start=1)
        ],
        columns=["kind", "place", "input", "output", "score"],
    )


def _empty() -> tuple[Array, Array, Array]:
    return np.empty(0), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)


def _strongest(listed: tuple[Array, Array, Array], k: int) -> tuple[Array, Array, Array]:
    values, queries, entries = listed
    order = np.argsort(-values, kind="stable")[:k]
    order = order[np.isfinite(values[order])]
    return values[order], queries[order], entries[order]
