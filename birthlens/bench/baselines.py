"""Baselines: the plain, independent code that a researcher would write without birthlens.

They share the data, the initial weights, and `model.build`, which loads weights into a HookedTransformer, with birthlens.
Everything that is timed is plain PyTorch and plain TransformerLens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from birthlens.config.run import RunConfig
from birthlens.model.weights import Weights
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.bigram import BigramTask

if TYPE_CHECKING:
    from birthlens.model.hooked import HookedTransformer

Step = Callable[[TokenBatch], None]


class PaperModel(nn.Module):
    """The equations of paper section 4.2 in plain PyTorch, as the authors' code computes them."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.scale = weights.score_scale
        for name, array in weights.items():
            tensor = torch.from_numpy(array.copy())
            tensor = tensor[0] if tensor.dim() == 3 else tensor
            key = name.replace(".", "_")
            if name in ("L0.W_K", "L1.W_K", "L1.W_O", "L1.W_F"):
                self.register_parameter(key, nn.Parameter(tensor))
            else:
                self.register_buffer(key, tensor)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [batch pos d_vocab]."""
        n = tokens.shape[1]
        fixed = dict(self.named_buffers())
        x = fixed["W_E"][tokens] + fixed["W_pos"][:n]
        mask = torch.ones(n, n, dtype=torch.bool, device=tokens.device).triu(1)
        for layer in (0, 1):
            w = {matrix: getattr(self, f"L{layer}_W_{matrix}") for matrix in "QKVO"}
            scores = (x @ w["Q"]) @ (x @ w["K"]).transpose(1, 2) * self.scale
            attention = scores.masked_fill(mask, -math.inf).softmax(-1)
            x = x + attention @ (x @ w["V"]) @ w["O"]
        if hasattr(self, "L1_W_F"):
            x = x + x @ self.get_parameter("L1_W_F")
        return x @ fixed["W_U"]


def plain_step(weights: Weights, config: RunConfig, micro_batch: int | None = None) -> Step:
    """Return a training step of the paper's equations with torch's optimiser, whole or in micro-batches."""
    model = PaperModel(weights)
    return autograd_step(model, list(model.parameters()), config, micro_batch)


def hooked_step(weights: Weights, config: RunConfig) -> Step:
    """Return a training step of a plain HookedTransformer loop."""
    from birthlens.model.hooked import build

    model = build(weights, config.trained)
    return autograd_step(model, [p for p in model.parameters() if p.requires_grad], config, None)


def autograd_step(model: nn.Module, parameters: list[Tensor], config: RunConfig, micro_batch: int | None) -> Step:
    """Return a training step of a model by autograd and torch's optimiser, whole or in micro-batches."""
    optimiser = _optimiser(parameters, config)

    def step(batch: TokenBatch) -> None:
        optimiser.zero_grad()
        mask = batch.in_context if config.training.loss == "in_context" else torch.ones_like(batch.absorbed)
        n = mask.sum()
        for part in batch.chunks(micro_batch or len(batch)):
            chosen = part.in_context if config.training.loss == "in_context" else torch.ones_like(part.absorbed)
            logits = model(part.tokens)[chosen]
            loss = functional.cross_entropy(logits, part.targets[chosen], reduction="sum") / n
            torch.autograd.backward(loss)
        optimiser.step()

    return step


def _optimiser(parameters: list[Tensor], config: RunConfig) -> torch.optim.Optimizer:
    settings = config.optimiser
    rate = settings.learning_rate
    decay = settings.weight_decay
    if settings.kind == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, betas=settings.betas, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=rate, momentum=settings.momentum, weight_decay=decay)


def hooked_ablations(model: HookedTransformer, batch: TokenBatch, reference: TokenBatch) -> dict[str, float]:
    """In-context accuracy with each head ablated in each way: one model, one cache, `run_with_hooks` per case."""

    def accuracy(logits: Tensor) -> float:
        return float((logits.argmax(-1) == batch.targets)[batch.in_context].float().mean())

    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    with torch.no_grad():
        _, cache = model.run_with_cache(reference.tokens, names_filter=names)
        found = {"none": accuracy(model(batch.tokens))}
        for layer, name in enumerate(names):
            z = cache[name]
            mean = z.mean((0, 1), keepdim=True).expand_as(z)
            for method, value in (("zero", torch.zeros_like(z)), ("mean", mean), ("resample", z.flip(0))):
                edited = model.run_with_hooks(batch.tokens, fwd_hooks=[(name, lambda _, hook, value=value: value)])
                found[f"L{layer}H0 {method}"] = accuracy(edited)
    return found


Candidates = Mapping[str, tuple[Sequence[int], Sequence[int]]]
"""Sets of queries and candidates, by name."""


