"""How does real text compare with the synthetic task? The same small language model on both, with the same measurements.

Two attention-only layers of four heads with rotary positions learn the synthetic task with random triggers, and windows of
Shakespeare in 512 byte pairs: same optimiser, batches and steps. Measured over training, on held-out sequences: attention
of the best heads to the position before (both layers) and to what followed the query's token before (layer 1), above
chance; how much the in-context loss rises without each of these heads; and losses, also on random tokens that repeat.

python analyses/how_does_text_compare.py --seeds 3        # 8 minutes of one core with the runs, 1 without
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from asking import curve, follow
from matplotlib.figure import Figure

from birthlens.analysis.behaviour.head_scores import scores_table, transfer_table
from birthlens.analysis.interventions.runner import evaluate
from birthlens.analysis.interventions.scoring import BASELINE, Scoring
from birthlens.analysis.interventions.spec import Intervention
from birthlens.claims.claim import Evidence
from birthlens.model.sites import Head
from birthlens.runs.evaluation import evaluation_batch
from birthlens.tasks.predictors.scores import reference_table
from birthlens.viz.figures.style import COLOURS, DASHES, legend_below, panels, save, styled

MODEL = ("model.family=full", "model.d_model=64", "model.n_heads=4", "model.positions=rotary", "model.init=scaled",
         "optimiser.kind=adamw", "optimiser.learning_rate=0.005", "optimiser.weight_decay=0.01", "optimiser.warm_up=100",
         "task.context=128", "training.steps=1000", "training.batch_size=16", "training.loss=all", "checkpoints.every=100",
         "evaluation.every=100", "evaluation.batch_size=64")  # fmt: skip
CASES = {
    "synthetic": (*MODEL, "task.triggers=random"),
    "text": (*MODEL, "task.kind=text", "task.vocabulary=512"),
}
HEADS = {
    "layer 0, token before": (0, "previous_token"),
    "layer 1, token before": (1, "previous_token"),
    "layer 1, what followed": (1, "induction"),
}
"""The heads that are followed: those with the largest score of a layer."""
REPEATS = 16
"""Random sequences that repeat."""


def over_training(evidence: Evidence) -> dict[str, float]:
    """Return scores, effects of ablations and losses at each step, and when each score is half-way to its largest value."""
    run = evidence.runs["run"]
    batch = evaluation_batch(run, 32)
    scoring = Scoring.of(batch, ["in_context.loss", "all.loss"])
    found: dict[str, float] = {}
    above: dict[str, dict[int, float]] = {name: {} for name in HEADS}
    for step, weights in run.checkpoints(run.steps):
        scores = scores_table([(step, weights)], batch)
        cases = {}
        for name, (layer, score) in HEADS.items():
            rows = scores[(scores["layer"] == layer) & (scores["score"] == score)]
            best = rows.sort_values("value").iloc[-1]
            above[name][step] = found[f"{name}, step {step}"] = float(best["value"] - best["chance"])
            cases[name] = (Intervention("z", "mean", heads=(Head.parse(str(best["head"])),)),)
        outcomes = evaluate(weights, cases, batch, scoring, evaluation_batch(run, 32))
        for label, values in zip(outcomes.cases, outcomes.values, strict=True):
            if label == BASELINE:
                whole = values
                found |= {f"in-context loss, step {step}": values[0], f"loss, step {step}": values[1]}
            else:
                found[f"without {label}, step {step}"] = values[0] - whole[0]
        repeated = transfer_table([(step, weights)], np.random.default_rng(7), REPEATS)
        loss = repeated[(repeated["score"] == "loss") & (repeated["group"] == "all")].iloc[0]
        found[f"loss on repeats, step {step}"] = float(loss["value"])
    for name, values in above.items():
        found[f"{name}: half-way"] = min(step for step, value in values.items() if value >= max(values.values()) / 2)
    known = [name for name in ("bigram", "trigram") if name in run.task.predictors]
    references = (
        reference_table(run.task, batch, known).query("metric == 'loss'").set_index(["predictor", "role"])["value"]
    )
    for predictor, role in references.index:
        if role in ("in_context", "all"):
            found[f"{predictor}: {role.replace('_', '-')} loss"] = references[predictor, role]
    return found


@styled
def picture(table: pd.DataFrame) -> Figure:
    """Draw the scores above chance, the effects of ablations and the loss, for the synthetic task and for text."""
    figure, axes = panels(2, 3, 2.7, 2.2)
    drawn = {
        "attention": {name: name for name in HEADS},
        "effect of a head": {f"without {name}": f"without {name}" for name in HEADS},
        "loss": {"in-context": "in-context loss", "all tokens": "loss", "random repeats": "loss on repeats"},
    }
    handles = []
    for number, case in enumerate(CASES):
        for ax, (title, lines) in zip(axes[number], drawn.items(), strict=True):
            for (label, name), colour, dashes in zip(lines.items(), COLOURS, DASHES, strict=False):
                line = curve(table, case, name)
                plotted = ax.plot(line.index, line, color=colour, linestyle=dashes, label=label)
                handles += plotted if number == 0 else []
            ax.set_title(f"{case}: {title}")
            ax.set_xlabel("step")
    for ax, label in zip(axes[0], ("share above chance", "rise of in-context loss", "nats"), strict=True):
        ax.set_ylabel(label)
    for column in zip(*axes, strict=True):
        low = min(ax.get_ylim()[0] for ax in column)
        high = max(ax.get_ylim()[1] for ax in column)
        for ax in column:
            ax.set_ylim(low, high)
    legend_below(figure, handles, columns=3)
    return figure


def main() -> None:
    """Train, measure, write, print and draw."""
    arguments, table = follow(__file__, __doc__, CASES, over_training)
    save(picture(table), arguments.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
