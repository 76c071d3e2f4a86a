"""When does a head have to work? Each head is ablated for 20 steps at one time, or its pattern is fixed throughout.

The table shows how many steps later the in-context accuracy exceeds one half than in the control run of the same seed, with
95 % intervals of Student's t over seeds. `n` is the number of seeds in which both runs stayed above it. `knocked_out_at` is
the first step without the head, and is empty if a pattern is fixed. If the control run had exceeded one half before the head
was ablated, the run exceeds it again when the head is back, and the delay shows only that.

python analyses/when_does_a_head_have_to_work.py --tier laptop
"""

from __future__ import annotations

import re

import pandas as pd
from asking import grid_of, keep, options

from birthlens.analysis.behaviour.contrast import RunPair, birth_shifts_table
from birthlens.training.sweep import runs_of
from birthlens.viz.figures.curves import timeline
from birthlens.viz.figures.style import save

CONTROL = "control"
EVENT = "in_context_accuracy"


def main() -> None:
    """Train what is missing; write the table and the figure, and print the shifts."""
    arguments = options(__file__, __doc__)
    runs = runs_of(grid_of(__file__, arguments), arguments.runs, arguments.processes)
    seeds = sorted({seed for _, seed in runs})
    tables = []
    for case in dict.fromkeys(case for case, _ in runs):
        if case == CONTROL:
            continue
        shifts = birth_shifts_table([RunPair(runs[CONTROL, seed], runs[case, seed]) for seed in seeds])
        at = re.fullmatch(r"(L\dH\d) knocked out at (\d+)", case)
        place = {"case": at[1], "knocked_out_at": int(at[2])} if at else {"case": case, "knocked_out_at": None}
        tables.append(shifts[shifts["event"] == EVENT].assign(**place))
    table = pd.concat(tables, ignore_index=True)
    table = table[["case", "knocked_out_at", *(name for name in table if name not in ("case", "knocked_out_at"))]]
    keep(arguments, table)
    print(table.to_string(index=False))
    drawn = table.dropna(subset=["knocked_out_at"]).rename(columns={"knocked_out_at": "step", "shift": "value"})
    drawn = drawn.assign(step=drawn["step"].astype(int), case=drawn["case"] + " knocked out for 20 steps")
    figure = timeline(drawn, title="How much later copying is learned", reference=0.0)
    ax = figure.axes[0]
    ax.set_xlabel("first step without the head")
    ax.set_ylabel("delay of half accuracy, in steps")
    save(figure, arguments.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
