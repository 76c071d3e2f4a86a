"""One forward pass as a graph of named activations, evaluated on demand: the shortcut behind suites of interventions.

    embed, pos_embed -> resid_pre[0];  resid_pre[l] -> q, k, v;  q, k -> pattern;  pattern, v -> z -> attn_out
    resid_pre[l], attn_out -> mlp_out;  resid_pre[l], attn_out, mlp_out -> resid_post[l] -> resid_pre[l + 1] or logits

An edited pass recomputes what lies downstream of its edits and takes everything else from the unedited pass, so that many
interventions share their prefixes. In the last layer queries, and all that follows, exist only at the `Rows` that are read.
Shapes are TransformerLens's: q, k, v, z are [batch pos head d_head], the pattern is [batch head query_pos key_pos].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from birthlens.forward import _rotated, tensors_of
from birthlens.sites import INPUT_SITES, Point
from birthlens.weights import Weights

FROM_QUERIES = ("q", "pattern", "z", "attn_out", "mlp_out", "resid_post")
"""Sites that exist at the read positions only, in the last layer."""


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
        """What to add to the scores of the rows' queries: nothing up to the query, minus infinity behind it."""
        behind = torch.arange(self.n_pos) > self.index[..., None]
        return torch.zeros(behind.shape).masked_fill_(behind, float("-inf"))

    def of_positions(self, value: Float[Tensor, "batch pos *rest"]) -> Float[Tensor, "batch row *rest"]:
        """Pick the rows of a tensor with positions on axis 1."""
        return value[torch.arange(len(value))[:, None], self.index]


Edit = Callable[[Tensor, Rows | None], Tensor]
"""Maps an activation (and the rows it is restricted to, if any) to its replacement, a new tensor."""

Edits = Mapping[Point, Sequence[Edit]]


