"""Statistics of attention sinks (Guo et al. 2024): their strength, the effects that accompany them, and their order."""

from __future__ import annotations

import numpy as np
import pandas as pd

from birthlens.analysis.behaviour.sinks import sink_table
from birthlens.claims.claim import Evidence
from birthlens.claims.statistics.behaviours import held_out
from birthlens.claims.statistics.timing import first_crossing
from birthlens.model.sites import Head
from birthlens.runs.evaluation import evaluation_batch
from birthlens.shapes import Float

Array = np.ndarray
_FIRST = str(Head(0, 0))


def measures(evidence: Evidence) -> dict[str, float]:
    """Return the measures of the first head at the last checkpoint, with the loss at triggers."""
    run = evidence.runs["run"]
    table = sink_table(run.checkpoints(run.steps[-1:]), evaluation_batch(run, evidence.settings.get("sequences", 64)))
    _, losses = held_out(run, "in_context_loss")
    return {
        "sink": _last(table, "attention_to_first", "other"),
        "sink_while_active": _last(table, "attention_to_first", "in_context"),
        "active": _last(table, "attention_to_previous", "in_context"),
        "value_ratio": _last(table, "value_ratio", "other"),
        "trigger_loss": float(losses[-1]),
    }


def rectified(evidence: Evidence) -> dict[str, float]:
    """Return the sink, value ratio and losses of the case `relu`; losses are differences from those of `softmax`."""
    run = evidence.runs["relu"]
    found = measures(Evidence({"run": run}, evidence.seed, evidence.settings))
    for role in ("global", "in_context"):
        ends = [held_out(evidence.runs[case], f"{role}_loss")[1][-1] for case in ("relu", "softmax")]
        found[f"{role}_loss_more"] = float(ends[0] - ends[1])
    return found


def sink_before_drain(evidence: Evidence) -> dict[str, float]:
    """Return how many steps after the sink's half-way point the first token's value ratio has fallen half-way."""
    run = evidence.runs["run"]
    table = sink_table(run.checkpoints(), evaluation_batch(run, evidence.settings.get("sequences", 32)))
    steps, sink = _curve(table, "attention_to_first")
    _, ratio = _curve(table, "value_ratio")
    sunk = first_crossing(steps, sink, (sink[0] + sink[-1]) / 2)
    fallen = first_crossing(steps, -ratio, -(ratio[0] + ratio[-1]) / 2)
    return {"steps_later": fallen - sunk}


def logarithmic_growth(evidence: Evidence) -> dict[str, float]:
    """Return the slope of the sink logit in log(step), and the share of its variance that this line explains."""
    run = evidence.runs["run"]
    first = evidence.settings["from"]
    chosen = [step for step in run.steps if step >= first]
    table = sink_table(run.checkpoints(chosen), evaluation_batch(run, evidence.settings.get("sequences", 32)))
    steps, logit = _curve(table, "sink_logit")
    if len(steps) < 3:
        return {"slope": float("nan"), "explained": float("nan")}
    slope, intercept = np.polyfit(np.log(steps), logit, 1)
    rest = logit - (slope * np.log(steps) + intercept)
    return {"slope": float(slope), "explained": float(1 - rest.var() / logit.var())}


def _last(table: pd.DataFrame, measure: str, group: str) -> float:
    rows = table[(table["measure"] == measure) & (table["group"] == group) & (table["head"] == _FIRST)]
    return float(rows["value"].iloc[-1]) if len(rows) else float("nan")


def _curve(table: pd.DataFrame, measure: str) -> tuple[Float[Array, "step"], Float[Array, "step"]]:
    rows = table[(table["measure"] == measure) & (table["group"] == "other") & (table["layer"] == 0)]
    rows = rows[rows["head"] == _FIRST].sort_values("step")
    return rows["step"].to_numpy(dtype=float), rows["value"].to_numpy(dtype=float)
