"""The figures of `birthlens plot`: for a run, `analysis` computes the tables first; a saved table is drawn as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from birthlens.analysis.memories.names import is_paper_model
from birthlens.errors import BirthlensError
from birthlens.labels import counted, in_words, legible
from birthlens.runs.run import Run
from birthlens.viz import figures
from birthlens.viz.figures.heatmaps import HEADS_DOWN
from birthlens.viz.figures.style import columns_needed, mixed_columns
from birthlens.viz.notebook import thinned

if TYPE_CHECKING:
    import pandas as pd

    from birthlens.model.weights import Weights

MOST_TOKENS = 96
"""Score tables of larger vocabularies show this many tokens."""


def birth(run: Run, steps: Sequence[int]) -> Figure:
    """In-context loss and accuracy with the reference predictors, and the recall of the three memories, in one row."""
    from birthlens.analysis.behaviour.trajectory import memories_over
    from birthlens.runs.evaluation import evaluation_batch
    from birthlens.tasks.predictors.scores import reference_table

    metrics = run.metrics()
    references = reference_table(run.task, evaluation_batch(run, 32))
    recalls = memories_over(run, steps, bases=("raw",)).to_pandas() if is_paper_model(run.config.model) else None
    return figures.birth_panels(metrics[metrics["step"] <= max(steps)], references, recalls)


def behaviour(run: Run, steps: Sequence[int]) -> Figure:
    """Loss and accuracy over training, with the reference predictors."""
    from birthlens.runs.evaluation import evaluation_batch
    from birthlens.tasks.predictors.scores import reference_table

    metrics = run.metrics()
    return figures.training_curves(
        metrics[metrics["step"] <= max(steps)], reference_table(run.task, evaluation_batch(run, 32))
    )


def recall(run: Run, steps: Sequence[int]) -> Figure:
    """Recall of the three memories over training."""
    from birthlens.analysis.behaviour.trajectory import memories_over

    _paper_model(run, "recall")
    return figures.recall_curves(memories_over(run, steps, bases=("raw",)).to_pandas())


def memories(run: Run, steps: Sequence[int]) -> Figure:
    """The three memories at the last of the steps, as tables of scores."""
    _paper_model(run, "memories")
    return figures.memory_heatmaps(memory_scores(run, run.weights(steps[-1])))


def ledger(run: Run, steps: Sequence[int]) -> Figure:
    """Shares of the three matrices' norms over training."""
    from birthlens.analysis.memories.ledger_tables import paper_ledger_table

    _paper_model(run, "ledger")
    # The value at the first step is subtracted, so this step is read too.
    read = sorted({run.steps[0], *steps})
    return figures.ledger_areas(paper_ledger_table(run.checkpoints(read), run.triggers))


def ablation(run: Run, steps: Sequence[int]) -> Figure:
    """Change of in-context accuracy when a head is replaced by its mean."""
    from birthlens.analysis.interventions.causal_tables import changes_table, head_ablations_table

    table = changes_table(head_ablations_table(run, steps))
    return figures.timeline(table, "ablated", value="change", title="One head replaced by its mean", reference=0.0)


def edges(run: Run, steps: Sequence[int]) -> Figure:
    """Change of in-context accuracy when an edge between components is replaced by its mean."""
    from birthlens.analysis.interventions.causal_tables import changes_table, edge_ablations_table

    table = changes_table(edge_ablations_table(run, steps, n=16))
    table["ablated"] = table["ablated"].map(in_words)
    title = "One edge replaced by its mean" + ("" if table["change"].any() else ": no edge matters")
    return figures.timeline(table, "ablated", value="change", title=title, most=6, reference=0.0)


def patching(run: Run, steps: Sequence[int]) -> Figure:
    """Share of the clean-corrupted gap that each activation recovers at the last of the steps, by role of position."""
    from birthlens.analysis.interventions.causal_tables import patching_by_role_table

    table = patching_by_role_table(run, steps[-1])
    table["position"] = table["position"].map(figures.label)
    return figures.patching_map(table, "position", "component", title=f"Share of the gap recovered, step {steps[-1]}")


