"""Names of matrices: by role, as in the paper, or as parameters; and the memory that each name stands for.

    prev_token_memory     W_K^1    L0.W_K        the paper counts layers from 1, parameters from 0
    trigger_memory        W_K^2    L1.W_K
    output_memory         W_O^2    L1.W_O
    feed_forward_memory   W_F      L1.W_F

`L1.QK` and `L1.OV` stand for all parameters of a circuit. Names joined by + stand for several matrices at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from birthlens.analysis.memories.circuits import (
    all_memories,
    feed_forward_memory,
    output_memory,
    prev_token_memory,
    trigger_memory,
)
from birthlens.analysis.memories.memory import AssociativeMemory
from birthlens.analysis.memories.recall import Association
from birthlens.config.model import ModelConfig, parameter_names, trained_by_default
from birthlens.errors import BirthlensError
from birthlens.model.weights import Weights

MEMORY_PARAMETERS = {
    "prev_token_memory": "L0.W_K",
    "trigger_memory": "L1.W_K",
    "output_memory": "L1.W_O",
    "feed_forward_memory": "L1.W_F",
}
"""The parameter that holds each memory of the two-layer simplified model."""

MEMORIES = ("output_memory", "trigger_memory", "prev_token_memory")
"""The paper's three memories, in the order in which it finds them to be learned."""

_CIRCUITS = {"QK": ("W_Q", "W_K", "b_Q", "b_K"), "OV": ("W_V", "W_O", "b_V", "b_O")}


def is_paper_model(config: ModelConfig) -> bool:
    """Return whether a model is the two-layer simplified one, whose matrices have roles."""
    return config.family == "simplified" and config.n_layers == 2


def parameters_named(config: ModelConfig, text: str) -> tuple[str, ...]:
    """Return the parameters that a name, or several names joined by +, stand for.

    Raises:
        BirthlensError: for a matrix that this model does not have; the message lists the valid names.

    Example:
        >>> parameters_named(ModelConfig(), "W_O^2+prev_token_memory"), parameters_named(ModelConfig(), "L1.QK")
        (('L1.W_O', 'L0.W_K'), ('L1.W_Q', 'L1.W_K'))
    """
    known = parameter_names(config)
    found = []
    for part in (part.strip() for part in text.split("+")):
        layer, _, circuit = part.partition(".")
        names = [_parameter(config, part)]
        if circuit in _CIRCUITS:
            names = [f"{layer}.{name}" for name in _CIRCUITS[circuit] if f"{layer}.{name}" in known]
        if not names or any(name not in known for name in names):
            roles = [*(role for role, name in MEMORY_PARAMETERS.items() if name in known and is_paper_model(config))]
            circuits = [f"L{layer}.{circuit}" for layer in range(config.n_layers) for circuit in _CIRCUITS]
            raise BirthlensError(
                f"matrix = {part!r}: this model has no such matrix; valid are {', '.join([*roles, *circuits, *known])}."
            )
        found += names
    return tuple(dict.fromkeys(found))


def trained_matrices(config: ModelConfig) -> tuple[str, ...]:
    """Name the matrices worth patching alone: the trained matrices by role (paper's model), or every circuit."""
    if is_paper_model(config):
        role_of = {parameter: role for role, parameter in MEMORY_PARAMETERS.items()}
        return tuple(role_of.get(name, name) for name in trained_by_default(config))
    return tuple(f"L{layer}.{circuit}" for layer in range(config.n_layers) for circuit in _CIRCUITS)


def memory_named(
    weights: Weights, text: str, labels: Sequence[str] | None = None, triggers: Sequence[int] | None = None
) -> tuple[AssociativeMemory, Association | None]:
    """Return the memory that a name stands for, and the association that it should store (None if there is no natural one).

    Names are those of the module, or of a memory of `circuits.all_memories`, such as 'L1H0.QK: W_E -> W_E'. The part before
    the colon is enough if it has one reading only. With fixed `triggers`, the trigger memory is read for these tokens.

    Raises:
        BirthlensError: for a name without a memory; the message lists the valid names.
    """
    role = _role(weights.config, text)
    if role is not None and MEMORY_PARAMETERS[role] in weights:
        vocabulary = len(weights["W_E"])
        if role == "prev_token_memory":
            memory = prev_token_memory(weights)
            return memory, Association.shift(len(memory.inputs))
        if role == "trigger_memory":
            return trigger_memory(weights, labels=labels), Association.identity(vocabulary, triggers)
        memory = (output_memory if role == "output_memory" else feed_forward_memory)(weights, labels=labels)
        return memory, Association.identity(vocabulary) if role == "output_memory" else None
    named = [(found.memory.name, found) for found in all_memories(weights, labels=labels)]
    chosen = [found for name, found in named if text == name]
    chosen = chosen or [found for name, found in named if name.startswith(f"{text}: ")]
    if len(chosen) != 1:
        roles = [role for role, name in MEMORY_PARAMETERS.items() if is_paper_model(weights.config) and name in weights]
        valid = ", ".join([*roles, *(repr(name) for name, _ in named)])
        reason = "is not a memory of this model" if not chosen else f"has {len(chosen)} readings"
        raise BirthlensError(f"matrix = {text!r} {reason}; valid are {valid}.")
    return chosen[0].memory, chosen[0].association


def _parameter(config: ModelConfig, text: str) -> str:
    if text in MEMORY_PARAMETERS and is_paper_model(config):
        return MEMORY_PARAMETERS[text]
    if text == "W_F":
        return f"L{config.n_layers - 1}.W_F"
    match = re.fullmatch(r"(W_\w+)\^([1-9]\d*)", text)
    return f"L{int(match[2]) - 1}.{match[1]}" if match else text


def _role(config: ModelConfig, text: str) -> str | None:
    if not is_paper_model(config):
        return None
    name = _parameter(config, text)
    return next((role for role, parameter in MEMORY_PARAMETERS.items() if parameter == name), None)
