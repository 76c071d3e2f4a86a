"""What if one memory is frozen? W_O^2, W_K^2 or W_K^1 keeps its initial value until step 200, against all trained.

python analyses/what_if_one_memory_is_frozen.py --tier laptop
"""

from __future__ import annotations

from asking import ask

from birthlens.claims.claim import Evidence
from birthlens.claims.statistics.orders import accuracy_at, onsets, scores_at


def births(evidence: Evidence) -> dict[str, float]:
    """Return accuracy and standardised scores at the end of the freeze, the last accuracy, and every memory's onset."""
    run, thaw = evidence.runs["run"], int(evidence.settings["thaw"])
    return {
        "accuracy at the thaw": accuracy_at(run, thaw),
        "accuracy at the end": accuracy_at(run, run.steps[-1]),
        **{f"score of {name} at the thaw": score for name, (score, _) in scores_at(run, thaw).items()},
        **{f"onset of {name}": value for name, value in onsets(run).items()},
    }


if __name__ == "__main__":
    ask(__file__, __doc__, births, thaw=200)
