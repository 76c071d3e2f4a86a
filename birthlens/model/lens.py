"""The one door to TransformerLens, whose version 3.9 and versions 4 are both supported.

The class of models is `HookedTransformer`. With TransformerLens 3.9 it is that library's own. TransformerLens 4 has none, so
there it is birthlens's (`hooked_transformer`), with the same names, hook points and numbers. Models from directories are
TransformerLens's bridges in both versions.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from importlib.metadata import version

__all__ = ["Attention", "CanBeUsedAsMLP", "Embed", "HookPoint", "HookedModel", "HookedTransformer",
           "HookedTransformerConfig", "TransformerBridge", "Unembed"]  # fmt: skip

with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
    warnings.simplefilter("ignore")
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_bridge import TransformerBridge

    if int(version("transformer-lens").split(".")[0]) < 4:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens.components import Attention, Embed, Unembed
        from transformer_lens.components.mlps.can_be_used_as_mlp import CanBeUsedAsMLP
    else:
        from birthlens.model.hooked_parts import Attention, CanBeUsedAsMLP, Embed, HookedTransformerConfig, Unembed
        from birthlens.model.hooked_transformer import HookedTransformer

HookedModel = HookedTransformer | TransformerBridge
"""A model with TransformerLens's hook points: one of birthlens's own, or one loaded from a directory."""
