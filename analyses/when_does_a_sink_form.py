"""When does an attention sink form, and what does it need? Sink, copy and drain over training, by attention and optimiser.

Bigram-Backcopy (Guo et al. 2024), one layer: attention to `<bos>` from tokens that are no trigger (sink), attention to the
position before from triggers (active), the norm of the value of `<bos>` over that of the others (drain), and the losses.
Softmax and ReLU attention with AdamW, softmax with SGD.

python analyses/when_does_a_sink_form.py        # 7 minutes of one core with the runs, 1 without
"""

from __future__ import annotations

import pandas as pd
from asking import curve, follow
from matplotlib.figure import Figure

from birthlens.analysis.behaviour.sinks import sink_table
from birthlens.claims.catalogue.memory_line import SINKS
from birthlens.claims.claim import Evidence
from birthlens.claims.statistics.behaviours import held_out
from birthlens.runs.evaluation import evaluation_batch
from birthlens.viz.figures.style import COLOURS, DASHES, legend_below, panels, save, styled

SGD = ("optimiser.kind=sgd", "optimiser.learning_rate=0.1", "optimiser.momentum=0.9", "training.steps=800")
CASES = {
    "softmax, AdamW": SINKS,
    "ReLU, AdamW": (*SINKS, "model.attention=relu"),
    "softmax, SGD": (*SINKS, *SGD),
}
MEASURES = {
    "sink": ("attention_to_first", "other"),
    "active": ("attention_to_previous", "in_context"),
    "value ratio": ("value_ratio", "other"),
    "sink at triggers": ("attention_to_first", "in_context"),
}
TITLES = {
    "sink": "sink: attention to <bos>",
    "active": "active: attention to t - 1",
    "value ratio": "drain: |v| of <bos> over others",
}
EVERY = 40


def over_training(evidence: Evidence) -> dict[str, float]:
    """Return the measures of the head over training, and the losses at the end."""
    run = evidence.runs["run"]
    steps = [step for step in run.steps if step % EVERY == 0]
    table = sink_table(run.checkpoints(steps), evaluation_batch(run, 32))
    found: dict[str, float] = {}
    for name, (measure, group) in MEASURES.items():
        rows = table[(table["measure"] == measure) & (table["group"] == group) & (table["head"] == "L0H0")]
        found |= {f"{name}, step {row['step']}": float(row["value"]) for row in rows.to_dict("records")}
    for role, said in (("global", "other tokens"), ("in_context", "triggers")):
        found[f"loss at {said}, at the end"] = float(held_out(run, f"{role}_loss")[1][-1])
    return found


@styled
def picture(table: pd.DataFrame) -> Figure:
    """Draw sink, copy and drain against the step, one line a case."""
    figure, axes = panels(1, len(TITLES), 2.7, 2.4)
    for ax, (name, title) in zip(axes[0], TITLES.items(), strict=True):
        for case, colour, dashes in zip(CASES, COLOURS, DASHES, strict=False):
            line = curve(table, case, name)
            ax.plot(line.index, line, color=colour, linestyle=dashes, label=case)
        ax.set_ylim(bottom=-0.03)
        ax.set_xlabel("step")
        ax.set_title(title)
    legend_below(figure, axes[0][0].get_legend_handles_labels()[0])
    return figure


def main() -> None:
    """Train, measure, write, print and draw."""
    arguments, table = follow(__file__, __doc__, CASES, over_training)
    save(picture(table), arguments.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
