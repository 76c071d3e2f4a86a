"""Whether edits of a model from a directory have the effect that they should, found by trying them on a few tokens.

A hook can fire and change nothing, if a model's own code continues with values that the hook did not see. Models built from
weights have tests of their own. A loaded model is tried when a point or an edge is first used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from birthlens.errors import BirthlensError
from birthlens.model.components import has_mlp, has_positions
from birthlens.model.hooks import SilentHookError, captured_with_logits, device_of, edited
from birthlens.model.sites import READING_SITES, Point
from birthlens.shapes import Float, Int

if TYPE_CHECKING:
    from birthlens.model.hooked import HookedModel

_NEXT = {
    "q": "pattern", "k": "pattern", "v": "z", "pattern": "z", "z": "attn_out", "attn_out": "resid_post",
    "mlp_out": "resid_post", "resid_pre": "resid_post", "mlp_in": "mlp_out", "q_input": "q", "k_input": "k", "v_input": "v",
}  # fmt: skip
"""What an edit of a site must change, in the same layer."""
_TOLERANCE = 1e-3
BUILT = "HookedTransformer"
"""The class of TransformerLens that runs its own code; others wrap the code of another library."""

_known: WeakKeyDictionary[HookedModel, dict[tuple[object, ...], bool]] = WeakKeyDictionary()
"""Which laws hold, by model: each is tried once."""


def check_effect(model: HookedModel, point: Point) -> None:
    """Raise BirthlensError if an edit at a point does not change what is computed from it."""
    if not _holds(model, _has_effect, point):
        raise BirthlensError(
            f"site {point.site} of layer {point.layer}: an edit there has no effect in this model "
            f"({architecture(model)} as TransformerLens runs it); use another site, z or resid_pre for instance."
        )


def check_reading(model: HookedModel, point: Point) -> None:
    """Raise BirthlensError if what a head's queries, keys or values are made from is not the residual stream."""
    if point.site in READING_SITES[:3] and not _holds(model, _reads_stream, point):
        raise BirthlensError(
            f"edges into {point.site} of layer {point.layer}: in this model ({architecture(model)}) it is not the residual "
            "stream, so edges into it mean nothing; patch whole components instead."
        )


def check_edges(model: HookedModel) -> None:
    """Raise BirthlensError if the residual stream is not the sum of what the senders write; edges then have no meaning."""
    if not _holds(model, _is_sum):
        raise BirthlensError(
            f"edges: in this model ({architecture(model)}) the residual stream is not the sum of what heads, feed-forwards "
            "and embeddings write, since a norm or a factor stands between; patch or ablate whole components instead."
        )


def _holds(model: HookedModel, law: Callable[..., bool], *points: Point) -> bool:
    """Return whether a law holds for a loaded model; models that were built have tests of their own."""
    if type(model).__name__ == BUILT:
        return True
    known = _known.setdefault(model, {})
    if (law, *points) not in known:
        try:
            known[law, *points] = law(model, *points)
        except RuntimeError:  # activations of other shapes than the law is about
            known[law, *points] = False
    return known[law, *points]


def architecture(model: HookedModel) -> str:
    """Return the name of a model's architecture."""
    return str(getattr(model.cfg, "architecture", None) or type(model).__name__)


def _has_effect(model: HookedModel, point: Point) -> bool:
    tokens = _few(model)
    after = _after(model, point)
    before, logits = captured_with_logits(model, tokens, after)

    def other(value: Tensor, rows: object) -> Tensor:
        if point.site == "pattern":
            first = torch.zeros_like(value)
            first[..., 0] = 1
            return first
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=value.dtype)
        return value + (value.std() + 0.1) * noise.to(value.device)

    try:
        with edited(model, {point: [other]}), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # TransformerLens 4 warns of edits that it discards
            now, edited_logits = captured_with_logits(model, tokens, after)
    except (AttributeError, SilentHookError):
        # A norm without weights, whose divisor the library cannot hold; a point that the architecture's code goes around.
        return False
    if not after:
        return not torch.equal(logits, edited_logits)
    return not torch.equal(before[after[0]], now[after[0]])


def _after(model: HookedModel, point: Point) -> list[Point]:
    """Return the point that an edit must change, or None for the logits."""
    if point.site in ("embed", "pos_embed"):
        return [Point("resid_pre", 0)]
    if point.layer is None or point.site not in _NEXT:
        return []
    return [Point(_NEXT[point.site], point.layer)]


def _reads_stream(model: HookedModel, point: Point) -> bool:
    stream = Point("resid_pre", point.layer)
    found, _ = captured_with_logits(model, _few(model), [stream, point])
    expected = found[stream][:, :, None].expand_as(found[point])
    return torch.allclose(found[point], expected, atol=_TOLERANCE * float(expected.abs().max()))


def _is_sum(model: HookedModel) -> bool:
    layers = range(model.cfg.n_layers)
    points = [Point("embed"), *([Point("pos_embed")] if has_positions(model.cfg) else [])]
    points += [Point("z", layer) for layer in layers]
    points += [Point("mlp_out", layer) for layer in layers if has_mlp(model.cfg, layer)]
    last = Point("resid_post", model.cfg.n_layers - 1)
    found, _ = captured_with_logits(model, _few(model), [*points, last])
    total = torch.zeros_like(found[last])
    for point in points:
        total = total + (_attention(model, found[point], point.layer or 0) if point.site == "z" else found[point])
    return torch.allclose(total, found[last], atol=_TOLERANCE * float(found[last].abs().max()))


def _attention(model: HookedModel, z: Tensor, layer: int) -> Float[Tensor, "batch pos d_model"]:
    attention = model.blocks[layer].attn
    bias = getattr(attention, "b_O", None)
    out = torch.einsum("bphd,hdm->bpm", z, attention.W_O)
    return out if bias is None else out + bias


def _few(model: HookedModel) -> Int[Tensor, "batch pos"]:
    size = int(model.cfg.d_vocab)
    length = min(5, int(model.cfg.n_ctx))
    tokens = torch.randint(size, (1, length), generator=torch.Generator().manual_seed(0))
    return tokens.to(device_of(model))
