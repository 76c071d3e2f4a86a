"""A grid of runs: named cases of one base config, with seeds."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from birthlens.config.presets import preset
from birthlens.config.run import RunConfig
from birthlens.errors import BirthlensError
from birthlens.labels import shown
from birthlens.reading import read_mapping

MOST_RUNS = 10_000
"""The most runs in a grid."""
KEYS = ("preset", "overrides", "cases", "axes", "seeds")
_SEEDS = ("seeds.init", "seeds.data")


@dataclass(frozen=True)
class Grid:
    """Named cases of one base config (each a list of overrides), each of them with every seed.

    A seed sets the initial weights and the training data; the held-out batch stays the same. Without `seeds`, every case is
    one run with the seeds of its config.

    Example:
        >>> grid = Grid(RunConfig(), {"fixed": (), "random": ("task.triggers=random",)}, seeds=(0, 1))
        >>> [(case, seed, config.task.triggers) for (case, seed), config in grid.configs().items()][1:3]
        [('fixed', 1, 'fixed'), ('random', 0, 'random')]
    """

    base: RunConfig
    cases: Mapping[str, Sequence[str]]
    seeds: Sequence[int] | None = None

    def configs(self) -> dict[tuple[str, int], RunConfig]:
        """Return the config of every (case, seed).

        Raises:
            BirthlensError: if a case sets a seed that `seeds` sets too, or an override does not fit.
        """
        tree = self.base.to_data()
        found: dict[tuple[str, int], RunConfig] = {}
        for case, overrides in self.cases.items():
            config = RunConfig.parse(tree, list(overrides))
            own = {"seeds.init": config.seeds.init, "seeds.data": config.seeds.data}
            for seed in (config.seeds.init,) if self.seeds is None else self.seeds:
                if self.seeds is None:
                    found[case, seed] = config
                    continue
                if taken := [name for name, value in own.items() if value not in (0, seed)]:
                    raise _seeds_twice(f"{taken[0]} = {own[taken[0]]}")
                found[case, seed] = config.changed(seeds=config.seeds.changed(init=seed, data=seed))
        return found

    @classmethod
    def parse(cls, tree: Mapping[Any, Any], seeds: int | None = None) -> Grid:
        """Build from plain data; every key may be left out.

        preset, overrides (a list of section.key=value), cases (name -> overrides), axes (section.key -> values: every
        combination of them, in every case), seeds (how many). `seeds` replaces the number of the data.

        Raises:
            BirthlensError: for unknown keys, parts of another shape, a setting that is made twice, or too many runs.
        """
        if unknown := [key for key in tree if key not in KEYS]:
            raise BirthlensError(f"sweep: {shown(unknown[0])} is unknown; valid are {', '.join(KEYS)}.")
        overrides = _words("overrides", tree.get("overrides"))
        cases = {str(name): _words(f"cases.{name}", words) for name, words in _mapping("cases", tree).items()}
        cases = cases or {"base": []}
        axes = {str(name): _values(str(name), values) for name, values in _mapping("axes", tree).items()}
        count = seeds if seeds is not None else tree.get("seeds")
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise BirthlensError(f"sweep: seeds = {shown(count)}; give how many, 1 or more.")
        runs = len(cases) * math.prod(map(len, axes.values())) * (count or 1)
        if runs > MOST_RUNS:
            raise BirthlensError(f"sweep: it has {shown(runs)} runs; at most {MOST_RUNS} are possible.")
        _check_once(overrides, cases, axes, count)
        points = [list(point) for point in product(*axes.values())]
        listed = [
            (" ".join([*([case] if case != "base" or not point else []), *point]), [*words, *point])
            for case, words in cases.items()
            for point in points
        ]
        if (twice := Counter(name for name, _ in listed).most_common(1)[0])[1] > 1:
            raise BirthlensError(f"sweep: two cases have the name {shown(twice[0])}; give each case and value once.")
        return cls(_base(tree, overrides), dict(listed), None if count is None else tuple(range(count)))

    @classmethod
    def load(cls, path: str | Path, seeds: int | None = None) -> Grid:
        """Read a YAML or JSON file with the keys of `parse`; `seeds` replaces its number."""
        return cls.parse(read_mapping(path, "sweep"), seeds)


def _base(tree: Mapping[Any, Any], overrides: list[str]) -> RunConfig:
    name = tree.get("preset")
    if name is None:
        return RunConfig.parse({}, overrides)
    if not isinstance(name, str):
        raise BirthlensError(f"sweep: preset = {shown(name)}; give the name of a preset.")
    return preset(name, overrides)


def _mapping(key: str, tree: Mapping[Any, Any]) -> Mapping[Any, Any]:
    part = tree.get(key)
    if part is None:
        return {}
    if not isinstance(part, Mapping) or not all(isinstance(values, list | tuple | None) for values in part.values()):
        raise BirthlensError(f"sweep: {key} = {shown(part)}; it must map names to lists.")
    if len({str(name) for name in part}) < len(part):
        raise BirthlensError(f"sweep: {key} = {shown(part)}; two of its names are the same text.")
    return part


def _words(key: str, words: object) -> list[str]:
    """Return a list of overrides."""
    if words is None:
        return []
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise BirthlensError(f"sweep: {key} = {shown(words)}; give a list of section.key=value.")
    return list(words)


def _values(axis: str, values: Sequence[object] | None) -> list[str]:
    """Return the values of an axis as overrides."""
    if not values:
        raise BirthlensError(f"sweep: axes.{axis} = {shown(values)}; list at least one value.")
    if "=" in axis:
        raise BirthlensError(f"sweep: axes.{axis}: the name of an axis is section.key, without '='.")
    try:
        return [f"{axis}={json.dumps(value)}" for value in values]
    except (TypeError, ValueError, RecursionError):
        raise BirthlensError(f"sweep: axes.{axis} = {shown(values)}; list plain values.") from None


def _check_once(overrides: list[str], cases: Mapping[str, list[str]], axes: Mapping[str, Any], count: object) -> None:
    """Raise BirthlensError if two parts of a sweep set the same thing, so that one of them would be without effect."""
    inside = {_name(word): f"cases.{case}" for case, words in cases.items() for word in words}
    if both := [axis for axis in axes if axis.strip() in inside]:
        raise BirthlensError(f"sweep: {both[0]} is set in {inside[both[0].strip()]} and listed in axes; leave one out.")
    everywhere = {_name(word): "overrides" for word in overrides} | inside | {axis.strip(): "axes" for axis in axes}
    if count is not None and (taken := [name for name in _SEEDS if name in everywhere]):
        raise _seeds_twice(f"{taken[0]} is set in {everywhere[taken[0]]}")


def _name(word: str) -> str:
    return word.partition("=")[0].strip()


def _seeds_twice(what: str) -> BirthlensError:
    return BirthlensError(
        f"sweep: {what}, but the number of seeds sets seeds.init and seeds.data of every run; leave one of the two out "
        "(axes: {seeds.init: [0, 1, 2]} varies the initial weights alone)."
    )
