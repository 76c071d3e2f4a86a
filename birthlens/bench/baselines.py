"""What a researcher would write without birthlens: plain, independent code to be measured against.

What is shared with birthlens: the data, the initial weights, and `model.build`, which fills a HookedTransformer with them
(here, and for the models that are handed in). What is timed is plain PyTorch and plain TransformerLens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from birthlens.config import RunConfig
from birthlens.task import BigramTask, TokenBatch
from birthlens.weights import Weights

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

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
        mask = torch.ones(n, n, dtype=torch.bool).triu(1)
        for layer in (0, 1):
            w = {matrix: getattr(self, f"L{layer}_W_{matrix}") for matrix in "QKVO"}
            scores = (x @ w["Q"]) @ (x @ w["K"]).transpose(1, 2) * self.scale
            attention = scores.masked_fill(mask, -math.inf).softmax(-1)
            x = x + attention @ (x @ w["V"]) @ w["O"]
        if hasattr(self, "L1_W_F"):
            x = x + x @ self.L1_W_F  # type: ignore[operator]
        return x @ fixed["W_U"]


def plain_step(weights: Weights, config: RunConfig, micro_batch: int | None = None) -> Step:
    """Return a training step of the paper's equations with torch's optimiser, whole or in micro-batches."""
    model = PaperModel(weights)
    return _autograd_step(model, list(model.parameters()), config, micro_batch)


def hooked_step(weights: Weights, config: RunConfig) -> Step:
    """Return a training step of a plain HookedTransformer loop."""
    from birthlens.model import build

    model = build(weights, config.trained)
    return _autograd_step(model, [p for p in model.parameters() if p.requires_grad], config, None)


def _autograd_step(model: nn.Module, parameters: list[Tensor], config: RunConfig, micro_batch: int | None) -> Step:
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
    rate, decay = settings.learning_rate, settings.weight_decay
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


def hooked_probes(path: str | Path) -> list[tuple[float, float, float]]:
    """Read the three memories of every checkpoint of a run through a HookedTransformer.

    Returns recall, soft recall and mean margin of each memory, through the codebooks (raw) and their pseudo-inverses (dual).
    """
    from birthlens.model import build
    from birthlens.runs import load_run

    run, found = load_run(path), []
    for step in run.steps:
        model = build(run.weights(step))
        with torch.no_grad():
            w_1 = model.W_E @ model.OV[0, 0].AB
            memories = (
                (model.W_E, model.OV[1, 0].AB, model.W_U.T, 0),
                (model.W_E, model.QK[1, 0].AB / model.cfg.attn_scale, w_1, 0),
                (model.W_pos, model.QK[0, 0].AB / model.cfg.attn_scale, model.W_pos, -1),
            )
            for inputs, matrix, outputs, offset in memories:
                dual = torch.linalg.pinv(inputs).T, torch.linalg.pinv(outputs).T
                for left, right in ((inputs, outputs), dual):
                    scores = left @ matrix @ right.T
                    right_answers = scores.diagonal(offset)
                    scores = scores[-offset:, : scores.shape[1] + offset]  # the last position is nobody's predecessor
                    wrong = scores.clone()
                    ids = torch.arange(len(scores))
                    wrong[ids, ids] = -math.inf
                    recall = (scores.argmax(-1) == ids).float().mean()
                    soft = scores.softmax(-1)[ids, ids].mean()
                    margin = (right_answers - wrong.max(-1).values).mean()
                    found.append((float(recall), float(soft), float(margin)))
    return found


def plain_sampler(task: BigramTask, n: int, generator: np.random.Generator) -> list[list[int]]:
    """Draw sequences with one `Generator.choice` a token, as a straightforward implementation does."""
    config, statistics = task.config, task.statistics
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
