"""Do three layers help? One, two and three layers on clean data, with the (approximate) bag-of-tokens ceiling.

python analyses/do_three_layers_help.py --tier laptop
"""

from __future__ import annotations

from asking import ask

from birthlens.claims.claim import Evidence
from birthlens.claims.statistics.behaviours import held_out, speed
from birthlens.tasks.predictors.scores import reference_table


def layers(evidence: Evidence) -> dict[str, float]:
    """Return speed and accuracy of a run, its best accuracy, and the ceiling on new sequences of its task."""
    run = evidence.runs["run"]
    batch = run.task.batch(128, run.config.seeds.evaluation + evidence.seed)
    table = reference_table(run.task, batch, ["bag"]).set_index(["role", "metric"])["value"]
    return {
        **speed(evidence),
        "best accuracy": float(held_out(run, "in_context_accuracy")[1].max()),
        "bag-of-tokens ceiling (approximate)": float(table["in_context", "accuracy"]),
    }


if __name__ == "__main__":
    ask(__file__, __doc__, layers)
