"""The weights of many runs of one shape as stacked tensors, with their gradients and evaluations as one tensor program.

    loss of run r = mean over its positions of the cross-entropy;  the program differentiates the sum over r

Runs share no weight, so the gradient of the sum is each run's own gradient. Sequences are taken in pieces, so that memory
does not grow with the batch or the number of runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from birthlens.config.model import ModelConfig
from birthlens.config.run import RunConfig
from birthlens.devices import Execution
from birthlens.model.stacked_forward import stacked_logits
from birthlens.model.weights import Weights
from birthlens.shapes import Bool, Float, Int, Shaped
from birthlens.tasks.batch import TokenBatch
from birthlens.training.engines import Engine

ON_CPU = 16
"""Sequences in a piece on the CPU, whose data should stay in the cache."""
ON_GPU = 32_768
"""The most sequences x heads in a piece on a GPU: the backward passes of fused attention refuse 65,536."""

Evaluation = tuple[Float[Tensor, "batch pos"], Int[Tensor, "batch pos"]]


class Stack:
    """Stacked weights: `values[name]` has the weight's own shape after a leading axis of runs.

    `trained` names everything that any of the runs trains. `sequences` is the most sequences in a piece.
    """

    def __init__(
        self,
        model: ModelConfig,
        shapes: Mapping[str, tuple[int, ...]],
        trained: Sequence[str],
        n_runs: int,
        execution: Execution,
        sequences: int | None = None,
    ) -> None:
        self.device = torch.device(execution.device)
        self.model = model
        self.trained = tuple(trained)
        self.n_runs = n_runs
        self.values = {name: torch.zeros(n_runs, *shape, device=self.device) for name, shape in shapes.items()}
        self._reduced = execution.precision == "bfloat16"
        most = ON_CPU if self.device.type == "cpu" else max(1, ON_GPU // model.n_heads)
        self._sequences = most if sequences is None else min(most, sequences)

    def gradients(
        self, runs: Sequence[int], batches: Sequence[TokenBatch], masks: Sequence[Bool[Tensor, "_batch pos"]]
    ) -> tuple[Float[Tensor, " run"], dict[str, Float[Tensor, "run ..."]]]:
        """Return the mean loss of each given run over its mask, and the gradients; every mask has a position."""
        tokens = self._padded([batch.tokens for batch in batches])
        targets = self._padded([batch.targets for batch in batches])
        counted = self._padded(list(masks))
        losses = torch.zeros(len(runs), device=self.device)
        gradients = {
            name: torch.zeros(len(runs), *self.values[name].shape[1:], device=self.device) for name in self.trained
        }
        share = counted.sum((1, 2)).reciprocal()
        for first, last in self._pieces_of_runs(len(runs)):
            own = self._chosen(runs[first:last])
            leaves = {name: own[name].detach().requires_grad_() for name in self.trained}
            for piece in self._pieces_of_batch(last - first, tokens.shape[1]):
                at = (slice(first, last), piece)
                loss = self._losses({**own, **leaves}, tokens[at], targets[at], counted[at]) * share[first:last]
                found = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
                losses[first:last] += loss.detach()
                for name, gradient in zip(leaves, found, strict=True):
                    if gradient is not None:
                        gradients[name][first:last] += gradient
        return losses, gradients

    @torch.no_grad()
    def evaluate(self, runs: Sequence[int], batches: Sequence[TokenBatch]) -> list[Evaluation]:
        """Return loss and predicted token of each given run at every position of its batch, on the CPU."""
        tokens = self._padded([batch.tokens for batch in batches])
        targets = self._padded([batch.targets for batch in batches])
        losses = torch.empty(tokens.shape)
        predictions = torch.empty(tokens.shape, dtype=torch.int64)
        for first, last in self._pieces_of_runs(len(runs)):
            own = self._chosen(runs[first:last])
            for piece in self._pieces_of_batch(last - first, tokens.shape[1]):
                at = (slice(first, last), piece)
                logits = self._logits(own, tokens[at], None)
                each = functional.cross_entropy(logits.flatten(0, 1), targets[at].flatten(), reduction="none")
                losses[at] = each.view(tokens[at].shape).cpu()
                predictions[at] = logits.argmax(-1).view(tokens[at].shape).cpu()
        return [(losses[i, : len(batch)], predictions[i, : len(batch)]) for i, batch in enumerate(batches)]

    def _losses(
        self,
        tensors: Mapping[str, Tensor],
        tokens: Int[Tensor, "run batch pos"],
        targets: Int[Tensor, "run batch pos"],
        counted: Bool[Tensor, "run batch pos"],
    ) -> Float[Tensor, " run"]:
        """Return the summed loss of each run over the counted positions."""
        weight = counted.flatten(1)
        goal = targets.flatten(1)
        rows = None
        if self.device.type == "cpu":  # elsewhere, selecting positions costs more than it saves
            most = max(1, int(weight.sum(1).max()))
            rows = weight.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
            weight = weight.gather(1, rows)
            goal = goal.gather(1, rows)
        logits = self._logits(tensors, tokens, rows)
        each = functional.cross_entropy(logits.flatten(0, 1), goal.flatten(), reduction="none").view(goal.shape)
        # A position that does not count adds nothing, whatever its loss.
        return each.masked_fill(~weight, 0).sum(1)

    def _logits(
        self, tensors: Mapping[str, Tensor], tokens: Int[Tensor, "run batch pos"], rows: Int[Tensor, "run row"] | None
    ) -> Float[Tensor, "run row d_vocab"]:
        with torch.autocast(self.device.type, torch.bfloat16) if self._reduced else nullcontext():
            return stacked_logits(tensors, self.model, tokens, rows).float()

    def _chosen(self, runs: Sequence[int]) -> dict[str, Tensor]:
        """Return the weights of some runs: views where the runs are neighbours."""
        first = runs[0]
        if list(runs) == list(range(first, first + len(runs))):
            return {name: value[first : first + len(runs)] for name, value in self.values.items()}
        index = torch.tensor(list(runs), device=self.device)
        return {name: value[index] for name, value in self.values.items()}

    def _pieces_of_runs(self, n: int) -> Iterator[tuple[int, int]]:
        for first in range(0, n, self._sequences):
            yield first, min(first + self._sequences, n)

    def _pieces_of_batch(self, n_runs: int, batch: int) -> Iterator[slice]:
        size = max(1, self._sequences // n_runs)
        for first in range(0, batch, size):
            yield slice(first, min(first + size, batch))

    def _padded(self, parts: Sequence[Shaped[Tensor, "_batch pos"]]) -> Shaped[Tensor, "run batch pos"]:
        """Stack the batches of each run, padded with zeros to the largest one."""
        largest = max(len(part) for part in parts)
        if all(len(part) == largest for part in parts):
            return torch.stack(list(parts)).to(self.device, non_blocking=True)
        whole = parts[0].new_zeros(len(parts), largest, parts[0].shape[1])
        for row, part in zip(whole, parts, strict=True):
            row[: len(part)] = part
        return whole.to(self.device, non_blocking=True)


class Member(Engine):
    """One run of a stack as an engine: its parameters are views of the stack, so what changes one changes the other.

    `evaluation` is the stack's result for the current step, computed together with the other runs.
    """

    name = "functional"

    def __init__(self, stack: Stack, run: int, initial: Weights, trained: Sequence[str]) -> None:
        self.stack = stack
        self.run = run
        self.evaluation: Evaluation | None = None
        for name, value in stack.values.items():
            value[run] = torch.from_numpy(np.array(initial[name]))
        self.parameters = {name: stack.values[name][run] for name in trained}

    def gradients(self, batch: TokenBatch, mask: Bool[Tensor, "batch pos"]) -> float:
        """Give this run's gradients to its parameters."""
        losses, gradients = self.stack.gradients([self.run], [batch], [mask])
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name][0]
        return float(losses[0])

    def evaluate(self, batch: TokenBatch) -> Evaluation:
        """Return the stack's result, or run its forward pass for this run alone."""
        found = self.evaluation
        self.evaluation = None
        return self.stack.evaluate([self.run], [batch])[0] if found is None else found


def lone_member(config: RunConfig, initial: Weights, execution: Execution) -> Member:
    """Return the engine of a single run on another device: a stack of one."""
    shapes = {name: initial[name].shape for name in initial}
    return Member(Stack(config.model, shapes, config.trained, 1, execution), 0, initial, config.trained)
