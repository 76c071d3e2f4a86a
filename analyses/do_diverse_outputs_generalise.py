"""Do diverse outputs generalise? Models trained on uniform, bigram, or some outputs, tested on all kinds of output.

python analyses/do_diverse_outputs_generalise.py --tier laptop
"""

from __future__ import annotations

from typing import cast

from asking import ask

from birthlens.claims.claim import Evidence
from birthlens.claims.statistics.behaviours import tested_on
from birthlens.config.task import TaskConfig
from birthlens.tasks.bigram import BigramTask

TESTS = {"uniform outputs": {}, "bigram outputs": {"outputs": "bigram"}, "first 75 % of outputs": {"split": "train"},
         "last 25 % of outputs": {"split": "test"}}  # fmt: skip


def generalisation(evidence: Evidence) -> dict[str, float]:
    """Return the in-context accuracy, without absorbed positions, on each kind of output."""
    run, found = evidence.runs["run"], {}
    for name, changes in TESTS.items():
        task = run.config.task.changed(**{"outputs": "uniform", "split": "none", **changes})
        found[f"on {name}"] = tested_on(run, BigramTask(cast(TaskConfig, task), run.statistics), evidence.seed)
    return found


if __name__ == "__main__":
    ask(__file__, __doc__, generalisation)
