"""Where theory stops predicting SGD: predicted and actual updates during a run, family by family.

Between two kept checkpoints a matrix changes by dW. Each prediction is a matrix, which is compared with dW by its cosine:

    gradient   minus the population gradient of the run's loss at the earlier checkpoint, on new sequences
    memory     the paper's ideal memory, the sum of the outer products that it should store
    counts     the table of the first step, from data counts alone (W_O of layer 1 only)

A family is a pair of codebooks, one for inputs and one for outputs. Both matrices are first projected on its span. `null` is
the root mean square cosine of unrelated matrices, 1 / sqrt(dimension of the family).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from birthlens.analysis.theory.first_step import counts_table
from birthlens.analysis.theory.gradients import MATRICES, Loss, check_simplified, simplified_gradients
from birthlens.errors import BirthlensError
from birthlens.model.forward import tensors_of
from birthlens.model.weights import Weights
from birthlens.shapes import Float
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.roles import role_masks

Array = np.ndarray
Factors = tuple[Float[Array, "d_in rank"], Float[Array, "d_out rank"]]
_CHUNK = 64


def families(weights: Weights) -> dict[str, dict[str, Factors]]:
    """Return orthonormal bases (input side, output side) of each matrix's families; W_K pairs a key with a query."""
    embedding = weights["W_E"]
    positions = weights["W_pos"]
    remapped = embedding @ weights["L0.W_V"][0] @ weights["L0.W_O"][0]
    sources = {"tokens": embedding, "positions": positions, "remapped": remapped}
    value = weights["L1.W_V"][0]
    unembedding = _basis(weights["W_U"].T)
    keys = {name: _basis(vectors) for name, vectors in sources.items()}
    asked = [{name: _basis(vectors @ weights[f"L{layer}.W_Q"][0]) for name, vectors in sources.items()}
             for layer in (0, 1)]  # fmt: skip
    return {
        "L1.W_O": {f"{name} -> outputs": (_basis(vectors @ value), unembedding) for name, vectors in sources.items()},
        "L1.W_K": {f"{key} <- {query}": (keys[key], asked[1][query]) for key in sources for query in sources},
        "L0.W_K": {
            f"{key} <- {query}": (keys[key], asked[0][query])
            for key in ("tokens", "positions")
            for query in ("tokens", "positions")
        },
    }


def ideal_memories(weights: Weights, context: int) -> dict[str, Float[Array, "d_in d_out"]]:
    """Return the three sums of outer products that make an induction head."""
    embedding = weights["W_E"]
    positions = weights["W_pos"][:context]
    remapped = embedding @ weights["L0.W_V"][0] @ weights["L0.W_O"][0]
    return {
        "L1.W_O": (embedding @ weights["L1.W_V"][0]).T @ weights["W_U"].T,
        "L1.W_K": remapped.T @ embedding @ weights["L1.W_Q"][0],
        "L0.W_K": positions[:-1].T @ positions[1:] @ weights["L0.W_Q"][0],
    }


def update_cosine_table(
    checkpoints: Iterable[tuple[int, Weights]], task: BigramTask, loss: Loss, sequences: int = 256, seed: int = 0
) -> pd.DataFrame:
    """Compare each update between consecutive checkpoints with the predictions of theory, by matrix and family.

    `loss` is the loss that the run was trained on: `run.config.training.loss`.

    Columns: step, next_step, matrix, family (`all` is the whole matrix), prediction, cosine, share (of the update's squared
    norm inside the family), null. Matrices that did not change are left out.

    Raises:
        BirthlensError: for a model that the closed-form gradients do not cover, or fewer than two checkpoints.
    """
    batch = task.batch(sequences, seed)
    rows = []
    previous = None
    bases = {}
    for step, weights in checkpoints:
        if previous is None:
            check_simplified(weights)
            bases = families(weights)
        else:
            first, old = previous
            predictions = _predictions(old, task, batch, loss)
            for name in MATRICES:
                update = (weights[name] - old[name])[0].astype(np.float64)
                if update.any():
                    for family, kind, cosine, share, null in _compared(update, predictions[name], bases[name]):
                        rows.append((first, step, name, family, kind, cosine, share, null))
        previous = (step, weights)
    if previous is None or not rows:
        raise BirthlensError("checkpoints: a comparison needs at least 2 between which a memory moved.")
    columns = ["step", "next_step", "matrix", "family", "prediction", "cosine", "share", "null"]
    return pd.DataFrame(rows, columns=columns)


def _predictions(weights: Weights, task: BigramTask, batch: TokenBatch, loss: Loss) -> dict[str, dict[str, Array]]:
    tensors = tensors_of(weights)
    gradient: dict[str, Array] = {name: np.zeros(weights[name].shape[1:]) for name in MATRICES}
    for part in batch.chunks(_CHUNK):
        mask = role_masks(part)[loss]
        if mask.any():
            found = simplified_gradients(tensors, weights.score_scale, part.tokens, part.targets, mask)
            for name in MATRICES:
                gradient[name] += found[name][0].double().numpy() * int(mask.sum())
    ideal = ideal_memories(weights, task.config.context)
    out = {name: {"gradient": -gradient[name], "memory": ideal[name]} for name in MATRICES}
    table = counts_table(batch, role_masks(batch)[loss].numpy(), len(task.statistics), prediction="frequency")
    out["L1.W_O"]["counts"] = (weights["W_E"] @ weights["L1.W_V"][0]).T @ table @ weights["W_U"].T
    return out


def _compared(
    update: Float[Array, "d_in d_out"], predictions: Mapping[str, Array], bases: Mapping[str, Factors]
) -> Iterable[tuple[str, str, float, float, float]]:
    whole = (np.eye(update.shape[0]), np.eye(update.shape[1]))
    total = float((update**2).sum())
    for family, (left, right) in {"all": whole, **bases}.items():
        mine = left.T @ update @ right
        for kind, prediction in predictions.items():
            theirs = left.T @ prediction @ right
            norm = float(np.linalg.norm(mine) * np.linalg.norm(theirs))
            cosine = float((mine * theirs).sum()) / norm if norm > 0 else float("nan")
            yield family, kind, cosine, float((mine**2).sum()) / total, float(mine.size**-0.5)


def _basis(vectors: Float[Array, "entry d"]) -> Float[Array, "d rank"]:
    """Return an orthonormal basis of the span of the rows."""
    _, values, rows = np.linalg.svd(vectors.astype(np.float64), full_matrices=False)
    return np.asarray(rows[values > 1e-6 * values[0]].T)
