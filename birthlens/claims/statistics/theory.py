"""Statistics of the theory: the first step from counts, and three gradient steps with and without their assumptions."""

from __future__ import annotations

from dataclasses import replace

from birthlens.analysis.theory.first_step import ENTRIES, PREDICTIONS, first_step_table
from birthlens.analysis.theory.three_steps import Recipe, ablations, three_steps_table
from birthlens.claims.claim import Evidence
from birthlens.config.model import ModelConfig
from birthlens.config.run import CorpusConfig
from birthlens.config.task import TaskConfig
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.corpus import statistics_of

MATRICES = {"L1.W_O": "output", "L1.W_K": "trigger", "L0.W_K": "prev_token"}


def three_steps(evidence: Evidence) -> dict[str, float]:
    """Take the three steps in the named case of `three_steps.ablations`; return recalls and accuracy at the end.

    `first_gradient` is the norm of the first step's gradient, which shows that another order stores nothing.
    """
    settings = evidence.settings
    recipe = Recipe(sequences=settings["sequences"], order=tuple(settings.get("order", MATRICES)))
    statistics = statistics_of(CorpusConfig())
    cases = ablations(statistics, settings["d_model"], settings["context"], recipe)
    chosen, task, chain, model = cases[settings["case"]]
    table = three_steps_table(replace(chosen, seed=evidence.seed), BigramTask(task, chain), model)
    last = table[table["step"] == 3].set_index("metric")["value"]
    recalls = {f"recall_{memory}": float(last[f"recall {matrix}"]) for matrix, memory in MATRICES.items()}
    return {
        **recalls,
        "least_recall": min(recalls.values()),
        "accuracy": float(last["in_context_accuracy"]),
        "first_gradient": float(table.loc[table["step"] == 1, "gradient"].iloc[0]),
    }


def first_step(evidence: Evidence) -> dict[str, float]:
    """Correlate the first step's table predicted from counts with the model's gradient, at the smallest and the largest d.

    For each prediction: `all_*`, `diagonal_*` and `off_diagonal_*` at the largest d, `small_*` off the diagonal at the
    smallest, and `growth_*`, the difference between the last two.
    """
    settings = evidence.settings
    widths = [int(width) for width in settings["widths"]]
    task = BigramTask(TaskConfig(context=settings["context"]), statistics_of(CorpusConfig()))
    model = ModelConfig(init=settings["init"])
    table = first_step_table(task, model, widths, settings["sequences"], (evidence.seed,), ("zero",))
    correlation = table.set_index(["prediction", "entries", "d_model"])["correlation"]
    small = min(widths)
    large = max(widths)
    found: dict[str, float] = {}
    for name in PREDICTIONS:
        found |= {f"{entries}_{name}": float(correlation[name, entries, large]) for entries in ENTRIES}
        found[f"small_{name}"] = float(correlation[name, "off_diagonal", small])
        found[f"growth_{name}"] = found[f"off_diagonal_{name}"] - found[f"small_{name}"]
    return found
