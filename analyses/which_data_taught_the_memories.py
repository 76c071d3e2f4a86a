"""Which data taught the memories? What each occurrence of the triggers added to each memory's margin over training.

The loss counts at second and later occurrences of a trigger only. The rows of a memory sum to the change of its margin.

python analyses/which_data_taught_the_memories.py --tier laptop
"""

from __future__ import annotations

import pandas as pd
from asking import grid_of, joined, keep, options

from birthlens.runs.run import Run, load_run
from birthlens.training.data_attribution import data_attribution_table
from birthlens.training.sweep import runs_of
from birthlens.viz.figures.attribution import data_parts
from birthlens.viz.figures.style import save

MEMORIES = ("output_memory", "trigger_memory", "prev_token_memory")
LARGEST = 6
"""The last occurrence with a row of its own; later ones are counted together."""


def taught(path: str, seed: int, memory: str) -> pd.DataFrame:
    """Return what each occurrence changed in one memory of a run."""
    run: Run = load_run(path)
    table = data_attribution_table(run, memory, 0, run.steps[-1], "occurrence")
    parts = [
        f"occurrence {part if int(part) < LARGEST else f'{LARGEST} and later'}" if by == "occurrence" else part
        for by, part in zip(table["by"], table["part"], strict=True)
    ]
    keys = ["seed", "memory", "matrix", "from", "until", "by", "part"]
    return table.assign(part=parts, seed=seed).groupby(keys, sort=False, as_index=False)[["n", "value"]].sum()


def main() -> None:
    """Write the table, print the sums over training, and draw the trigger memory."""
    arguments = options(__file__, __doc__)
    runs = runs_of(grid_of(__file__, arguments), arguments.runs, arguments.processes)
    jobs = [(str(run.path), seed, memory) for (_, seed), run in runs.items() for memory in MEMORIES]
    table = joined(taught, jobs, arguments.processes)
    keep(arguments, table)
    sums = table.groupby(["memory", "part", "seed"], sort=False)["value"].sum().groupby(level=[0, 1], sort=False).mean()
    print(sums.unstack(0).round(3).to_string())
    first = table[(table["memory"] == "trigger_memory") & (table["seed"] == table["seed"].min())]
    save(data_parts(first), arguments.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
