"""The provenance of a number: digests of the code and of the corpus that it came from.

The digest of a module covers its statements and those of every module of birthlens that it imports, directly or not. It
should change if and only if a number could change:

- Statements are digested as syntax trees without docstrings, so comments and layout do not count.
- Names of modules and the order of top-level statements do not count: statements are digested one by one and sorted. A
  function that moves to another module keeps its digest.
- A module that is named in a string, such as "birthlens.tasks.bigram:BigramTask", counts as imported.
- Imports from birthlens do not count, unless a name is changed or defined in several modules: then the name counts together
  with the statement that defines it. Imports of other packages count as they are. Imports for type checkers do not count.

Code that only draws, prints or writes pages is not imported by code that computes, so it is left out.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from birthlens.tasks.corpus import BigramStatistics

TRAINING = "birthlens.training.recording"
"""The module whose digest identifies the code that made a run."""
_HOME = Path(__file__).parents[2]
_DIGITS = 16
_REFERENCE = re.compile(r"birthlens(\.\w+)+:\w+")


@cache
def code_digest(module: str, home: Path = _HOME) -> str:
    """Return the digest of a module and of everything it imports from the package birthlens in `home`.

    Example:
        >>> len(code_digest(TRAINING)), code_digest(TRAINING) == code_digest("birthlens.tasks.corpus")
        (16, False)
    """
    found = sources(module, home)
    texts = {text for source in found.values() for text in source.statements}
    definitions: dict[str, set[str]] = {}
    for source in found.values():
        for name, digest in source.definitions.items():
            definitions.setdefault(name, set()).add(digest)
    for source in found.values():
        for home_of, name, here in source.own:
            if here != name or len(definitions.get(name, ())) > 1:  # only the import says what is meant
                texts.add(f"{name} as {here}: {_meaning(home_of, name, found)}")
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:_DIGITS]


def training_digest(kind: str) -> str:
    """Return the digest of the code that trains a kind of task: that of training, and the module of a user's own task."""
    from birthlens.tasks.kinds import task_class

    training = code_digest(TRAINING)
    module = task_class(kind).__module__
    if module.split(".")[0] == "birthlens":
        return training
    return hashlib.sha256(f"{training}{code_digest(module)}".encode()).hexdigest()[:_DIGITS]


@dataclass(frozen=True)
class Source:
    """What is digested of a module: its statements, and its imports from birthlens (module, name, name here)."""

    statements: tuple[str, ...]
    own: tuple[tuple[str, str, str], ...]
    imports: tuple[str, ...]
    definitions: Mapping[str, str]


def sources(module: str, home: Path = _HOME) -> dict[str, Source]:
    """Return the digested sources, by module."""
    waiting = [module]
    found: dict[str, Source] = {}
    while waiting:
        name = waiting.pop()
        file = _file(name, home)
        if name in found or file is None:
            continue
        found[name] = _read(file)
        waiting += [other for other in found[name].imports if other.split(".")[0] == "birthlens"]
    return found


def _meaning(module: str, name: str, found: Mapping[str, Source]) -> str:
    """Return the digest of the statements that define an imported name; empty for a module."""
    return found[module].definitions.get(name, "") if module in found else ""


def corpus_digest(statistics: BigramStatistics) -> str:
    """Return the digest of a chain: its labels and both distributions, bit for bit."""
    found = hashlib.sha256("\0".join(statistics.vocab).encode())
    for table in (statistics.unigram, statistics.bigram):
        found.update(f"{table.shape}{table.dtype}".encode() + table.tobytes())
    return found.hexdigest()[:_DIGITS]


def _file(name: str, home: Path) -> Path | None:
    """Return the source file of a module, or None for a name that is not a module (an imported function's full name)."""
    place = home.joinpath(*name.split("."))
    for file in (place.with_suffix(".py"), place / "__init__.py"):
        if file.is_file():
            return file
    elsewhere = getattr(sys.modules.get(name), "__file__", None)  # a user's own statistic
    return Path(elsewhere) if elsewhere and name.split(".")[0] != "birthlens" else None


@cache
def _read(file: Path) -> Source:
    """Read a module without its docstrings and without the code for type checkers."""
    tree = ast.parse(file.read_bytes())
    imports: list[str] = []
    own: list[tuple[str, str, str]] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        match node:
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                if ast.get_docstring(node, clean=False) is not None:
                    node.body = node.body[1:]
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                node.body = [ast.Pass()]
            case ast.Constant(value=str(text)) if _REFERENCE.fullmatch(text):
                imports.append(text.partition(":")[0])
            case ast.Import():
                imports += [alias.name for alias in node.names]
            case ast.ImportFrom(module=str(module), level=0):
                imports += [module, *(f"{module}.{alias.name}" for alias in node.names)]
                if module.split(".")[0] == "birthlens":
                    own += [(module, alias.name, alias.asname or alias.name) for alias in node.names]
                    node.module = None
                    node.names = []
        waiting += ast.iter_child_nodes(node)
    definitions: dict[str, str] = {}
    statements = []
    for statement in tree.body:
        text = ast.dump(statement)
        statements.append(text)
        for name in _defined(statement):
            digest = hashlib.sha256(f"{definitions.get(name, '')}{text}".encode()).hexdigest()
            definitions[name] = digest
    return Source(tuple(statements), tuple(own), tuple(imports), definitions)


def _defined(statement: ast.stmt) -> Iterator[str]:
    """Yield the names that a top-level statement defines."""
    for target in getattr(statement, "targets", [getattr(statement, "target", statement)]):
        name = getattr(target, "name", getattr(target, "id", None))
        if isinstance(name, str):
            yield name
