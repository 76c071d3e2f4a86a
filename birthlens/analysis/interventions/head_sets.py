"""Which sets of heads to ablate: each head alone, every pair, or given sets."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from birthlens.errors import BirthlensError
from birthlens.model.components import Sizes, all_heads
from birthlens.model.sites import Head

HeadSet = tuple[Head, ...]
"""Heads that are ablated together."""


@dataclass(frozen=True)
class HeadSets:
    """Sets of heads, given by a rule that holds for any model ('all', 'pairs') or one by one.

    Example:
        >>> HeadSets.parse("pairs")
        HeadSets(rule='pairs', listed=())
        >>> HeadSets.parse("L0H0,L0H1+L1H0").listed
        ((Head(layer=0, head=0),), (Head(layer=0, head=1), Head(layer=1, head=0)))
    """

    rule: Literal["all", "pairs", "listed"] = "all"
    listed: tuple[HeadSet, ...] = ()

    @classmethod
    def parse(cls, text: str) -> HeadSets:
        """Parse 'all' (each head alone), 'pairs', or addresses such as 'L0H0,L0H1+L1H0'.

        Raises:
            BirthlensError: for text that is neither a rule nor a list of addresses.
        """
        rules = {"all": cls("all"), "pairs": cls("pairs")}
        if text in rules:
            return rules[text]
        return cls("listed", tuple(tuple(map(Head.parse, group.split("+"))) for group in text.split(",")))

    def of(self, sizes: Sizes) -> list[HeadSet]:
        """Return the sets for a model.

        Raises:
            BirthlensError: for heads that do not exist; the message lists those that do.
        """
        heads = all_heads(sizes)
        if self.rule == "all":
            return [(head,) for head in heads]
        if self.rule == "pairs":
            if len(heads) < 2:
                raise BirthlensError(f"heads = 'pairs': the model has only one head, {heads[0]}; use all.")
            return list(combinations(heads, 2))
        if unknown := [str(head) for group in self.listed for head in group if head not in heads]:
            raise BirthlensError(f"heads = {', '.join(unknown)} do not exist; valid are {', '.join(map(str, heads))}.")
        return list(self.listed)
