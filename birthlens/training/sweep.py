"""Grids of runs on the cores of this machine: what is missing is trained, what is unfinished continued, the rest used again.

A run lives in  folder / digest of its config , so that equal configs share one run, whatever asked for them. A directory
counts only where it is whole and its config, its corpus and the code that made it are those asked for (`standing`).

Each core gets one process of one thread (runs share nothing, and the fused engine gives the same bits for any number of
threads); `processes=1` trains one run after the other in this process, with its own threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from birthlens.config.presets import preset
from birthlens.config.run import RunConfig, read_tree
from birthlens.errors import BirthlensError
from birthlens.runs.reuse import cost, standing, write_cost
from birthlens.runs.run import Run
from birthlens.system import cores

State = Literal["trained", "continued", "reused", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What became of one run: `message` says why it failed, or why it was made anew.

    `seconds` and `cpu_seconds` are what the whole run has cost, over all its sessions.
    """

    path: Path
    state: State
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    message: str = ""


@dataclass(frozen=True)
class Grid:
    """Named cases of one base config (each a list of overrides), every one with every seed.

    A seed sets the initial weights and the training data; the held-out batch stays the same.

    Example:
        >>> grid = Grid(RunConfig(), {"fixed": (), "random": ("task.triggers=random",)}, seeds=(0, 1))
        >>> [(case, seed, config.task.triggers) for (case, seed), config in grid.configs().items()][1:3]
        [('fixed', 1, 'fixed'), ('random', 0, 'random')]
    """

    base: RunConfig
    cases: Mapping[str, Sequence[str]]
    seeds: Sequence[int] = (0,)

    def configs(self) -> dict[tuple[str, int], RunConfig]:
        """Return the config of every (case, seed)."""
        tree = self.base.to_data()
        return {
            (case, seed): RunConfig.parse(tree, [*overrides, f"seeds.init={seed}", f"seeds.data={seed}"])
            for case, overrides in self.cases.items()
            for seed in self.seeds
        }

    @classmethod
    def parse(cls, tree: Mapping[str, Any], seeds: int | None = None) -> Grid:
        """Build from plain data; every key may be left out.

        preset, overrides (a list of section.key=value), cases (name -> overrides), axes (section.key -> values: every
        combination of them, in every case), seeds (how many).

        Raises:
            BirthlensError: for unknown keys, or parts of another shape.
        """
        if unknown := sorted(set(tree) - {"preset", "overrides", "cases", "axes", "seeds"}):
            raise BirthlensError(f"sweep: {unknown[0]!r} is unknown; valid are preset, overrides, cases, axes, seeds.")
        cases, axes = tree.get("cases") or {"base": []}, tree.get("axes") or {}
        count, overrides = seeds or tree.get("seeds", 1), tree.get("overrides") or []
        if not isinstance(count, int) or count < 1:
            raise BirthlensError(f"sweep: seeds = {count!r}; give how many, 1 or more.")
        if not isinstance(overrides, list):
            raise BirthlensError(f"sweep: overrides = {overrides!r}; give a list of section.key=value.")
        for name, part in (("cases", cases), ("axes", axes)):
            if not isinstance(part, dict) or not all(isinstance(value, list) for value in part.values()):
                raise BirthlensError(f"sweep: {name} = {part!r}; it must map names to lists.")
        base = preset(tree["preset"], overrides) if "preset" in tree else RunConfig.parse({}, overrides)
        points = [[f"{axis}={json.dumps(value)}" for axis, value in zip(axes, values, strict=True)]
                  for values in product(*axes.values())]  # fmt: skip
        named = {
            " ".join([*([case] if case != "base" or not point else []), *point]): [*words, *point]
            for case, words in cases.items()
            for point in points
        }
        return cls(base, named, tuple(range(count)))

    @classmethod
    def load(cls, path: str | Path, seeds: int | None = None) -> Grid:
        """Read a YAML or JSON file of `parse`'s shape; `seeds` overrides its number."""
        return cls.parse(read_tree(path), seeds)


