"""The margin of a memory as a linear function of one trained matrix.

For a memory that should answer each query i with a(i) among some candidates j, with scores S_ij = u_i A B v_j^T,

    margin = mean_i ( S_i,a(i) - mean_j S_ij )

With the codebooks and the other factor fixed this is <G, W> for the matrix W that holds the memory: B (W_K as W_K^T, or
W_O), or A (W_Q, W_V), or a single matrix. Any change of W therefore changes the margin by exactly <G, change>.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from birthlens.analysis.memories.memory import Array, AssociativeMemory, Circuit
from birthlens.analysis.memories.recall import Association
from birthlens.errors import BirthlensError
from birthlens.model.weights import Weights
from birthlens.shapes import Float


@dataclass(frozen=True, eq=False)
class Margin:
    """The margin of a memory, as the direction G in the space of one parameter: its value is the sum of G * W.

    `matrix` is the name of the parameter. For a QK memory the value is in nats of attention scores, for others of logits.
    """

    memory: str
    matrix: str
    direction: Float[Array, "..."]

    def of(self, matrix: Float[Array, "..."]) -> float:
        """Return the margin for a value of the parameter."""
        return float(np.vdot(self.direction, matrix.astype(np.float64)))


def margin_of(weights: Weights, memory: AssociativeMemory, association: Association, trained: Sequence[str]) -> Margin:
    """Return the margin of a memory as a function of the trained factor of its circuit.

    If both factors are trained, it is the right one, W_K or W_O. The codebooks and the other factor are those of `weights`.

    Raises:
        BirthlensError: for a path through several heads, or if no factor of the circuit is trained.

    Example:
        >>> from birthlens.analysis.memories.circuits import output_memory
        >>> from birthlens.config.model import ModelConfig
        >>> from birthlens.model.initialisation import initial_weights
        >>> weights = initial_weights(ModelConfig(d_model=16), 5, 8, np.random.default_rng(0))
        >>> memory = output_memory(weights)
        >>> margin = margin_of(weights, memory, Association.identity(5), ["L1.W_O"])
        >>> table = memory.scores().astype(float)
        >>> margin.matrix, bool(np.isclose(margin.of(weights["L1.W_O"]), (table.diagonal() - table.mean(1)).mean()))
        ('L1.W_O', True)
    """
    circuit = memory.circuit
    parameters = _parameters(circuit)
    chosen = next((name for name in reversed(parameters) if name in trained), None)
    if chosen is None:
        raise BirthlensError(
            f"{memory.name} is in {' and '.join(parameters)}, which this run does not train; "
            f"trained are {', '.join(trained)}."
        )
    queries = memory.inputs.vectors[association.queries].astype(np.float64)
    answers = memory.outputs.vectors.astype(np.float64)
    margins = answers[association.right] - answers[association.candidates].mean(0)
    left = circuit.left.astype(np.float64)
    if circuit.head is None or circuit.right is None:
        return Margin(memory.name, chosen, queries.T @ margins / len(queries))
    right = circuit.right.astype(np.float64)
    scale = weights.score_scale if circuit.writes == "residual" else 1.0
    if chosen == parameters[0]:
        direction = queries.T @ (margins @ right.T)
    else:
        direction = (queries @ left).T @ margins
        direction = direction.T if chosen.endswith("W_K") else direction
    whole = np.zeros(weights[chosen].shape)
    whole[circuit.head.head] = scale * direction / len(queries)
    return Margin(memory.name, chosen, whole)


def _parameters(circuit: Circuit) -> tuple[str, ...]:
    """Return the parameters that a circuit is made of, from left to right; a single matrix has the parameter's name."""
    if circuit.head is not None:
        letters = "QK" if circuit.writes == "residual" else "VO"
        return tuple(f"L{circuit.layer}.W_{letter}" for letter in letters)
    if circuit.right is not None:
        raise BirthlensError(f"{circuit.name} is a path through several heads; name the circuit of one head.")
    return (circuit.name,)