class Architecture:
    """The tensors of one checkpoint, laid out for `Trace`."""

    def __init__(self, weights: Weights) -> None:
        self.config = weights.config
        self.tensors = tensors_of(weights)
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
                # The simplified model's W_Q is the identity for ever; there is nothing to multiply.
                identity = letter == "Q" and square and torch.equal(matrix, torch.eye(len(matrix)))
                self.maps[letter.lower(), layer] = None if identity else matrix
            self.outputs.append(self.tensors[f"L{layer}.W_O"].flatten(0, 1))

        self.keys_folded = [self.tensors[f"L{layer}.W_K"][0].T.contiguous() for layer in range(self.config.n_layers)]

    def folds(self, layer: int) -> bool:
        """Say whether keys and values are plain products with the layer's input, as in the simplified model."""
        rotary = self.config.positions == "rotary" and layer == 0
        return self.config.family == "simplified" and not rotary

    def normed(self, name: str, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Apply the named LayerNorm, where the model has one."""
        if f"{name}.w" not in self.tensors:
            return x
        return functional.layer_norm(x, x.shape[-1:], self.tensors[f"{name}.w"], self.tensors[f"{name}.b"], eps=1e-5)

    def trace(self, tokens: Int[Tensor, "batch pos"], rows: Rows | None = None) -> Trace:
        """Open the unedited pass over some tokens; nothing is computed yet."""
        return Trace(self, tokens, rows)


class Trace:
    """The activations of one pass, each computed when it is first asked for.

    Example:
        >>> import numpy as np
        >>> from birthlens.architecture import ModelConfig
        >>> from birthlens.initialisation import initial_weights
        >>> weights = initial_weights(ModelConfig(d_model=8), 5, 4, np.random.default_rng(0))
        >>> trace = Architecture(weights).trace(torch.tensor([[0, 1, 2]]))
        >>> tuple(trace.value(Point("pattern", 1)).shape), tuple(trace.logits().shape)
        ((1, 1, 3, 3), (1, 3, 5))
    """

    def __init__(
        self,
        model: Architecture,
        tokens: Int[Tensor, "batch pos"],
        rows: Rows | None = None,
        edits: Edits | None = None,
        base: Trace | None = None,
    ) -> None:
        self.model, self.tokens, self.rows = model, tokens, rows
        self._edits: Edits = edits or {}
        self._base = base
        self._known: dict[Point, Tensor] = {}
        self._changed: dict[Point, bool] = {}

    def logits(self, edits: Edits | None = None) -> Float[Tensor, "batch row d_vocab"]:
        """Return the logits at the rows (all positions without rows), after `edits` to this pass."""
        if edits:
            return Trace(self.model, self.tokens, self.rows, edits, self).logits()
        model = self.model
        out = model.normed("ln_final", self.value(Point("resid_post", model.config.n_layers - 1)))
        out = out @ model.tensors["W_U"]
        return out + model.tensors["b_U"] if "b_U" in model.tensors else out

    def value(self, point: Point) -> Tensor:
        """Return an activation, edits applied."""
        if self._base is not None and not self._is_changed(point):
            return self._base.value(point)
        if point not in self._known:
            reused = self._base is not None and not any(map(self._is_changed, self._inputs(point)))
            out = self._base.value(point) if reused and self._base is not None else self._computed(point)
            at = self.rows if self._restricted(point) else None
            for edit in self._edits.get(point, ()):
                out = edit(out, at)
            self._known[point] = out
        return self._known[point]

    def _restricted(self, point: Point) -> bool:
        return self.rows is not None and point.layer == self.model.config.n_layers - 1 and point.site in FROM_QUERIES

    def _is_changed(self, point: Point) -> bool:
        if point not in self._changed:
            self._changed[point] = point in self._edits or any(map(self._is_changed, self._inputs(point)))
        return self._changed[point]

    def _inputs(self, point: Point) -> list[Point]:
        site, layer = point
        if site in INPUT_SITES or layer is None:
            return []
        if site == "resid_pre":
            return [Point("embed"), Point("pos_embed")] if layer == 0 else [Point("resid_post", layer - 1)]
        sources = {
            **dict.fromkeys(("q", "k", "v"), ("resid_pre",)),
            "pattern": ("q", "k"),
            "z": ("pattern", "v"),
            "attn_out": ("z",),
            "mlp_out": ("resid_pre",) if self.model.config.family == "full" else ("resid_pre", "attn_out"),
            "resid_post": ("resid_pre", "attn_out", "mlp_out"),
        }
        return [Point(source, layer) for source in sources[site]]

    def _computed(self, point: Point) -> Tensor:
        site, layer = point
        tensors = self.model.tensors
        if layer is None:
            if site == "embed":
                return functional.embedding(self.tokens, tensors["W_E"])
            positions = tensors["W_pos"][: self.tokens.shape[1]]
            return positions.expand(len(self.tokens), -1, -1)
        if site == "resid_pre":
            if layer > 0:
                return self.value(Point("resid_post", layer - 1))
            embed = self.value(Point("embed"))
            return embed + self.value(Point("pos_embed")) if "W_pos" in tensors else embed
        if site in ("q", "k", "v"):
            return self._projected(site, layer)
        if site == "pattern":
            return self._pattern(layer)
        if site == "z":
            return self._mixed(layer)
        if site == "attn_out":
            z = self.value(Point("z", layer)).flatten(-2)
            constant = z.stride()[:2] == (0, 0)  # a broadcast replacement, as zero or a mean: one product serves all
            out = z[:1, :1] @ self.model.outputs[layer] if constant else z @ self.model.outputs[layer]
            out = out.expand(*z.shape[:2], -1)
            return out + tensors[f"L{layer}.b_O"] if f"L{layer}.b_O" in tensors else out
        if site == "mlp_out":
            return self._fed_forward(layer)
        after = self._at_rows(layer) + self.value(Point("attn_out", layer))
        return after + self.value(Point("mlp_out", layer)) if self.has_mlp(layer) else after

    def has_mlp(self, layer: int) -> bool:
        """Say whether a layer has a feed-forward."""
        return f"L{layer}.W_F" in self.model.tensors or f"L{layer}.W_in" in self.model.tensors

    def _at_rows(self, layer: int) -> Float[Tensor, "batch row d_model"]:
        """Return the block's input where its outputs are wanted."""
        x = self.value(Point("resid_pre", layer))
        restricted = self.rows is not None and layer == self.model.config.n_layers - 1
        return self.rows.of_positions(x) if restricted and self.rows is not None else x

    def _projected(self, site: str, layer: int) -> Float[Tensor, "batch pos head d_head"]:
        model, name = self.model, f"L{layer}.b_{site.upper()}"
        x = model.normed(
            f"L{layer}.ln1", self._at_rows(layer) if site == "q" else self.value(Point("resid_pre", layer))
        )
        matrix = model.maps[site, layer]
        flat = x if matrix is None else x @ matrix
        out = flat.view(*flat.shape[:2], model.config.n_heads, model.config.d_head)
        return out + model.tensors[name] if name in model.tensors else out

    def _queries_and_keys(self, layer: int) -> tuple[Tensor, Tensor]:
        q, k = self.value(Point("q", layer)).transpose(1, 2), self.value(Point("k", layer)).transpose(1, 2)
        if self.model.config.positions == "rotary" and layer == 0:
            # As in TransformerLens, q and k are seen (and edited) before they are turned.
            return _turned(q, self.rows if self._restricted(Point("q", layer)) else None, k.shape[-2]), _rotated(k)
        return q, k

    def _pattern(self, layer: int) -> Float[Tensor, "batch head query_pos key_pos"]:
        q, k = self._queries_and_keys(layer)
        scores = self.model.scale * q @ k.transpose(-1, -2)
        if self.rows is not None and self._restricted(Point("q", layer)):
            return (scores + self.rows.bias[:, None]).softmax(-1)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(future, float("-inf")).softmax(-1)

    def _mixed(self, layer: int) -> Float[Tensor, "batch row head d_head"]:
        point = Point("pattern", layer)
        rows = self.rows if self._restricted(point) else None
        explicit = point in self._edits or point in self._known
        edited_sources = explicit or any(Point(site, layer) in self._edits for site in "kv")
        if rows is not None and self.model.folds(layer) and not edited_sources:
            return self._folded(layer, rows)
        v = self.value(Point("v", layer)).transpose(1, 2)
        if explicit:
            return (self.value(point) @ v).transpose(1, 2)
        q, k = self._queries_and_keys(layer)
        mask = None if rows is None else rows.bias[:, None]
        scale = self.model.scale
        z = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=rows is None, scale=scale)
        return z.transpose(1, 2)

    def _folded(self, layer: int, rows: Rows) -> Float[Tensor, "batch row 1 d_head"]:
        """Attend over the layer's input itself: W_K goes to the few queries, W_V to the few results."""
        x = self.value(Point("resid_pre", layer))
        queries = self.value(Point("q", layer))[:, :, 0] @ self.model.keys_folded[layer]
        pattern = torch.baddbmm(rows.bias, queries, x.transpose(1, 2), alpha=self.model.scale).softmax(-1)
        return ((pattern @ x) @ self.model.tensors[f"L{layer}.W_V"][0])[:, :, None]

    def _fed_forward(self, layer: int) -> Float[Tensor, "batch row d_model"]:
        model, tensors, name = self.model, self.model.tensors, f"L{layer}"
        read = model.normed(f"{name}.ln2", self._at_rows(layer))
        if model.config.family == "simplified":
            read = read + self.value(Point("attn_out", layer))
        if f"{name}.W_F" in tensors:
            return read @ tensors[f"{name}.W_F"]
        hidden = read @ tensors[f"{name}.W_in"]
        if f"{name}.b_in" not in tensors:
            return hidden.relu() @ tensors[f"{name}.W_out"]
        return (hidden + tensors[f"{name}.b_in"]).relu() @ tensors[f"{name}.W_out"] + tensors[f"{name}.b_out"]


def _turned(
    q: Float[Tensor, "batch head row d_head"], rows: Rows | None, length: int
) -> Float[Tensor, "batch head row d_head"]:
    """Turn queries by the angle of their position, also where only some positions are there."""
    if rows is None:
        return _rotated(q)
    full = q.new_zeros(*q.shape[:2], length, q.shape[-1])
    at = rows.index[:, None, :, None].expand_as(q)
    return _rotated(full.scatter(2, at, q)).gather(2, at)