def weight_patching(run: Run, steps: Sequence[int]) -> Figure:
    """In-context accuracy when a trained matrix of one step is put into the model of another, at up to six steps."""
    from birthlens.analysis.interventions.weight_patching import weight_patching_table
    from birthlens.runs.evaluation import evaluation_batch

    chosen = list(run.checkpoints(steps))
    return figures.weight_patching_map(weight_patching_table(chosen, evaluation_batch(run, 32)), "in_context_accuracy")


def attention(run: Run, steps: Sequence[int]) -> Figure:
    """Attention of every head on one held-out sequence, at up to four steps."""
    from birthlens.viz.attention_frames import run_frames

    return figures.attention_maps(run_frames(run, steps, length=32))


def sweep(
    table: pd.DataFrame, x: str, y: str, value: str = "value", metric: str | None = None, title: str | None = None
) -> Figure:
    """Means over seeds of a sweep's results, over two settings."""
    from birthlens.analysis.behaviour.sweep_results import means_over_seeds_table

    columns_needed(table, x, y, numeric=(value,))
    if metric is not None:
        columns_needed(table, "metric")
        table = table[table["metric"] == metric]
        columns_needed(table, x)
    mixed_columns(table, [x, y], averaged=True)
    means = means_over_seeds_table(table, [x, y], value)
    return figures.heatmap(means, x, y, value, title or (figures.label(metric) if metric else None))


RUN_FIGURES: dict[str, Callable[[Run, Sequence[int]], Figure]] = {
    "birth": birth,
    "behaviour": behaviour,
    "recall": recall,
    "memories": memories,
    "ledger": ledger,
    "ablation": ablation,
    "edges": edges,
    "patching": patching,
    "weight-patching": weight_patching,
    "attention": attention,
}
"""The figures of a run."""

MOST_STEPS = {"memories": 1, "ledger": 12, "ablation": 12, "edges": 12, "patching": 1, "weight-patching": 6,
              "attention": 4}  # fmt: skip
"""The largest number of steps in a figure, evenly spaced; if it is 1, the last step."""

TABLE_FIGURES: dict[str, Callable[..., Figure]] = {
    "curves": figures.training_curves,
    "recall": figures.recall_curves,
    "timeline": figures.timeline,
    "ledger": figures.ledger_areas,
    "patching": figures.patching_map,
    "weight-patching": figures.weight_patching_map,
    "sweep": sweep,
    "heatmap": figures.heatmap,
}
"""The figures of a saved table."""

RENAMED = {"transplant": "weight-patching"}
"""Old names of kinds, which still work."""


def draw(run: Run, kind: str, steps: Sequence[int]) -> Figure:
    """Draw one kind of figure of a run.

    Raises:
        BirthlensError: for an unknown kind, or one that is unavailable for this model.
    """
    kind = RENAMED.get(kind, kind)
    if kind not in RUN_FIGURES:
        raise BirthlensError(
            f"kind = {kind!r}: of a run there are {', '.join(RUN_FIGURES)}; of a table {', '.join(TABLE_FIGURES)}."
        )
    return RUN_FIGURES[kind](run, drawn_steps(run, kind, steps))


def drawn_steps(run: Run, kind: str, steps: Sequence[int]) -> list[int]:
    """Return which of the steps a kind of figure draws: all of them, or as many as fit."""
    most = MOST_STEPS.get(RENAMED.get(kind, kind), len(steps))
    if kind == "attention" and run.config.model.n_layers * run.config.model.n_heads > HEADS_DOWN:
        most = 2
    return list(steps[-1:]) if most == 1 else thinned(steps, most)


