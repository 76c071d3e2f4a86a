"""Tokens and names in readable form: spaces and line ends are visible, invisible characters are shown as code points."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_WORDS = {
    "bag": "bag of tokens",
    "bayes": "Bayes-optimal",
    "bayes (approximate)": "Bayes-optimal (approximate)",
}
_PLACES = {"embed": "tokens", "pos_embed": "positions", "W_E": "tokens", "W_pos": "positions", "W_U": "unembedding",
           "->": "→", ">": " through ", "x": "×", "q": "queries", "k": "keys", "v": "values"}  # fmt: skip
_PLACE = re.compile(
    r"L(\d+)H(\d+)(?:\.(q|k|v|QK|OV))?|L(\d+)\.mlp|pos_embed|embed|W_E|W_pos|W_U|\s*->\s*|>|(?<= )x(?= )"
)
_STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of controls, formats (text direction), surrogates, and separators of lines and paragraphs."""
_VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍", "": "∅"}


def legible(token: str) -> str:
    r"""Return a token with every character visible and without characters that affect the surrounding text.

    Example:
        >>> legible(" "), legible("to\n"), legible("\u202e"), legible("é")
        ('␣', 'to⏎', 'U+202E', 'é')
    """
    if token in _VISIBLE:
        return _VISIBLE[token]
    return "".join(_character(character) for character in token)


def label(name: str) -> str:
    """Return a name of the code as words, the same in all places.

    Example:
        >>> label("in_context_loss"), label("prev_token_memory"), label("bag")
        ('in-context loss', 'previous-token memory', 'bag of tokens')
    """
    if name in _WORDS:
        return _WORDS[name]
    return name.replace("in_context", "in-context").replace("prev_token", "previous-token").replace("_", " ")


def in_words(address: str) -> str:
    """Return an edge, a circuit or a cell of a ledger in words.

    Example:
        >>> in_words("L0H0->L1H0.k"), in_words("W_E>L0H0.OV x W_U")
        ('layer 0 head 0 → keys of layer 1 head 0', 'tokens through OV of layer 0 head 0 × unembedding')
    """

    def spell(match: re.Match[str]) -> str:
        layer, head, part, forward = match.groups()
        if forward is not None:
            return f"feed-forward of layer {forward}"
        if layer is not None:
            return f"{_PLACES.get(part, part)} of layer {layer} head {head}" if part else f"layer {layer} head {head}"
        word = _PLACES[match[0].strip()]
        return f" {word} " if word == "→" else word

    return _PLACE.sub(spell, address)


def shown(value: object, longest: int = 200) -> str:
    r"""Return the repr of a value for a message: on one line, cut to `longest` characters; it never raises an error.

    Example:
        >>> shown("a\x1b[2J"), shown([1, 2, 3], 6)
        ("'a\\x1b[2J'", '[1, 2…')
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__} too large to print"
    return shortened(" ".join(text.split("\n")), longest)


def neutral(text: str) -> str:
    r"""Replace each character that could control a terminal or hide text by its code point; line ends and tabs stay.

    Example:
        >>> neutral("run\x1b[2J"), neutral("a\u202eb"), neutral("π = 3")
        ('runU+001B[2J', 'aU+202Eb', 'π = 3')
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        f"U+{ord(character):04X}"
        if character not in "\n\t" and unicodedata.category(character) in _STEERING
        else character
        for character in text
    )


def shortened(text: str, longest: int) -> str:
    """Cut a label that would take too much space.

    Example:
        >>> shortened("abc", 3), shortened("abcd", 3)
        ('abc', 'ab…')
    """
    return text if len(text) <= longest else text[: longest - 1] + "…"


def suggestion(name: str, valid: Iterable[str]) -> str:
    """Return " The closest is ..." with the valid name most similar to a wrong one, or an empty text.

    Example:
        >>> suggestion("trian", ["train", "probe"]), suggestion("x", ["train"])
        (' The closest is train.', '')
    """
    from difflib import get_close_matches

    found = get_close_matches(name, list(valid), n=1)
    return f" The closest is {found[0]}." if found else ""


def counted(n: int, noun: str) -> str:
    """Return a count with its noun.

    Example:
        >>> counted(1, "layer"), counted(2, "layer")
        ('1 layer', '2 layers')
    """
    return f"{n} {noun}{'' if n == 1 else 's'}"


def is_share(metric: str) -> bool:
    """Return whether a metric lies between 0 and 1, so that its axis shows the whole range.

    Example:
        >>> is_share("in_context_accuracy"), is_share("in_context_loss")
        (True, False)
    """
    return metric.endswith(("accuracy", "recall"))


def _character(character: str) -> str:
    if character in _VISIBLE:
        return _VISIBLE[character]
    # Controls, formats (text direction!), surrogates, unassigned; separators; marks that need a letter before them.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Cn", "Co", "Zs", "Zl", "Zp", "Mn", "Me"):
        return f"U+{ord(character):04X}"
    return character
