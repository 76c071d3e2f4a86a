"""The forward pass with edited heads, attention patterns and edges, as a differentiable function of named tensors.

Every component writes a term of its own, and every reader reads the sum of the terms before it (`components`), so that one
edge can carry something different from the others:

    read(r) = sum of the terms of all senders before r,   where an edited edge s->r carries a constant, or s without gradient
    z       = pattern @ v,                                where an edited head has another pattern, or a constant z
    logits  = read(logits) W_U,                           plus c * pattern @ onehot(tokens) of a head that copies

Without edits it equals `forward.logits` up to rounding. It forms every pattern and term, so it is slower and needs more
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from birthlens.config.model import ModelConfig
from birthlens.model.attention import attention_pattern, relative_scores
from birthlens.model.components import is_parallel, precedes
from birthlens.model.forward import Tensors, feed_forward, has_feed_forward, normed, rotated, score_scale, unembed
from birthlens.model.sites import Edge, Embedding, Head, HeadInput, Logits, Mlp, Receiver, Sender
from birthlens.shapes import Bool, Float, Int

Pattern = Callable[[Int[Tensor, "batch pos"]], Float[Tensor, "... pos pos"]]


@dataclass(frozen=True, eq=False)
class Edits:
    """The edits of a forward pass.

    `heads`: constant outputs z [d_head]; `patterns`: functions of the tokens; `edges`: constants [d_model], or None for an
    edge that no gradient passes; `copies`: the logits that a head's whole attention adds.
    """

    heads: Mapping[Head, Float[Tensor, " d_head"]] = field(default_factory=dict)
    patterns: Mapping[Head, Pattern] = field(default_factory=dict)
    edges: Mapping[Edge, Float[Tensor, " d_model"] | None] = field(default_factory=dict)
    copies: Mapping[Head, float] = field(default_factory=dict)

    @property
    def any(self) -> bool:
        """Whether there is any edit."""
        return bool(self.heads or self.patterns or self.edges or self.copies)


@dataclass(frozen=True, eq=False)
class Terms:
    """Logits, with what each component wrote to the residual stream and the output z of each head."""

    logits: Float[Tensor, "batch pos d_vocab"]
    written: Mapping[Sender, Float[Tensor, "batch pos d_model"]]
    z: Mapping[Head, Float[Tensor, "batch pos d_head"]]


def edited_logits_at(
    tensors: Tensors,
    config: ModelConfig,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    edits: Edits,
) -> Float[Tensor, "row d_vocab"]:
    """Return the logits at the positions of the mask, in row-major order."""
    return edited_terms(tensors, config, tokens, edits).logits[mask]


def edited_terms(
    tensors: Tensors, config: ModelConfig, tokens: Int[Tensor, "batch pos"], edits: Edits | None = None
) -> Terms:
    """Run the model and return what each component wrote.

    Example:
        >>> import numpy as np
        >>> from birthlens.model.forward import tensors_of
        >>> from birthlens.model.initialisation import initial_weights
        >>> weights = initial_weights(ModelConfig(d_model=8), 5, 4, np.random.default_rng(0))
        >>> found = edited_terms(tensors_of(weights), weights.config, torch.tensor([[0, 1, 2]]))
        >>> [str(sender) for sender in found.written]
        ['embed', 'pos_embed', 'L0H0', 'L1H0']
    """
    stream = _Stream(config, edits or Edits(), tokens)
    stream.write(Embedding("embed"), torch.nn.functional.embedding(tokens, tensors["W_E"]))
    if "W_pos" in tensors:
        place = tensors["W_pos"][: tokens.shape[1]]
        stream.write(Embedding("pos_embed"), place.expand(*tokens.shape, -1))
    for layer in range(config.n_layers):
        for number in range(config.n_heads):
            stream.attend(tensors, Head(layer, number))
        if f"L{layer}.b_O" in tensors:
            stream.bias = stream.bias + tensors[f"L{layer}.b_O"]
        stream.feed_forward(tensors, layer)
    logits = unembed(tensors, config, stream.read(Logits())) + stream.copied
    return Terms(logits, stream.written, stream.z)


class _Stream:
    """The residual stream as a sum of terms; biases of attention belong to no component."""

    def __init__(self, config: ModelConfig, edits: Edits, tokens: Int[Tensor, "batch pos"]) -> None:
        self.config = config
        self.edits = edits
        self.tokens = tokens
        self.written: dict[Sender, Tensor] = {}
        self.z: dict[Head, Tensor] = {}
        self.bias: Tensor = torch.zeros(())
        self.copied: Tensor = torch.zeros(())
        self._bias_before = self.bias

    def write(self, sender: Sender, term: Float[Tensor, "batch pos d_model"]) -> None:
        self.written[sender] = term

    def read(self, receiver: Receiver) -> Float[Tensor, "batch pos d_model"]:
        """Return the sum that a receiver reads, each term as its edge carries it."""
        parallel = is_parallel(self.config)
        total = self._bias_of(receiver)
        for sender, term in self.written.items():
            edge = Edge(sender, receiver)
            if precedes(edge, parallel):
                total = total + self._carried(edge, term)
        return total

    def _bias_of(self, receiver: Receiver) -> Tensor:
        """Return the sum of the attention biases of earlier layers; a parallel block's own comes after its MLP."""
        behind = isinstance(receiver, Mlp) and is_parallel(self.config)
        return self._bias_before if behind else self.bias

    def _carried(self, edge: Edge, term: Tensor) -> Tensor:
        if edge not in self.edits.edges:
            return term
        constant = self.edits.edges[edge]
        return term.detach() if constant is None else constant.expand_as(term)

    def attend(self, tensors: Tensors, head: Head) -> None:
        """Run one head on what its queries, keys and values read."""
        if head.head == 0:
            self._bias_before = self.bias
        q, k, v = (self._projected(tensors, head, letter) for letter in "QKV")
        if head in self.edits.patterns:
            pattern = self.edits.patterns[head](self.tokens)
        else:
            scores = q @ k.transpose(-1, -2)
            if self.config.positions == "relative":
                scores = scores + relative_scores(q, tensors[f"L{head.layer}.W_R"][head.head])
            pattern = attention_pattern(self.config, score_scale(self.config) * scores)
        z = pattern @ v
        if head in self.edits.heads:
            z = self.edits.heads[head].expand_as(z)
        self.z[head] = z
        written = z @ tensors[f"L{head.layer}.W_O"][head.head]
        if head in self.edits.copies:
            tokens = torch.nn.functional.one_hot(self.tokens, tensors["W_E"].shape[0]).to(pattern.dtype)
            self.copied = self.copied + self.edits.copies[head] * (pattern @ tokens)
            written = torch.zeros_like(written)
        self.write(head, written)

    def _projected(self, tensors: Tensors, head: Head, letter: str) -> Float[Tensor, "batch pos d_head"]:
        x = normed(tensors, f"L{head.layer}.ln1", self.read(HeadInput(head, letter.lower())))
        out = x @ tensors[f"L{head.layer}.W_{letter}"][head.head]
        if f"L{head.layer}.b_{letter}" in tensors:
            out = out + tensors[f"L{head.layer}.b_{letter}"][head.head]
        if self.config.is_rotary(head.layer) and letter in "QK":
            out = rotated(out[:, None])[:, 0]
        return out

    def feed_forward(self, tensors: Tensors, layer: int) -> None:
        """Run the MLP of a layer, or W_F, if there is one."""
        if has_feed_forward(tensors, layer):
            read = normed(tensors, f"L{layer}.ln2", self.read(Mlp(layer)))
            self.write(Mlp(layer), feed_forward(tensors, self.config, layer, read))
