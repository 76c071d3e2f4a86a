"""Three gradient steps make an induction head, and the role of each assumption of that theorem (paper section 7).

Start from W_O = W_K = 0 in layer 1 and W_K = 0 in layer 0. Take one step on the first matrix of `order`, one on the second
and one on the third, each on the in-context targets of new sequences. A step stores -rate * gradient. The rate is chosen
such that the right entries of its memory reach a mean score of `strength` (logits for W_O, scaled attention scores for W_K).

Assumptions can be switched off: those on the codebooks (ModelConfig.init), on the data (TaskConfig.cycles, no_repeat; bigram
rows all equal to pi_u: `independent_tokens`), and on the step (`Recipe`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from birthlens.analysis.theory.first_step import zeroed
from birthlens.analysis.theory.gradients import MATRICES, Readout, simplified_gradients, simplified_pass
from birthlens.config.model import ModelConfig
from birthlens.config.task import TaskConfig
from birthlens.errors import BirthlensError
from birthlens.model.forward import tensors_of
from birthlens.model.initialisation import initial_weights
from birthlens.model.weights import Weights
from birthlens.shapes import Float
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.corpus import BigramStatistics

Array = np.ndarray
_CHUNK = 128
STREAMS = {"bias": 97, "evaluation": 98}
"""Numbers of the batches that do not belong to a step."""


@dataclass(frozen=True)
class Recipe:
    """How the steps are taken.

    `bias` adds log p(y) to the logits. `centred` subtracts mean inputs and queries in the gradient. `direct_path` keeps the
    residual stream below layer 1's output in the logits. `projected` keeps only the part of each step that lies between the
    codebooks of its own memory. The defaults are the theorem's assumptions.
    """

    sequences: int = 4096
    strengths: tuple[float, float, float] = (3.0, 20.0, 100.0)
    order: tuple[str, str, str] = MATRICES
    bias: bool = True
    centred: bool = True
    direct_path: bool = False
    projected: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if sorted(self.order) != sorted(MATRICES):
            raise BirthlensError(f"order = {self.order}: name each of {', '.join(MATRICES)} once.")


@dataclass(frozen=True, eq=False)
class Memory:
    """One of the three matrices with the codebooks of its association; scores are query x entry."""

    left: Float[Array, "left d_in"]
    right: Float[Array, "right d_out"]
    queries_left: bool
    previous: bool
    candidates: Array
    scale: float

    def scores(self, matrix: Float[Array, "d_in d_out"]) -> Float[Array, "query entry"]:
        """Read the matrix: the score of each query with each entry."""
        table = self.scale * (self.left @ matrix @ self.right.T)
        return table if self.queries_left else table.T

    def right_scores(self, matrix: Float[Array, "d_in d_out"]) -> Float[Array, "pair"]:
        """Return the scores of the right pairs: k with k, or t with t - 1."""
        scores = self.scores(matrix)
        return scores.diagonal(-1) if self.previous else scores.diagonal()[self.candidates]

    def recall(self, matrix: Float[Array, "d_in d_out"]) -> float:
        """Return the share of queries whose best entry is the right one; ties do not count."""
        scores = self.scores(matrix)
        scores = scores[1:, :-1] if self.previous else scores[np.ix_(self.candidates, self.candidates)]
        others = scores.copy()
        np.fill_diagonal(others, -np.inf)
        return float((scores.diagonal() > others.max(1)).mean())

    def projected(self, matrix: Float[Array, "d_in d_out"]) -> Float[Array, "d_in d_out"]:
        """Project the matrix on the span of the memory's codebooks."""
        return np.asarray(np.linalg.pinv(self.left) @ self.left @ matrix @ (np.linalg.pinv(self.right) @ self.right).T)


