"""Addresses inside a transformer, and the only place where TransformerLens hook names are formed.

Layers count from 0 as in TransformerLens; the paper's superscripts 1 and 2 are layers 0 and 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from birthlens.errors import BirthlensError

_HEAD = re.compile(r"L(\d{1,9})H(\d{1,9})")
_MLP = re.compile(r"L(\d{1,9})\.mlp")


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
            raise BirthlensError(f"head = {text!r} is not a head; write it as L<layer>H<head>, for instance L1H0.")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True, order=True)
class Mlp:
    """The feed-forward of one layer (W_F in the simplified model); it writes to the residual stream and reads it.

    Example:
        >>> str(Mlp(1))
        'L1.mlp'
    """

    layer: int

    def __str__(self) -> str:
        return f"L{self.layer}.mlp"


@dataclass(frozen=True, order=True)
class HeadInput:
    """One of the three inputs of a head: what its queries, keys or values are made from.

    Example:
        >>> str(HeadInput(Head(1, 0), "k"))
        'L1H0.k'
    """

    head: Head
    letter: str

    def __str__(self) -> str:
        return f"{self.head}.{self.letter}"

    @property
    def layer(self) -> int:
        """The head's layer."""
        return self.head.layer


@dataclass(frozen=True)
class Embedding:
    """A writer before layer 0: 'embed' (tokens) or 'pos_embed' (positions)."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Logits:
    """The last reader: the unembedding (behind the final LayerNorm, if there is one)."""

    def __str__(self) -> str:
        return "logits"


Sender = Embedding | Head | Mlp
Receiver = HeadInput | Mlp | Logits


@dataclass(frozen=True)
class Edge:
    """What one component writes, as one other component reads it.

    Senders are embed, pos_embed, L0H0 (a head) or L0.mlp; receivers L1H0.q, L1H0.k, L1H0.v, L1.mlp or logits.

    Example:
        >>> edge = Edge.parse("L0H0->L1H0.k")
        >>> edge.sender, str(edge)
        (Head(layer=0, head=0), 'L0H0->L1H0.k')
    """

    sender: Sender
    receiver: Receiver

    def __str__(self) -> str:
        return f"{self.sender}->{self.receiver}"

    @classmethod
    def parse(cls, text: object) -> Edge:
        """Read an edge such as 'L0H0->L1H0.k'; raise BirthlensError for anything else."""
        if not isinstance(text, str):
            raise BirthlensError(f"edge = {text!r} is not an edge; write it as text, for instance L0H0->L1H0.k.")
        sender, arrow, receiver = (part.strip() for part in text.partition("->"))
        if not arrow:
            raise BirthlensError(
                f"edge = {text!r} is not an edge; write it as sender->receiver, for instance L0H0->L1H0.k."
            )
        return cls(_sender(sender), _receiver(receiver))


def _sender(text: str) -> Sender:
    if text in INPUT_SITES:
        return Embedding(text)
    if match := _MLP.fullmatch(text):
        return Mlp(int(match[1]))
    if _HEAD.fullmatch(text):
        return Head.parse(text)
    raise BirthlensError(f"sender = {text!r} is unknown; valid are embed, pos_embed, a head (L0H0) or L0.mlp.")


def _receiver(text: str) -> Receiver:
    if text == "logits":
        return Logits()
    if match := _MLP.fullmatch(text):
        return Mlp(int(match[1]))
    head, dot, letter = text.partition(".")
    if dot and letter in ("q", "k", "v") and _HEAD.fullmatch(head):
        return HeadInput(Head.parse(head), letter)
    raise BirthlensError(f"receiver = {text!r} is unknown; valid are L1H0.q, L1H0.k, L1H0.v, L1.mlp or logits.")


ATTENTION_SITES = ("q", "k", "v", "z", "pattern", "attn_scores")
"""Activations of an attention block that have a head axis."""

RESIDUAL_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""Activations in the residual stream's space, one in each layer."""

INPUT_SITES = ("embed", "pos_embed")
"""The inputs of the residual stream before layer 0."""

READING_SITES = ("q_input", "k_input", "v_input", "mlp_in")
"""What queries, keys, values and feed-forward read: hook points that exist only while a flag of the model is set."""

NORM_SITES = ("ln1.scale", "ln2.scale")
"""LayerNorm's divisors in a block."""

FINAL_NORM = "ln_final.scale"
"""The divisor of the LayerNorm before the unembedding; it has no layer."""

INTERVENTION_SITES = (
    "embed",
    "pos_embed",
    "resid_pre",
    "resid_post",
    "attn_out",
    "mlp_out",
    "z",
    "q",
    "k",
    "v",
    "pattern",
)
"""Where activations can be replaced with the same meaning in every model TransformerLens builds or loads."""


class Point(NamedTuple):
    """A site and, if the site has one, its layer."""

    site: str
    layer: int | None = None

    @property
    def hook(self) -> str:
        """The TransformerLens hook point."""
        return hook_name(self.site, self.layer)


def hook_name(site: str, layer: int | None = None) -> str:
    """Return the TransformerLens hook point of `site` (and `layer`, if the site has one).

    Raises:
        BirthlensError: for an unknown site, or a missing layer.

    Example:
        >>> hook_name("pattern", 1), hook_name("embed"), hook_name("ln1.scale", 0)
        ('blocks.1.attn.hook_pattern', 'hook_embed', 'blocks.0.ln1.hook_scale')
    """
    if site in INPUT_SITES:
        return f"hook_{site}"
    if site == FINAL_NORM:
        return "ln_final.hook_scale"
    if site not in ATTENTION_SITES + RESIDUAL_SITES + READING_SITES + NORM_SITES:
        valid = ", ".join((*INPUT_SITES, *RESIDUAL_SITES, *ATTENTION_SITES, *READING_SITES, *NORM_SITES, FINAL_NORM))
        raise BirthlensError(f"site = {site!r} is unknown; valid sites are {valid}.")
    if layer is None:
        raise BirthlensError(f"site = {site!r} needs a layer.")
    if site in NORM_SITES:
        room, _, name = site.partition(".")
        return f"blocks.{layer}.{room}.hook_{name}"
    return f"blocks.{layer}.attn.hook_{site}" if site in ATTENTION_SITES else f"blocks.{layer}.hook_{site}"
