"""How far does the previous-token head reach? Its attention to t - 1 by position t, and the accuracy at these positions.

Each row is one case, seed and position t: attention (mean over sequences, head 0 of layer 0, at the end), chance
(1 / (t + 1)), accuracy and n (in-context targets that are not absorbed).

    python analyses/how_far_does_the_previous_token_head_reach.py --tier laptop
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from asking import grid_of, keep, options
from matplotlib.figure import Figure

from birthlens.claims.statistics.copying import attention_to_previous
from birthlens.model import forward
from birthlens.runs.run import Run
from birthlens.training.sweep import runs_of
from birthlens.viz.figures.style import COLOURS, panels, save, styled

SEQUENCES = 128


def profile(run: Run, seed: int) -> pd.DataFrame:
    """Return the table of one run: columns position, attention, chance, accuracy, n."""
    batch = run.task.batch(SEQUENCES, run.config.seeds.evaluation + seed, 1)
    tensors = forward.tensors_of(run.weights(-1))
    with torch.inference_mode():
        logits = [forward.logits(tensors, run.config.model, part.tokens) for part in batch.chunks(16)]
    right = (torch.cat(logits).argmax(-1) == batch.targets).numpy()
    asked = (batch.in_context & ~batch.absorbed).numpy()
    n, position = asked.sum(0), np.arange(asked.shape[1])
    with np.errstate(invalid="ignore"):
        accuracy = (right & asked).sum(0) / n
    columns = {
        "attention": attention_to_previous(run, batch),
        "chance": 1 / (position + 1),
        "accuracy": accuracy,
        "n": n,
    }
    return pd.DataFrame({"position": position, **columns})


@styled
def picture(table: pd.DataFrame) -> Figure:
    """Draw attention (dots: one position, line: eighths of the context), its chance level, and the accuracy."""
    cases = list(dict.fromkeys(table["case"]))
    figure, axes = panels(1, len(cases), 2.9, 2.4)
    for ax, case in zip(axes[0], cases, strict=True):
        rows = table[table["case"] == case]
        at, eighths = rows.groupby("position")[["attention", "chance"]].mean(), by_eighths(rows)
        ax.plot(at.index, at["attention"], ".", color=COLOURS[0], markersize=2, alpha=0.5)
        ax.plot(eighths["position"], eighths["attention"], color=COLOURS[0], label="attention to t - 1")
        ax.plot(at.index, at["chance"], color="#6E6E6E", linewidth=0.9, linestyle=":", label="chance")
        ax.plot(eighths["position"], eighths["accuracy"], "--", color=COLOURS[1], label="in-context accuracy")
        ax.set_ylim(0, 1.03)
        ax.set_xlabel("position t")
        ax.set_title(case)
    axes[0][-1].legend(loc="center right")
    return figure


def by_eighths(rows: pd.DataFrame) -> pd.DataFrame:
    """Average over seeds and eighths of the context (accuracy over targets): columns position (middle), ..., accuracy."""
    width = (int(rows["position"].max()) + 1) // 8
    weighed = rows.assign(right=(rows["accuracy"] * rows["n"]).fillna(0), eighth=rows["position"] // width)
    groups = weighed.groupby("eighth")
    table = groups[["position", "attention", "chance"]].mean()
    return table.assign(accuracy=groups["right"].sum() / groups["n"].sum())


def main() -> None:
    """Train what is missing, write the table, draw, and print means over eighths of the context."""
    arguments = options(__file__, __doc__)
    grid = grid_of(__file__, arguments)
    runs = runs_of(grid, arguments.runs, arguments.processes)
    tables = [profile(run, seed).assign(case=case, seed=seed) for (case, seed), run in runs.items()]
    table = pd.concat(tables)[["case", "seed", "position", "attention", "chance", "accuracy", "n"]]
    keep(arguments, table)
    save(picture(table), arguments.out.with_suffix(".svg"))
    for case, rows in table.groupby("case", sort=False):
        print(f"\n{case}\n{by_eighths(rows).round(3).to_string(index=False)}")


if __name__ == "__main__":
    main()
