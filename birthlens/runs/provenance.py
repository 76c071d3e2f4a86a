"""What made a number: digests of the code and of the corpus that it came from.

The digest of a module covers its source and that of every module of birthlens that it imports, directly or not: as syntax
trees without docstrings, so that words, comments and layout do not count, and whatever can change a number does. What only
draws, prints or writes pages is imported by none of them, and is left out by itself.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from birthlens.tasks.corpus import BigramStatistics

TRAINING = "birthlens.training.recording"
"""The module whose digest says what a run was made by."""
_HOME = Path(__file__).parents[2]
_DIGITS = 16


@cache
def code_digest(module: str, home: Path = _HOME) -> str:
    """Return the digest of a module and of all it imports from the package birthlens that lies in `home`.

    Example:
        >>> len(code_digest(TRAINING)), code_digest(TRAINING) == code_digest("birthlens.tasks.corpus")
        (16, False)
    """
    found = hashlib.sha256()
    for name, text in sorted(sources(module, home).items()):
        found.update(f"{name}\n{text}\n".encode())
    return found.hexdigest()[:_DIGITS]


def sources(module: str, home: Path = _HOME) -> dict[str, str]:
    """Return what is digested: module -> its syntax tree as text."""
    waiting, found = [module], dict[str, str]()
    while waiting:
        name = waiting.pop()
        file = _file(name, home)
        if name in found or file is None:
            continue
        found[name], imported = _read(file)
        waiting += [other for other in imported if other.split(".")[0] == "birthlens"]
    return found


def corpus_digest(statistics: BigramStatistics) -> str:
    """Return the digest of a chain: its labels and both distributions, to the bit."""
    found = hashlib.sha256("\0".join(statistics.vocab).encode())
    for table in (statistics.unigram, statistics.bigram):
        found.update(f"{table.shape}{table.dtype}".encode() + table.tobytes())
    return found.hexdigest()[:_DIGITS]


def _file(name: str, home: Path) -> Path | None:
    """Find the source of a module; None for a name that is no module (a function that is imported by its full name)."""
    place = home.joinpath(*name.split("."))
    for file in (place.with_suffix(".py"), place / "__init__.py"):
        if file.is_file():
            return file
    elsewhere = getattr(sys.modules.get(name), "__file__", None)  # a statistic of somebody's own
    return Path(elsewhere) if elsewhere and name.split(".")[0] != "birthlens" else None


@cache
def _read(file: Path) -> tuple[str, tuple[str, ...]]:
    """Return a module's tree without its docstrings, and all names that it imports when it runs."""
    tree = ast.parse(file.read_bytes())
    imported = tuple(_imports(tree))
    for node in ast.walk(tree):
        match node:
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                if ast.get_docstring(node, clean=False) is not None:
                    node.body = node.body[1:]
    return ast.dump(tree), imported


def _imports(node: ast.AST) -> Iterator[str]:
    """Yield the imported names below a node, but those for type checkers only."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child)
