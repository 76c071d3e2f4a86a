"""What each setting means, read from the strings below the fields of the sections, and a config with these as comments."""

from __future__ import annotations

import ast
import inspect
import textwrap
from itertools import pairwise

from birthlens.config.base import Section
from birthlens.config.run import RunConfig

WIDTH = 100


def meanings(section: type[Section]) -> dict[str, str]:
    """Return the string below each field of a section and of its bases, on one line each."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except OSError:  # created at run time, from a user's own class
            continue
        assert isinstance(tree, ast.ClassDef)
        for field, after in pairwise(tree.body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                found[ast.unparse(field.target)] = " ".join(inspect.cleandoc(str(after.value.value)).split())
    return found


def commented(config: RunConfig) -> str:
    """Return a config as YAML in which every key has its meaning above it; it reads as the same config.

    Example:
        >>> "  # Width of the residual stream." in commented(RunConfig())
        True
    """
    import yaml

    lines: list[str] = []
    for name, values in config.to_data().items():
        lines.append(f"{name}:")
        said = meanings(type(getattr(config, name)))
        for key, value in values.items():
            if key in said:
                lines += textwrap.wrap(said[key], WIDTH, initial_indent="  # ", subsequent_indent="  # ")
            text = str(yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True))
            lines += textwrap.indent(text, "  ").splitlines()
    return "\n".join(lines) + "\n"
