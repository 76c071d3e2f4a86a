"""The shortest command that makes a run again."""

from __future__ import annotations

import json
import shlex
from typing import Any

from birthlens.config.presets import PRESETS, preset
from birthlens.config.run import RunConfig


def command(config: RunConfig, out: str) -> str:
    """Return `birthlens train OUT ...` with the preset that needs the fewest overrides, and these.

    Example:
        >>> command(preset("paper", ["model.d_model=64"]), "runs/mine")
        'birthlens train runs/mine --preset paper model.d_model=64'
    """
    choices: list[tuple[str, list[str]]] = [("", overrides(RunConfig(), config))]
    choices += [(f" --preset {name}", overrides(preset(name), config)) for name in PRESETS]
    option, needed = min(choices, key=lambda choice: len(choice[1]))
    words = "".join(f" {shlex.quote(word)}" for word in needed)
    return f"birthlens train {shlex.quote(out)}{option}{words}"


def overrides(base: RunConfig, wanted: RunConfig) -> list[str]:
    """List the `section.key=value` words that turn one config into another.

    Example:
        >>> overrides(RunConfig(), preset("demo", ["training.steps=9"]))[0]
        'task.context=48'
    """
    return [f"{name}={_yaml(new)}" for name, (_, new) in differences(base, wanted).items()]


def differences(first: RunConfig, second: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the settings in which two configs differ: name -> (first, second)."""
    one, two = settings(first), settings(second)
    return {name: (one[name], two[name]) for name in one if one[name] != two[name]}


def settings(config: RunConfig) -> dict[str, Any]:
    """Flatten a config to section.key -> value."""
    tree = config.to_data()
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}


def _yaml(value: Any) -> str:
    """Spell a value as YAML in one line; text goes without quotes where it reads back as itself."""
    import yaml

    if isinstance(value, str):
        try:
            if yaml.safe_load(value) == value:
                return value
        except yaml.YAMLError:
            pass
    return json.dumps(value)
