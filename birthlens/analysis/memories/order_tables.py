"""The order in which the memories of several runs are born: from runs to the tables of `birth_order`.

Each memory needs one candidate set, and the choice matters. With K fixed triggers, the authors read the trigger memory as a
K-way choice, which is easy, and the output memory as a choice among all tokens with all tokens as queries. The default,
`MATCHED`, reads both memories for the triggers among all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from birthlens.analysis.memories.birth_order import crossing_table, onset_table, standardised_table
from birthlens.analysis.memories.memory import Basis
from birthlens.analysis.memories.recall_tables import memory_series
from birthlens.errors import BirthlensError
from birthlens.runs.run import Run

if TYPE_CHECKING:
    import pandas as pd

MATCHED: dict[str, tuple[str, ...]] = {
    "prev_token_memory": ("all",),
    "trigger_memory": ("triggers among all", "all"),
    "output_memory": ("triggers among all", "all"),
}
"""The candidate sets of each memory, by preference; the first one that exists is used."""

CROSSINGS: dict[str, tuple[float, ...]] = {"recall": (0.5, 0.9), "soft_recall": (0.5,), "margin": (0.0,)}
"""Other probes, each with the thresholds that it has to stay above."""


def standardised_scores_table(runs: Sequence[Run], basis: Basis = "raw") -> pd.DataFrame:
    """Score the paper's memories at every kept step of every run.

    Columns: seed, run, and those of `birth_order.standardised_table`. `seed` is the run's seed of initialisation, or its
    place in the list if two runs share one. attrs["moving_codebooks"] names the codebooks that move in any of the runs.

    Raises:
        BirthlensError: if there are no runs, a run is not of the two-layer simplified model, a run appears twice, or runs
            differ in more than their seeds.
    """
    tables = []
    for seed, run in zip(_seeds(runs), runs, strict=True):
        table = standardised_table(run.checkpoints(), run.triggers, basis=basis)
        table.insert(0, "run", str(run.path))
        table.insert(0, "seed", seed)
        tables.append(table)
    return _together(tables)


def onsets_table(scores: pd.DataFrame, width: float = 4.0) -> pd.DataFrame:
    """Find the onset of every memory of every run, in every candidate set: `birth_order.onset_table` by seed."""
    return onset_table(scores.drop(columns="run"), width)


def chosen_sets(onsets: pd.DataFrame, sets: Mapping[str, Sequence[str]] | None = None) -> pd.DataFrame:
    """Keep one candidate set for each memory: the first of `sets` (default `MATCHED`) that exists.

    Raises:
        BirthlensError: if a memory has none of its sets, or not for every seed; the message lists those that exist.
    """
    kept = []
    wanted = {**MATCHED, **(sets or {})}
    for memory, rows in onsets.groupby("memory", sort=False):
        names = [name for name in wanted.get(str(memory), ()) if name in set(rows["candidates"])]
        if not names:
            there = ", ".join(dict.fromkeys(rows["candidates"]))
            raise BirthlensError(
                f"candidates of {memory}: {', '.join(wanted[str(memory)])} were not read; the table has {there}."
            )
        chosen = rows[rows["candidates"] == names[0]]
        if lacking := sorted(set(onsets["seed"]) - set(chosen["seed"])):
            raise BirthlensError(
                f"candidates of {memory}: {names[0]!r} is read for some seeds and not for seed {lacking[0]}; give runs that "
                "are read in the same way."
            )
        kept.append(chosen)
    return _together(kept)


def crossings_table(
    runs: Sequence[Run], crossings: Mapping[str, Sequence[float]] | None = None, bases: Sequence[Basis] = ("raw",)
) -> pd.DataFrame:
    """Find the step from which other probes stay above their thresholds (default `CROSSINGS`): `crossing_table` by seed."""
    tables = []
    for seed, run in zip(_seeds(runs), runs, strict=True):
        read = memory_series(run.checkpoints(), run.triggers, bases=bases).to_pandas()
        read.insert(0, "seed", seed)
        for metric, thresholds in (crossings or CROSSINGS).items():
            tables.append(crossing_table(read, [metric], thresholds))
    return _together(tables)


def _together(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    import pandas as pd

    table = pd.concat(tables, ignore_index=True)
    table.attrs["moving_codebooks"] = sorted({name for one in tables for name in one.attrs.get("moving_codebooks", [])})
    return table


def _seeds(runs: Sequence[Run]) -> list[int]:
    if not runs:
        raise BirthlensError("There is no run to read an order from; give at least one.")
    for run in runs:
        model = run.config.model
        if model.family != "simplified" or model.n_layers != 2:
            raise BirthlensError(
                f"run = {str(run.path)!r} is a {model.family} model of {model.n_layers} layers; the order of birth needs "
                "the three memories of the two-layer simplified model."
            )
    first = runs[0]
    seen = dict[tuple[int, int], Run]()
    for run in runs:
        if difference := _difference(first, run):
            raise BirthlensError(
                f"run = {str(run.path)!r} differs from {str(first.path)!r} in {difference}; an order over seeds needs runs "
                "that differ in nothing but seeds."
            )
        seeds = run.config.seeds
        if twin := seen.get((seeds.init, seeds.data)):
            raise BirthlensError(
                f"run = {str(run.path)!r} has the same seeds as {str(twin.path)!r}: one run twice is not two seeds."
            )
        seen[seeds.init, seeds.data] = run
    initial = [run.config.seeds.init for run in runs]
    return initial if len(set(initial)) == len(initial) else list(range(len(runs)))


def _difference(one: Run, other: Run) -> str | None:
    """Return a setting in which two runs differ, apart from seeds, engine, checkpoints and evaluation; or None."""
    for section in ("corpus", "task", "model", "optimiser", "training"):
        left, right = (vars(getattr(run.config, section)) for run in (one, other))
        for key in left:
            if key != "engine" and left[key] != right[key]:
                return f"{section}.{key} ({right[key]!r} against {left[key]!r})"
    if one.steps[-1] != other.steps[-1]:
        return f"the last kept step ({other.steps[-1]} against {one.steps[-1]})"
    return None
