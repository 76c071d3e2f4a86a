"""Statistics of the reduced models of factual recall: when each stage comes, and the capacity of one linear memory."""

from __future__ import annotations

import numpy as np
import pandas as pd

from birthlens.analysis.theory.fact_stages import Descent, escape_times, stage_table
from birthlens.analysis.theory.memory_capacity import learned_capacity_table
from birthlens.claims.claim import Evidence
from birthlens.claims.statistics.timing import first_crossing
from birthlens.config.task import FactsConfig
from birthlens.tasks.facts import FactsTask


def stages(evidence: Evidence) -> dict[str, float]:
    """Follow the reduced model from a small init: when relations and subjects escape, and the stage in between.

    `steps_later` is counted from relation accuracy 0.9 to fact accuracy 0.5. `stage_kl` is the lowest KL from
    p(answer | relation) among evaluations with fact accuracy at most 0.2. `subject_later` is counted from the relations'
    escape (mean key above 0.5) to that of the subjects. `relation_off` and `subject_off` are the distances from the
    predicted steps, as shares of them.
    """
    settings = evidence.settings
    config = FactsConfig(subjects=settings["subjects"], relations=settings["relations"])
    descent = Descent(steps=settings["steps"])
    table = stage_table(FactsTask(config, FactsTask.chain(config, None)), descent, evidence.seed)
    relation = _crossing(table, "relation_key", 0.5)
    subject = _crossing(table, "subject_key", 0.5)
    predicted_relation, predicted_subject = escape_times(config, descent)
    ignorant = table[table["fact_accuracy"] <= 0.2]
    return {
        "steps_later": _crossing(table, "fact_accuracy", 0.5) - _crossing(table, "relation_accuracy", 0.9),
        "stage_kl": float(ignorant["relation_kl"].min()),
        "subject_later": subject - relation,
        "relation_off": abs(relation / predicted_relation - 1),
        "subject_off": abs(subject / predicted_subject - 1),
        "relation_escape": relation,
        "subject_escape": subject,
        "last_accuracy": float(table["fact_accuracy"].iloc[-1]),
    }


def capacity(evidence: Evidence) -> dict[str, float]:
    """Return how far N log N / d^2 is from constant, and the slope of log(N log N) on log d."""
    table = learned_capacity_table(evidence.settings["widths"], (evidence.seed,))
    ratio = table["ratio"].to_numpy()
    widths = table["d_model"].to_numpy(dtype=float)
    return {
        "off_constant": float(np.abs(ratio / ratio.mean() - 1).max()),
        "slope": float(np.polyfit(np.log(widths), np.log(ratio * widths**2), 1)[0]),
        "ratio": float(ratio.mean()),
    }


def _crossing(table: pd.DataFrame, column: str, level: float) -> float:
    return first_crossing(table["step"].to_numpy(dtype=float), table[column].to_numpy(), level)
