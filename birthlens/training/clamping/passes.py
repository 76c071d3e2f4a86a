"""Clamps on the forward pass: heads and edges that are ablated, pinned patterns, heads that copy, edges without gradient.

A mean, and a frozen pattern, are those of the model at the first step of the span; they are part of the state of a training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from birthlens.config.clamps import FORWARD, Ablate, Clamp, Copy, Pin, StopGradient
from birthlens.config.model import ModelConfig
from birthlens.errors import BirthlensError
from birthlens.model import forward
from birthlens.model.components import check_edge, check_head
from birthlens.model.edited_forward import Edits, Pattern, edited_terms
from birthlens.model.sites import Edge, Head
from birthlens.shapes import Float, Int

Array = np.ndarray
Tensors = Mapping[str, Tensor]


class ForwardClamps:
    """The clamps of a run that act in the forward pass.

    `remembered` holds, by the clamp's number and a name, the means and the weights that a clamp took at its first step.

    Raises:
        BirthlensError: for a head or an edge that the model does not have.
    """

    def __init__(
        self,
        clamps: Sequence[Clamp],
        model: ModelConfig,
        remembered: Mapping[tuple[int, str], Array] | None = None,
    ) -> None:
        self.remembered = dict(remembered or {})
        self._model = model
        self._clamps = {number: clamp for number, clamp in enumerate(clamps) if isinstance(clamp, FORWARD)}
        self._subjects = {number: _subject(clamp, model) for number, clamp in self._clamps.items()}
        self._edits = Edits()

    @property
    def edits(self) -> Edits:
        """What the forward pass does otherwise at the step that was entered last."""
        return self._edits

    def remember(self, step: int, tensors: Tensors, tokens: Int[Tensor, "batch pos"], first: int = 0) -> None:
        """Take means and frozen weights where a span begins, from the weights of now and over some sequences."""
        for number, clamp in self._clamps.items():
            if clamp.start == step and number >= first:
                self._remember(number, clamp, tensors, tokens)

    def enter(self, step: int) -> None:
        """Set the edits of a step."""
        heads: dict[Head, Tensor] = {}
        patterns: dict[Head, Pattern] = {}
        edges: dict[Edge, Tensor | None] = {}
        copies: dict[Head, float] = {}
        for number, clamp in self._clamps.items():
            subject = self._subjects[number]
            if not clamp.acts(step):
                continue
            if isinstance(clamp, Pin) and isinstance(subject, Head):
                patterns[subject] = self._pattern(number, clamp, subject)
            elif isinstance(clamp, Copy) and isinstance(subject, Head):
                copies[subject] = clamp.strength
            elif isinstance(subject, Head):
                heads[subject] = self._constant(number, self._model.d_head)
            else:
                edges[subject] = (
                    None if isinstance(clamp, StopGradient) else self._constant(number, self._model.d_model)
                )
        self._edits = Edits(heads, patterns, edges, copies)

    @torch.no_grad()
    def _remember(self, number: int, clamp: Clamp, tensors: Tensors, tokens: Int[Tensor, "batch pos"]) -> None:
        if isinstance(clamp, Pin) and clamp.pattern == "frozen":
            for name, tensor in tensors.items():
                self.remembered[number, name] = tensor.detach().cpu().numpy().copy()
        elif isinstance(clamp, Ablate) and clamp.method == "mean":
            subject = self._subjects[number]
            terms = edited_terms(tensors, self._model, tokens)
            source = terms.z[subject] if isinstance(subject, Head) else terms.written[subject.sender]
            self.remembered[number, "mean"] = source.mean((0, 1)).numpy().copy()

    def _constant(self, number: int, width: int) -> Float[Tensor, " width"]:
        mean = self.remembered.get((number, "mean"))
        return torch.zeros(width) if mean is None else torch.from_numpy(mean)

    def _pattern(self, number: int, clamp: Pin, head: Head) -> Pattern:
        if clamp.pattern == "previous":
            return to_previous
        if clamp.pattern == "uniform":
            return uniform
        tensors = {name: torch.from_numpy(array) for (of, name), array in self.remembered.items() if of == number}
        return partial(_frozen, tensors, self._model, head)


def to_previous(tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "pos pos"]:
    """Attend from each position to the one before, from the first to itself."""
    n = tokens.shape[1]
    pattern = torch.zeros(n, n)
    pattern[torch.arange(n), (torch.arange(n) - 1).clamp(min=0)] = 1
    return pattern


def uniform(tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "pos pos"]:
    """Attend equally to all positions up to the query."""
    n = tokens.shape[1]
    return torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]


@torch.no_grad()
def _frozen(
    tensors: Tensors, model: ModelConfig, head: Head, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos pos"]:
    return forward.activations(tensors, model, tokens).patterns[head.layer][:, head.head]


def _subject(clamp: Clamp, model: ModelConfig) -> Head | Edge:
    """Return the head or the edge that a clamp acts on."""
    text = clamp.subjects[0]
    try:
        if "->" in text or isinstance(clamp, StopGradient):
            if isinstance(clamp, Pin):
                raise BirthlensError(f"head = {text!r} is an edge; a pattern belongs to a head such as L0H0.")
            if isinstance(clamp, Copy):
                raise BirthlensError(f"head = {text!r} is an edge; only a head such as L1H0 copies.")
            edge = Edge.parse(text)
            check_edge(edge, model)
            return edge
        head = Head.parse(text)
        check_head(head, model)
        return head
    except BirthlensError as error:
        raise BirthlensError(f"clamp '{clamp}': {error}") from None