def hooked_probes(path: str | Path) -> dict[tuple[int, str, str, str, str], float]:
    """Read the three memories of every checkpoint of a run through a HookedTransformer, one checkpoint after another.

    Returns what `birthlens probe` writes, by step, memory, basis, metric and candidates.
    """
    from birthlens.model.hooked import build
    from birthlens.runs.run import load_run

    run = load_run(path)
    found: dict[tuple[int, str, str, str, str], float] = {}
    triggers = run.triggers or []
    for step in run.steps:
        model = build(run.weights(step))
        with torch.no_grad():
            found |= {(step, *key): value for key, value in _memories_of(model, triggers).items()}
    return found


def _memories_of(model: HookedTransformer, triggers: list[int]) -> dict[tuple[str, str, str, str], float]:
    tokens = range(model.cfg.d_vocab)
    place = model.W_pos
    by_token: Candidates = {"all": (tokens, tokens)}
    if len(triggers) > 1:
        by_token = {**by_token, "triggers": (triggers, triggers), "triggers among all": (triggers, tokens)}
    ways = len(triggers) if len(triggers) > 1 else 5
    w_1 = model.W_E @ model.OV[0, 0].AB
    match, attend = (model.QK[layer, 0].AB / model.cfg.attn_scale for layer in (1, 0))
    # The last number says how many positions before its query the right entry is.
    memories: list[tuple[str, Tensor, Tensor, Tensor, Candidates, int]] = [
        ("output_memory", model.W_E, model.OV[1, 0].AB, model.W_U.T, by_token, 0),
        ("trigger_memory", model.W_E, match, w_1, by_token, 0),
    ]
    for count, name in ((len(place), "all"), (64, "first 64")):
        if name == "all" or count < len(place):
            first = place[:count]
            shifted = {name: (range(1, count), range(count - 1))}
            memories.append(("prev_token_memory", first, attend, first, shifted, 1))
    found: dict[tuple[str, str, str, str], float] = {}
    for memory, inputs, matrix, outputs, sets, back in memories:
        dual = torch.linalg.pinv(inputs).T, torch.linalg.pinv(outputs).T
        for basis, (left, right) in {"raw": (inputs, outputs), "dual": dual}.items():
            scores = left @ matrix @ right.T
            for name, (rows, columns) in sets.items():
                answers = torch.tensor([list(columns).index(row - back) for row in rows])
                for metric, value in _read(scores[list(rows)][:, list(columns)], answers, ways).items():
                    found[memory, basis, metric, name] = value
        for name, (rows, _) in sets.items():
            ideal = inputs[list(rows)].T @ outputs[[row - back for row in rows]]
            overlap = (matrix * ideal).sum() / matrix.norm() / ideal.norm()
            found[memory, "raw", "frobenius_share", name] = float(overlap**2)
        if "all" in sets:
            energies = torch.linalg.svdvals(matrix) ** 2
            found[memory, "raw", "effective_rank", "all"] = float(energies.sum() ** 2 / (energies**2).sum())
    return found


def _read(scores: Tensor, answers: Tensor, ways: int) -> dict[str, float]:
    """Read one table in whose row i the right entry is column answers[i]."""
    n = scores.shape[1]
    rows = torch.arange(len(scores))
    ways = min(ways, n)
    right = scores[rows, answers]
    is_wrong = torch.ones_like(scores, dtype=torch.bool)
    is_wrong[rows, answers] = False
    wrong = scores[is_wrong].view(len(scores), n - 1)
    rank = 1 + (wrong > right[:, None]).sum(1) + (wrong == right[:, None]).sum(1) / 2
    recall = (rank == 1).float().mean()
    lead = right - wrong.mean(1)
    spread = wrong.std(1, correction=0)
    beaten = torch.ones_like(rank)
    for drawn in range(1, ways):
        beaten = beaten * (n - rank - drawn + 1).clamp(min=0) / (n - drawn)
    values = {
        "recall": recall,
        "corrected_recall": (recall - 1 / n) / (1 - 1 / n),
        "matched_recall": ((rank == 1).float() if ways == n else beaten).mean(),
        "soft_recall": scores.softmax(1)[rows, answers].mean(),
        "rank": rank.mean(),
        "margin": (right - wrong.max(1).values).mean(),
        "standardised": (lead / spread).mean(),
        "signal_to_interference": lead.mean() / (spread**2).mean().sqrt(),
    }
    return {metric: float(value) for metric, value in values.items()}


def plain_sampler(task: BigramTask, n: int, generator: np.random.Generator) -> list[list[int]]:
    """Draw sequences with one call of `Generator.choice` for each token, as a straightforward implementation does."""
    config = task.config
    statistics = task.statistics
    ids = np.arange(len(statistics))
    sequences = []
    for _ in range(n):
        if task.fixed_triggers is not None:
            triggers = task.fixed_triggers.tolist()
        else:
            triggers = generator.choice(ids, config.n_triggers, replace=False, p=statistics.unigram).tolist()
        outputs = {trigger: int(generator.choice(ids)) for trigger in triggers}
        sequence = [int(generator.choice(ids, p=statistics.unigram))]
        while len(sequence) <= config.context:
            last = sequence[-1]
            sequence.append(outputs[last] if last in outputs else int(generator.choice(ids, p=statistics.bigram[last])))
        sequences.append(sequence)
    return sequences
