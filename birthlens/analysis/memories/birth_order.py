"""When each memory appears, and in which order, with statistics (paper section 3, figure on the order of learning).

The score of a memory is standardised. For each pair it is (right entry - mean of the others) / their standard deviation,
averaged over pairs. The null distribution comes from the same table with shifted pairings: each query is paired with the
candidate s places after its right one, s = 1, 2, ... The vectors and the matrix are the same; only the partners are wrong.
A memory is born at the first step from which its score stays above mean + width * std of the null. This puts memories of
different sizes on one scale.

Intervals over seeds are exact, so that twelve seeds out of twelve do not count as certainty: Clopper-Pearson intervals for
shares of seeds, order statistics for median onsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise, product
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from birthlens.analysis.memories.circuits import INDUCTION_HEAD, PREV_TOKEN_HEAD
from birthlens.analysis.memories.intervals import median_interval, share_interval
from birthlens.analysis.memories.memory import Array, AssociativeMemory, Basis
from birthlens.analysis.memories.recall import Association
from birthlens.analysis.memories.recall_tables import Checkpoints, Moving, chunks, paper_probes
from birthlens.errors import BirthlensError
from birthlens.model.sites import Head
from birthlens.shapes import Bool, Float

if TYPE_CHECKING:
    import pandas as pd


def shifted_scores(
    memory: AssociativeMemory, association: Association, basis: Basis = "raw"
) -> Float[Array, "*step shift"]:
    """Return the standardised score of the association shifted by s = 0 (itself), 1, ..., candidates - 1 places.

    Raises:
        BirthlensError: with fewer than four candidates, which are too few for a null distribution.
    """
    count = len(association.candidates)
    if count < 4:
        raise BirthlensError(
            f"association {association.name}: {count} candidates are too few for a null band; give at least four."
        )
    total = np.zeros((*memory.steps, count))
    for steps, rows, scores in memory.blocks(association.queries, association.candidates, basis):
        # Mean and variance of all other entries, for every entry at once: subtract the entry from its row's sums.
        centred = scores.astype(np.float64)
        centred -= centred.mean(-1, keepdims=True)
        others = -centred / (count - 1)
        squares = np.einsum("...rc,...rc->...r", centred, centred)[..., None] - centred**2
        with np.errstate(invalid="ignore", divide="ignore"):
            score = (centred - others) / np.sqrt(np.maximum(squares / (count - 1) - others**2, 0))
        shifted = (association.columns[rows, None] + np.arange(count)) % count
        total[steps] += np.take_along_axis(score, np.broadcast_to(shifted, score.shape), axis=-1).sum(-2)
    return total / len(association.queries)


def onset(steps: Sequence[int], above: Bool[Array, "step"]) -> float:
    """Return the first step from which `above` holds until the end, or NaN if it does not hold at the end.

    Example:
        >>> onset([0, 10, 20, 30], np.array([True, False, True, True]))
        20.0
    """
    outside = np.flatnonzero(~np.asarray(above, dtype=bool))
    first = 0 if len(outside) == 0 else int(outside[-1]) + 1
    return float(steps[first]) if first < len(steps) else float("nan")


def standardised_table(
    checkpoints: Checkpoints,
    triggers: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
    basis: Basis = "raw",
    prev_token_head: Head = PREV_TOKEN_HEAD,
    induction_head: Head = INDUCTION_HEAD,
) -> pd.DataFrame:
    """Score the paper's three memories at every checkpoint, against shifted pairings.

    Columns: step, memory, candidates, value, null_mean, null_std, n (queries), shifts (wrong pairings in the null).
    attrs["moving_codebooks"] as in `recall_tables.memory_series`. Sets of fewer than four candidates are left out.

    Raises:
        BirthlensError: if a memory has no set of at least four candidates.
    """
    import pandas as pd

    rows = []
    moving = Moving([prev_token_head])
    with threadpool_limits(1):  # see recall_tables.memory_series
        for steps, weights in chunks(checkpoints):
            moving.watch(weights)
            for probe in paper_probes(weights, triggers, outputs, prev_token_head, induction_head):
                wide_enough = [of for of in probe.associations if len(of.candidates) >= 4]
                if not wide_enough:
                    count = max(len(of.candidates) for of in probe.associations)
                    raise BirthlensError(
                        f"{probe.name}: {count} candidates are too few for a null band, which needs at least four."
                    )
                for association in wide_enough:
                    found = np.broadcast_to(
                        shifted_scores(probe.memory, association, basis), (len(steps), len(association.candidates))
                    )
                    for step, scores in zip(steps, found, strict=True):
                        null = scores[1:]
                        sizes = (len(association.queries), len(scores) - 1)
                        row = (
                            step,
                            probe.name,
                            association.name,
                            float(scores[0]),
                            float(null.mean()),
                            float(null.std(ddof=1)),
                        )
                        rows.append((*row, *sizes))
    columns = ["step", "memory", "candidates", "value", "null_mean", "null_std", "n", "shifts"]
    table = pd.DataFrame(rows, columns=columns)
    table = table.sort_values(["memory", "candidates", "step"], kind="stable", ignore_index=True)
    table.attrs["moving_codebooks"] = moving.names
    return table


def onset_table(scores: pd.DataFrame, width: float = 4.0) -> pd.DataFrame:
    """Find the onset of every memory in a `standardised_table`; rows that differ in other columns (seed, run) stay separate.

    Columns: those other columns, memory, candidates, probe ("standardised"), threshold (`width`), onset (NaN: never).
    attrs are those of `scores`.

    Raises:
        BirthlensError: if `width` is negative or not finite.
    """
    if not (np.isfinite(width) and width >= 0):
        raise BirthlensError(f"width = {width}: give a finite number of standard deviations, 0 or more.")
    band = scores["null_mean"] + width * scores["null_std"]
    marked = scores.assign(above=scores["value"] > band, probe="standardised", threshold=width)
    return _onsets(marked, ["step", "value", "null_mean", "null_std", "n", "shifts", "above"])


def crossing_table(readings: pd.DataFrame, metrics: Sequence[str], thresholds: Sequence[float]) -> pd.DataFrame:
    """Find the step from which each reading of a `memory_series` stays above a threshold.

    The table shows how the order depends on the probe. Columns as in `onset_table`, with basis. Thresholds are compared with
    the metric's own values (`margin` with 0, for instance).
    """
    import pandas as pd

    unknown = sorted(set(metrics) - set(readings["metric"]))
    if unknown:
        raise BirthlensError(f"metrics = {unknown} are not in the table; it has {sorted(set(readings['metric']))}.")
    picked = readings[readings["metric"].isin(list(metrics))].rename(columns={"metric": "probe"})
    dropped = ["step", "layer", "head", "value", "chance", "n", "above"]
    found = [
        _onsets(picked.assign(above=picked["value"] > threshold, threshold=threshold), dropped)
        for threshold in thresholds
    ]
    table = pd.concat(found, ignore_index=True)
    table.attrs = dict(readings.attrs)
    return table


def birth_order_table(onsets: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """Tabulate over seeds when each memory is born and which comes first.

    Needs the columns seed, memory and onset, with one row for each seed and memory.
    Columns: kind, what, value, low, high, n (seeds). attrs are those of `onsets`. Kinds:

    - "onset": the median onset, infinite if most seeds have none.
    - "before": the probability that the first memory is born before the second. Ties count half, and a memory that is never
      born comes last. Only seeds in which at least one of the two is born count.
    - "order": the probability of each order, such as "output < trigger = prev_token" or "output; never prev_token, trigger".

    low and high are the ends of an interval over seeds of at least the given level (`share_interval`, `median_interval`).

    Raises:
        BirthlensError: if a seed has no row for a memory, or more than one.
    """
    import pandas as pd

    if onsets.empty or onsets.duplicated(["seed", "memory"]).any():
        raise BirthlensError("onsets: give one row for each seed and memory; choose one probe and candidate set.")
    wide = _wide(onsets, onsets["seed"].unique())
    times = wide.to_numpy()
    names = list(wide.columns)
    rows = []
    for name, column in zip(names, times.T, strict=True):
        rows.append(("onset", name, float(np.median(column)), *median_interval(column.tolist(), level), len(column)))
    shares: list[tuple[str, str, Array]] = []
    for i, j in combinations(range(len(names)), 2):
        pair = times[np.isfinite(times[:, [i, j]]).any(axis=1)][:, [i, j]]  # without seeds where neither is born
        wins = (pair[:, 0] < pair[:, 1]) + 0.5 * (pair[:, 0] == pair[:, 1])
        shares.append(("before", f"{names[i]} < {names[j]}", wins))
    orders = [_order(names, row) for row in times]
    for order in sorted(set(orders), key=lambda order: (-orders.count(order), order)):
        shares.append(("order", order, np.array([float(other == order) for other in orders])))
    rows += [(kind, what, *_share(wins, level), len(wins)) for kind, what, wins in shares]
    table = pd.DataFrame(rows, columns=["kind", "what", "value", "low", "high", "n"])
    table.attrs = dict(onsets.attrs)
    return table


def _share(wins: Float[Array, "seed"], level: float) -> tuple[float, float, float]:
    if len(wins) == 0:
        return float("nan"), float("nan"), float("nan")
    return float(wins.mean()), *share_interval(float(wins.sum()), len(wins), level)


def order_sensitivity_table(onsets: pd.DataFrame) -> pd.DataFrame:
    """Show how the order depends on probe, threshold and candidates: one row for each choice, over all seeds.

    Takes rows of `onset_table` and `crossing_table` together, with a column seed. Columns: probe, threshold, basis,
    candidates (one set for each memory, in every combination), order (the most frequent one), share (of seeds with this
    order), low, high (its `share_interval`), n (seeds).

    Raises:
        BirthlensError: if a seed lacks a probe and candidate set that other seeds have.
    """
    import pandas as pd

    rows = []
    seeds = onsets["seed"].unique()
    keyed = onsets.assign(basis=onsets["basis"].fillna("raw") if "basis" in onsets else "raw")
    for (probe, threshold, basis), group in keyed.groupby(["probe", "threshold", "basis"], sort=True):
        names = list(dict.fromkeys(group["memory"]))
        for sets in product(*(dict.fromkeys(group.loc[group["memory"] == name, "candidates"]) for name in names)):
            picked = group[group["candidates"] == group["memory"].map(dict(zip(names, sets, strict=True)))]
            wide = _wide(picked, seeds)
            orders = [_order(list(wide.columns), row) for row in wide.to_numpy()]
            common = max(sorted(set(orders)), key=orders.count)
            label = "; ".join(f"{name.removesuffix('_memory')}: {of}" for name, of in zip(names, sets, strict=True))
            count = orders.count(common)
            n = len(orders)
            rows.append((probe, threshold, basis, label, common, count / n, *share_interval(count, n), n))
    columns = ["probe", "threshold", "basis", "candidates", "order", "share", "low", "high", "n"]
    table = pd.DataFrame(rows, columns=columns)
    table.attrs = dict(onsets.attrs)
    return table


def _wide(onsets: pd.DataFrame, seeds: Array) -> pd.DataFrame:
    """Return seeds x memories, with infinity for a memory that is never born; refuse memories that were not read."""
    wide = onsets.pivot(index="seed", columns="memory", values="onset").astype(float)
    read = set(zip(onsets["seed"], onsets["memory"], strict=True))
    for seed, memory in product(seeds, wide.columns):
        if (seed, memory) not in read:
            candidates = ", ".join(dict.fromkeys(onsets.loc[onsets["memory"] == memory].get("candidates", [])))
            raise BirthlensError(
                f"onsets: {memory} was not read for seed {seed}{f' among {candidates}' if candidates else ''}, which is not "
                "the same as never born; give runs that are read in the same way."
            )
    return wide.fillna(np.inf)


def _order(names: Sequence[str], times: Float[Array, "memory"]) -> str:
    ranked = sorted(zip(times.tolist(), (str(name).removesuffix("_memory") for name in names), strict=True))
    born = [(time, name) for time, name in ranked if np.isfinite(time)]
    never = [name for time, name in ranked if not np.isfinite(time)]
    text = born[0][1] if born else ""
    for (before, _), (now, name) in pairwise(born):
        text += f" {'=' if now == before else '<'} {name}"
    return "; ".join(part for part in (text, f"never {', '.join(never)}" if never else "") if part)


def _onsets(marked: pd.DataFrame, dropped: Sequence[str]) -> pd.DataFrame:
    keys = [column for column in marked.columns if column not in dropped]
    ordered = marked.sort_values("step", kind="stable")

    def first(group: pd.DataFrame) -> float:
        return onset(group["step"].tolist(), group["above"].to_numpy())

    found = ordered.groupby(keys, sort=False)[["step", "above"]].apply(first).rename("onset").reset_index()
    found.attrs = dict(marked.attrs)
    return found
