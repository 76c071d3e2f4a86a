"""Clamps on matrices: which updates are skipped, and what is written into the trained weights at each step.

At every step of its span a held matrix has its value, in the checkpoints too; the updates that start there skip it, and the
projections (ledger, without_ledger, rank) let it train and project the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from birthlens.analysis.memories.ideal import Codebooks, Strengths, ideal_matrices
from birthlens.analysis.memories.projections import LedgerProjection, low_rank
from birthlens.config.clamps import Add, Clamp, Freeze, Hold, Reset
from birthlens.errors import BirthlensError
from birthlens.model.weights import Weights
from birthlens.shapes import Float

Array = np.ndarray
Value = Callable[[Weights], Float[Array, "..."]]


@dataclass(frozen=True, eq=False)
class Ground:
    """What memories are computed from: the initial weights with their codebooks, fixed triggers, the corpus's bigrams."""

    initial: Weights
    triggers: Sequence[int] | None
    bigram: Float[Array, "d_vocab d_vocab"] | None


class MatrixClamps:
    """The clamps of a run that act on its matrices and on the optimiser.

    `remembered` holds matrices of earlier steps that a clamp will need, by the clamp's number; it is part of the state of
    a training, so that a run resumes bit for bit.

    Raises:
        BirthlensError: for a value that the matrix does not have.
    """

    def __init__(self, clamps: Sequence[Clamp], ground: Ground, remembered: Mapping[int, Array] | None = None) -> None:
        self.remembered = dict(remembered or {})
        self._clamps = clamps
        self._ground = ground
        self._values: dict[int, Value] = {}
        for number, clamp in enumerate(clamps):
            try:
                if isinstance(clamp, Hold):
                    self._values[number] = self._held(number, clamp)
                elif isinstance(clamp, Add):
                    self._values[number] = _constant(_ideal(ground, clamp.matrix, "ideal", 1.0))
            except BirthlensError as error:
                raise BirthlensError(f"clamp '{clamp}': {error}") from None

    def skipped(self, step: int) -> set[str]:
        """Return the matrices that the update after a step leaves as they are."""
        found = set()
        for clamp in self._clamps:
            if clamp.acts(step) and (isinstance(clamp, Freeze) or (isinstance(clamp, Hold) and not clamp.projects)):
                found.add(clamp.matrix)
        return found

    def apply(
        self, step: int, parameters: Mapping[str, Tensor], optimiser: torch.optim.Optimizer, first: int = 0
    ) -> None:
        """Write what the clamps from number `first` on demand at a step into the parameters, in place.

        What later steps need of the weights is remembered before.
        """
        numbered = list(enumerate(self._clamps))[first:]
        for number, clamp in numbered:
            if isinstance(clamp, Hold) and clamp.at == "step" and clamp.step == step:
                self.remembered[number] = parameters[clamp.matrix].detach().cpu().numpy().copy()
        for number, clamp in numbered:
            if isinstance(clamp, Reset) and clamp.start == step:
                for name in [clamp.matrix] if clamp.matrix else list(parameters):
                    optimiser.state.pop(parameters[name], None)
            elif (isinstance(clamp, Hold) and clamp.acts(step)) or (isinstance(clamp, Add) and _adds(clamp, step)):
                self._write(number, clamp, parameters)

    def _write(self, number: int, clamp: Hold | Add, parameters: Mapping[str, Tensor]) -> None:
        parameter = parameters[clamp.matrix]
        now = {name: tensor.detach().cpu().numpy() for name, tensor in parameters.items()}
        value = self._values[number](self._ground.initial.replaced(now))
        if isinstance(clamp, Add):
            old = now[clamp.matrix].astype(np.float64)
            share = np.vdot(value, old) / np.vdot(value, value) if clamp.held else 0.0
            value = old + (clamp.strength - share) * value
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(value, np.float32)))

    def _held(self, number: int, clamp: Hold) -> Value:
        """Return the function that gives a hold's value from the weights of now."""
        name = clamp.matrix
        initial = self._ground.initial
        if clamp.at == "zero":
            return _constant(np.zeros_like(initial[name]))
        if clamp.at == "initial":
            return _constant(initial[name])
        if clamp.at == "step":
            if number not in self.remembered and (clamp.step or 0) > clamp.start:
                raise BirthlensError(
                    f"step {clamp.step} comes after from = {clamp.start}, so its value is not known then; "
                    "name an earlier step, or fork from a run that has that step."
                )
            return lambda _: self.remembered[number]
        if clamp.at in ("ideal", "ideal_dual"):
            return _constant(_ideal(self._ground, name, clamp.at, clamp.strength))
        if clamp.at == "rank":
            rank = clamp.rank or 0
            valid = min(initial[name].shape[-2:])
            if rank > valid:
                raise BirthlensError(f"rank = {rank} is too large; valid are 1 to {valid}.")
            return lambda weights: low_rank(weights[name], rank)
        project = LedgerProjection(initial, self._ground.triggers, self._ground.bigram)
        if name not in project(initial):
            raise BirthlensError(f"{name} has no ledger.")
        rest = clamp.at == "without_ledger"
        return lambda weights: weights[name] - project(weights)[name] if rest else project(weights)[name]


def _adds(clamp: Add, step: int) -> bool:
    return clamp.acts(step) if clamp.held else step == clamp.start


def _constant(value: Float[Array, "..."]) -> Value:
    return lambda _: value


def _ideal(ground: Ground, name: str, kind: str, strength: float | None) -> Array:
    """Return the ideal memory of a matrix, whose right entries score `strength` nats (its usual strength for None)."""
    strengths = Strengths()
    if strength is not None:
        strengths = Strengths(prev_token=strength, trigger=strength, output=strength)
    codebooks: Codebooks = "dual" if kind == "ideal_dual" else "raw"
    found = ideal_matrices(ground.initial, ground.triggers, strengths, codebooks, ground.bigram)
    if name not in found:
        raise BirthlensError(f"{name} has no ideal memory; valid are {', '.join(found)}.")
    if strength is not None and name == "L1.W_F":
        return found[name] * strength
    return found[name]
