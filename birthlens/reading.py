"""One reader for all text from outside: YAML, JSON and plain text, with bounded work and errors of one sentence.

A document may contain what JSON can contain: null, booleans, numbers of 64 bits, text, lists and mappings. YAML's
aliases and tags are refused, because a few of them can describe more data than a machine can hold. Sizes and depths are
limited.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from birthlens.errors import BirthlensError
from birthlens.labels import shown

SMALL = 2**20
"""The most bytes in a config, sweep or suite."""
LARGE = 2**28
"""The most bytes in a corpus or table of counts."""
DEEPEST = 32
"""The most levels of lists and mappings in a document."""
MOST = 100_000
"""The most values in a document."""


def read_text(path: str | Path, what: str, longest: int = SMALL) -> str:
    """Read a UTF-8 file of at most `longest` bytes; `what` names it in messages.

    Raises:
        BirthlensError: if the file is missing, too long, or not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(longest + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BirthlensError(f"{what} = {shown(str(path))} cannot be read: {reason}.") from None
    if len(data) > longest:
        raise BirthlensError(f"{what} = {shown(str(path))} is longer than {longest} bytes, which is the most.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BirthlensError(
            f"{what} = {shown(str(path))} is not UTF-8 text (byte {error.start}); convert it first."
        ) from None


def read_mapping(path: str | Path, what: str) -> dict[Any, Any]:
    """Read a YAML or JSON file that contains a mapping; an empty file is an empty mapping.

    Raises:
        BirthlensError: if the file cannot be read, is neither YAML nor JSON, or contains something else.
    """
    text = read_text(path, what)
    name = f"{what} = {shown(str(path))}"
    tree = parse_json(text, name) if Path(path).suffix == ".json" else parse_yaml(text, name)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise BirthlensError(f"{name} holds a {type(tree).__name__}; it must be a mapping.")
    return tree


def parse_json(text: str, what: str) -> object:
    """Read JSON.

    Raises:
        BirthlensError: if the text is not JSON, gives a key twice, or is beyond the limits of this module.

    Example:
        >>> parse_json('{"a": [1, 2.5, null]}', "example")
        {'a': [1, 2.5, None]}
    """
    tree = decode_json(text, what)
    _check_values(tree, what)
    return tree


def decode_json(text: str, what: str) -> object:
    """Read JSON of any size, a table of counts for instance, whose values the caller checks.

    Raises:
        BirthlensError: if the text is not JSON, gives a key twice, or is nested too deep.
    """

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            (twice, _), *_ = (Counter(name for name, _ in pairs)).most_common(1)
            raise BirthlensError(f"{what} has the key {shown(twice)} twice in one mapping; give it once.")
        return found

    try:
        tree: object = json.loads(text, object_pairs_hook=mapping)
        return tree
    except BirthlensError:
        raise
    except json.JSONDecodeError as error:
        raise BirthlensError(f"{what} is not JSON (line {error.lineno}: {error.msg}).") from None
    except ValueError:
        raise BirthlensError(f"{what} has a number of too many digits.") from None
    except RecursionError:
        raise _too_deep(what) from None


def parse_yaml(text: str, what: str) -> object:
    """Read YAML without aliases and tags; a key may be given once, and dates are text.

    Raises:
        BirthlensError: if the text is not YAML, or beyond the limits of this module.

    Example:
        >>> parse_yaml("{a: [1, 2.5, ~], b: 2024-01-01}", "example")
        {'a': [1, 2.5, None], 'b': '2024-01-01'}
    """
    import yaml

    _check_text(text, what)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        tree = _built(yaml.parse(text, Loader=loader), what)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f"line {mark.line + 1}: "
        raise BirthlensError(f"{what} is not YAML ({line}{reason}).") from None
    _check_values(tree, what)
    return tree


def _built(events: Iterator[Any], what: str) -> object:
    """Build plain data from YAML's events, and stop at the first event that is not allowed."""
    import yaml

    loader = yaml.SafeLoader("")
    top: list[Any] = []
    stack: list[list[Any] | _Pairs] = [top]
    for number, event in enumerate(events):
        if number > 2 * MOST:
            raise _too_many(what)
        if isinstance(event, yaml.AliasEvent):
            raise BirthlensError(f"{what} has the alias *{event.anchor}; write out what it stands for.")
        if isinstance(event, yaml.DocumentStartEvent) and top:
            raise BirthlensError(f"{what} holds several documents; it must hold one.")
        if isinstance(event, yaml.CollectionStartEvent | yaml.ScalarEvent) and _tagged(event):
            raise BirthlensError(f"{what} has the tag {shown(event.tag)}; write plain values without tags.")
        if isinstance(event, yaml.ScalarEvent):
            stack[-1].append(_scalar(event, loader, what))
        elif isinstance(event, yaml.CollectionStartEvent):
            if len(stack) > DEEPEST:
                raise _too_deep(what)
            stack.append(_Pairs(what) if isinstance(event, yaml.MappingStartEvent) else [])
        elif isinstance(event, yaml.CollectionEndEvent):
            finished = stack.pop()
            stack[-1].append(finished.found if isinstance(finished, _Pairs) else finished)
    return top[0] if top else None


class _Pairs:
    """A mapping under construction: keys and values alternate."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.found: dict[Any, Any] = {}
        self.key: Any = None
        self.waiting = False

    def append(self, value: Any) -> None:
        """Add the next key or value."""
        self.waiting = not self.waiting
        if not self.waiting:
            self.found[self.key] = value
            return
        if isinstance(value, list | dict):
            raise BirthlensError(f"{self.what} has the key {shown(value)}; keys must be text or numbers.")
        if value in self.found:
            raise BirthlensError(f"{self.what} has the key {shown(value)} twice in one mapping; give it once.")
        self.key = value


def _tagged(event: Any) -> bool:
    """Return whether a value has a tag; a quoted scalar's "!" says that it is text."""
    return event.tag is not None and event.tag != "!"


def _scalar(event: Any, loader: Any, what: str) -> object:
    """Return a scalar as YAML 1.1 reads it, with dates as text; the loader knows the formats of numbers."""
    import yaml

    text: str = event.value
    if not event.implicit[0]:
        return text
    kind = loader.resolve(yaml.ScalarNode, text, (True, False)).rpartition(":")[2]
    try:
        if kind == "null":
            return None
        if kind == "bool":
            return loader.bool_values[text.lower()]
        if kind in ("int", "float"):
            node = yaml.ScalarNode(f"tag:yaml.org,2002:{kind}", text)
            number: float = loader.construct_yaml_int(node) if kind == "int" else loader.construct_yaml_float(node)
            return number
    except (ValueError, OverflowError):
        raise BirthlensError(f"{what} has the number {shown(text)}, which cannot be read.") from None
    return text


def _check_values(tree: object, what: str) -> None:
    """Raise BirthlensError if a document is too deep or too large, or a text or number in it is not usable."""
    level = [tree]
    count = 0
    for depth in itertools.count():
        below: list[object] = []
        for value in level:
            if isinstance(value, str):
                _check_text(value, what)
            elif isinstance(value, int) and not -(2**63) <= value < 2**64:
                raise BirthlensError(f"{what} has a number of more than 64 bits; give a smaller one.")
            elif isinstance(value, dict | list) and depth >= DEEPEST:
                raise _too_deep(what)
            elif isinstance(value, dict):
                below += [*value, *value.values()]
            elif isinstance(value, list):
                below += value
        count += len(below)
        if count > MOST:
            raise _too_many(what)
        if not below:
            return
        level = below


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise BirthlensError(f"{what} has the lone surrogate U+{code:04X}, which is not a character.") from None


def _too_deep(what: str) -> BirthlensError:
    return BirthlensError(f"{what} has lists or mappings more than {DEEPEST} levels deep; use fewer levels.")


def _too_many(what: str) -> BirthlensError:
    return BirthlensError(f"{what} holds more than {MOST} values; use a smaller document.")
