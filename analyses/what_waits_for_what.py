"""What waits for what? Each memory given (ideal from step 0) or withheld (kept at its initial value), against the control.

The table shows how many steps later each other memory, and the in-context accuracy, are born than in the control run of the
same seed, with 95 % intervals of Student's t over seeds. `n` is the number of seeds in which both were born.

python analyses/what_waits_for_what.py --tier laptop
"""

from __future__ import annotations

import argparse

import pandas as pd
from asking import grid_of, keep, options

from birthlens.analysis.behaviour.contrast import RunPair, birth_shifts_table, contrast_table
from birthlens.training.sweep import runs_of
from birthlens.viz.figures.contrast import difference_curves
from birthlens.viz.figures.style import save

CONTROL = "control"


def shifts(arguments: argparse.Namespace) -> tuple[pd.DataFrame, dict[str, list[RunPair]]]:
    """Train what is missing; return the shift of every birth in every case, and the pairs of each case."""
    runs = runs_of(grid_of(__file__, arguments), arguments.runs, arguments.processes)
    seeds = sorted({seed for _, seed in runs})
    cases = [case for case in dict.fromkeys(case for case, _ in runs) if case != CONTROL]
    pairs = {case: [RunPair(runs[CONTROL, seed], runs[case, seed]) for seed in seeds] for case in cases}
    tables = [birth_shifts_table(of).assign(case=case) for case, of in pairs.items()]
    table = pd.concat(tables, ignore_index=True)
    return table[["case", *[name for name in table if name != "case"]]], pairs


def main() -> None:
    """Write the table and the figure, and print the shifts."""
    arguments = options(__file__, __doc__)
    table, pairs = shifts(arguments)
    keep(arguments, table)
    cells = [
        f"{shift:.1f} [{low:.1f}, {high:.1f}] n={n}" if n else f"never ({never} seeds)"
        for shift, low, high, n, never in zip(
            table["shift"], table["low"], table["high"], table["n"], table["changed_never"], strict=True
        )
    ]
    shown = table.assign(cell=cells)
    print(shown.pivot(index="case", columns="event", values="cell").loc[list(pairs)].to_string())
    held_back = contrast_table(pairs["output memory withheld"])
    save(difference_curves(held_back), arguments.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
