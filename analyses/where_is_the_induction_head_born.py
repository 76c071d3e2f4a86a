"""Where is the induction head born? Phase diagrams over triggers and width, and over learning rate and batch size.

The value is the step from which the in-context accuracy stays at one half or above, over two seeds, within 300 steps. Points
are added between neighbours that differ most.

python analyses/where_is_the_induction_head_born.py --tier laptop
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from asking import keep, options

from birthlens.analysis.behaviour.phase import VALUES, Diagram, phase_table
from birthlens.claims.tiers import TIERS
from birthlens.config.run import RunConfig
from birthlens.training.sweep import Outcome, sweep
from birthlens.viz.figures.phase import phase_map
from birthlens.viz.figures.style import save

AXES: dict[str, dict[str, list[float]]] = {
    "triggers_width": {"task.n_triggers": [1, 5, 20], "model.d_model": [32, 64, 128]},
    "rate_batch": {"optimiser.learning_rate": [0.05, 0.2, 0.8], "training.batch_size": [16, 64, 256]},
}
SETTINGS = ("training.steps=300", "training.batch_size=64", "checkpoints.every=300", "evaluation.every=5")


def main() -> None:
    """Write both tables and figures."""
    arguments = options(__file__, __doc__, points=8)

    def train(configs: Sequence[RunConfig]) -> Iterable[Outcome]:
        return sweep(configs, arguments.runs, arguments.processes)

    tables = {}
    for name, axes in AXES.items():
        x, y = axes
        own = [word for word in SETTINGS if word.partition("=")[0] not in axes]
        tree = {"overrides": [*TIERS[arguments.tier].base, *own], "axes": axes, "seeds": arguments.seeds or 2}
        tables[name] = phase_table(Diagram(tree, x, y), arguments.runs, train, arguments.points)
        print(tables[name].to_string())
        figure = phase_map(tables[name], x, y, VALUES["birth"])
        save(figure, arguments.out.with_stem(f"{arguments.out.stem}_{name}").with_suffix(".svg"))
    keep(arguments, None, None, **tables)


if __name__ == "__main__":
    main()
