"""resume.safetensors: the optimiser's tensors at the last kept step, checked against the updates before it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from birthlens.config.run import OptimiserConfig, RunConfig
from birthlens.errors import BirthlensError
from birthlens.model.weights import check_tensors, load_with_metadata
from birthlens.runs.files import RESUME
from birthlens.runs.header import check_of
from birthlens.runs.metrics import updates

Array = np.ndarray
CLAMP = "clamp/"
"""The prefix of tensors that clamps keep from earlier steps, as in clamp/NUMBER/NAME."""


def read_state(path: Path, header: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read the optimiser's tensors and the notes, which contain at least `step`.

    Raises:
        BirthlensError: if the file is missing or damaged.
    """
    file = path / RESUME
    tensors, metadata = load_with_metadata(file, check_of(header, RESUME))
    try:
        notes = json.loads(metadata.get("notes", ""))
    except (ValueError, RecursionError):
        notes = None
    if not isinstance(notes, dict) or type(notes.get("step")) is not int:
        raise BirthlensError(f"{file} does not say which step it belongs to; the run is damaged, train again.")
    loss = notes.get("last_kept_loss")
    if loss is not None and (type(loss) not in (int, float) or not math.isfinite(loss)):
        raise BirthlensError(f"{file} has last_kept_loss = {loss!r}, which is not a loss; the run is damaged.")
    if notes.get("engine") != header["engine"]["name"]:
        raise BirthlensError(
            f"{file} is of the engine {notes.get('engine')!r}, the run of {header['engine']['name']!r}; "
            "the run is damaged."
        )
    if header["format"] > 1 and not isinstance(notes.get("metrics"), str):
        raise BirthlensError(f"{file} does not say where metrics.jsonl ended; the run is damaged.")
    return tensors, notes


def check_state(
    path: Path,
    config: RunConfig,
    shapes: Mapping[str, tuple[int, ...]],
    state: tuple[Mapping[str, Array], Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]] | None,
) -> None:
    """Raise BirthlensError if a state does not match the updates in the rows of metrics.jsonl.

    `shapes` are those of the parameters. A matrix that no update has changed yet has no state; any other has all tensors of
    the optimiser, in the matrix's shape. Without `rows` (a fork, a run with clamps), any matrix may or may not have changed.
    """
    file = path / RESUME
    tensors, notes = state
    step = notes["step"]
    if not 0 <= step <= config.training.steps:
        raise BirthlensError(f"{file} belongs to step {step} of {config.training.steps}; the run is damaged.")
    expected: dict[str, tuple[int, ...]] = {}
    for name in config.trained:
        if rows is None:
            count = int(any(key in tensors for key in _shapes_of(config.optimiser, name, shapes[name])))
        else:
            count = updates(rows, config.training.freeze_until.get(name, 0), step)
        if count:
            expected |= _shapes_of(config.optimiser, name, shapes[name])
        found = tensors.get(f"step/{name}")
        if rows is not None and count and found is not None and found.size == 1 and found.item() != count:
            raise BirthlensError(
                f"{file} counts {found.item():g} updates of {name}, but metrics.jsonl {count} up to step {step}; "
                "the run is damaged."
            )
    numbers = [name.split("/")[1] for name in tensors if name.startswith(CLAMP)]
    if wrong := [number for number in numbers if number not in map(str, range(len(config.training.clamps)))]:
        raise BirthlensError(f"{file} has the memory of clamp {wrong[0]!r}, which the run lacks; the run is damaged.")
    optimiser = {name: tensor for name, tensor in tensors.items() if not name.startswith(CLAMP)}
    check_tensors(file, optimiser, expected)


def _shapes_of(optimiser: OptimiserConfig, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return the tensors that torch's optimiser keeps for a matrix that it has changed."""
    if optimiser.kind == "adamw":
        return {f"step/{name}": (1,), f"exp_avg/{name}": shape, f"exp_avg_sq/{name}": shape}
    return {f"momentum_buffer/{name}": shape} if optimiser.momentum else {}
