"""What do the heads attend to, before and after training? Probes of both heads, and their attention maps as pages.

python analyses/what_do_the_heads_attend_to.py --tier laptop
"""

from __future__ import annotations

from asking import grid_of, options, tell

from birthlens.analysis.behaviour.attention import attention_table
from birthlens.claims.claim import Evidence
from birthlens.claims.grids import grid_table
from birthlens.runs.evaluation import evaluation_batch
from birthlens.training.sweep import runs_of
from birthlens.viz.notebook import show_attention


def before_and_after(evidence: Evidence) -> dict[str, float]:
    """Return the attention probes of each head at the first and the last step, and their chance levels at the last."""
    run = evidence.runs["run"]
    ends = {"before": run.steps[0], "after": run.steps[-1]}
    table = attention_table(run.checkpoints(ends.values()), evaluation_batch(run, 64), role="in_context_unabsorbed")
    table = table.dropna(subset=["head"])
    found = {}
    for when, step in ends.items():
        for row in table[table["step"] == step].to_dict("records"):
            found[f"{row['head']} {row['probe']}, {when}"] = float(row["value"])
            if when == "after":
                found[f"{row['head']} {row['probe']}, chance"] = float(row["chance"])
    return found


def main() -> None:
    """Write the table over seeds; save the maps of the first seed with it."""
    arguments = options(__file__, __doc__)
    grid = grid_of(__file__, arguments)
    tell(arguments, grid_table(grid, before_and_after, arguments.runs, processes=arguments.processes))
    for (case, seed), run in runs_of(grid, arguments.runs, arguments.processes).items():
        if seed == 0:
            page = arguments.runs.parent / f"attention_{case.replace(' ', '_')}.html"
            print(f"maps before and after: {show_attention(run, '0,-1', length=48).save(page)}")


if __name__ == "__main__":
    main()
