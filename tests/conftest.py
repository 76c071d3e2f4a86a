"""Every annotation of the package is checked while the tests run: jaxtyping's shapes and plain types, by beartype.

Names that a module imports for annotations only (`if TYPE_CHECKING:`) must exist for that, so all modules are imported here
with TYPE_CHECKING set. Other libraries are imported before, as theirs need not work that way.
"""

import ast
import importlib
import os
import typing
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hypothesis import settings
from jaxtyping import install_import_hook

# Two cores: BLAS threads of several processes only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "2")

UNCHECKED = {
    "birthlens.shapes": "it defines the annotations, and is tested with TYPE_CHECKING unset",
    "birthlens.__main__": "importing it runs the command line",
    "birthlens.tasks.sampling_kernel": "Numba compiles its functions and needs them undecorated",
    "birthlens.training.simplified.kernels": "Numba compiles its functions and needs them undecorated",
}
"""The modules whose annotations are not checked, and why."""

PACKAGE = Path(__file__).parents[1] / "birthlens"


def modules() -> Iterator[str]:
    """Name every module of the package, parents first."""
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = ("birthlens", *file.relative_to(PACKAGE).with_suffix("").parts)
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def checked_names() -> Iterator[str]:
    """Name the modules to check; the hook takes a package for all that is in it."""
    for name in modules():
        if not any(unchecked == name or unchecked.startswith(f"{name}.") for unchecked in UNCHECKED):
            yield name


def libraries() -> Iterator[str]:
    """Name every module of other packages that the package imports anywhere."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module


def import_checked() -> None:
    for library in ("beartype", *sorted({name for name in libraries() if name.split(".")[0] != "birthlens"})):
        with suppress(ImportError):  # extras that are not installed
            importlib.import_module(library)
    importlib.import_module("birthlens.shapes")
    typing.TYPE_CHECKING = True  # type: ignore[misc]
    try:
        with install_import_hook(list(checked_names()), "checking.checked"):
            for name in modules():
                if name != "birthlens.__main__":
                    importlib.import_module(name)
    finally:
        typing.TYPE_CHECKING = False  # type: ignore[misc]


import_checked()

# A landing is judged by the same examples each time; new ones are looked for where somebody can look at what they found.
settings.register_profile("birthlens", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("birthlens")
