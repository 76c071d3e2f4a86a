"""What is learned of facts first? Relations, then facts, and how many facts one linear memory holds.

Linear attention reduced to its votes, SGD from an init of 1e-5 (Nichani, Lee, Bietti 2024): the accuracies of relation and
fact and the KL from p(answer | relation); the mean keys of relations and subjects with the steps at which their gradients
say that they escape, for 16 subjects and 4 relations, and for 4 and 8. Capacity: the largest N that a learned d x d memory
recalls to 0.99.

python analyses/what_is_learned_of_facts_first.py        # 1 minute of one core
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from asking import curve, options, tell
from matplotlib.figure import Figure

from birthlens.analysis.theory.fact_stages import Descent, escape_times, stage_table
from birthlens.analysis.theory.memory_capacity import learned_capacity_table
from birthlens.config.task import FactsConfig
from birthlens.tasks.facts import FactsTask
from birthlens.viz.figures.style import COLOURS, DASHES, GREY, legend_below, panels, save, styled

SETTINGS = {
    "16 subjects, 4 relations": FactsConfig(subjects=16, relations=4),
    "4 subjects, 8 relations": FactsConfig(subjects=4, relations=8),
}
DESCENT = Descent(steps=700)
NAMES = {
    "relation_accuracy": "relation accuracy",
    "fact_accuracy": "fact accuracy",
    "relation_kl": "KL from p(answer | relation)",
    "relation_key": "key of relations",
    "subject_key": "key of subjects",
}
WIDTHS = (8, 12, 16, 24, 32)


def staged(case: str, seed: int) -> pd.DataFrame:
    """Follow one descent: case, seed, quantity, value."""
    config = SETTINGS[case]
    table = stage_table(FactsTask(config, FactsTask.chain(config, None)), DESCENT, seed)
    rows = [
        (case, seed, f"{said}, step {row['step']}", float(row[name]))
        for row in table.to_dict("records")
        for name, said in NAMES.items()
    ]
    relation, subject = escape_times(config, DESCENT)
    rows += [(case, seed, "predicted step of relations", relation), (case, seed, "predicted step of subjects", subject)]
    return pd.DataFrame(rows, columns=["case", "seed", "quantity", "value"])


def held(seeds: range) -> pd.DataFrame:
    """Measure the capacity: case ("linear memory"), seed, quantity, value."""
    table = learned_capacity_table(WIDTHS, seeds)
    rows = []
    for row in table.to_dict("records"):
        for name, said in (("capacity", "capacity"), ("ratio", "N log N / d^2")):
            rows.append(("linear memory", row["seed"], f"{said}, d = {row['d_model']}", float(row[name])))
    return pd.DataFrame(rows, columns=["case", "seed", "quantity", "value"])


@styled
def picture(table: pd.DataFrame, capacity: pd.DataFrame) -> Figure:
    """Draw accuracies, keys of both settings with the predicted steps, and capacity against d."""
    figure, axes = panels(1, 4, 2.5, 2.4)
    first = next(iter(SETTINGS))
    for name, colour, dashes in zip(tuple(NAMES.values())[:3], COLOURS, DASHES, strict=False):
        line = curve(table, first, name)
        axes[0][0].plot(line.index, line, color=colour, linestyle=dashes, label=name)
    axes[0][0].set_title(first)
    handles = axes[0][0].get_legend_handles_labels()[0]
    for ax, case in zip(axes[0][1:3], SETTINGS, strict=True):
        for name, who, colour in zip(
            ("key of relations", "key of subjects"), ("relations", "subjects"), COLOURS, strict=False
        ):
            line = curve(table, case, name)
            ax.plot(line.index, line, color=colour, label=name)
            rows = table[(table["case"] == case) & (table["quantity"] == f"predicted step of {who}")]
            ax.axvline(
                rows["value"].iloc[0],
                label=f"predicted step of {who}",
                color=colour,
                linestyle=(0, (4, 2)),
                linewidth=0.9,
            )
        ax.set_title(f"{case}: keys")
    handles += axes[0][1].get_legend_handles_labels()[0]
    for ax in axes[0][:3]:
        ax.set_xlabel("step")
    ax = axes[0][3]
    means = capacity[capacity["quantity"].str.startswith("capacity")].groupby("quantity")["value"].mean()
    counts = np.array([means[f"capacity, d = {width}"] for width in WIDTHS])
    ax.plot(WIDTHS, counts * np.log(counts), color=COLOURS[0], marker="o", markersize=3, label="N log N")
    ax.plot(WIDTHS, np.square(WIDTHS), color=GREY, linestyle=(0, (4, 2)), linewidth=0.9, label="d^2")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(WIDTHS, map(str, WIDTHS))
    ax.set_xticks([], minor=True)
    ax.set_xlabel("d")
    ax.set_title("linear memory")
    ax.legend(loc="upper left")
    legend_below(figure, handles, columns=7)
    return figure


def main() -> None:
    """Follow, measure, write, print and draw."""
    arguments = options(__file__, __doc__, tiers=False)
    seeds = range(arguments.seeds or 3)
    table = pd.concat([staged(case, seed) for case in SETTINGS for seed in seeds], ignore_index=True)
    capacity = held(seeds)
    save(picture(table, capacity), arguments.out.with_suffix(".svg"))
    tell(arguments, table, capacity=capacity)


if __name__ == "__main__":
    main()
