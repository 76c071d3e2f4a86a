"""Grids of runs on the cores of this machine: what is missing is trained, what is unfinished continued, the rest used again.

A run lives in  folder / digest of its config , so that equal configs share one run, whatever asked for them. A directory
counts only where it is whole and its config, its corpus and the code that made it are those asked for (`standing`).

Each core gets one process of one thread (`workers`: runs share nothing, and the fused engine gives the same bits for any
number of threads); `processes=1` trains one run after the other in this process, with its own threads.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from birthlens.config.run import RunConfig
from birthlens.errors import BirthlensError
from birthlens.runs.lock import locked
from birthlens.runs.reuse import cost, standing, write_cost
from birthlens.runs.run import Run
from birthlens.system import out_of_memory
from birthlens.training.grid import Grid
from birthlens.training.workers import WorkerKilledError, workers

State = Literal["trained", "continued", "reused", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What became of one run: `message` says why it failed, why it was trained again, or why other code's run is reused.

    `seconds` and `cpu_seconds` are what the whole run has cost, over all its sessions.
    """

    path: Path
    state: State
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    message: str = ""


def run_path(config: RunConfig, folder: str | Path) -> Path:
    """Name the directory of a config's run: the first 16 digits of the SHA-256 of its canonical JSON."""
    text = json.dumps(config.to_data(), sort_keys=True, separators=(",", ":"))
    return Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]


def sweep(configs: Sequence[RunConfig], folder: str | Path, processes: int | None = None) -> Iterator[Outcome]:
    """Bring every run to its end and yield outcomes as they come; equal configs are trained once.

    A run that fails in any way (it diverges, its directory holds something else, its process is killed) is an outcome
    "failed" with the reason, and the others go on.
    """
    paths = {run_path(config, folder): config for config in configs}
    with workers(processes) as pool:
        waiting = {pool.submit(prepare, config, path): path for path, config in paths.items()}
        for future in as_completed(waiting):
            yield outcome_of(future, waiting[future])


def outcome_of(future: Future[Outcome], path: Path) -> Outcome:
    """Return the outcome of a run that was prepared in a pool, also where its process was killed."""
    try:
        return future.result()
    except WorkerKilledError as error:
        return Outcome(path, "failed", message=f"{path}: {error}")


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
        BirthlensError: where it is unavailable; the message is the reason.
    """
    outcome = prepare(config, run_path(config, folder))
    if outcome.state == "failed":
        raise BirthlensError(outcome.message)
    return Run(outcome.path)


def prepare(config: RunConfig, path: Path) -> Outcome:
    """Train, continue or reuse the run at `path`; a run that fails is an outcome, not an error.

    Where another process is at work on it, this one waits, and then uses what the other made.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.name}.lock"), wait=True):
            return _prepare(config, path)
    except Exception as error:  # one run must not take the others of a grid with it; the outcome says what it was
        spent = (time.perf_counter() - wall, time.process_time() - cpu)
        return Outcome(path, "failed", *spent, f"{path}: {_reason(error)}")


def _prepare(config: RunConfig, path: Path) -> Outcome:
    from birthlens.training.recording import resume, train_to_disk
    from birthlens.training.replay import replayed

    wall, cpu = time.perf_counter(), time.process_time()
    state, why = standing(config, path, replayed)
    if state != "reused":
        for _ in train_to_disk(config, path) if state == "trained" else resume(path):
            pass
        spent = (time.perf_counter() - wall, time.process_time() - cpu)
        write_cost(path, [old + new for old, new in zip(cost(path), spent, strict=True)])
    return Outcome(path, state, *cost(path), why)


def _reason(error: Exception) -> str:
    """Say why a run failed."""
    if isinstance(error, BirthlensError | OSError):
        return str(error)
    if out_of_memory(error):
        return "out of memory; use a smaller batch, context, vocabulary or model."
    return f"{type(error).__name__}: {error}"
