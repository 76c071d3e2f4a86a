"""Edits of a live TransformerLens model, active only inside a `with` block.

In TransformerLens, hooks can silently do nothing: those with names that do not exist, and those at points that are used only
while a flag is set. Here names are checked, flags are set and restored, and every hook is checked to have fired.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from birthlens.errors import BirthlensError
from birthlens.model.layout import PointEdits
from birthlens.model.sites import READING_SITES, Point
from birthlens.shapes import Float, Int

if TYPE_CHECKING:
    from birthlens.model.hooked import HookedModel

FLAGS = {**dict.fromkeys(READING_SITES[:3], "use_split_qkv_input"), "mlp_in": "use_hook_mlp_in"}
"""The flag that enables each reading site."""


class SilentHookError(BirthlensError):
    """A hook was set, and the model did not pass through it."""


@contextlib.contextmanager
def edited(model: HookedModel, edits: PointEdits) -> Iterator[None]:
    """Replace activations inside the block, each by the results of its edits in turn.

    On exit, also after an exception, exactly these hooks are removed and the flags are restored.

    Raises:
        BirthlensError: for a point the model does not have, and, at the end of the block, for a hook that never fired.
    """
    fired: set[Point] = set()
    handles: list[tuple[Any, Any]] = []
    with _flags(model, edits):
        try:
            for point, chain in edits.items():
                hook_point = _hook_point(model, point)
                hook_point.add_hook(_hook(point, chain, fired))
                handles.append((hook_point, hook_point.fwd_hooks[-1]))
            yield
        finally:
            for hook_point, handle in handles:
                handle.hook.remove()
                hook_point.fwd_hooks.remove(handle)
    if silent := [point.hook for point in edits if point not in fired]:
        raise SilentHookError(f"hooks {', '.join(silent)} never fired: the model does not pass through them.")


@contextlib.contextmanager
def _flags(model: HookedModel, points: Iterable[Point]) -> Iterator[None]:
    """Set the flags that the reading sites among `points` need; restore them afterwards."""
    wanted = {FLAGS[point.site] for point in points if point.site in FLAGS}
    changed: list[str] = []
    try:
        for flag in sorted(flag for flag in wanted if not getattr(model.cfg, flag, False)):
            try:
                getattr(model, f"set_{flag}")(True)
            except NotImplementedError:
                sites = ", ".join(site for site in READING_SITES if FLAGS[site] == flag)
                raise BirthlensError(
                    f"sites {sites}: TransformerLens does not show them in this model, so edges into them cannot be edited."
                ) from None
            changed.append(flag)
        yield
    finally:
        for flag in changed:
            getattr(model, f"set_{flag}")(False)


def _hook_point(model: HookedModel, point: Point) -> Any:
    try:
        return model.hook_dict[point.hook]
    except KeyError:
        layers = f"layers 0 to {model.cfg.n_layers - 1}"
        raise BirthlensError(
            f"site {point.site} of layer {point.layer} does not exist in this model ({layers})."
        ) from None


def _hook(point: Point, chain: Sequence[Callable[..., Tensor]], fired: set[Point]) -> Callable[..., Tensor]:
    def hook(value: Tensor, hook: Any) -> Tensor:
        fired.add(point)
        for edit in chain:
            value = edit(value, None)
        return value

    return hook


def device_of(model: HookedModel) -> torch.device:
    """Return the device of a live model."""
    return next(model.parameters()).device


def moved(model: HookedModel, device: str | torch.device) -> HookedModel:
    """Move a live model to a device, in place, and return it."""
    return model if device_of(model) == torch.device(device) else model.to(str(device), print_details=False)


class HookedTrace:
    """An unedited pass of a hooked model: the activations at some points, and logits under edits."""

    def __init__(self, model: HookedModel, tokens: Int[Tensor, "batch pos"], points: Iterable[Point] = ()) -> None:
        self.model = model
        self.tokens = tokens
        self._known = captured(model, tokens, points)

    def value(self, point: Point) -> Tensor:
        """Return a captured activation."""
        return self._known[point]

    def logits(self, edits: PointEdits | None = None) -> Float[Tensor, "batch pos d_vocab"]:
        """Return the logits at all positions, after `edits`."""
        with torch.no_grad(), edited(self.model, edits or {}):
            return self.model(self.tokens)


def captured(model: HookedModel, tokens: Int[Tensor, "batch pos"], points: Iterable[Point]) -> dict[Point, Tensor]:
    """Return the unedited activations at some points (in one pass, or none if there are no points)."""
    points = list(points)
    return captured_with_logits(model, tokens, points)[0] if points else {}


def captured_with_logits(
    model: HookedModel, tokens: Int[Tensor, "batch pos"], points: Iterable[Point]
) -> tuple[dict[Point, Tensor], Float[Tensor, "batch pos d_vocab"]]:
    """Return the unedited activations at some points, and the logits of the same pass."""
    known: dict[Point, Tensor] = {}

    def keeper(point: Point) -> Callable[..., Tensor]:
        def keep(value: Tensor, rows: object) -> Tensor:
            known[point] = value.detach()
            return value

        return keep

    with torch.no_grad(), edited(model, {point: [keeper(point)] for point in points}):
        logits = model(tokens)
    return known, logits