def memories(weights: Weights, task: BigramTask) -> dict[str, Memory]:
    """Return the three memories with the candidates for their recall.

    For the output memory these are all tokens that can be outputs; for the trigger memory, the fixed triggers or all tokens.
    W_K pairs keys (left) with queries (right): it is the transposed QK circuit.
    """
    n = len(task.statistics)
    tokens = np.arange(n)
    output_tokens = np.arange(n)
    if task.fixed_triggers is not None:
        tokens = np.sort(task.fixed_triggers)
        laws = task.output_distribution(task.fixed_triggers[None])[0]
        output_tokens = np.flatnonzero(laws.sum(0) > 0)
    embedding = weights["W_E"]
    positions = weights["W_pos"][: task.config.context]
    remapped = embedding @ weights["L0.W_V"][0] @ weights["L0.W_O"][0]
    everywhere = np.arange(len(positions))
    queries = [weights[f"L{layer}.W_Q"][0] for layer in (0, 1)]
    scale = weights.score_scale
    heard = embedding @ weights["L1.W_V"][0]
    return {
        "L1.W_O": Memory(heard, weights["W_U"].T, True, False, output_tokens, 1.0),
        "L1.W_K": Memory(remapped, embedding @ queries[1], False, False, tokens, scale),
        "L0.W_K": Memory(positions, positions @ queries[0], False, True, everywhere, scale),
    }


def three_steps_table(recipe: Recipe, task: BigramTask, model: ModelConfig) -> pd.DataFrame:
    """Take the three steps; read every memory and the in-context accuracy after each step.

    Columns: step, moved (the matrix), gradient (its Frobenius norm), rate, strength (mean right score reached), metric
    (the recall of each matrix as `recall L1.W_O`, and in_context_accuracy), value, chance, n (queries, or positions).
    A gradient of exactly zero stores nothing: rate and strength are 0.
    """
    d_vocab = len(task.statistics)
    context = task.config.context
    weights = zeroed(initial_weights(model, d_vocab, context, np.random.default_rng(recipe.seed)))
    tensors = tensors_of(weights)
    parts = memories(weights, task)
    readout = Readout(recipe.direct_path, _log_frequency(recipe, task), recipe.centred)
    strengths = dict(zip(MATRICES, recipe.strengths, strict=True))
    rows = []
    for step, name in enumerate(recipe.order, start=1):
        gradient = _gradient(tensors, weights.score_scale, task, recipe, step, name, readout)
        size = float(np.linalg.norm(gradient))
        memory = parts[name]
        moved = -memory.projected(gradient) if recipe.projected else -gradient
        reach = float(np.abs(memory.right_scores(moved)).mean())
        rate = strengths[name] / reach if reach > 0 else 0.0
        tensors[name] = torch.from_numpy(rate * moved).float()[None]
        reached = float(memory.right_scores(rate * moved).mean())
        for metric, value, chance, n in _readings(tensors, weights.score_scale, parts, task, recipe, readout):
            rows.append((step, name, size, rate, reached, metric, value, chance, n))
    columns = ["step", "moved", "gradient", "rate", "strength", "metric", "value", "chance", "n"]
    return pd.DataFrame(rows, columns=columns)


def independent_tokens(statistics: BigramStatistics, uniform: bool = False) -> BigramStatistics:
    """Return the chain whose rows all equal the unigram distribution (rank one), or the uniform one."""
    n = len(statistics)
    unigram = np.full(n, 1 / n) if uniform else statistics.unigram
    return BigramStatistics(statistics.vocab, unigram, np.tile(unigram, (n, 1)))


Case = tuple[Recipe, TaskConfig, BigramStatistics, ModelConfig]


def ablations(
    statistics: BigramStatistics, d_model: int = 256, context: int = 64, recipe: Recipe = Recipe()
) -> dict[str, Case]:
    """Return the theorem's setting, each assumption dropped alone, and all dropped at once, by name."""
    task = TaskConfig(context=context, triggers="random", cycles="clean", no_repeat=True)
    model = ModelConfig(d_model=d_model, init="orthogonal")
    iid = independent_tokens(statistics, uniform=True)
    gaussian = model.changed(init="authors")
    published = task.changed(cycles="published", no_repeat=False)
    naive = replace(recipe, bias=False, centred=False, direct_path=True, projected=False)
    return {
        "theorem": (recipe, task, iid, model),
        "gaussian embeddings": (recipe, task, iid, gaussian),
        "corpus unigrams": (recipe, task, independent_tokens(statistics), model),
        "corpus bigrams": (recipe, task, statistics, model),
        "absorbed sequences": (recipe, published, iid, model),
        "uniform prediction": (replace(recipe, bias=False), task, iid, model),
        "mean kept": (replace(recipe, centred=False), task, iid, model),
        "direct path kept": (replace(recipe, direct_path=True), task, iid, model),
        "not projected": (replace(recipe, projected=False), task, iid, model),
        "fixed triggers": (recipe, task.changed(triggers="fixed"), iid, model),
        "none": (naive, published, statistics, gaussian),
    }


