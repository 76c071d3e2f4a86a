"""Checkpoints of one model as a series of Hugging Face directories, each with its step; nothing is fetched.

a folder of folders     step1000, step_1000, step-1000 or checkpoint-1000, in the order of their numbers
the cache of the hub    models--ORG--NAME with refs/step1000, each of which names a folder of snapshots/
a YAML file             a mapping of steps to directories, relative to the file
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from birthlens.config.schedule import chosen_steps
from birthlens.errors import BirthlensError
from birthlens.labels import shown
from birthlens.reading import read_mapping

_NAME = re.compile(r"(?:step|checkpoint)[-_]?(\d{1,12})")
_HASH = re.compile(r"[0-9a-f]{7,64}")


@dataclass(frozen=True)
class Series:
    """Directories of models by step, ascending."""

    path: Path
    directories: dict[int, Path]

    @property
    def steps(self) -> list[int]:
        """Every step."""
        return list(self.directories)

    def select(self, text: str) -> list[int]:
        """Read a choice of steps: `config.schedule.chosen_steps`."""
        return chosen_steps(text, self.steps, self.path)


def series_at(path: str | Path) -> Series | None:
    """Return the series at a path; None if there is none.

    Raises:
        BirthlensError: for two directories of one step, a reference without its snapshot, or an invalid file.
    """
    place = Path(path)
    if place.is_file() and place.suffix in (".yaml", ".yml"):
        return Series(place, _checked(place, _of_file(place)))
    if (place / "refs").is_dir() and (place / "snapshots").is_dir():
        found = _of_cache(place)
    elif place.is_dir() and not (place / "config.json").exists() and not (place / "run.json").exists():
        found = [(int(name[1]), one) for one in sorted(place.iterdir()) if (name := _NAME.fullmatch(one.name))]
        found = [(step, one) for step, one in found if one.is_dir()]
    else:
        return None
    return Series(place, _checked(place, found)) if found else None


def _of_cache(place: Path) -> list[tuple[int, Path]]:
    found = []
    for file in sorted((place / "refs").iterdir()):
        name = _NAME.fullmatch(file.name)
        if name is None:
            continue
        snapshot = file.read_text(encoding="utf-8", errors="replace").strip()
        if not _HASH.fullmatch(snapshot) or not (place / "snapshots" / snapshot).is_dir():
            raise BirthlensError(f"{file} names the snapshot {shown(snapshot, 80)}, which {place} does not hold.")
        found.append((int(name[1]), place / "snapshots" / snapshot))
    return found


def _of_file(file: Path) -> list[tuple[int, Path]]:
    found = []
    for step, directory in read_mapping(file, "series").items():
        number = str(step)
        if not (number.isascii() and number.isdigit() and len(number) <= 12 and isinstance(directory, str)):
            raise BirthlensError(f"{file}: {shown(step)}: {shown(directory)}; map steps to directories, as 1000: path.")
        found.append((int(number), file.parent / directory))
    if not found:
        raise BirthlensError(f"{file} maps no step to a directory.")
    return found


def _checked(place: Path, found: list[tuple[int, Path]]) -> dict[int, Path]:
    directories: dict[int, Path] = {}
    for step, directory in sorted(found):
        if step in directories:
            raise BirthlensError(
                f"{place} has two directories of step {step}, {directories[step].name} and {directory.name}; keep one."
            )
        directories[step] = directory
    return directories
