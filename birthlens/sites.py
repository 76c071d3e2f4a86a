"""Addresses inside a transformer, and the only spelling of TransformerLens hook names.

Layers count from 0 as in TransformerLens; the paper's superscripts 1 and 2 are layers 0 and 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from birthlens.errors import BirthlensError

_HEAD = re.compile(r"L(\d+)H(\d+)")


@dataclass(frozen=True, order=True)
class Head:
    """One attention head by address.

    Example:
        >>> Head.parse("L1H0")
        Head(layer=1, head=0)
        >>> str(Head(0, 3))
        'L0H3'
    """

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Read an address such as 'L1H0'; raise BirthlensError for anything else."""
        match = _HEAD.fullmatch(text.strip())
        if match is None:
            raise BirthlensError(f"head = {text!r} is no head; write it as L<layer>H<head>, for instance L1H0.")
        return cls(int(match[1]), int(match[2]))


ATTENTION_SITES = ("q", "k", "v", "z", "pattern", "attn_scores")
"""Activations of an attention block that have a head axis."""

RESIDUAL_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""Activations in the residual stream's space, one a layer."""

INPUT_SITES = ("embed", "pos_embed")
"""What enters the residual stream before layer 0."""


def hook_name(site: str, layer: int | None = None) -> str:
    """Spell the TransformerLens hook point of `site` (and `layer`, where the site has one).

    Raises:
        BirthlensError: for an unknown site, or a layer missing where the site needs one.

    Example:
        >>> hook_name("pattern", 1), hook_name("embed")
        ('blocks.1.attn.hook_pattern', 'hook_embed')
    """
    if site in INPUT_SITES:
        return f"hook_{site}"
    if site not in ATTENTION_SITES + RESIDUAL_SITES:
        valid = ", ".join(INPUT_SITES + RESIDUAL_SITES + ATTENTION_SITES)
        raise BirthlensError(f"site = {site!r} is unknown; valid sites are {valid}.")
    if layer is None:
        raise BirthlensError(f"site = {site!r} needs a layer.")
    return f"blocks.{layer}.attn.hook_{site}" if site in ATTENTION_SITES else f"blocks.{layer}.hook_{site}"
