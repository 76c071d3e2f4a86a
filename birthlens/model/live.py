"""A model that somebody else trains, read through a copy, so that the model itself is never run, hooked or switched.

The copy is made once, in float32 and for evaluation, and takes the values of the model's parameters and buffers whenever it
is refreshed. It needs as much memory again as the weights. Hooks of modules are copied with them.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from birthlens.errors import BirthlensError
from birthlens.model.effects import BUILT
from birthlens.model.hooks import captured_with_logits
from birthlens.model.sites import Point
from birthlens.shapes import Float, Int

_WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}
"""Classes that hold the model in an attribute: data-parallel training and torch.compile."""
_UNLIMITED = 1024
"""Positions of a model whose config names no limit."""
_HOOKED = {BUILT, "TransformerBridge"}
"""Classes of TransformerLens."""
_EXPECTED = "give a HookedTransformer, a TransformerBridge, or a causal language model of Transformers."


class LiveModel:
    """A copy of a model of TransformerLens, or of a causal language model of Transformers, that follows its training.

    `cfg` has n_layers, n_heads, d_vocab and n_ctx. `hooked` is the copy of a model of TransformerLens, else None.

    Raises:
        BirthlensError: if a model is of another kind, cannot be copied, or does not show the pattern of every layer.
    """

    def __init__(self, model: object) -> None:
        self._live = _unwrapped(model)
        classes = {one.__name__ for one in type(self._live).__mro__}
        if not classes & {*_HOOKED, "PreTrainedModel"}:
            raise BirthlensError(f"model = {type(self._live).__name__}: {_EXPECTED}")
        try:
            self._copy: Any = copy.deepcopy(self._live)
        except (RuntimeError, TypeError) as error:
            raise BirthlensError(f"model = {type(self._live).__name__} cannot be copied: {error}") from None
        self._copy.float().eval().requires_grad_(False)
        self.hooked: Any = self._copy if classes & _HOOKED else None
        self.cfg: Any
        if self.hooked is not None:
            self._copy.reset_hooks()
            self._copy.cfg.dtype = torch.float32
            self.cfg = self._copy.cfg
        else:
            self._copy.set_attn_implementation("eager")  # others do not return patterns
            self.cfg = _sizes(self._copy.config)
        self._check()

    def refresh(self) -> None:
        """Take the present values of the model.

        Raises:
            BirthlensError: if its parameters are no longer those that were copied.
        """
        with torch.no_grad():
            for kind in ("named_parameters", "named_buffers"):
                found = dict(getattr(self._live, kind)())
                for name, mine in getattr(self._copy, kind)():
                    if name not in found or found[name].shape != mine.shape:
                        raise BirthlensError(f"model: its {name} has changed shape or is gone since the copy was made.")
                    mine.copy_(found[name])

    def seen(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> tuple[list[Float[Tensor, "batch head query_pos key_pos"]], Float[Tensor, "batch pos d_vocab"]]:
        """Run the copy: return the pattern of each layer and the logits, on the CPU."""
        place = next(self._copy.parameters()).device
        with torch.no_grad(), torch.autocast(place.type, enabled=False):
            if self.hooked is not None:
                points = [Point("pattern", layer) for layer in range(self.cfg.n_layers)]
                found, logits = captured_with_logits(self._copy, tokens.to(place), points)
                patterns = [found[point] for point in points]
            else:
                out = self._copy(tokens.to(place), output_attentions=True, use_cache=False)
                patterns, logits = list(out.attentions), out.logits
        return [pattern.cpu() for pattern in patterns], logits.cpu()

    def _check(self) -> None:
        """Refuse a model whose patterns are not one a layer, with rows that sum to 1 over what the query may see."""
        name = type(self._live).__name__
        try:
            patterns, logits = self.seen(torch.arange(min(4, self.cfg.n_ctx))[None] % self.cfg.d_vocab)
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise BirthlensError(f"model = {name} does not show its attention patterns: {error}") from None
        ones = torch.ones(())
        whole = all(
            pattern.dim() == 4
            and torch.allclose(pattern.sum(-1), ones, atol=1e-3)
            and not bool(pattern.triu(1).any())
            for pattern in patterns
        )  # fmt: skip
        if not whole or len(patterns) != self.cfg.n_layers or logits.shape[-1] != self.cfg.d_vocab:
            raise BirthlensError(
                f"model = {name} is not a causal model that shows the attention pattern of every layer."
            )


def _unwrapped(model: object) -> Any:
    while type(model).__name__ in _WRAPPERS:
        model = getattr(model, _WRAPPERS[type(model).__name__])
    if not isinstance(model, nn.Module):
        raise BirthlensError(f"model = {type(model).__name__}: {_EXPECTED}")
    return model


def _sizes(config: Any) -> SimpleNamespace:
    """Read the config of a model of Transformers, which spells most sizes in one way for every architecture."""
    return SimpleNamespace(
        n_layers=int(config.num_hidden_layers),
        n_heads=int(config.num_attention_heads),
        d_vocab=int(config.vocab_size),
        n_ctx=int(getattr(config, "max_position_embeddings", None) or _UNLIMITED),
    )
