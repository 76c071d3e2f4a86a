"""The origin of a fork: the run and the step that it started from, and what it changed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from birthlens.errors import BirthlensError


@dataclass(frozen=True)
class Parent:
    """The run and the step that a fork started from, and what it changed: settings and clamps, as text."""

    path: Path
    step: int
    changes: tuple[str, ...] = ()
    clamps: tuple[str, ...] = ()

    def __str__(self) -> str:
        changed = ", ".join([*self.changes, *(f"clamp '{clamp}'" for clamp in self.clamps)])
        return f"forked from {self.path} at step {self.step}, {changed or 'without a change'}"

    @classmethod
    def read(cls, home: Path, data: Any) -> Parent:
        """Read the parent from run.json of the fork in `home`; the parent's path is relative to it.

        Raises:
            BirthlensError: if it is damaged.
        """
        try:
            path = Path(os.path.normpath(home / data["run"]))
            words = [tuple(map(str, data[key])) for key in ("changes", "clamps")]
            return cls(path, int(data["step"]), *words)
        except (TypeError, KeyError, ValueError):
            raise BirthlensError(f"{home / 'run.json'} has a damaged 'parent'; restore it or fork again.") from None

    def to_data(self, home: Path) -> dict[str, Any]:
        """Return plain data for run.json of the fork in `home`."""
        relative = os.path.relpath(self.path.resolve(), home.resolve())
        path = Path(relative).as_posix()
        return {"run": path, "step": self.step, "changes": list(self.changes), "clamps": list(self.clamps)}
