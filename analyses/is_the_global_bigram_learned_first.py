"""Is the global bigram learned first? W_F, trained on all targets: KL, losses, and which predictor the model matches.

python analyses/is_the_global_bigram_learned_first.py --tier laptop
"""

from __future__ import annotations

import torch
from asking import ask

from birthlens.analysis.behaviour.excess import divergence_table
from birthlens.analysis.behaviour.trajectory import memories_over
from birthlens.claims.claim import Evidence
from birthlens.claims.statistics.behaviours import global_first
from birthlens.claims.statistics.orders import accuracy_at
from birthlens.model import forward
from birthlens.runs.evaluation import evaluation_batch

STEPS = [0, 20, 40, 60, 80, 100, 140, 200, 300, 400, 600]
PREDICTORS = ["uniform", "unigram", "bigram", "bag", "bayes"]


def predictors(evidence: Evidence) -> dict[str, float]:
    """Return half-way steps and, at each step, KL(bigram || W_F), losses, and KL from each predictor to the model."""
    run, batch = evidence.runs["run"], evaluation_batch(evidence.runs["run"], 64)
    steps = [step for step in STEPS if step in run.steps]
    found = {f"half-way step: {name}": value for name, value in global_first(evidence).items()}
    memories = memories_over(run, steps, bases=("raw",)).to_pandas()
    kl = memories[memories["metric"] == "kl"].set_index("step")["value"]

    def outputs(step: int) -> torch.Tensor:
        weights = run.weights(step)
        with torch.inference_mode():
            return forward.logits(forward.tensors_of(weights), weights.config, batch.tokens)

    table = divergence_table(((step, outputs(step)) for step in steps), run.task, batch, PREDICTORS, positions=2048)
    for step in steps:
        found[f"step {step}: KL(bigram || W_F)"] = float(kl[step])
        for role in ("global", "in_context"):
            found[f"step {step}: {role} loss"] = accuracy_at(run, step, f"{role}_loss")
            rows = table[(table["step"] == step) & (table["role"] == role)]
            for name, value in zip(rows["predictor"], rows["divergence"], strict=True):
                found[f"step {step}: {role} KL from {name}"] = float(value)
    return found


if __name__ == "__main__":
    ask(__file__, __doc__, predictors)
