"""Weight patching: one matrix of a model is replaced, everything else is kept, and the model is evaluated.

There are three questions, each with a table over the same batch of sequences:

    weight_patching_table   the same matrix from another checkpoint: which is sufficient (a late one helps an early model),
                         which is necessary (an early one breaks a late model), and from which step on
    subset_table         every subset of the trained matrices at its final value, the others at their initial value
    replacement_table    a matrix replaced by one of `WEIGHT_SOURCES`:
        initial          its value at the first step
        ideal            the closed-form memory between the same codebooks, raw outer products (`ideal.ideal_matrices`)
        ideal_dual       the same, between dual vectors
        ledger           what the ledger's associations explain: the least-squares sum of their outer products
        without_ledger   the rest of it
        rank:R           its R largest singular components (of each head); biases and gains stay as they are
        without_rank:R   all other components
        change_rank:R    its value at the first step, plus the R largest singular components of its change since then

Metrics are those of `tasks.roles.summary`, as role_quantity ("in_context_loss", "global_accuracy").

If embeddings are trained, a matrix of one step is read in the bases of another. The column `drift` says how far apart the
bases are (0: frozen), `attrs["moving"]` names the tensors that move, and `align=True` first rotates the matrices into the
bases of the model that receives them (`alignment`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from birthlens.analysis.interventions.truncation import TRUNCATIONS, Truncation
from birthlens.analysis.memories.ideal import Codebooks, Strengths, ideal_matrices
from birthlens.analysis.memories.layer_norms import fold_layer_norms
from birthlens.analysis.memories.names import parameters_named, trained_matrices
from birthlens.analysis.memories.projections import LedgerProjection, Matrices
from birthlens.analysis.memories.recall_tables import Checkpoints
from birthlens.errors import BirthlensError
from birthlens.model import forward
from birthlens.model.alignment import aligned, drift, partner_of, rotated_weights, rotation
from birthlens.model.weights import Weights
from birthlens.shapes import Float, Int
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.roles import losses, summary

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray
Evaluate = Callable[[Weights, TokenBatch], tuple[Float[Tensor, "batch pos"], Int[Tensor, "batch pos"]]]
"""Loss and predicted token at every position; a training engine's `evaluate` is faster than `by_forward`."""

WEIGHT_SOURCES = ("initial", "ideal", "ideal_dual", "ledger", "without_ledger", *(f"{how}:R" for how in TRUNCATIONS))


