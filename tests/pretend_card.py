"""A device that is not there: tensors that say they are on it, compute on the CPU, and refuse to meet those of the CPU.

It is torch's device `meta`, which no operation of the CPU accepts and which numpy cannot read. Inside `pretend_card` its
tensors have values, so that whole analyses run on it, and every number can be compared with that of the CPU. As on a GPU,
tensors of no axes and indices of the CPU may be mixed with those of the device, and copies go both ways.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("meta")
_aten = torch.ops.aten
_MIXED = (_aten.index.Tensor, _aten.index_put_.default, _aten.copy_.default, _aten._to_copy.default)
"""Operations that GPUs compute with tensors of the CPU too: as indices, or because they copy."""
_PRODUCTS = (_aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.baddbmm.default)


class OnCard(Tensor):
    """A tensor on the card; `plain` has its numbers."""

    plain: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "OnCard":
        made: OnCard = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), values.stride(), values.storage_offset(), None, values.dtype, values.layout, CARD
        )
        made.plain = values
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _computed(function, args, kwargs or {})


class OtherDeviceError(RuntimeError):
    """An operation has met tensors of both devices."""


def _computed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if lost := [one for one in tensors if one.device == CARD and not isinstance(one, OnCard)]:
        raise OtherDeviceError(f"{function} meets {len(lost)} tensors of the device meta without values: {lost[0]}")
    there = any(isinstance(one, OnCard) for one in tensors)
    if there and function not in _MIXED and any(not isinstance(one, OnCard) and one.ndim for one in tensors):
        raise OtherDeviceError(
            f"{function} meets tensors of the card and of the CPU: {[(type(t).__name__, tuple(t.shape)) for t in tensors]}"
        )
    wanted = kwargs.get("device")
    onto = there if wanted is None else torch.device(wanted).type == CARD.type
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if function is _aten._fused_sdp_choice.default:
        return 0  # the plain one, whose products are seen one by one
    plain = tree_map(lambda one: one.plain if isinstance(one, OnCard) else one, (args, kwargs))
    out = function(*plain[0], **plain[1])
    if function in (_aten.copy_.default, _aten.index_put_.default):
        return args[0]
    if onto:
        out = tree_map(lambda one: OnCard(one) if isinstance(one, Tensor) else one, out)
    return return_and_correct_aliasing(function, args, kwargs, out) if there and onto else out  # type: ignore[no-untyped-call]


class Card(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The card while it is there: `products` counts the matrix products that it has computed."""

    products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _computed(function, args, kwargs or {})
        self.products += function in _PRODUCTS and isinstance(out, OnCard)
        return out


def _as_indices(index: Any) -> Any:
    """Turn lists in an index into tensors of the CPU."""
    if isinstance(index, tuple):
        return tuple(map(_as_indices, index))
    return torch.tensor(index) if isinstance(index, list) else index


class _Made(TorchFunctionMode):
    """Values of `torch.tensor` and of indices, which torch drops for the device meta before a dispatch mode sees them."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], _as_indices(args[1]), *args[2:])
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        return function(*args, **kwargs)


@contextmanager
def pretend_card() -> Iterator[Card]:
    """Give tensors on the device values inside the block."""
    with Card() as card, _Made():  # type: ignore[no-untyped-call]
        yield card
