"""Engines: four ways to compute the same gradient, from the plain TransformerLens loop to the compiled kernel.

    reference    HookedTransformer and autograd; any model
    functional   forward.py and autograd, with fused attention, in small chunks; any model
    handwritten  forward and backward by hand in torch; the simplified model with the paper's trained matrices
    fused        the same, compiled with numba; the same models

`choose` takes the fastest engine that the config allows. It depends only on the config, the size of the vocabulary and
whether the compiled kernels can be loaded, so the same config gets the same engine each time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from birthlens.config.clamps import FORWARD
from birthlens.config.run import RunConfig
from birthlens.devices import DEFAULT, Execution
from birthlens.errors import BirthlensError
from birthlens.model import forward
from birthlens.model.edited_forward import edited_logits_at
from birthlens.model.weights import Weights
from birthlens.shapes import Bool, Float, Int
from birthlens.tasks.batch import TokenBatch
from birthlens.training.clamping.passes import ForwardClamps
from birthlens.training.simplified import folding

if TYPE_CHECKING:
    from birthlens.training.simplified.folding import FoldedStep

COMPILING_PAYS = 1_000_000
"""From this number of trained tokens the fused engine is taken; it compiles once on a new machine, in about ten seconds."""

ASKED_FOR = "asked for"
"""The reason of an engine that the config names."""

LogitsAt = Callable[[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]], Float[Tensor, "row d_vocab"]]


class Engine(ABC):
    """One way to compute gradients and to evaluate; the optimiser updates `parameters` in place."""

    name: str
    parameters: dict[str, Tensor]
    bits_depend_on_threads = True

    @property
    def threads(self) -> int:
        """Number of threads that take a step: torch's, which OMP_NUM_THREADS sets."""
        return torch.get_num_threads()

    @abstractmethod
    def gradients(self, batch: TokenBatch, mask: Bool[Tensor, "batch pos"]) -> float:
        """Set `.grad` of every parameter to that of the mean loss over the mask; return the loss, in nats."""

    @abstractmethod
    def evaluate(self, batch: TokenBatch) -> tuple[Float[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """Return the loss and the predicted token at every position."""

    def tensors(self) -> dict[str, np.ndarray]:
        """Return a copy of the trained parameters."""
        return {name: parameter.detach().cpu().numpy().copy() for name, parameter in self.parameters.items()}


class AutogradEngine(Engine):
    """Gradients by autograd, accumulated over chunks of sequences so that memory does not grow with the batch."""

    def __init__(self, name: str, parameters: dict[str, Tensor], logits_at: LogitsAt, chunk: int) -> None:
        self.name = name
        self.parameters = parameters
        self._logits_at = logits_at
        self._chunk = chunk

    def gradients(self, batch: TokenBatch, mask: Bool[Tensor, "batch pos"]) -> float:
        """Accumulate gradients chunk by chunk."""
        for parameter in self.parameters.values():
            parameter.grad = None
        n = int(mask.sum())
        total = 0.0
        for part, chosen in zip(batch.chunks(self._chunk), torch.split(mask, self._chunk), strict=True):
            if not chosen.any():
                continue
            loss = functional.cross_entropy(self._logits_at(part.tokens, chosen), part.targets[chosen], reduction="sum")
            if loss.requires_grad:  # with some heads ablated, the loss may depend on no trained matrix
                torch.autograd.backward(loss / n)
            total += float(loss.detach())
        return total / n

    @torch.no_grad()
    def evaluate(self, batch: TokenBatch) -> tuple[Float[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """Run the forward pass chunk by chunk."""
        losses = []
        predictions = []
        for part in batch.chunks(self._chunk):
            shape = part.tokens.shape
            logits = self._logits_at(part.tokens, torch.ones(shape, dtype=torch.bool))
            losses.append(functional.cross_entropy(logits, part.targets.flatten(), reduction="none").view(shape))
            predictions.append(logits.argmax(-1).view(shape))
        return torch.cat(losses), torch.cat(predictions)


class FoldedEngine(Engine):
    """The hand-written step, in torch or compiled; its arrays share their memory with the parameters."""

    def __init__(self, name: str, step: FoldedStep, arrays: Mapping[str, np.ndarray]) -> None:
        self.name = name
        self._step = step
        self.parameters = {key: torch.from_numpy(array) for key, array in arrays.items()}
        self.bits_depend_on_threads = name != "fused"

    def gradients(self, batch: TokenBatch, mask: Bool[Tensor, "batch pos"]) -> float:
        """Give the gradients of the step to the parameters."""
        result = self._step.loss_and_gradients(batch.tokens.numpy(), batch.targets.numpy(), mask.numpy())
        for name, gradient in result.gradients.items():
            self.parameters[name].grad = torch.from_numpy(gradient)
        return result.loss

    def evaluate(self, batch: TokenBatch) -> tuple[Float[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """Run the step's forward pass at every position."""
        everywhere = np.ones(batch.tokens.shape, dtype=bool)
        outcome = self._step.evaluate(batch.tokens.numpy(), batch.targets.numpy(), everywhere)
        shape = batch.tokens.shape
        return torch.from_numpy(outcome.losses).view(shape), torch.from_numpy(outcome.predictions).view(shape)


def choose(config: RunConfig, d_vocab: int, execution: Execution = DEFAULT) -> tuple[str, str]:
    """Return the name of the engine and the reason for it.

    Raises:
        BirthlensError: if the config names an engine that cannot train it, or not on this device.
    """
    wanted = config.training.engine
    if not execution.on_cpu:
        where = f"{execution.device} in {execution.precision}"
        if obstacle := obstacle_to_stacking(config):
            raise BirthlensError(f"device = {execution.device!r}: {obstacle}; use device cpu and precision float32.")
        return "functional", f"on {where}"
    edited = _clamp_in_the_forward_pass(config)
    if wanted == "reference" and edited is not None:
        raise BirthlensError(f"training.engine = 'reference' cannot train this config: {edited}; use auto.")
    if wanted in ("reference", "functional"):
        return wanted, ASKED_FOR
    obstacle = obstacle_to_folding(config, d_vocab)
    if wanted != "auto":
        if obstacle is None and wanted == "fused":
            obstacle = _obstacle_to_compiling()
        if obstacle is not None:
            raise BirthlensError(f"training.engine = {wanted!r} cannot train this config: {obstacle}; use auto.")
        return wanted, ASKED_FOR
    if obstacle is not None:
        return "functional", obstacle
    tokens = config.training.steps * config.training.batch_size * config.task.context
    if tokens < COMPILING_PAYS:
        return "handwritten", f"{tokens:,} trained tokens are too few to be worth compiling"
    if obstacle := _obstacle_to_compiling():
        return "handwritten", obstacle
    return "fused", "the fastest for this config"


def obstacle_to_folding(config: RunConfig, d_vocab: int) -> str | None:
    """Return why the handwritten and fused engines cannot train a config, or return None if they can."""
    model = config.model
    if model.family != "simplified" or model.n_layers != 2:
        return f"it needs the two-layer simplified model, not a {model.n_layers}-layer {model.family} one"
    if model.feed_forward == "relu" or model.positions == "rotary":
        return f"feed_forward {model.feed_forward!r} with {model.positions} positions has no hand-written step"
    others = [name for name in config.trained if name not in folding.TRAINABLE]
    if others:
        return f"{', '.join(others)} must stay frozen"
    if edited := _clamp_in_the_forward_pass(config):
        return edited
    return folding.obstacle(config.task.context, d_vocab)


def obstacle_to_stacking(config: RunConfig) -> str | None:
    """Return why a config cannot be a member of an ensemble, or train on another device; None if it can."""
    if config.training.engine not in ("auto", "functional"):
        return f"training.engine = {config.training.engine!r} trains one run on the CPU in float32"
    if config.model.attention != "softmax":
        return f"model.attention = {config.model.attention!r} runs in the functional and reference engines only"
    if config.model.positions == "relative":
        return "model.positions = 'relative' runs in the functional and reference engines only"
    return _clamp_in_the_forward_pass(config)


def _clamp_in_the_forward_pass(config: RunConfig) -> str | None:
    """Return the first clamp that changes the forward pass, which only the functional engine supports."""
    found = next((clamp for clamp in config.training.clamps if isinstance(clamp, FORWARD)), None)
    return None if found is None else f"the clamp '{found}' acts in the forward pass, which is the functional engine's"


def engine(name: str, config: RunConfig, weights: Weights, clamps: ForwardClamps | None = None) -> Engine:
    """Build an engine around its own copy of the trained weights; `clamps` edit the forward pass of the functional one."""
    trained = {key: np.array(weights[key]) for key in config.trained}
    own = weights.replaced(trained)
    if name == "reference":
        return _reference(config, own)
    if name == "functional":
        tensors = forward.tensors_of(own)
        for key in trained:
            tensors[key].requires_grad_(True)
        parameters = {key: tensors[key] for key in trained}

        def logits_at(
            tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]
        ) -> Float[Tensor, "row d_vocab"]:
            if clamps is not None and clamps.edits.any:
                return edited_logits_at(tensors, config.model, tokens, mask, clamps.edits)
            return forward.logits_at(tensors, config.model, tokens, mask)

        return AutogradEngine(name, parameters, logits_at, chunk=16)
    step: FoldedStep
    if name == "fused":
        from birthlens.training.simplified.numba_step import FusedStep

        step = FusedStep(own, own.score_scale, tuple(trained))
    else:
        from birthlens.training.simplified.torch_step import SimplifiedStep

        step = SimplifiedStep(own, own.score_scale, tuple(trained))
    return FoldedEngine(name, step, trained)


def _reference(config: RunConfig, weights: Weights) -> Engine:
    from birthlens.model.hooked import build, parameters

    model = build(weights, config.trained, n_ctx=config.task.context)
    moving = {key: tensor for key, tensor in parameters(model, config.model).items() if key in config.trained}
    return AutogradEngine("reference", moving, lambda tokens, mask: model(tokens)[mask], chunk=64)


def _obstacle_to_compiling() -> str | None:
    from birthlens.training.simplified import numba_step as fused

    return fused.obstacle()