def run_path(config: RunConfig, folder: str | Path) -> Path:
    """Name the directory of a config's run: the first 16 digits of the SHA-256 of its canonical JSON."""
    text = json.dumps(config.to_data(), sort_keys=True, separators=(",", ":"))
    return Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]


def sweep(configs: Sequence[RunConfig], folder: str | Path, processes: int | None = None) -> Iterator[Outcome]:
    """Bring every run to its end and yield outcomes as they come; equal configs are trained once.

    A run that cannot be had (it diverges, or its directory holds something else) is an outcome "failed" with the reason, and
    the others go on.

    Raises:
        BirthlensError: where a worker process is killed; what is kept on disk is used by the next call.
    """
    paths = {run_path(config, folder): config for config in configs}
    with workers(processes) as pool, told_when_killed():
        for future in as_completed([pool.submit(prepare, config, path) for path, config in paths.items()]):
            yield future.result()


def runs_of(grid: Grid, folder: str | Path, processes: int | None = None) -> dict[tuple[str, int], Run]:
    """Train what is missing of a grid and open all its runs.

    Raises:
        BirthlensError: where a run failed; the message is its reason.
    """
    configs = grid.configs()
    for outcome in sweep(list(configs.values()), folder, processes):
        if outcome.state == "failed":
            raise BirthlensError(outcome.message)
    return {key: Run(run_path(config, folder)) for key, config in configs.items()}


def trained(config: RunConfig, folder: str | Path) -> Run:
    """Return the finished run of a config: trained or continued in `folder`, or used again where it matches.

    Raises:
        BirthlensError: where it cannot be had; the message is the reason.
    """
    outcome = prepare(config, run_path(config, folder))
    if outcome.state == "failed":
        raise BirthlensError(outcome.message)
    return Run(outcome.path)


def prepare(config: RunConfig, path: Path) -> Outcome:
    """Train, continue or reuse the run at `path`; nothing is raised for a run that cannot be had.

    Where another process is at work on it, this one waits, and then uses what the other made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        return _prepare(config, path)


def _prepare(config: RunConfig, path: Path) -> Outcome:
    from birthlens.training.recording import resume, train_to_disk

    wall, cpu = time.perf_counter(), time.process_time()
    try:
        state, why = standing(config, path)
        if state != "reused":
            for _ in train_to_disk(config, path) if state == "trained" else resume(path):
                pass
            spent = (time.perf_counter() - wall, time.process_time() - cpu)
            write_cost(path, [old + new for old, new in zip(cost(path), spent, strict=True)])
    except (BirthlensError, OSError) as error:
        return Outcome(path, "failed", time.perf_counter() - wall, time.process_time() - cpu, f"{path}: {error}")
    return Outcome(path, state, *cost(path), why)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock on a run, which the system lets go when its holder dies (where it has no such locks, go on without)."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def workers(processes: int | None = None) -> Iterator[Executor]:
    """Open a pool: a process of one thread for each core, or a thread of this process; on leaving, what waits is dropped."""
    import multiprocessing

    count = cores() if processes is None else processes
    if count < 1:
        raise BirthlensError(f"processes = {count}: it must be 1 or more.")
    pool: Executor = ThreadPoolExecutor(1)
    if count > 1:
        pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_one_thread)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def told_when_killed() -> Iterator[None]:
    """Turn the death of a worker into one sentence."""
    try:
        yield
    except BrokenProcessPool:
        raise BirthlensError(
            "a worker process was killed (out of memory?); give the same command again to continue, "
            "with fewer processes if it happens once more."
        ) from None


def _one_thread() -> None:
    """Hold a worker to one thread, let an interrupt end it quietly, and let it go when its parent goes."""
    import multiprocessing
    import signal
    import threading

    import torch
    from threadpoolctl import threadpool_limits

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    threadpool_limits(1)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def leave() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=leave, daemon=True).start()
