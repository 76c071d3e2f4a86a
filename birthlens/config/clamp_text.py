"""Clamps as text, such as 'hold L1.W_O ideal from=20 until=40': the kind, the words of `PLACES`, and name=value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import to_builtins

from birthlens.config.clamps import KINDS, Ablate, Add, Clamp, Copy, Freeze, Hold, Pin, Reset, Set, StopGradient
from birthlens.errors import BirthlensError
from birthlens.reading import parse_yaml

PLACES: dict[type[Clamp], tuple[str, ...]] = {
    Freeze: ("matrix",),
    Hold: ("matrix", "at"),
    Add: ("matrix", "strength", "held"),
    Reset: ("matrix",),
    Set: ("key", "value"),
    Ablate: ("target", "method"),
    Pin: ("head", "pattern"),
    Copy: ("head", "strength"),
    StopGradient: ("edge",),
}
"""The words of a clamp as text, after its kind and before name=value."""


def from_text(text: str) -> dict[str, Any]:
    """Read a clamp such as 'hold L1.W_O ideal from=20 until=40' as plain data.

    Raises:
        BirthlensError: for an unknown kind, or words that do not fit it.

    Example:
        >>> from_text("freeze L0.W_K until=50")
        {'kind': 'freeze', 'matrix': 'L0.W_K', 'until': 50}
    """
    kind, *words = text.split() or [""]
    if kind not in KINDS:
        raise BirthlensError(f"clamp = {text!r}: it must begin with one of {', '.join(KINDS)}.")
    places = list(PLACES[KINDS[kind]])
    named = {"from", "until"} | {name for name in KINDS[kind].__struct_fields__ if name not in ("start", "stop")}
    data: dict[str, Any] = {"kind": kind}
    for word in words:
        name, equals, value = word.partition("=")
        if kind == "set" and "key" in places and equals:
            data |= {"key": name, "value": parse_yaml(value, f"clamp = {text!r}")}
            places = []
        elif equals and name in named:
            data[name] = parse_yaml(value, f"clamp = {text!r}")
        elif places and (places[0] != "held" or word == "held"):
            data |= _placed(places.pop(0), word)
        else:
            raise BirthlensError(f"clamp = {text!r}: {word!r} does not fit; {_grammar(kind)}.")
    if missing := [name for name in places if name in ("matrix", "key", "target", "head", "edge") and kind != "reset"]:
        raise BirthlensError(f"clamp = {text!r}: its {missing[0]} is missing; {_grammar(kind)}.")
    return data


def parsed(clamps: object) -> object:
    """Convert the texts among some clamps to plain data; everything else is returned unchanged."""
    if isinstance(clamps, str):
        clamps = [clamps]
    if isinstance(clamps, Sequence):
        return [from_text(clamp) if isinstance(clamp, str) else _known(clamp) for clamp in clamps]
    return clamps


def parsed_all(clamps: Sequence[Any]) -> list[dict[str, Any]]:
    """Return clamps, which may be texts, mappings or clamps, as plain data."""
    return [from_text(clamp) if isinstance(clamp, str) else to_builtins(clamp) for clamp in clamps]


def _known(clamp: object) -> object:
    """Return a clamp unchanged; raise BirthlensError if it is a mapping of an unknown kind."""
    if isinstance(clamp, dict):
        kind = clamp.get("kind")
        if not isinstance(kind, str) or kind not in KINDS:
            raise BirthlensError(f"clamp = {clamp!r}: kind = {kind!r} is unknown; valid are {', '.join(KINDS)}.")
    return clamp


def _placed(name: str, word: str) -> dict[str, Any]:
    """Parse one word without a name; step:N and rank:N give a source and its number at once."""
    if name == "held":
        return {"held": True}
    source, colon, number = word.partition(":")
    if name == "at" and colon and source in ("step", "rank"):
        return {"at": source, source: parse_yaml(number, f"clamp: {word!r}")}
    return {name: parse_yaml(word, f"clamp: {word!r}") if name == "strength" else word}


def _grammar(kind: str) -> str:
    words = " ".join(name.upper() for name in PLACES[KINDS[kind]])
    return f"write '{kind} {words} from=STEP until=STEP'"
