"""Statistics of in-context Markov chains (Edelman et al. 2024; Park et al. 2024): which predictor a model matches, when."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch

from birthlens.analysis.behaviour.excess import divergence_table
from birthlens.claims.claim import Evidence
from birthlens.claims.statistics.timing import first_crossing
from birthlens.model import forward
from birthlens.model.weights import Weights
from birthlens.runs.evaluation import evaluation_batch
from birthlens.runs.run import Run
from birthlens.shapes import Float
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.markov import MarkovTask
from birthlens.tasks.predictors.scores import reference_table
from birthlens.tasks.task import Task

Array = np.ndarray
ROLE = "in_context"


def divergences(run: Run, task: Task, steps: list[int], sequences: int) -> pd.DataFrame:
    """Return KL(predictor || model) at each step, over the second half of the positions of new sequences."""
    batch = task.batch(sequences, run.config.seeds.evaluation, 2**40 + 2)
    late = torch.zeros_like(batch.in_context)
    late[:, late.shape[1] // 2 :] = True
    batch = TokenBatch(
        batch.tokens, batch.targets, batch.triggers, batch.outputs, batch.occurrence, batch.absorbed, {ROLE: late}
    )
    logits = ((step, _logits(run.weights(step), batch)) for step in steps)
    return divergence_table(logits, task, batch, roles=(ROLE,), positions=batch.tokens.numel())


def phases(evidence: Evidence) -> dict[str, float]:
    """Return how long the unigram predictor is nearest, when the bigram predictor becomes it, and the last divergences.

    Evaluations are 10 steps apart. `last_excess` is the loss above the bigram predictor's at the end, over all positions.
    """
    run = evidence.runs["run"]
    steps_apart = [step for step in run.steps if step % 10 == 0]
    table = divergences(run, run.task, steps_apart, evidence.settings.get("sequences", 64))
    nearest = table[table["nearest"]].sort_values("step")
    names = nearest["predictor"].tolist()
    steps = nearest["step"].to_numpy(dtype=float)
    first_bigram = next((i for i, name in enumerate(names) if name == "bigram"), None)
    before = names[: len(names) if first_bigram is None else first_bigram]
    last = table[table["step"] == steps_apart[-1]].set_index("predictor")["divergence"]
    return {
        "uniform_at_first": float(names[0] == "uniform"),
        "unigram_evaluations": float(sum(name == "unigram" for name in before)),
        "bigram_from": float("nan") if first_bigram is None else float(steps[first_bigram]),
        "bigram_to_the_end": float(first_bigram is not None and set(names[first_bigram:]) == {"bigram"}),
        "last_unigram": float(last["unigram"]),
        "last_bigram": float(last["bigram"]),
        "last_excess": excess_over_bigrams(run.weights(-1), run.task, evaluation_batch(run, 64)),
    }


def excess_over_bigrams(weights: Weights, task: Task, batch: TokenBatch) -> float:
    """Return the mean loss above the bigram predictor's, in nats."""
    loss = torch.nn.functional.cross_entropy(_logits(weights, batch).flatten(0, 1), batch.targets.flatten())
    floors = reference_table(task, batch, ("bigram",))
    floor = floors[(floors["role"] == "all") & (floors["metric"] == "loss")]["value"].iloc[0]
    return float(loss) - float(floor)


def top_down(evidence: Evidence) -> dict[str, float]:
    """Return how many steps layer 1's half-rise on matching keys comes before layer 0's on the previous position."""
    run = evidence.runs["run"]
    batch = evaluation_batch(run, evidence.settings.get("sequences", 32))
    matching = []
    lag = []
    for _, weights in run.checkpoints():
        for_match, for_lag = statistical_induction(weights, batch)
        matching.append(for_match)
        lag.append(for_lag)
    steps = np.array(run.steps, dtype=float)
    return {
        "steps_later": _half_rise(steps, np.array(lag)) - _half_rise(steps, np.array(matching)),
        "largest_lag": max(lag),
    }


def pool(evidence: Evidence) -> dict[str, float]:
    """Return a pool-trained model's divergences on its pool, and its excess loss on chains that it never saw."""
    run = evidence.runs["run"]
    task = run.task
    assert isinstance(task, MarkovTask)
    sequences = evidence.settings.get("sequences", 64)
    table = divergences(run, task, run.steps[-1:], sequences).set_index("predictor")["divergence"]
    fresh = MarkovTask(task.config.changed(chains=0), task.statistics)
    batch = fresh.batch(sequences, run.config.seeds.evaluation, 2**40 + 3)
    return {
        "retrieval_less_bigram": float(table["retrieval"] - table["bigram"]),
        "new_chain_excess": excess_over_bigrams(run.weights(-1), fresh, batch),
    }


@torch.no_grad()
def statistical_induction(weights: Weights, batch: TokenBatch) -> tuple[float, float]:
    """Return the last layer's mean attention to keys whose previous token is the query's, and layer 0's to the previous key.

    Only queries in the second half of the context that have something to match count.
    """
    tensors = forward.tensors_of(weights)
    patterns = forward.activations(tensors, weights.config, batch.tokens).patterns
    before = torch.nn.functional.pad(batch.tokens[:, :-1], (1, 0), value=-1)
    matching = (before[:, None, :] == batch.tokens[:, :, None]) & torch.ones(batch.tokens.shape[1], 1).bool()
    half = batch.tokens.shape[1] // 2
    matched = (patterns[-1].mean(1) * matching).sum(-1)[:, half:]
    lagged = patterns[0].mean(1).diagonal(-1, -2, -1)[:, half:]
    return float(matched.mean()), float(lagged.mean())


@torch.no_grad()
def _logits(weights: Weights, batch: TokenBatch) -> Float[torch.Tensor, "batch pos d_vocab"]:
    tensors = forward.tensors_of(weights)
    return torch.cat(list(_in_chunks(tensors, weights, batch)))


def _in_chunks(
    tensors: forward.Tensors, weights: Weights, batch: TokenBatch
) -> Iterator[Float[torch.Tensor, "part pos d_vocab"]]:
    for part in batch.chunks(32):
        yield forward.logits(tensors, weights.config, part.tokens)


def _half_rise(steps: Float[Array, "step"], values: Float[Array, "step"]) -> float:
    return first_crossing(steps, values, (values[0] + values.max()) / 2)
