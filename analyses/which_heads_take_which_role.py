"""Which heads take which role in a full transformer? Two layers of four heads, LayerNorm, MLP, AdamW, all targets.

python analyses/which_heads_take_which_role.py --tier laptop
"""

from __future__ import annotations

from asking import ask

from birthlens.analysis.behaviour.attention import attention_table
from birthlens.analysis.interventions.ablation import ablation_table
from birthlens.claims.claim import Evidence
from birthlens.claims.statistics.behaviours import IN_CONTEXT


def heads(evidence: Evidence) -> dict[str, float]:
    """Return probes and mean ablation of every head; heads of a layer are ranked, since their numbers have no meaning."""
    run = evidence.runs["run"]
    last = [(run.steps[-1], run.weights(-1))]
    batch, reference = (run.task.batch(64, run.config.seeds.evaluation + evidence.seed, index) for index in (1, 2))
    attention = attention_table(last, batch, role=IN_CONTEXT)
    ablated = ablation_table(last, batch, reference, methods=["mean"], metrics=[f"{IN_CONTEXT}.accuracy"], draws=0)
    found = {"accuracy": float(ablated.loc[ablated["ablated"] == "none", "value"].iloc[0])}
    for layer in (0, 1):
        for probe in ("previous_token", "induction_match"):
            rows = attention[(attention["probe"] == probe) & (attention["layer"] == layer)]
            for rank, value in enumerate(sorted(rows["value"], reverse=True), start=1):
                found[f"layer {layer} {probe}, best {rank}"] = float(value)
        lost = -ablated.loc[ablated["ablated"].str.startswith(f"L{layer}"), "change"]
        for rank, value in enumerate(sorted(lost, reverse=True), start=1):
            found[f"layer {layer} accuracy lost without a head, largest {rank}"] = float(value)
    return found


if __name__ == "__main__":
    ask(__file__, __doc__, heads)
