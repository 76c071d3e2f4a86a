"""SGD and AdamW for a stack of runs, each with its own settings; the updates are those of torch's optimisers.

SGD     g <- g + decay * w;  m <- momentum * m + g;  w <- w - rate * m
AdamW   w <- (1 - rate * decay) * w;  m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
        w <- w - rate / (1 - beta1^n) * m / (sqrt(v / (1 - beta2^n)) + 1e-8)      at the matrix's update number n

Settings are columns, with one number for each run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from birthlens.config.run import OptimiserConfig
from birthlens.shapes import Bool, Float, Int
from birthlens.training.stack import Stack

Array = np.ndarray
Kind = Literal["sgd", "adamw"]
_QUANTITIES: dict[str, tuple[str, ...]] = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}
_EPSILON = 1e-8


class StackedOptimiser:
    """The optimisers of all runs of a stack."""

    def __init__(self, stack: Stack, kind: Kind) -> None:
        self._stack = stack
        self._kind = kind
        self._buffers = {
            quantity: {name: torch.zeros_like(stack.values[name]) for name in stack.trained}
            for quantity in _QUANTITIES[kind]
        }
        self._updates = {name: np.zeros(stack.n_runs, dtype=np.int64) for name in stack.trained}

    def step(
        self,
        runs: Sequence[int],
        gradients: Mapping[str, Float[Tensor, "run ..."]],
        settings: Sequence[OptimiserConfig],
        moving: Mapping[str, Bool[Array, " run"]],
    ) -> None:
        """Update the given runs; `settings` are each one's current settings, and `moving` says which matrices it trains."""
        index = torch.tensor(list(runs), device=self._stack.device)
        for name, gradient in gradients.items():
            moves = moving[name]
            if not moves.any():
                continue
            counted = moves if self._kind == "adamw" else moves & [each.momentum > 0 for each in settings]
            self._updates[name][np.array(runs)[counted]] += 1
            before = [self._stack.values[name], *(buffers[name] for buffers in self._buffers.values())]
            chosen = [tensor[index] for tensor in before]
            after: tuple[Tensor, ...]
            if self._kind == "sgd":
                after = _sgd(gradient, chosen[0], chosen[1], settings)
            else:
                updates = self._updates[name][list(runs)].clip(1)
                after = _adamw(gradient, chosen[0], chosen[1], chosen[2], settings, updates)
            mask = _column(moves.tolist(), gradient)
            for whole, new, old in zip(before, after, chosen, strict=True):
                whole[index] = new if moves.all() else torch.where(mask, new, old)

    def store(self, run: int, optimiser: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> None:
        """Give torch's optimiser of one run the state that it would have."""
        for name, parameter in parameters.items():
            optimiser.state.pop(parameter, None)
            count = int(self._updates[name][run])
            if not count:
                continue
            state: dict[str, Tensor] = {"step": torch.tensor(float(count))} if self._kind == "adamw" else {}
            optimiser.state[parameter] = state | {key: whole[name][run] for key, whole in self._buffers.items()}

    def load(self, run: int, optimiser: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> None:
        """Copy the state of torch's optimiser of one run."""
        for name, parameter in parameters.items():
            state = optimiser.state.get(parameter, {})
            count = state.get("step")
            self._updates[name][run] = int(bool(state)) if count is None else int(count)
            for quantity, whole in self._buffers.items():
                found = state.get(quantity)
                whole[name][run] = torch.zeros_like(parameter) if found is None else found.clone()


def _sgd(
    gradient: Tensor, weight: Tensor, buffer: Tensor, settings: Sequence[OptimiserConfig]
) -> tuple[Tensor, Tensor]:
    decay = _column([each.weight_decay for each in settings], weight)
    momentum = _column([each.momentum for each in settings], weight)
    rate = _column([each.learning_rate for each in settings], weight)
    gradient = gradient + decay * weight
    moved = momentum * buffer + gradient
    if not all(each.momentum for each in settings):  # without momentum the buffer is neither used nor changed
        return weight - rate * torch.where(momentum > 0, moved, gradient), torch.where(momentum > 0, moved, buffer)
    return weight - rate * moved, moved


def _adamw(
    gradient: Tensor,
    weight: Tensor,
    mean: Tensor,
    square: Tensor,
    settings: Sequence[OptimiserConfig],
    updates: Int[Array, " run"],
) -> tuple[Tensor, Tensor, Tensor]:
    beta1 = np.array([each.betas[0] for each in settings])
    beta2 = np.array([each.betas[1] for each in settings])
    rate = np.array([each.learning_rate for each in settings])
    decay = np.array([each.weight_decay for each in settings])
    weight = weight * _column(1 - rate * decay, weight)
    mean = mean + (gradient - mean) * _column(1 - beta1, weight)
    square = square * _column(beta2, weight) + gradient * gradient * _column(1 - beta2, weight)
    root = square.sqrt() / _column(np.sqrt(1 - beta2**updates), weight) + _EPSILON
    return weight - _column(rate / (1 - beta1**updates), weight) * mean / root, mean, square


def _column(values: Sequence[float] | Float[Array, " run"], like: Float[Tensor, "run ..."]) -> Tensor:
    """Return one number, or one boolean, for each run, in a shape that broadcasts with the run's tensor."""
    dtype = torch.bool if isinstance(values[0], bool) else like.dtype
    return torch.tensor(np.asarray(values), dtype=dtype, device=like.device).view(-1, *[1] * (like.ndim - 1))
