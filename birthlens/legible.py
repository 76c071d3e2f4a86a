"""Tokens and names as people can read them: spaces and line ends visible, invisible characters by their code points."""

from __future__ import annotations

import unicodedata

_WORDS = {"bag": "bag of tokens", "bayes": "Bayes-optimal"}
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


def label(name: str) -> str:
    """Spell a name of the code as words, the same wherever readers meet it.

    Example:
        >>> label("in_context_loss"), label("prev_token_memory"), label("bag")
        ('in-context loss', 'previous-token memory', 'bag of tokens')
    """
    if name in _WORDS:
        return _WORDS[name]
    return name.replace("in_context", "in-context").replace("prev_token", "previous-token").replace("_", " ")


def counted(n: int, noun: str) -> str:
    """Spell a count with its noun.

    Example:
        >>> counted(1, "layer"), counted(2, "layer")
        ('1 layer', '2 layers')
    """
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _character(character: str) -> str:
    if character in _VISIBLE:
        return _VISIBLE[character]
    # Controls, formats (text direction!), surrogates, unassigned; separators; marks that need a letter before them.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Cn", "Co", "Zs", "Zl", "Zp", "Mn", "Me"):
        return f"U+{ord(character):04X}"
    return character
