"""How many facts one attention layer with an MLP can hold: the capacity model of Nichani, Lee and Bietti 2024.

    x = sum over heads of (sum_t softmax_t(q K_h e_t / sqrt(d_head)) e_t) V_h O_h        q: the query of <eos>
    logits = (x + relu(x W_in) W_out) U

There are no positions, no biases, no layer norms, and no residual around the attention; embeddings e and U are frozen draws
from N(0, 1/d). The unembedding has the answers only. AdamW trains the other matrices, 4 H d_head d + 2 m d parameters. The
capacity is the largest number S * S of drawn facts (S subjects, S relations) with accuracy 0.99 (arXiv 2412.06538,
section 4.2 and appendix).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from birthlens.config.task import FactsConfig
from birthlens.errors import BirthlensError
from birthlens.shapes import Float, Int
from birthlens.tasks.facts import FactsTask

_EVERY = 50
_HELD_OUT = 2048


@dataclass(frozen=True)
class LayerShape:
    """The sizes of the layer: heads of width d_model / heads, and an MLP of `hidden` units.

    Raises:
        BirthlensError: if the heads do not divide the width.
    """

    d_model: int
    heads: int = 4
    hidden: int = 64

    def __post_init__(self) -> None:
        if self.d_model % self.heads:
            raise BirthlensError(f"heads = {self.heads}: it must divide d_model = {self.d_model}.")

    @property
    def parameters(self) -> int:
        """Number of trained parameters: 4 H d_head d + 2 m d."""
        return 4 * self.d_model**2 + 2 * self.hidden * self.d_model


@dataclass(frozen=True)
class Training:
    """How long, with which batches, and with which rates of AdamW: facts are held if one rate is enough."""

    steps: int = 1200
    batch: int = 256
    rates: tuple[float, ...] = (0.03, 0.01)
    enough: float = 0.99


class FactLayer:
    """The layer with its matrices, for one task; `logits` is its forward pass."""

    def __init__(self, shape: LayerShape, task: FactsTask, seed: int) -> None:
        generator = np.random.default_rng(seed)
        d = shape.d_model
        self.shape = shape
        self.eos = task.eos
        self.embedding = _normal(generator, task.eos + 1, d, variance=1 / d)
        self.unembedding = _normal(generator, d, task.config.relations * task.config.answers, variance=1 / d)
        self.w_q, self.w_k, self.w_v, self.w_o = (_normal(generator, d, d, variance=1 / d) for _ in range(4))
        self.w_in = _normal(generator, d, shape.hidden, variance=2 / d)
        self.w_out = _normal(generator, shape.hidden, d, variance=1 / shape.hidden)
        for matrix in self.trained:
            matrix.requires_grad_()

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """The matrices that training moves."""
        return (self.w_q, self.w_k, self.w_v, self.w_o, self.w_in, self.w_out)

    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch answer"]:
        """Score the answers.

        Without positions, scores and values depend on the token alone. They are computed once for each token, and the
        softmax over places is one over tokens, weighted by how often each stands in the sequence.
        """
        heads = self.shape.heads
        width = self.shape.d_model // heads
        query = (self.embedding[self.eos] @ self.w_q).view(heads, width)
        scores = ((self.embedding @ self.w_k).view(-1, heads, width) * query).sum(-1) / math.sqrt(width)
        weights = (scores - scores.amax(0).detach()).exp()
        values = (self.embedding @ self.w_v).view(-1, heads, width) * weights[:, :, None]
        counts = torch.zeros(len(tokens), len(self.embedding)).scatter_add_(1, tokens, torch.ones(tokens.shape))
        mixed = (counts @ values.flatten(1)).view(-1, heads, width) / (counts @ weights)[:, :, None]
        x = mixed.flatten(1) @ self.w_o
        return (x + (x @ self.w_in).relu() @ self.w_out) @ self.unembedding


def accuracies(task: FactsTask, shape: LayerShape, training: Training, rate: float, seed: int) -> Iterator[float]:
    """Train a layer, and yield its accuracy on held-out sequences every 50 steps."""
    layer = FactLayer(shape, task, seed)
    optimiser = torch.optim.AdamW(layer.trained, lr=rate, weight_decay=0.0, fused=True)
    generator = np.random.default_rng((seed, 1))
    held_out = task.sample(_HELD_OUT, np.random.default_rng((seed, 2)))
    first = task.eos + 1
    for step in range(1, training.steps + 1):
        batch = task.sample(training.batch, generator)
        loss = torch.nn.functional.cross_entropy(layer.logits(batch.tokens), batch.targets[:, -1] - first)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if step % _EVERY == 0 or step == training.steps:
            with torch.no_grad():
                found = layer.logits(held_out.tokens).argmax(-1)
            yield float((found == held_out.targets[:, -1] - first).double().mean())


def holds(size: int, shape: LayerShape, training: Training, seed: int = 0) -> bool:
    """Return whether the layer learns `size` subjects times `size` relations, with one of the rates, at any checked step."""
    config = FactsConfig(
        context=16, subjects=size, relations=size, noise_tokens=2 * size, structured=False, facts_seed=seed
    )
    task = FactsTask(config, FactsTask.chain(config, None))
    return any(
        accuracy >= training.enough
        for rate in training.rates
        for accuracy in accuracies(task, shape, training, rate, seed)
    )


def capacity_of(shape: LayerShape, training: Training, seed: int = 0) -> int:
    """Return the most facts that are held: S grows by one from 2, and the first S that fails ends the search."""
    size = 1
    while holds(size + 1, shape, training, seed):
        size += 1
    return size**2


def fact_capacity_table(widths: Sequence[int], seeds: Sequence[int], training: Training) -> pd.DataFrame:
    """Measure the capacity at each width, with an MLP of 4 d units; columns: d_model, seed, parameters, facts."""
    rows = []
    for seed in seeds:
        for width in widths:
            shape = LayerShape(width, hidden=4 * width)
            rows.append((width, seed, shape.parameters, capacity_of(shape, training, seed)))
    return pd.DataFrame(rows, columns=["d_model", "seed", "parameters", "facts"])


def _normal(generator: np.random.Generator, rows: int, columns: int, variance: float) -> Float[Tensor, "rows columns"]:
    return torch.from_numpy((math.sqrt(variance) * generator.standard_normal((rows, columns))).astype(np.float32))