def sizes(
    widths: Iterable[int] = (128, 256),
    vocabularies: Iterable[int] = (32, 64),
    contexts: Iterable[int] = (64,),
    sequences: Iterable[int] = (512, 2048),
    recipe: Recipe = Recipe(),
) -> dict[str, Case]:
    """Return the theorem's setting for all combinations of d, N, T and batch, by names like 'd=128 N=32 T=64 batch=512'."""
    out = {}
    for d, n, t, batch in itertools.product(widths, vocabularies, contexts, sequences):
        statistics = BigramStatistics(tuple(map(str, range(n))), np.full(n, 1 / n), np.full((n, n), 1 / n))
        task = TaskConfig(context=t, triggers="random", cycles="clean", no_repeat=True)
        model = ModelConfig(d_model=d, init="orthogonal")
        out[f"d={d} N={n} T={t} batch={batch}"] = (replace(recipe, sequences=batch), task, statistics, model)
    return out


def assumptions_table(cases: Mapping[str, Case], seeds: Iterable[int] = (0,)) -> pd.DataFrame:
    """Run `three_steps_table` on every case and seed; the columns case and seed come first."""
    tables = []
    for seed in seeds:
        for name, (recipe, task, statistics, model) in cases.items():
            table = three_steps_table(replace(recipe, seed=seed), BigramTask(task, statistics), model)
            tables.append(table.assign(case=name, seed=seed))
    joined = pd.concat(tables, ignore_index=True)
    return joined[["case", "seed", *joined.columns.drop(["case", "seed"])]]


def _log_frequency(recipe: Recipe, task: BigramTask) -> Tensor | None:
    """Estimate log p(y) on in-context targets, with half a count added for every token."""
    if not recipe.bias:
        return None
    batch = task.batch(recipe.sequences, recipe.seed, STREAMS["bias"])
    counts = torch.bincount(batch.targets[batch.in_context], minlength=len(task.statistics)).float() + 0.5
    return (counts / counts.sum()).log()


def _gradient(
    tensors: Mapping[str, Tensor],
    scale: float,
    task: BigramTask,
    recipe: Recipe,
    step: int,
    name: str,
    readout: Readout,
) -> Float[Array, "d_in d_out"]:
    batch = task.batch(recipe.sequences, recipe.seed, step)
    gradient = np.zeros(tensors[name].shape[1:])
    for part in batch.chunks(_CHUNK):
        mask = part.in_context
        if mask.any():
            found = simplified_gradients(tensors, scale, part.tokens, part.targets, mask, [name], readout)[name][0]
            gradient += found.double().numpy() * int(mask.sum())
    return gradient / max(int(batch.in_context.sum()), 1)


def _readings(
    tensors: Mapping[str, Tensor],
    scale: float,
    parts: Mapping[str, Memory],
    task: BigramTask,
    recipe: Recipe,
    readout: Readout,
) -> list[tuple[str, float, float, int]]:
    out = []
    for name, memory in parts.items():
        choices = len(memory.candidates) - memory.previous
        out.append((f"recall {name}", memory.recall(tensors[name][0].double().numpy()), 1 / choices, choices))
    batch = task.batch(min(recipe.sequences, 512), recipe.seed, STREAMS["evaluation"])
    right = total = 0
    for part in batch.chunks(_CHUNK):
        mask = part.in_context
        found = simplified_pass(tensors, scale, part.tokens, readout).logits[mask].argmax(-1)
        right += int((found == part.targets[mask]).sum())
        total += int(mask.sum())
    return [*out, ("in_context_accuracy", right / max(total, 1), 1 / len(task.statistics), total)]
