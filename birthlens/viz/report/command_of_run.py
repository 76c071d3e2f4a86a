"""The shortest command that trains a run again."""

from __future__ import annotations

import shlex

from birthlens.config.differences import overrides
from birthlens.config.presets import PRESETS, preset
from birthlens.config.run import RunConfig
from birthlens.runs.run import Run


def command_of(run: Run) -> str:
    """Return the command that repeats a run: `birthlens fork` for a fork, `birthlens train` for any other."""
    if run.parent is None:
        return command(run.config, str(run.path))
    words = [str(run.parent.path), str(run.path), "--at", str(run.parent.step), *run.parent.changes]
    for clamp in run.parent.clamps:
        words += ["--clamp", clamp]
    return f"birthlens fork {' '.join(map(shlex.quote, words))}"


def command(config: RunConfig, out: str) -> str:
    """Return `birthlens train OUT ...` with the preset that needs the fewest overrides, and those overrides.

    Example:
        >>> command(preset("paper", ["model.d_model=64"]), "runs/mine")
        'birthlens train runs/mine --preset paper model.d_model=64'
    """
    choices: list[tuple[str, list[str]]] = [("", overrides(RunConfig(), config))]
    choices += [(f" --preset {name}", overrides(preset(name), config)) for name in PRESETS]
    option, needed = min(choices, key=lambda choice: len(choice[1]))
    words = "".join(f" {shlex.quote(word)}" for word in needed)
    return f"birthlens train {shlex.quote(out)}{option}{words}"