def by_forward(
    weights: Weights, batch: TokenBatch, chunk: int = 16
) -> tuple[Float[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Run any model over the batch, on its device: loss and predicted token at every position."""
    tensors = forward.tensors_of(weights, device=batch.device)
    found = []
    with torch.no_grad():
        for part in batch.chunks(chunk):
            logits = forward.logits(tensors, weights.config, part.tokens)
            found.append((losses(logits, part.targets), logits.argmax(-1)))
    loss, prediction = (torch.cat(parts) for parts in zip(*found, strict=True))
    return loss, prediction


def weight_patching_table(
    checkpoints: Checkpoints,
    batch: TokenBatch,
    matrices: Sequence[str] | None = None,
    from_steps: Sequence[int] | None = None,
    to_steps: Sequence[int] | None = None,
    align: bool = False,
    evaluate: Evaluate = by_forward,
) -> pd.DataFrame:
    """Put each matrix of every step into the model of every other step.

    `matrices` are names as in `memories.names` (default: the trained ones). Columns: matrix, from_step, to_step, metric,
    value, change (from the unedited model, which is the diagonal), drift, n. attrs: moving, aligned.

    Raises:
        BirthlensError: for unknown matrices, for steps that are not among the checkpoints, and for `align` with relative
            positions or a tied unembedding.
    """
    import pandas as pd

    models = dict(checkpoints)
    names = _named(models, matrices)
    config = next(iter(models.values())).config
    if align and (config.tied or config.positions == "relative"):
        option = f"positions = {config.positions!r}" if config.positions == "relative" else "unembedding = 'tied'"
        raise BirthlensError(f"align: model.{option}, for which no alignment is defined; patch without it.")
    recipients = chosen_among("to_steps", to_steps, models)
    donors = chosen_among("from_steps", from_steps, models)
    if align:
        models = {step: fold_layer_norms(weights) for step, weights in models.items()}
    rows: list[tuple[Any, ...]] = []
    for to_step in recipients:
        model = models[to_step]
        untouched = _measured(model, batch, evaluate)
        for from_step in donors:
            donor = models[from_step]
            apart = drift(rotated_weights(donor, rotation(donor, model)) if align else donor, model)
            for matrix, parameters in names.items():
                found = untouched
                if from_step != to_step:
                    taken = {name: donor[name] for name in parameters}
                    graft = aligned(donor, model, parameters) if align else taken
                    found = _measured(model.replaced(graft), batch, evaluate)
                keys = (matrix, from_step, to_step)
                rows += [(*keys, *row[:3], apart, row[3]) for row in _changes(found, untouched)]
    columns = ["matrix", "from_step", "to_step", "metric", "value", "change", "drift", "n"]
    place = list(names)
    rows.sort(key=lambda row: (place.index(str(row[0])), row[1], row[2]))
    table = pd.DataFrame(rows, columns=columns)
    table.attrs = {"moving": moving(list(models.values()), names.values()), "aligned": align}
    return table


def subset_table(
    initial: Weights,
    final: Weights,
    batch: TokenBatch,
    matrices: Sequence[str] | None = None,
    evaluate: Evaluate = by_forward,
) -> pd.DataFrame:
    """Set every subset of the matrices to its final value in the initial model.

    Columns: final (names joined by " + ", or "none" for the initial model), size, metric, value, n. All other parameters are
    those of the initial model. attrs["moving"] as in `weight_patching_table`.
    """
    import pandas as pd

    names = _named({0: initial}, matrices)
    rows = []
    for size in range(len(names) + 1):
        for subset in combinations(names, size):
            taken = {name: final[name] for matrix in subset for name in names[matrix]}
            found = _measured(initial.replaced(taken), batch, evaluate)
            rows += [(" + ".join(subset) or "none", size, metric, value, n) for metric, (value, n) in found.items()]
    table = pd.DataFrame(rows, columns=["final", "size", "metric", "value", "n"])
    table.attrs["moving"] = moving([initial, final], names.values())
    return table


def replacement_table(
    checkpoints: Checkpoints,
    batch: TokenBatch,
    sources: Sequence[str] = ("initial", "ideal", "ledger", "without_ledger", "rank:8"),
    matrices: Sequence[str] | None = None,
    initial: Weights | None = None,
    triggers: Sequence[int] | None = None,
    strengths: Strengths | None = None,
    bigram: Float[Array, "d_vocab d_vocab"] | None = None,
    evaluate: Evaluate = by_forward,
) -> pd.DataFrame:
    """Replace each matrix at every step by each source.

    `initial` defaults to the first checkpoint. `triggers`, `strengths` and `bigram` are those of `ideal.ideal_matrices`; the
    ledger uses `triggers` and `bigram` too.
    Columns: step, matrix, source ("none": the unedited model), metric, value, change, n. attrs: moving.
    """
    import pandas as pd

    models = dict(checkpoints)
    names = _named(models, matrices)
    start = initial if initial is not None else next(iter(models.values()))
    rows = []
    for step, model in models.items():
        untouched = _measured(model, batch, evaluate)
        for matrix, parameters in names.items():
            rows += [(step, matrix, "none", *row) for row in _changes(untouched, untouched)]
            for source in dict.fromkeys(sources):
                graft = replacement(model, parameters, source, start, triggers, strengths, bigram)
                found = _measured(model.replaced(graft), batch, evaluate)
                rows += [(step, matrix, source, *row) for row in _changes(found, untouched)]
    table = pd.DataFrame(rows, columns=["step", "matrix", "source", "metric", "value", "change", "n"])
    table.attrs["moving"] = moving([start, *models.values()], names.values())
    return table


def replacement(
    weights: Weights,
    parameters: Sequence[str],
    source: str,
    initial: Weights | None = None,
    triggers: Sequence[int] | None = None,
    strengths: Strengths | None = None,
    bigram: Float[Array, "d_vocab d_vocab"] | None = None,
) -> Matrices:
    """Return the matrices that replace some parameters, for a source.

    Raises:
        BirthlensError: for an unknown source, or one that is unavailable for these parameters.

    Example:
        >>> from birthlens.config.model import ModelConfig
        >>> from birthlens.model.initialisation import initial_weights
        >>> weights = initial_weights(ModelConfig(d_model=8), 5, 4, np.random.default_rng(0))
        >>> low = replacement(weights, ["L1.W_O"], "rank:2")["L1.W_O"]
        >>> int(np.linalg.matrix_rank(low[0]))
        2
    """
    if source == "initial" and initial is not None:
        return {name: initial[name] for name in parameters}
    if (truncation := Truncation.parse(source)) is not None:
        return {name: _truncated(weights, name, truncation, initial) for name in parameters}
    if source in ("ideal", "ideal_dual"):
        kind: Codebooks = "dual" if source == "ideal_dual" else "raw"
        memories: Matrices = ideal_matrices(weights, triggers, strengths, kind, bigram)
        if bigram is None:
            memories.pop("L1.W_F", None)  # without `bigram`, nothing defines what it should store
    elif source in ("ledger", "without_ledger"):
        memories = LedgerProjection(weights, triggers, bigram)(weights)
        if source == "without_ledger":
            memories = {name: weights[name] - memory for name, memory in memories.items()}
    else:
        raise BirthlensError(f"source = {source!r}: valid are {', '.join(WEIGHT_SOURCES)} with R = 1, 2, ...")
    missing = [name for name in parameters if name not in memories]
    if missing:
        raise BirthlensError(f"source = {source!r}: {missing[0]} has none; it exists for {', '.join(memories)}.")
    return {name: memories[name].astype(weights[name].dtype) for name in parameters}


def moving(models: Sequence[Weights], matrices: Iterable[Sequence[str]]) -> list[str]:
    """Name the tensors that move between models and are bases of what is replaced: codebooks, and partners in a head."""
    bases = [name for name in ("W_E", "W_pos", "W_U") if name in models[0]]
    for parameters in matrices:
        for name in parameters:
            partner = partner_of(name)
            if partner is not None and partner in models[0] and partner not in parameters:
                bases.append(partner)
    first = models[0]
    return [
        name
        for name in dict.fromkeys(bases)
        if any(not np.array_equal(first[name], other[name]) for other in models[1:])
    ]


def _truncated(weights: Weights, name: str, truncation: Truncation, initial: Weights | None) -> Float[Array, "..."]:
    matrix = weights[name]
    if name.rpartition(".")[2].startswith("b_") or matrix.ndim < 2:
        return matrix
    return truncation.of(matrix, None if initial is None else initial[name])


def _measured(weights: Weights, batch: TokenBatch, evaluate: Evaluate) -> dict[str, tuple[float, int]]:
    found = summary(*evaluate(weights, batch), batch)
    return {f"{role}_{quantity}": measured for (role, quantity), measured in found.items()}


def _changes(
    found: dict[str, tuple[float, int]], untouched: dict[str, tuple[float, int]]
) -> list[tuple[str, float, float, int]]:
    return [(metric, value, value - untouched[metric][0], n) for metric, (value, n) in found.items()]


def _named(models: dict[int, Weights], matrices: Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    if not models:
        raise BirthlensError("There is no checkpoint to patch between; give at least one (step, weights).")
    config = next(iter(models.values())).config
    chosen = trained_matrices(config) if matrices is None else matrices
    return {text: parameters_named(config, text) for text in chosen}


def chosen_among(field: str, steps: Sequence[int] | None, models: Mapping[int, object]) -> list[int]:
    """Return the steps of some models to patch between, by default all.

    Raises:
        BirthlensError: for a step without a model; the message names the field.
    """
    chosen = list(models) if steps is None else list(dict.fromkeys(steps))
    missing = [step for step in chosen if step not in models]
    if missing:
        raise BirthlensError(f"{field} = {missing}: the checkpoints given are {', '.join(map(str, models))}.")
    return chosen
