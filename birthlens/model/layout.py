"""A model's tensors prepared for the functional pass, and the rows (positions) that are read from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from birthlens.errors import BirthlensError
from birthlens.model.forward import tensors_of
from birthlens.model.sites import Point
from birthlens.model.weights import Weights
from birthlens.shapes import Bool, Float, Int, Shaped

BLOCKS = 2
"""Parts into which the read rows are divided, so that early queries are not multiplied with late keys."""

LARGEST_TABLE = 4096
"""For vocabularies up to this size, keys and values of layer 0 are looked up in two tables, W_E W and W_pos W."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The positions of each sequence that are read, padded to one length; `valid` is False on the padding."""

    index: Int[Tensor, "batch row"]
    valid: Bool[Tensor, "batch row"]
    n_pos: int

    @classmethod
    def of(cls, mask: Bool[Tensor, "batch pos"]) -> Rows:
        """Return the positions where the mask holds, in order."""
        length = max(int(mask.sum(1).max()), 1)
        index = mask.int().argsort(dim=1, descending=True, stable=True)[:, :length]
        return cls(index, mask.gather(1, index), mask.shape[1])

    @cached_property
    def bias(self) -> Float[Tensor, "batch row pos"]:
        """What is added to the scores of the rows' queries: 0 up to the query's own position, minus infinity after it."""
        behind = torch.arange(self.n_pos, device=self.index.device) > self.index[..., None]
        return torch.zeros(behind.shape, device=behind.device).masked_fill_(behind, float("-inf"))

    @cached_property
    def blocks(self) -> list[tuple[slice, int]]:
        """Parts of the rows (which ascend), each with the number of keys visible to any of its queries."""
        count = self.index.shape[1]
        edges = [count * part // BLOCKS for part in range(BLOCKS + 1)] if count >= 8 * BLOCKS else [0, count]
        parts = [slice(start, stop) for start, stop in pairwise(edges)]
        return [(part, int(self.index[:, part].max()) + 1) for part in parts]

    def of_positions(self, value: Shaped[Tensor, "batch pos *rest"]) -> Shaped[Tensor, "batch row *rest"]:
        """Select the rows of a tensor with positions on axis 1."""
        return value[torch.arange(len(value), device=self.index.device)[:, None], self.index]


Edit = Callable[[Tensor, Rows | None], Tensor]
"""Maps an activation (and the rows it is restricted to, if any) to its replacement, a new tensor."""


@dataclass(frozen=True, eq=False)
class Whole:
    """An edit that replaces an activation everywhere; it needs only the shape of the current value."""

    edit: Edit

    def __call__(self, current: Tensor, rows: Rows | None) -> Tensor:
        """Return the replacement."""
        return self.edit(current, rows)


INPUTS = (Point("embed"), Point("pos_embed"), Point("resid_pre", 0))

PointEdits = Mapping[Point, Sequence[Edit]]


class PreparedWeights:
    """The tensors of one checkpoint, on a device, with the products and look-up tables that `Trace` needs."""

    def __init__(self, weights: Weights, device: str | torch.device = "cpu") -> None:
        self.config = weights.config
        if self.config.attention != "softmax":
            raise BirthlensError(f"model.attention = {self.config.attention!r}: this pass has softmax attention only.")
        if self.config.positions == "relative":
            raise BirthlensError("model.positions = 'relative': this pass has no relative positions.")
        self.tensors = tensors_of(weights, device=device)
        self.d_vocab = int(self.tensors["W_E"].shape[0])
        self.n_ctx = int(self.tensors["W_pos"].shape[0]) if "W_pos" in self.tensors else 10**9
        self.scale = weights.score_scale
        self.maps: dict[tuple[str, int], Tensor | None] = {}
        self.outputs: list[Tensor] = []
        for layer in range(self.config.n_layers):
            for letter in "QKV":
                matrix = rearrange(
                    self.tensors[f"L{layer}.W_{letter}"], "head d_model d_head -> d_model (head d_head)"
                ).contiguous()
                square = matrix.shape[0] == matrix.shape[1]
                # The simplified model's W_Q is always the identity, so there is nothing to multiply.
                identity = letter == "Q" and square and torch.equal(matrix, torch.eye(len(matrix), device=device))
                self.maps[letter.lower(), layer] = None if identity else matrix
            self.outputs.append(self.tensors[f"L{layer}.W_O"].flatten(0, 1))
        self._inputs: dict[Point, tuple[Point, ...]] = {}
        self.keys_folded: list[Tensor] = []
        self.values_folded: list[Tensor] = []
        self.look_ups: dict[str, tuple[Tensor, Tensor]] = {}
        if self.config.family == "simplified":
            for layer in range(self.config.n_layers):
                self.keys_folded.append(self.tensors[f"L{layer}.W_K"][0].T.contiguous())
                self.values_folded.append(self.tensors[f"L{layer}.W_V"][0] @ self.outputs[layer])
            if "W_pos" in self.tensors and self.d_vocab <= LARGEST_TABLE:
                readers = {"k": self.tensors["L0.W_K"][0], "v": self.tensors["L0.W_V"][0], "ov": self.values_folded[0]}
                for name, matrix in readers.items():
                    self.look_ups[name] = (self.tensors["W_E"] @ matrix, self.tensors["W_pos"] @ matrix)

    def looked_up(self, name: str, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the keys ('k'), values ('v') or written values ('ov') of layer 0, for the unedited input."""
        by_token, by_position = self.look_ups[name]
        return functional.embedding(tokens, by_token).add_(by_position[: tokens.shape[1]])

    def inputs(self, point: Point) -> tuple[Point, ...]:
        """Return the activations that one is computed from."""
        if point not in self._inputs:
            self._inputs[point] = self._inputs_of(*point)
        return self._inputs[point]

    def _inputs_of(self, site: str, layer: int | None) -> tuple[Point, ...]:
        if layer is None:
            return ()
        if site == "resid_pre":
            return INPUTS[:2] if layer == 0 else (Point("resid_post", layer - 1),)
        sources = {
            **dict.fromkeys(("resid_read", "k", "v"), ("resid_pre",)),
            "q": ("resid_read",),
            "mean_input": ("q", "resid_pre"),
            "pattern": ("q", "k"),
            "z": ("pattern", "v"),
            "attn_out": ("z",),
            "mlp_out": ("resid_read",) if self.config.parallel_attn_mlp else ("resid_read", "attn_out"),
            "resid_post": ("resid_read", "attn_out", "mlp_out"),
        }
        return tuple(Point(source, layer) for source in sources[site])

    def folds(self, layer: int) -> bool:
        """Return whether keys and values are plain products with the layer's input, as in the simplified model."""
        return self.config.family == "simplified" and not self.config.is_rotary(layer)

    def normed(self, name: str, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Apply the named LayerNorm, if the model has one."""
        if f"{name}.w" not in self.tensors:
            return x
        return functional.layer_norm(x, x.shape[-1:], self.tensors[f"{name}.w"], self.tensors[f"{name}.b"], eps=1e-5)
