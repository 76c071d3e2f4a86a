"""Statistics of noisy in-context recall (Chen, Bruna, Bietti 2024): which layer holds the noise, and when."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from birthlens.analysis.behaviour.noisy_recall import clean_recall_table
from birthlens.claims.claim import Evidence
from birthlens.claims.statistics.timing import first_crossing
from birthlens.model import forward
from birthlens.model.weights import Weights
from birthlens.runs.evaluation import evaluation_batch
from birthlens.runs.run import Run
from birthlens.shapes import Bool, Float
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.noise import NoiseTask

Array = np.ndarray


def noise_first(evidence: Evidence) -> dict[str, float]:
    """Return the number of steps from learning the noise to recall without noise.

    The noise is learned when its mean probability at a trigger's later occurrences exceeds 0.9 alpha. Recall is learned when
    the clean accuracy without the feed-forward's largest direction exceeds 0.5.
    """
    run = evidence.runs["run"]
    task = run.task
    assert isinstance(task, NoiseTask)
    steps = np.array(run.steps, dtype=float)
    batch = evaluation_batch(run, evidence.settings.get("sequences", 64))
    noise = np.array([noise_probability(weights, batch, task.noise) for _, weights in run.checkpoints()])
    table = clean_recall_table(run.checkpoints(), task, ("without:1",), len(batch))
    recall = table[table["metric"] == "accuracy"]["value"].to_numpy()
    learned = first_crossing(steps, noise, 0.9 * task.config.alpha)
    return {"steps_later": first_crossing(steps, recall, 0.5) - learned}


def truncation(evidence: Evidence) -> dict[str, float]:
    """Return clean accuracy and noise probability of the last checkpoint: whole, truncated, without attention."""
    run = evidence.runs["run"]
    variants = evidence.settings["variants"]
    table = clean_recall_table(
        run.checkpoints(run.steps[-1:]), run.task, tuple(variants.values()), evidence.settings.get("sequences", 128)
    )
    found = table.set_index(["variant", "metric"])["value"]
    out: dict[str, float] = {}
    for name, variant in variants.items():
        out[f"{name}_accuracy"] = float(found[variant, "accuracy"])
        out[f"{name}_noise"] = float(found[variant, "noise_probability"])
    if "truncated" in variants and "whole" in variants:
        out["gain"] = out["truncated_accuracy"] - out["whole_accuracy"]
    return out


def avoidance(evidence: Evidence) -> dict[str, float]:
    """Return the share on noise of the last layer's attention to earlier successors of a trigger, and a fair share."""
    run = evidence.runs["run"]
    task = run.task
    assert isinstance(task, NoiseTask)
    weights = run.weights(-1)
    on_noise = np.zeros(0)
    fair = np.zeros(0)
    for mass, share in _successor_attention(weights, run, task, evidence.settings.get("sequences", 64)):
        on_noise = np.append(on_noise, mass)
        fair = np.append(fair, share)
    return {"on_noise": float(on_noise.mean()), "of_fair_share": float(on_noise.mean() / fair.mean())}


@torch.no_grad()
def noise_probability(weights: Weights, batch: TokenBatch, noise: int, chunk: int = 32) -> float:
    """Return the mean probability of the noise token at the second and later occurrences of triggers."""
    tensors = forward.tensors_of(weights)
    total = 0.0
    n = 0
    for part in batch.chunks(chunk):
        mask = part.marks["later_occurrence"]
        probabilities = forward.logits(tensors, weights.config, part.tokens)[mask].double().softmax(-1)
        total += float(probabilities[:, noise].sum())
        n += int(mask.sum())
    return total / n if n else float("nan")


@torch.no_grad()
def _successor_attention(
    weights: Weights, run: Run, task: NoiseTask, sequences: int
) -> Iterator[tuple[Float[Array, "query"], Float[Array, "query"]]]:
    """Yield, for queries that follow both kinds of successors, the share of attention on noise and a fair share."""
    tensors = forward.tensors_of(weights)
    for part in evaluation_batch(run, sequences).chunks(16):
        pattern = forward.activations(tensors, weights.config, part.tokens).patterns[-1][:, 0]
        before = torch.nn.functional.pad(part.tokens[:, :-1], (1, 0), value=-1)
        successor: Bool[torch.Tensor, "batch query_pos key_pos"] = before[:, None, :] == part.tokens[:, :, None]
        successor &= torch.ones_like(successor).tril()
        noisy = successor & (part.tokens == task.noise)[:, None, :]
        counts = successor.sum(-1)
        noisy_counts = noisy.sum(-1)
        chosen = part.marks["later_occurrence"] & (noisy_counts > 0) & (noisy_counts < counts)
        attended = (pattern * successor).sum(-1)[chosen]
        yield (
            ((pattern * noisy).sum(-1)[chosen] / attended).double().numpy(),
            (noisy_counts[chosen] / counts[chosen]).double().numpy(),
        )
