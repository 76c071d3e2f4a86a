"""Statistics of factual recall (Nichani, Lee, Bietti 2024): relations before facts, and what stores them."""

from __future__ import annotations

import numpy as np
import torch

from birthlens.analysis.behaviour.noisy_recall import truncated
from birthlens.claims.claim import Evidence
from birthlens.claims.statistics.timing import first_crossing
from birthlens.model import forward
from birthlens.model.edited_forward import Edits, edited_terms
from birthlens.model.sites import Head
from birthlens.model.weights import Weights
from birthlens.runs.evaluation import evaluation_batch
from birthlens.shapes import Bool, Float
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.facts import FactsTask, named


def sequential(evidence: Evidence) -> dict[str, float]:
    """Return how many steps after relation accuracy 0.9 the fact accuracy exceeds 0.5, and the clearest intermediate stage.

    `stage` is the largest relation accuracy minus fact accuracy over the checkpoints; it is 1 - 1/answers if the model uses
    only the relation.
    """
    run = evidence.runs["run"]
    task = run.task
    assert isinstance(task, FactsTask)
    batch = evaluation_batch(run, evidence.settings.get("sequences", 256))
    found = np.array([accuracies(weights, task, batch) for _, weights in run.checkpoints()])
    steps = np.array(run.steps, dtype=float)
    relation = found[:, 0]
    fact = found[:, 1]
    return {
        "steps_later": first_crossing(steps, fact, 0.5) - first_crossing(steps, relation, 0.9),
        "stage": float((relation - fact).max()),
        "last_accuracy": float(fact[-1]),
    }


def stored_in(evidence: Evidence) -> dict[str, float]:
    """Return the accuracy of the last checkpoint without its feed-forward, and without what its heads write."""
    run = evidence.runs["run"]
    task = run.task
    assert isinstance(task, FactsTask)
    weights = run.weights(-1)
    batch = evaluation_batch(run, evidence.settings.get("sequences", 256))
    without_mlp = weights.replaced({"L0.W_in": truncated(weights["L0.W_in"], 0, keep=True)})
    without_heads = weights.replaced({"L0.W_O": np.zeros_like(weights["L0.W_O"])})
    return {
        "accuracy": accuracies(weights, task, batch)[1],
        "without_mlp": accuracies(without_mlp, task, batch)[1],
        "without_heads": accuracies(without_heads, task, batch)[1],
    }


def cut(evidence: Evidence) -> dict[str, float]:
    """Return the accuracies of the last checkpoint if no head of layer 0 attends to the relation, or to the subject."""
    run = evidence.runs["run"]
    task = run.task
    assert isinstance(task, FactsTask)
    weights = run.weights(-1)
    batch = evaluation_batch(run, evidence.settings.get("sequences", 256))
    subject = batch.tokens < task.first_relation
    relation = (batch.tokens >= task.first_relation) & (batch.tokens < task.first_relation + task.config.relations)
    without_relation = _scored(_logits_without(weights, batch, relation), task, batch)
    without_subject = _scored(_logits_without(weights, batch, subject), task, batch)
    return {
        "relation_without_relation": without_relation[0],
        "fact_without_relation": without_relation[1],
        "relation_without_subject": without_subject[0],
        "fact_without_subject": without_subject[1],
    }


@torch.no_grad()
def _logits_without(
    weights: Weights, batch: TokenBatch, keys: Bool[torch.Tensor, "batch key_pos"]
) -> Float[torch.Tensor, "batch pos d_vocab"]:
    """Return the logits if the softmax of the heads of layer 0 leaves out some keys."""
    tensors = forward.tensors_of(weights)
    patterns = forward.activations(tensors, weights.config, batch.tokens).patterns[0]
    left = patterns.masked_fill(keys[:, None, None, :], 0.0)
    left = left / left.sum(-1, keepdim=True).clamp(min=1e-30)
    edits = {Head(0, head): lambda _, head=head: left[:, head] for head in range(weights.n_heads)}
    return edited_terms(tensors, weights.config, batch.tokens, Edits(patterns=edits)).logits


@torch.no_grad()
def accuracies(weights: Weights, task: FactsTask, batch: TokenBatch) -> tuple[float, float]:
    """Return the share of predictions that are an answer of the right relation, and the share that are the right answer."""
    return _scored(forward.logits(forward.tensors_of(weights), weights.config, batch.tokens), task, batch)


def _scored(
    logits: Float[torch.Tensor, "batch pos d_vocab"], task: FactsTask, batch: TokenBatch
) -> tuple[float, float]:
    logits = logits[:, -1]
    predicted = logits.argmax(-1).numpy()
    _, relation = named(task, batch)
    of_relation = (predicted - task.eos - 1) // task.config.answers
    inside = (predicted > task.eos) & (of_relation == relation)
    right = predicted == batch.targets[:, -1].numpy()
    return float(inside.mean()), float(right.mean())
