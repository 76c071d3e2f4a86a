"""The scales at which claims are checked."""

from __future__ import annotations

from dataclasses import dataclass

from birthlens.config.run import RunConfig
from birthlens.errors import BirthlensError


@dataclass(frozen=True)
class Tier:
    """A scale at which claims are checked: the base of every config, and how many seeds."""

    name: str
    base: tuple[str, ...]
    seeds: int

    @property
    def config(self) -> RunConfig:
        """The base config."""
        return RunConfig.parse({}, self.base)


_SHARED = ("model.d_model=128", "training.steps=400", "checkpoints.every=200", "evaluation.every=10")
TIERS = {
    "laptop": Tier("laptop", (*_SHARED, "task.context=64", "training.batch_size=128", "evaluation.batch_size=128"), 5),
    "paper": Tier("paper", (*_SHARED, "task.context=256", "training.batch_size=512", "evaluation.batch_size=128"), 5),
}
"""laptop: minutes on two cores. paper: the authors' setting (T = 256, batch 512), hours."""


def tier_named(name: str) -> Tier:
    """Return a tier; raise BirthlensError for an unknown name."""
    if name not in TIERS:
        raise BirthlensError(f"tier = {name!r} is unknown; valid are {', '.join(TIERS)}.")
    return TIERS[name]
