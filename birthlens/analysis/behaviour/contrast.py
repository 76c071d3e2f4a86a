"""Paired counterfactuals: how forks, or other changed runs, differ from their controls, seed by seed.

A pair is a control and a run with the same seeds. Differences are changed run minus control. Intervals are Student's t over
pairs; a single pair has none. Only steps that all runs have are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from birthlens.analysis.behaviour.births import accuracy_birth, held_out, memory_births, one_reading_each
from birthlens.analysis.memories.birth_order import onset, standardised_table
from birthlens.analysis.memories.names import is_paper_model
from birthlens.errors import BirthlensError
from birthlens.runs.run import Run
from birthlens.shapes import Float

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray
_METRICS = ("in_context_accuracy", "in_context_loss", "global_accuracy", "global_loss", "all_loss")


@dataclass(frozen=True, eq=False)
class RunPair:
    """A control and the run that is compared with it."""

    control: Run
    changed: Run


def pairs_of(controls: Sequence[Run], changed: Sequence[Run]) -> list[RunPair]:
    """Give each run its control: the only one, the run that it was forked from, or the one with its seeds.

    Raises:
        BirthlensError: if a run has no control or two, vocabularies differ, or a pair appears twice.
    """
    found: list[RunPair] = []
    for run in changed:
        mine = [control for control in controls if len(controls) == 1 or _is_parent(control, run)]
        mine = mine or [control for control in controls if _seeds(control) == _seeds(run)]
        if len(mine) != 1:
            raise BirthlensError(
                f"run = {str(run.path)!r} has {len(mine)} controls with seeds.init, seeds.data = {_seeds(run)}; give one."
            )
        if mine[0].header["vocab"] != run.header["vocab"]:
            raise BirthlensError(f"run = {str(run.path)!r} has a different vocabulary from {str(mine[0].path)!r}.")
        if any(pair.changed.path.resolve() == run.path.resolve() for pair in found):
            raise BirthlensError(f"run = {str(run.path)!r} is given twice.")
        found.append(RunPair(mine[0], run))
    if not found:
        raise BirthlensError("There is no run to compare; give a control and at least one run.")
    return found


def cautions(pairs: Sequence[RunPair]) -> list[str]:
    """Say what keeps the intervals of some pairs from being intervals over paired runs; empty if nothing does."""
    found = ["one pair has no interval; give runs of several seeds."] if len(pairs) == 1 else []
    controls = [pair.control.path.resolve() for pair in pairs]
    if len(set(controls)) < len(controls):
        found.append("several runs share a control, so an interval is not one over independent pairs.")
    for pair in pairs:
        if not _is_parent(pair.control, pair.changed) and _seeds(pair.control) != _seeds(pair.changed):
            found.append(f"{pair.changed.path} has other seeds than {pair.control.path}, so the two are not paired.")
    return found


def contrast_table(pairs: Sequence[RunPair]) -> pd.DataFrame:
    """Compare measurements and memory scores at every step that all runs have.

    Columns: step, metric, control, changed (means over pairs), difference, low, high, n (pairs). Metrics are those of the
    held-out batch and, for the paper's model, memory scores against shifted pairings (`standardised_table`).

    Raises:
        BirthlensError: if the runs have no step in common.
    """
    import pandas as pd

    sides = [(_values(pair.control), _values(pair.changed)) for pair in pairs]
    index = sides[0][0].index
    for side in sides:
        for table in side:
            index = index.intersection(table.index)
    if not len(index):
        raise BirthlensError(
            "The runs have no measured step in common; keep or evaluate the same steps in all of them."
        )
    rows = []
    for metric, step in sorted(index, key=lambda key: (str(key[0]), key[1])):
        control, changed = (np.array([side[i][metric, step] for side in sides]) for i in (0, 1))
        low, high = paired_interval(changed - control)
        difference = float((changed - control).mean())
        rows.append((step, metric, float(control.mean()), float(changed.mean()), difference, low, high, len(pairs)))
    return pd.DataFrame(rows, columns=["step", "metric", "control", "changed", "difference", "low", "high", "n"])


def first_differences_table(contrast: pd.DataFrame) -> pd.DataFrame:
    """Find the step from which each metric of a `contrast_table` differs.

    Columns: metric, first (the first step at which the interval excludes zero, or at which the values differ if there is
    one pair only), lasting (the first step from which it does so until the end), n. NaN: never.
    """
    import pandas as pd

    rows = []
    for metric, part in contrast.groupby("metric", sort=False):
        alone = part["n"] == 1
        apart = (part["low"] > 0) | (part["high"] < 0) | (alone & (part["difference"] != 0))
        steps = part["step"].to_list()
        first = next((float(step) for step, here in zip(steps, apart, strict=True) if here), float("nan"))
        rows.append((metric, first, onset(steps, apart.to_numpy()), int(part["n"].iloc[0])))
    return pd.DataFrame(rows, columns=["metric", "first", "lasting", "n"])


def birth_shifts_table(pairs: Sequence[RunPair], width: float = 4.0) -> pd.DataFrame:
    """Compute how much later each memory and the accuracy are born than in the control.

    A memory is born at the step from which its right entries stay above the null band, the accuracy when it stays above one
    half. Both runs are read at the steps that they share. Columns: event, control, changed (mean steps over the pairs in
    which both were born), shift, low, high, n (such pairs), control_never, changed_never (pairs in which it was not born).
    """
    import pandas as pd

    births = [_births(pair, width) for pair in pairs]
    rows = []
    for event in births[0][0]:
        control, changed = (np.array([both[i].get(event, np.nan) for both in births]) for i in (0, 1))
        both = np.isfinite(control) & np.isfinite(changed)
        shift = (changed - control)[both]
        low, high = paired_interval(shift)
        means = [float(values[both].mean()) if both.any() else float("nan") for values in (control, changed)]
        mean = float(shift.mean()) if len(shift) else float("nan")
        never = [int(np.isnan(values).sum()) for values in (control, changed)]
        rows.append((event, *means, mean, low, high, int(both.sum()), *never))
    columns = ["event", "control", "changed", "shift", "low", "high", "n", "control_never", "changed_never"]
    return pd.DataFrame(rows, columns=columns)


def paired_interval(differences: Float[Array, "pair"], level: float = 0.95) -> tuple[float, float]:
    """Return Student's t interval of a mean difference; NaN for fewer than two pairs.

    Example:
        >>> [round(end, 3) for end in paired_interval(np.array([1.0, 2.0, 3.0]))]
        [-0.484, 4.484]
    """
    n = len(differences)
    if n < 2:
        return float("nan"), float("nan")
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, n - 1) * differences.std(ddof=1) / np.sqrt(n))
    mean = float(differences.mean())
    return mean - half, mean + half


def _is_parent(control: Run, run: Run) -> bool:
    return run.parent is not None and run.parent.path.resolve() == control.path.resolve()


def _seeds(run: Run) -> tuple[int, int]:
    return run.config.seeds.init, run.config.seeds.data


def _values(run: Run) -> pd.Series[float]:
    """Return the measurements of a run and the scores of its memories, by metric and step."""
    import pandas as pd

    table = run.metrics()
    table = table[(table["split"] == "held_out") & table["metric"].isin(_METRICS)]
    parts = [table.set_index(["metric", "step"])["value"]]
    if is_paper_model(run.config.model):
        scores = one_reading_each(standardised_table(run.checkpoints(), run.triggers))
        parts.append(scores.rename(columns={"memory": "metric"}).set_index(["metric", "step"])["value"])
    found = pd.concat(parts)
    return found[~found.index.duplicated(keep="last")]


def _births(pair: RunPair, width: float) -> list[dict[str, float]]:
    """Return the step of each event of the control and of the changed run, among the steps that they share."""
    kept = sorted({*pair.control.steps} & {*pair.changed.steps})
    if not kept:
        raise BirthlensError(
            f"run = {str(pair.changed.path)!r} and its control {str(pair.control.path)!r} keep no step in common."
        )
    runs = (pair.control, pair.changed)
    found = [memory_births(run, kept, width) for run in runs]
    metrics = [run.metrics() for run in runs]
    control, changed = ({*held_out(each, "in_context_accuracy")[0].tolist()} for each in metrics)
    if shared := sorted(control & changed):
        for births, each in zip(found, metrics, strict=True):
            births["in_context_accuracy"] = accuracy_birth(each, shared)
    return found
