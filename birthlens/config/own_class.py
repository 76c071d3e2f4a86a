"""Importing a class of the user's own, named as `module:Class` or by the entry point of an installed package."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from birthlens.errors import BirthlensError


def own_class(text: str, key: str, group: str) -> Any | None:
    """Import what `text` names; return None if it has no colon and no entry point of `group` has this name.

    Raises:
        BirthlensError: if the module cannot be imported or has no such class; the message begins with `key`, the setting.

    Example:
        >>> own_class("collections:Counter", "task.kind", "birthlens.tasks")
        <class 'collections.Counter'>
        >>> own_class("nothing", "task.kind", "birthlens.tasks") is None
        True
    """
    module, colon, name = text.partition(":")
    if not colon:
        return _from_entry_point(text, group)
    try:
        return getattr(_imported(module), name)
    except (ImportError, ValueError) as error:
        raise BirthlensError(f"{key} = {text!r}: the module {module!r} cannot be imported ({error}).") from None
    except AttributeError:
        raise BirthlensError(f"{key} = {text!r}: the module {module!r} has no class {name!r}.") from None


def _imported(module: str) -> ModuleType:
    """Import a module by name, also from the working directory, where a user's own task often is."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        here = str(Path.cwd())
        if error.name != module.partition(".")[0] or here in sys.path:
            raise
        sys.path.append(here)
        try:
            return import_module(module)
        finally:
            sys.path.remove(here)


def _from_entry_point(name: str, group: str) -> Any | None:
    from importlib.metadata import entry_points

    return next((found.load() for found in entry_points(group=group) if found.name == name), None)