def draw_table(table: pd.DataFrame, kind: str, **options: str) -> Figure:
    """Draw one kind of figure of a tidy table.

    Options are the parameters of the figure function (x, y, value, metric, title ...). An option that is the name of another
    column keeps the rows with that value: role=in_context.

    Raises:
        BirthlensError: for an unknown kind, an option the figure does not have, or a table that lacks a column.
    """
    kind = RENAMED.get(kind, kind)
    if kind not in TABLE_FIGURES:
        raise BirthlensError(
            f"kind = {kind!r}: of a table there are {', '.join(TABLE_FIGURES)}; of a run {', '.join(RUN_FIGURES)}."
        )
    parameters = dict(list(signature(TABLE_FIGURES[kind]).parameters.items())[1:])
    chosen = {name: value for name, value in options.items() if name not in parameters and name in table.columns}
    options = {name: value for name, value in options.items() if name not in chosen}
    for name, value in chosen.items():
        rows = table[table[name].map(str) == value]
        if rows.empty:
            there = ", ".join(map(str, list(dict.fromkeys(table[name]))[:8]))
            raise BirthlensError(f"option {name} = {value!r}: the column {name} holds {there}.")
        table = rows
    readers = {name: _READERS[_annotation(p)] for name, p in parameters.items() if _annotation(p) in _READERS}
    if unknown := [name for name in options if name not in readers]:
        valid = ", ".join(readers)
        raise BirthlensError(
            f"option {unknown[0]} = {options[unknown[0]]!r}: kind {kind} has {valid}, and each column of the table."
        )
    needed = [name for name, p in parameters.items() if p.default is Parameter.empty and name not in options]
    if needed:
        raise BirthlensError(f"kind = {kind!r}: say which column is {' and which is '.join(needed)}.")
    return TABLE_FIGURES[kind](table, **{name: _read(name, text, *readers[name]) for name, text in options.items()})


def _two_numbers(text: str) -> tuple[float, float]:
    low, high = text.split(",")
    return float(low), float(high)


_READERS: dict[str, tuple[str, Callable[[str], object]]] = {
    "str": ("text", str),
    "int": ("a whole number", int),
    "float": ("a number", float),
    "bool": ("yes or no", lambda text: {"yes": True, "no": False}[text]),
    "Sequence[str]": ("names with commas between", lambda text: text.split(",")),
    "tuple[float, float]": ("two numbers with a comma between", _two_numbers),
}
"""How an option given as text is parsed, by its annotation."""


def _annotation(parameter: Parameter) -> str:
    return str(parameter.annotation).removesuffix(" | None")


def _read(name: str, text: str, wanted: str, reader: Callable[[str], object]) -> object:
    try:
        return reader(text)
    except (ValueError, KeyError):
        raise BirthlensError(f"option {name} = {text!r}: it must be {wanted}.") from None


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a table that birthlens wrote: .csv, .parquet or .json."""
    import pandas as pd

    path = Path(path)
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".csv": pd.read_csv,
        ".parquet": pd.read_parquet,
        ".json": pd.read_json,
    }
    if path.suffix not in readers:
        raise BirthlensError(f"table = {str(path)!r}: the name must end in {', '.join(readers)}.")
    try:
        return readers[path.suffix](path)
    except (OSError, ValueError) as error:
        raise BirthlensError(f"table = {str(path)!r} cannot be read: {str(error).splitlines()[0]}") from None


def memory_scores(run: Run, weights: Weights) -> pd.DataFrame:
    """Return the scores of the three memories, as `memory_scores_table` does, of the 96 most frequent tokens at most."""
    from birthlens.analysis.memories.score_tables import memory_scores_table

    statistics = run.statistics
    tokens = None if len(statistics) <= MOST_TOKENS else sorted(map(int, statistics.most_frequent(MOST_TOKENS)))
    return memory_scores_table(weights, [legible(token) for token in statistics.vocab], run.triggers, tokens)


def _paper_model(run: Run, kind: str) -> None:
    if not is_paper_model(run.config.model):
        layers = counted(run.config.model.n_layers, "layer")
        raise BirthlensError(
            f"kind = {kind!r}: the three memories belong to the two-layer simplified model; this run is a "
            f"{run.config.model.family} model of {layers}. Use birth, behaviour, ablation or attention."
        )
