"""Statistics of the memories over training: which is born first, what freezing one does to the others, early positions.

A memory that is not born by the last kept step counts as born there: differences are then lower bounds.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from birthlens.analysis.birth_order import onset, onset_table, standardised_table
from birthlens.analysis.circuits import prev_token_memory
from birthlens.analysis.trajectory import memories_over
from birthlens.claims.claim import Evidence
from birthlens.runs import Run

Array = np.ndarray
MEMORIES = ("output", "trigger", "prev_token")


def onsets(run: Run) -> dict[str, float]:
    """Return the step at which each memory's standardised score leaves the band of shifted pairings for good.

    All three are read among as many candidates as there are tokens (positions); with fixed triggers the trigger memory has
    the triggers as queries.
    """
    triggers = None if run.trigger_ids is None else run.trigger_ids.tolist()
    found = onset_table(standardised_table(run.checkpoints(), triggers))
    named = found.set_index(["memory", "candidates"])["onset"]
    trigger = "all" if triggers is None or len(triggers) < 2 else "triggers among all"
    chosen = {name: float(named[f"{name}_memory", "all"]) for name in ("output", "prev_token")}
    return _bounded({**chosen, "trigger": float(named["trigger_memory", trigger])}, run)


def half_heights(run: Run) -> dict[str, float]:
    """Return the step from which each memory's raw recall, as the paper reads it, stays above half of its last value."""
    recall = memories_over(run, bases=("raw",))
    recall = recall[recall["metric"] == "recall"]
    found = {}
    for name in MEMORIES:
        narrow = name == "trigger" and run.trigger_ids is not None and len(run.trigger_ids) > 1
        rows = recall[
            (recall["memory"] == f"{name}_memory") & (recall["candidates"] == ("triggers" if narrow else "all"))
        ]
        values = rows.sort_values("step")["value"].to_numpy()
        found[name] = onset(run.steps, values >= max(values[-1] / 2, 1e-9))
    return _bounded(found, run)


def birth_order(evidence: Evidence) -> dict[str, float]:
    """Return how many steps later each memory is born, by standardised score, and the onsets themselves."""
    return _lags(onsets(evidence.runs["run"]))


def crossing_order(evidence: Evidence) -> dict[str, float]:
    """The same by half-height crossings of raw recall."""
    return _lags(half_heights(evidence.runs["run"]))


def frozen_first(evidence: Evidence) -> dict[str, float]:
    """Compare runs with one memory frozen until a step F with the run where all move, at F.

    `recall_lost_*` and `accuracy_lost`: what the other memories (standardised scores, as a share of those of the run where
    all move) and the in-context accuracy lack at F. `lag_*`: steps from the thaw to the birth of the other memories.
    """
    until, matrix = evidence.settings["until"], evidence.settings["memory"]
    frozen, free = evidence.runs["frozen"], evidence.runs["free"]
    found = {"accuracy_frozen": accuracy_at(frozen, until), "accuracy_free": accuracy_at(free, until)}
    found["accuracy_lost"] = found["accuracy_free"] - found["accuracy_frozen"]
    late, usual = scores_at(frozen, until), scores_at(free, until)
    births, normal = onsets(frozen), onsets(free)
    for name in MEMORIES:
        if name != matrix:
            found[f"kept_{name}"] = late[name] / usual[name]
            found[f"delay_{name}"] = births[name] - normal[name]
    return found


def scores_at(run: Run, step: int) -> dict[str, float]:
    """Return the standardised score of each memory at a step, with the candidates of `onsets`."""
    triggers = None if run.trigger_ids is None else run.trigger_ids.tolist()
    table = standardised_table([(step, run.weights(step))], triggers).set_index(["memory", "candidates"])["value"]
    trigger = "all" if triggers is None or len(triggers) < 2 else "triggers among all"
    sets = {"output": "all", "trigger": trigger, "prev_token": "all"}
    return {name: float(table[f"{name}_memory", candidates]) for name, candidates in sets.items()}


def accuracy_at(run: Run, step: int, metric: str = "in_context_accuracy") -> float:
    """Return a held-out measurement at a step."""
    table = run.metrics()
    rows = table[(table["split"] == "held_out") & (table["metric"] == metric) & (table["step"] == step)]
    return float(rows["value"].iloc[0]) if len(rows) else float("nan")


def early_positions(evidence: Evidence) -> dict[str, float]:
    """Ask whether the previous-token memory learns early positions first.

    `rank_correlation` (Spearman) of position and the first step from which it recalls its predecessor for good, positions
    that never do counting last; `early` and `late` are the recalls of the first and the last quarter at the end.
    """
    from scipy.stats import spearmanr

    run = evidence.runs["run"]
    recalled = np.stack([_recalled(weights) for _, weights in run.checkpoints()])
    last = float(run.steps[-1] + 1)
    births = np.nan_to_num([onset(run.steps, column) for column in recalled.T], nan=last)
    quarter = recalled.shape[1] // 4
    early, late = recalled[-1, :quarter].mean(), recalled[-1, -quarter:].mean()
    return {
        "rank_correlation": float(spearmanr(np.arange(len(births)), births).statistic),
        "early": float(early),
        "late": float(late),
        "early_minus_late": float(early - late),
    }


def _recalled(weights: Mapping[str, Array]) -> Float[Array, "pos"]:
    scores = prev_token_memory(weights).scores()  # type: ignore[arg-type]
    return np.asarray(scores[1:, :-1].argmax(1) == np.arange(scores.shape[0] - 1))


def _bounded(found: Mapping[str, float], run: Run) -> dict[str, float]:
    return {name: float(np.nan_to_num(value, nan=run.steps[-1])) for name, value in found.items()}


def _lags(found: Mapping[str, float]) -> dict[str, float]:
    return {
        "trigger_after_output": found["trigger"] - found["output"],
        "prev_token_after_trigger": found["prev_token"] - found["trigger"],
        **{name: found[name] for name in MEMORIES},
    }
