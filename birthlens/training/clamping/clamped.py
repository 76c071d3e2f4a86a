"""All clamps of one training, with what they remember of earlier steps as part of its state."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from birthlens.config.run import RunConfig
from birthlens.model.weights import Weights
from birthlens.shapes import Int
from birthlens.tasks.corpus import BigramStatistics
from birthlens.training.clamping.matrices import Ground, MatrixClamps
from birthlens.training.clamping.passes import ForwardClamps
from birthlens.training.clamping.timeline import Timeline

Array = np.ndarray
_STATE = "clamp"


class Clamps:
    """The clamps of a config, at work.

    `state` are the tensors that an earlier `state()` gave; other tensors in it are ignored.

    Raises:
        BirthlensError: for a clamp that does not fit the model, the corpus or the task.
    """

    def __init__(
        self,
        config: RunConfig,
        statistics: BigramStatistics,
        initial: Weights,
        state: Mapping[str, Array] | None = None,
    ) -> None:
        clamps = config.training.clamps
        self.settings = Timeline(config, statistics)
        triggers = self.settings.at(0).task.fixed_triggers
        bigram = statistics.bigram if config.model.feed_forward == "linear" else None
        ground = Ground(initial, None if triggers is None else triggers.tolist(), bigram)
        remembered = _remembered(state or {})
        whole = {number: array for (number, name), array in remembered.items() if name == "matrix"}
        parts = {key: array for key, array in remembered.items() if key[1] != "matrix"}
        self.matrices = MatrixClamps(clamps, ground, whole)
        self.passes = ForwardClamps(clamps, config.model, parts)

    def enter(
        self,
        step: int,
        parameters: Mapping[str, Tensor],
        optimiser: torch.optim.Optimizer,
        initial: Weights,
        tokens: Int[Tensor, "batch pos"],
        first: int = 0,
    ) -> None:
        """Go to a step: write what the clamps demand of the weights, and set the edits of the forward pass.

        Of a restored step, the weights and what is remembered are those that the clamps before number `first` left.
        """
        self.matrices.apply(step, parameters, optimiser, first)
        frozen = {name: torch.from_numpy(initial[name]) for name in initial}
        self.passes.remember(step, {**frozen, **parameters}, tokens, first)
        self.passes.enter(step)

    def state(self) -> dict[str, Array]:
        """Return what the clamps remember, as named tensors."""
        whole = {f"{_STATE}/{number}/matrix": array for number, array in self.matrices.remembered.items()}
        return whole | {f"{_STATE}/{number}/{name}": array for (number, name), array in self.passes.remembered.items()}


def _remembered(state: Mapping[str, Array]) -> dict[tuple[int, str], Array]:
    found = {}
    for key, array in state.items():
        kind, _, rest = key.partition("/")
        if kind == _STATE:
            number, _, name = rest.partition("/")
            found[int(number), name] = np.array(array)
    return found
