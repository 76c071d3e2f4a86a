"""Tokens as people can read them: spaces and line ends made visible, invisible characters by their code points."""

from __future__ import annotations

import unicodedata

_VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍", "": "∅"}


def legible(token: str) -> str:
    r"""Spell a token so that each character of it can be seen and none of it steers the text around it.

    Example:
        >>> legible(" "), legible("to\n"), legible("\u202e"), legible("é")
        ('␣', 'to⏎', 'U+202E', 'é')
    """
    if token in _VISIBLE:
        return _VISIBLE[token]
    return "".join(_character(character) for character in token)


def _character(character: str) -> str:
    if character in _VISIBLE:
        return _VISIBLE[character]
    # Controls, formats (text direction!), surrogates, unassigned; separators; marks that need a letter before them.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Cn", "Co", "Zs", "Zl", "Zp", "Mn", "Me"):
        return f"U+{ord(character):04X}"
    return character
