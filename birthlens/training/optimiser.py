"""The optimiser of a run, and its state as named arrays for saving to a file."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from birthlens.config.run import RunConfig
from birthlens.errors import BirthlensError

Array = np.ndarray
Parameters = Mapping[str, Tensor]


def new_optimiser(config: RunConfig, parameters: Parameters) -> torch.optim.Optimizer:
    """Return torch's optimiser for the trained parameters.

    Raises:
        BirthlensError: if there is nothing to train.
    """
    settings = config.optimiser
    tensors = list(parameters.values())
    if not tensors:
        raise BirthlensError("training.trained = (): there is nothing to train; name at least one matrix.")
    if settings.kind == "sgd":
        return torch.optim.SGD(
            tensors, lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(
        tensors, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )


def saved_state(optimiser: torch.optim.Optimizer, parameters: Parameters) -> dict[str, Array]:
    """Return a copy of the optimiser's tensors, each named `quantity/parameter`, such as `momentum_buffer/L0.W_K`."""
    state: dict[str, Array] = {}
    for name, parameter in parameters.items():
        for quantity, value in optimiser.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                state[f"{quantity}/{name}"] = value.detach().cpu().numpy().copy()
    return state


def load_state(optimiser: torch.optim.Optimizer, parameters: Parameters, tensors: Mapping[str, Array]) -> None:
    """Restore the state that `saved_state` returned; other tensors are ignored.

    Raises:
        BirthlensError: if a shape is not that of its parameter.
    """
    for name, parameter in parameters.items():
        found = {key.removesuffix(f"/{name}"): value for key, value in tensors.items() if key.endswith(f"/{name}")}
        for quantity, value in found.items():
            if value.size != 1 and value.shape != tuple(parameter.shape):
                raise BirthlensError(
                    f"resume.safetensors has {quantity}/{name} of shape {value.shape}, not {tuple(parameter.shape)}; "
                    "the run is damaged, train again."
                )
        if found:
            optimiser.state[parameter] = {
                key: torch.from_numpy(np.array(value)).to("cpu" if key == "step" else parameter.device)
                for key, value in found.items()
            }
