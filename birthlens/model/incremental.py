"""One forward pass as a graph of named activations, evaluated on demand: it makes suites of interventions fast.

    embed, pos_embed -> resid_pre[0];  resid_pre[l] -> q, k, v;  q, k -> pattern;  pattern, v -> z -> attn_out
    resid_pre[l], attn_out -> mlp_out;  resid_pre[l], attn_out, mlp_out -> resid_post[l] -> resid_pre[l + 1] or logits
    (resid_read is resid_pre at the read positions)

An edited pass recomputes what is downstream of its edits and takes everything else from the unedited pass, so that many
interventions share their prefixes. In the last layer, queries and everything after them exist only at the `Rows` that
are read. Shapes are TransformerLens's: q, k, v, z are [batch pos head d_head], the pattern is [batch head query_pos
key_pos].
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from birthlens.model.forward import feed_forward, has_feed_forward, rotated
from birthlens.model.layout import INPUTS, PointEdits, PreparedWeights, Rows, Whole
from birthlens.model.sites import Point
from birthlens.shapes import Float, Int

FROM_QUERIES = ("resid_read", "q", "mean_input", "pattern", "z", "attn_out", "mlp_out", "resid_post")
"""Sites of the last layer that exist only at the read positions."""


WIDE = 64
BLOCK = 64
"""For heads of at least this width, causal attention is computed in blocks of queries (measured against torch's own)."""


class Trace:
    """The activations of one pass, each computed when it is first needed.

    Example:
        >>> import numpy as np
        >>> from birthlens.config.model import ModelConfig
        >>> from birthlens.model.initialisation import initial_weights
        >>> weights = initial_weights(ModelConfig(d_model=8), 5, 4, np.random.default_rng(0))
        >>> trace = Trace(PreparedWeights(weights), torch.tensor([[0, 1, 2]]))
        >>> tuple(trace.value(Point("pattern", 1)).shape), tuple(trace.logits().shape)
        ((1, 1, 3, 3), (1, 3, 5))
    """

    def __init__(
        self,
        model: PreparedWeights,
        tokens: Int[Tensor, "batch pos"],
        rows: Rows | None = None,
        edits: PointEdits | None = None,
        base: Trace | None = None,
        wanted: Iterable[Point] = (),
    ) -> None:
        self.model = model
        self.tokens = tokens
        self.rows = rows
        self._wanted = frozenset(wanted)
        self._edits: PointEdits = edits or {}
        self._base = base
        self._known: dict[Point, Tensor] = {}
        self._changed: dict[Point, bool] = {}

    def logits(self, edits: PointEdits | None = None) -> Float[Tensor, "batch row d_vocab"]:
        """Return the logits at the rows (all positions without rows), after `edits` to this pass."""
        if edits:
            return Trace(self.model, self.tokens, self.rows, edits, self).logits()
        model = self.model
        out = model.normed("ln_final", self.value(Point("resid_post", model.config.n_layers - 1)))
        out = out @ model.tensors["W_U"]
        return out + model.tensors["b_U"] if "b_U" in model.tensors else out

    def value(self, point: Point) -> Tensor:
        """Return an activation, with edits applied."""
        if self._base is not None and not self._is_changed(point):
            return self._base.value(point)
        if point not in self._known:
            edits = self._edits.get(point, ())
            out = self._blank(point) if edits and isinstance(edits[0], Whole) else self._unedited(point)
            at = self.rows if self._restricted(point) else None
            for edit in edits:
                out = edit(out, at)
            self._known[point] = out
        return self._known[point]

    def _unedited(self, point: Point) -> Tensor:
        """Return an activation before its own edits: that of the base pass if nothing upstream has changed."""
        if self._base is not None and not any(map(self._is_changed, self.model.inputs(point))):
            return self._base.value(point)
        return self._computed(point)

    def _blank(self, point: Point) -> Tensor:
        """Return a tensor with an activation's shape and arbitrary values, if the shape is easily known."""
        if point.site not in ("q", "k", "v", "z"):
            return self._unedited(point)
        n = self.rows.index.shape[1] if self.rows is not None and self._restricted(point) else self.tokens.shape[1]
        config = self.model.config
        return torch.empty(1, device=self.tokens.device).expand(len(self.tokens), n, config.n_heads, config.d_head)

    def _restricted(self, point: Point) -> bool:
        return self.rows is not None and point.layer == self.model.config.n_layers - 1 and point.site in FROM_QUERIES

    def _is_changed(self, point: Point) -> bool:
        if point not in self._changed:
            self._changed[point] = point in self._edits or any(map(self._is_changed, self.model.inputs(point)))
        return self._changed[point]

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
        if site == "resid_read":
            x = self.value(Point("resid_pre", layer))
            return self.rows.of_positions(x) if self.rows is not None and self._restricted(point) else x
        if site in ("q", "k", "v"):
            return self._projected(site, layer)
        if site == "pattern":
            return self._pattern(layer)
        if site == "z":
            return self._mixed(layer)
        if site == "mean_input":
            return self._mean_input(layer)
        if site == "attn_out":
            if self._may_fold(layer) and Point("z", layer) not in self._edits:
                return self.value(Point("mean_input", layer)) @ self.model.values_folded[layer]
            if layer == 0 and self._may_skip_z():
                return self._attended(0, self.model.looked_up("ov", self.tokens)[:, None])[:, 0]
            z = self.value(Point("z", layer)).flatten(-2)
            constant = z.stride()[:2] == (0, 0)  # a broadcast zero or mean: one product is enough
            out = z[:1, :1] @ self.model.outputs[layer] if constant else z @ self.model.outputs[layer]
            out = out.expand(*z.shape[:2], -1)
            return out + tensors[f"L{layer}.b_O"] if f"L{layer}.b_O" in tensors else out
        if site == "mlp_out":
            return self._fed_forward(layer)
        after = self.value(Point("resid_read", layer)) + self.value(Point("attn_out", layer))
        return after + self.value(Point("mlp_out", layer)) if self.has_mlp(layer) else after

    def has_mlp(self, layer: int) -> bool:
        """Return whether a layer has a feed-forward."""
        return has_feed_forward(self.model.tensors, layer)

    def _projected(self, site: str, layer: int) -> Float[Tensor, "batch pos head d_head"]:
        model = self.model
        name = f"L{layer}.b_{site.upper()}"
        if layer == 0 and site in model.look_ups and not self._input_edited():
            return model.looked_up(site, self.tokens)[:, :, None]
        x = self.value(Point("resid_read" if site == "q" else "resid_pre", layer))
        x = model.normed(f"L{layer}.ln1", x)
        matrix = model.maps[site, layer]
        flat = x if matrix is None else x @ matrix
        out = flat.view(*flat.shape[:2], model.config.n_heads, model.config.d_head)
        return out + model.tensors[name] if name in model.tensors else out

    def _queries_and_keys(self, layer: int) -> tuple[Tensor, Tensor]:
        q = self.value(Point("q", layer)).transpose(1, 2)
        k = self.value(Point("k", layer)).transpose(1, 2)
        if self.model.config.is_rotary(layer):
            # As in TransformerLens, q and k are seen (and edited) before they are rotated.
            return _turned(q, self.rows if self._restricted(Point("q", layer)) else None, k.shape[-2]), rotated(k)
        return q, k

    def _pattern(self, layer: int) -> Float[Tensor, "batch head query_pos key_pos"]:
        q, k = self._queries_and_keys(layer)
        scores = self.model.scale * q @ k.transpose(-1, -2)
        if self.rows is not None and self._restricted(Point("q", layer)):
            return (scores + self.rows.bias[:, None]).softmax(-1)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill(future, float("-inf")).softmax(-1)

    def _mixed(self, layer: int) -> Float[Tensor, "batch row head d_head"]:
        point = Point("pattern", layer)
        if self._may_fold(layer):
            return (self.value(Point("mean_input", layer)) @ self.model.tensors[f"L{layer}.W_V"][0])[:, :, None]
        v = self.value(Point("v", layer)).transpose(1, 2)
        explicit = point in self._edits or point in self._known
        return (self.value(point) @ v if explicit else self._attended(layer, v)).transpose(1, 2)

    def _attended(self, layer: int, values: Float[Tensor, "batch head pos d"]) -> Float[Tensor, "batch head row d"]:
        """Average values by the layer's attention, without forming the pattern."""
        q, k = self._queries_and_keys(layer)
        if self.rows is None or not self._restricted(Point("pattern", layer)):
            return causal_attention(q, k, values, self.model.scale)
        attend = functional.scaled_dot_product_attention
        return attend(q, k, values, attn_mask=self.rows.bias[:, None], scale=self.model.scale)

    def _input_edited(self) -> bool:
        return any(point in self._edits for point in INPUTS)

    def _may_skip_z(self) -> bool:
        """Return whether layer 0 can compute its output directly from its pattern, with a table of W_V W_O."""
        sites = [Point(site, 0) for site in ("v", "pattern", "z")]
        unwanted = not any(point in self._edits or point in self._wanted or point in self._known for point in sites)
        return "ov" in self.model.look_ups and unwanted and not self._input_edited()

    def _may_fold(self, layer: int) -> bool:
        """Return whether the layer can attend over its input itself: keys and values are plain products, and unedited."""
        edited = any(Point(site, layer) in self._edits for site in ("k", "v", "pattern"))
        worth_it = self._restricted(Point("z", layer)) or not (layer == 0 and self.model.look_ups)
        return worth_it and self.model.folds(layer) and not edited and Point("pattern", layer) not in self._known

    def _mean_input(self, layer: int) -> Float[Tensor, "batch row d_model"]:
        """Average the layer's input by its attention: W_K is applied to the queries, of which there may be few."""
        x = self.value(Point("resid_pre", layer))
        scale = self.model.scale
        queries = self.value(Point("q", layer))[:, :, 0] @ self.model.keys_folded[layer]
        rows = self.rows if self._restricted(Point("mean_input", layer)) else None
        if rows is None:
            return causal_attention(queries[:, None], x[:, None], x[:, None], scale)[:, 0]
        means = []
        for part, seen in rows.blocks:
            keys = x[:, :seen]
            bias = rows.bias[:, part, :seen]
            pattern = torch.baddbmm(bias, queries[:, part], keys.transpose(1, 2), alpha=scale).softmax(-1)
            means.append(pattern @ keys)
        return torch.cat(means, 1)

    def _fed_forward(self, layer: int) -> Float[Tensor, "batch row d_model"]:
        model = self.model
        read = self.value(Point("resid_read", layer))
        if not model.config.parallel_attn_mlp:
            read = read + self.value(Point("attn_out", layer))
        return feed_forward(model.tensors, model.config, layer, model.normed(f"L{layer}.ln2", read))


def causal_attention(
    q: Float[Tensor, "batch head pos d_head"],
    k: Float[Tensor, "batch head pos d_head"],
    v: Float[Tensor, "batch head pos d"],
    scale: float,
) -> Float[Tensor, "batch head pos d"]:
    """Return softmax(scale q k^T) v over each query's past; equal to torch's attention, and faster for wide heads.

    A block of queries is multiplied only with the keys up to its last query, in one batched product. This does not help
    narrow heads.
    """
    if q.shape[-1] < WIDE:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    queries, keys, values = (tensor.flatten(0, 1) for tensor in (q, k, v))
    n = queries.shape[1]
    future = torch.full((n, n), float("-inf"), device=q.device).triu(1)
    out = values.new_empty(*queries.shape[:2], values.shape[-1])
    for start in range(0, n, BLOCK):
        rows = slice(start, start + BLOCK)
        seen = min(start + BLOCK, n)
        scores = torch.baddbmm(future[rows, :seen], queries[:, rows], keys[:, :seen].transpose(1, 2), alpha=scale)
        out[:, rows] = scores.softmax(-1) @ values[:, :seen]
    return out.view(*q.shape[:3], -1)


def _turned(
    q: Float[Tensor, "batch head row d_head"], rows: Rows | None, length: int
) -> Float[Tensor, "batch head row d_head"]:
    """Rotate queries by the angle of their position, also if only some positions are present."""
    if rows is None:
        return rotated(q)
    full = q.new_zeros(*q.shape[:2], length, q.shape[-1])
    at = rows.index[:, None, :, None].expand_as(q)
    return rotated(full.scatter(2, at, q)).gather(2, at)
