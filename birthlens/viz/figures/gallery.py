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
from birthlens.viz.notebook import thinned

if TYPE_CHECKING:
    import pandas as pd

    from birthlens.analysis.memories.memory import AssociativeMemory
    from birthlens.model.weights import Weights


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
    return figures.memory_heatmaps(memory_frames(run, run.weights(steps[-1])))


def ledger(run: Run, steps: Sequence[int]) -> Figure:
    """Shares of the three matrices' norms over training."""
    from birthlens.analysis.memories.ledger_tables import paper_ledger_table

    _paper_model(run, "ledger")
    # The value at the first step is subtracted, so this step is read too.
    read = sorted({run.steps[0], *steps})
    return figures.ledger_areas(paper_ledger_table(run.checkpoints(read), run.triggers))


def ablation(run: Run, steps: Sequence[int]) -> Figure:
    """Change of in-context accuracy when a head is replaced by its mean."""
    from birthlens.analysis.interventions.causal_tables import changes, head_ablations_table

    table = changes(head_ablations_table(run, steps))
    return figures.timeline(table, "ablated", value="change", title="One head replaced by its mean", reference=0.0)


def edges(run: Run, steps: Sequence[int]) -> Figure:
    """Change of in-context accuracy when an edge between components is replaced by its mean."""
    from birthlens.analysis.interventions.causal_tables import changes, edge_ablations_table

    table = changes(edge_ablations_table(run, steps, n=16))
    table["ablated"] = table["ablated"].map(in_words)
    title = "One edge replaced by its mean" + ("" if table["change"].any() else ": no edge matters")
    return figures.timeline(table, "ablated", value="change", title=title, most=6, reference=0.0)


def patching(run: Run, steps: Sequence[int]) -> Figure:
    """Share of the clean-corrupted gap that each activation recovers at the last of the steps, by role of position."""
    from birthlens.analysis.interventions.causal_tables import patching_by_role_table

    table = patching_by_role_table(run, steps[-1])
    table["position"] = table["position"].map(figures.label)
    return figures.patching_map(table, "position", "component", title=f"Share of the gap recovered, step {steps[-1]}")


def transplant(run: Run, steps: Sequence[int]) -> Figure:
    """In-context accuracy when a trained matrix of one step is put into the model of another, at up to six steps."""
    from birthlens.analysis.interventions.weight_patching import weight_patching_table
    from birthlens.runs.evaluation import evaluation_batch

    chosen = list(run.checkpoints(steps))
    return figures.transplant_map(weight_patching_table(chosen, evaluation_batch(run, 32)), "in_context_accuracy")


def attention(run: Run, steps: Sequence[int]) -> Figure:
    """Attention of every head on one held-out sequence, at up to four steps."""
    from birthlens.viz.attention_frames import run_frames

    return figures.attention_maps(run_frames(run, steps, length=32))


KINDS: dict[str, Callable[[Run, Sequence[int]], Figure]] = {
    "birth": birth,
    "behaviour": behaviour,
    "recall": recall,
    "memories": memories,
    "ledger": ledger,
    "ablation": ablation,
    "edges": edges,
    "patching": patching,
    "transplant": transplant,
    "attention": attention,
}
"""The figures of a run."""

MOST_STEPS = {"memories": 1, "ledger": 12, "ablation": 12, "edges": 12, "patching": 1, "transplant": 6, "attention": 4}
"""The largest number of steps in a figure, evenly spaced; if it is 1, the last step."""

TABLE_KINDS: dict[str, Callable[..., Figure]] = {
    "curves": figures.training_curves,
    "recall": figures.recall_curves,
    "timeline": figures.timeline,
    "ledger": figures.ledger_areas,
    "patching": figures.patching_map,
    "transplant": figures.transplant_map,
    "sweep": figures.sweep_heatmap,
    "heatmap": figures.heatmap,
}
"""The figures of a saved table."""


def draw(run: Run, kind: str, steps: Sequence[int]) -> Figure:
    """Draw one kind of figure of a run.

    Raises:
        BirthlensError: for an unknown kind, or one that is unavailable for this model.
    """
    if kind not in KINDS:
        raise BirthlensError(
            f"kind = {kind!r}: of a run there are {', '.join(KINDS)}; of a table {', '.join(TABLE_KINDS)}."
        )
    return KINDS[kind](run, drawn_steps(run, kind, steps))


def drawn_steps(run: Run, kind: str, steps: Sequence[int]) -> list[int]:
    """Return which of the steps a kind of figure draws: all of them, or as many as fit."""
    most = MOST_STEPS.get(kind, len(steps))
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
    if kind not in TABLE_KINDS:
        raise BirthlensError(
            f"kind = {kind!r}: of a table there are {', '.join(TABLE_KINDS)}; of a run {', '.join(KINDS)}."
        )
    parameters = dict(list(signature(TABLE_KINDS[kind]).parameters.items())[1:])
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
    return TABLE_KINDS[kind](table, **{name: _read(name, text, *readers[name]) for name, text in options.items()})


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


def memory_frames(run: Run, weights: Weights) -> dict[str, pd.DataFrame]:
    """Return the score tables of the three memories; that of the trigger memory covers the fixed triggers, if there are any.

    attrs["diagonal"] of each table is the offset of its right entries from the main diagonal: 0, or -1 if the right entry of
    row t is in column t - 1.
    """
    from birthlens.analysis.memories.circuits import output_memory, prev_token_memory, trigger_memory

    labels = [legible(token) for token in run.statistics.vocab]
    trigger = _scores(trigger_memory(weights, labels=labels), "query", "key")
    if run.trigger_ids is not None and len(run.trigger_ids) > 1:
        trigger = trigger.iloc[run.trigger_ids, run.trigger_ids]
    tables = {
        "output memory": _scores(output_memory(weights, labels=labels), "attended token", "predicted token"),
        "trigger memory": trigger,
    }
    if "W_pos" in weights:
        tables["previous-token memory"] = _scores(
            prev_token_memory(weights, first=64), "query position", "key position", diagonal=-1
        )
    return tables


def _scores(memory: AssociativeMemory, rows: str, columns: str, diagonal: int = 0) -> pd.DataFrame:
    import pandas as pd

    table = pd.DataFrame(
        memory.scores(),
        index=pd.Index(memory.inputs.labels, name=rows),
        columns=pd.Index(memory.outputs.labels, name=columns),
    )
    table.attrs["diagonal"] = diagonal
    return table


def _paper_model(run: Run, kind: str) -> None:
    if not is_paper_model(run.config.model):
        layers = counted(run.config.model.n_layers, "layer")
        raise BirthlensError(
            f"kind = {kind!r}: the three memories belong to the two-layer simplified model; this run is a "
            f"{run.config.model.family} model of {layers}. Use birth, behaviour, ablation or attention."
        )
