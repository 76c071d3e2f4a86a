"""Statistics of the memories over training: which is born first, how freezing one affects the others, early positions.

A memory that is not born by the last kept step has no step of birth (NaN); differences are as in `timing.lag`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from birthlens.analysis.behaviour.births import accuracy_birth, held_out
from birthlens.analysis.behaviour.trajectory import memories_over
from birthlens.analysis.memories.birth_order import onset, onset_table, standardised_table
from birthlens.analysis.memories.circuits import prev_token_memory
from birthlens.claims.claim import Evidence
from birthlens.claims.statistics.timing import lag
from birthlens.runs.run import Run
from birthlens.shapes import Bool

Array = np.ndarray
MEMORY_NAMES = ("output", "trigger", "prev_token")
WIDTH = 4.0
"""How far above the mean of the shifted pairings a score must be, in their standard deviations."""


def onsets(run: Run) -> dict[str, float]:
    """Return the step from which each memory's standardised score stays above the null band of shifted pairings.

    All three are read among all tokens (or positions) as candidates. With fixed triggers, the queries of the trigger memory
    are the triggers. NaN if a memory is never born.
    """
    found = onset_table(standardised_table(run.checkpoints(), run.triggers), WIDTH)
    named = found.set_index(["memory", "candidates"])["onset"]
    return {name: float(named[key]) for name, key in _read(run).items()}


def half_heights(run: Run) -> dict[str, float]:
    """Return the step from which each memory's raw recall, as the paper reads it, stays above half of its last value.

    NaN if it is zero at the end.
    """
    recall = memories_over(run, bases=("raw",)).to_pandas()
    recall = recall[recall["metric"] == "recall"]
    found = {}
    for name in MEMORY_NAMES:
        narrow = name == "trigger" and run.trigger_ids is not None and len(run.trigger_ids) > 1
        rows = recall[
            (recall["memory"] == f"{name}_memory") & (recall["candidates"] == ("triggers" if narrow else "all"))
        ]
        values = rows.sort_values("step")["value"].to_numpy()
        found[name] = onset(run.steps, values >= max(values[-1] / 2, 1e-9))
    return found


def birth_order(evidence: Evidence) -> dict[str, float]:
    """Return how many steps later each memory is born, by standardised score, and the onsets themselves."""
    run = evidence.runs["run"]
    return _lags(onsets(run), run)


def crossing_order(evidence: Evidence) -> dict[str, float]:
    """Return the same as `birth_order`, by half-height crossings of raw recall."""
    run = evidence.runs["run"]
    return _lags(half_heights(run), run)


def frozen_first(evidence: Evidence) -> dict[str, float]:
    """Compare, at step F, a run with one memory frozen until F with a run in which all memories move.

    `accuracy_frozen`, `accuracy_free`, `accuracy_lost`: held-out in-context accuracy of both at F, and their difference.
    `kept_*`: the standardised score of each other memory at F, as a share of its score in the free run. It is NaN if the
    memory is not born there by then, because a share of almost nothing has no meaning. `delay_*`: by how many steps it is
    born later than in the free run (`timing.lag`).
    """
    until = evidence.settings["until"]
    matrix = evidence.settings["memory"]
    frozen = evidence.runs["frozen"]
    free = evidence.runs["free"]
    found = {"accuracy_frozen": accuracy_at(frozen, until), "accuracy_free": accuracy_at(free, until)}
    found["accuracy_lost"] = found["accuracy_free"] - found["accuracy_frozen"]
    late = scores_at(frozen, until)
    usual = scores_at(free, until)
    births = onsets(frozen)
    normal = onsets(free)
    ends = float(free.steps[-1]), float(frozen.steps[-1])
    for name in MEMORY_NAMES:
        if name != matrix:
            score, band = usual[name]
            found[f"kept_{name}"] = late[name][0] / score if score > band else float("nan")
            found |= lag(f"delay_{name}", normal[name], births[name], ends)
    return found


def given_and_withheld(evidence: Evidence) -> dict[str, float]:
    """Compare runs in which one memory is given (ideal from step 0) or withheld (as at step 0) with the control.

    For each memory i: `sooner_i`, how many steps earlier the in-context accuracy stays above one half with i given;
    `lost_i`, the accuracy lost at the end with i withheld; `j_given_i` and `j_withheld_i`, how many steps later another
    memory j is born (`timing.lag`).
    """
    control = evidence.runs["control"]
    normal = onsets(control)
    found: dict[str, float] = {}
    for name in MEMORY_NAMES:
        for how in ("given", "withheld"):
            run = evidence.runs[f"{name} {how}"]
            births = onsets(run)
            for other in MEMORY_NAMES:
                if other != name:
                    found |= lag(f"{other}_{how}_{name}", normal[other], births[other], _ends(control, run))
            if how == "given":
                found |= _sooner(name, control, run)
            else:
                lost = accuracy_at(control, control.steps[-1]) - accuracy_at(run, run.steps[-1])
                found[f"lost_{name}"] = lost
    return found


def pinned(evidence: Evidence) -> dict[str, float]:
    """Return `sooner_i` for every case "i pinned": how many steps earlier than in the control the accuracy is born."""
    control = evidence.runs["control"]
    found: dict[str, float] = {}
    for case, run in evidence.runs.items():
        if run is not control:
            found |= _sooner(case.removesuffix(" pinned"), control, run)
    return found


def _sooner(name: str, control: Run, run: Run) -> dict[str, float]:
    """Return how many steps earlier than in the control the in-context accuracy stays at one half or above."""
    births = accuracy_birth(run.metrics()), accuracy_birth(control.metrics())
    return lag(f"sooner_{name}", *births, _ends(run, control))


def _ends(first: Run, second: Run) -> tuple[float, float]:
    return float(first.steps[-1]), float(second.steps[-1])


def scores_at(run: Run, step: int) -> dict[str, tuple[float, float]]:
    """Return the standardised score of each memory at a step, and the null band that it must exceed, as in `onsets`."""
    table = standardised_table([(step, run.weights(step))], run.triggers).set_index(["memory", "candidates"])
    table["band"] = table["null_mean"] + WIDTH * table["null_std"]
    return {name: (float(table["value"][key]), float(table["band"][key])) for name, key in _read(run).items()}


def accuracy_at(run: Run, step: int, metric: str = "in_context_accuracy") -> float:
    """Return a held-out measurement at a step."""
    steps, values = held_out(run.metrics(), metric)
    found = values[steps == step]
    return float(found[0]) if len(found) else float("nan")


def early_positions(evidence: Evidence) -> dict[str, float]:
    """Measure whether the previous-token memory learns early positions first.

    `rank_correlation` (Spearman) is between a position and the step from which it stays recalled, where positions that are
    never recalled come last. `early` and `late` are the recalls of the first and the last quarter at the end.
    """
    from scipy.stats import spearmanr

    run = evidence.runs["run"]
    recalled = np.stack([_recalled(weights) for _, weights in run.checkpoints()])
    last = float(run.steps[-1] + 1)
    births = np.nan_to_num([onset(run.steps, column) for column in recalled.T], nan=last)
    quarter = recalled.shape[1] // 4
    early = recalled[-1, :quarter].mean()
    late = recalled[-1, -quarter:].mean()
    return {
        "rank_correlation": float(spearmanr(np.arange(len(births)), births).statistic),
        "early": float(early),
        "late": float(late),
        "early_minus_late": float(early - late),
    }


def _read(run: Run) -> dict[str, tuple[str, str]]:
    """Return the memory and the candidates that `onsets` reads, by name."""
    trigger = "triggers among all" if run.triggers and len(run.triggers) > 1 else "all"
    sets = {"output": "all", "trigger": trigger, "prev_token": "all"}
    return {name: (f"{name}_memory", candidates) for name, candidates in sets.items()}


def _recalled(weights: Mapping[str, Array]) -> Bool[Array, "pos"]:
    scores = prev_token_memory(weights).scores()  # type: ignore[arg-type]
    return np.asarray(scores[1:, :-1].argmax(1) == np.arange(scores.shape[0] - 1))


def _lags(found: Mapping[str, float], run: Run) -> dict[str, float]:
    ends = (float(run.steps[-1]),) * 2
    return {
        **lag("trigger_after_output", found["output"], found["trigger"], ends),
        **lag("prev_token_after_trigger", found["trigger"], found["prev_token"], ends),
        **{name: found[name] for name in MEMORY_NAMES},
    }
