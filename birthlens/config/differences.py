"""The settings in which two configs differ, as data and as `section.key=value` words."""

from __future__ import annotations

import json
from typing import Any

from birthlens.config.run import RunConfig


def overrides(base: RunConfig, wanted: RunConfig) -> list[str]:
    """List the `section.key=value` words that turn one config into another.

    Example:
        >>> overrides(RunConfig(), RunConfig.parse({"task": {"context": 48}}))
        ['task.context=48']
    """
    kind = []
    if base.task.kind != wanted.task.kind:
        kind = [f"task.kind={wanted.task.kind}"]
        base = base.changed(task=type(wanted.task)())
    return kind + [f"{name}={_yaml(new)}" for name, (_, new) in differences(base, wanted).items()]


def differences(first: RunConfig, second: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the settings in which two configs differ: name -> (first, second), None if one has no such setting."""
    one = settings(first)
    two = settings(second)
    names = dict.fromkeys([*one, *two])
    return {name: (one.get(name), two.get(name)) for name in names if one.get(name) != two.get(name)}


def settings(config: RunConfig) -> dict[str, Any]:
    """Flatten a config to section.key -> value."""
    tree = config.to_data()
    tree["task"] = {"kind": config.task.kind, **tree["task"]}
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}


def _yaml(value: Any) -> str:
    """Write a value as YAML in one line, text without quotes where it reads back unchanged."""
    import yaml

    if isinstance(value, str):
        try:
            if yaml.safe_load(value) == value:
                return value
        except yaml.YAMLError:
            pass
    return json.dumps(value)
