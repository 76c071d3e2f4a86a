"""Grids of runs on the cores of this machine: missing runs are trained, unfinished ones continued, finished ones reused.

The path of a run is  folder / digest of its config , so that equal configs share one run. A directory is used only if it is
complete and its config, its corpus and the code that made it are the requested ones (`standing`).

Each core gets one process of one thread (`workers`: runs share nothing, and the fused engine gives the same bits for any
number of threads); `processes=1` trains one run after the other in this process, with its own threads.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from birthlens.config.run import RunConfig
from birthlens.devices import DEFAULT, Execution, free_memory
from birthlens.errors import BirthlensError
from birthlens.runs.files import HEADER
from birthlens.runs.lock import locked
from birthlens.runs.reuse import cost, standing, write_cost
from birthlens.runs.run import Run
from birthlens.system import out_of_memory
from birthlens.tasks.kinds import task_of
from birthlens.training.engines import obstacle_to_stacking
from birthlens.training.ensemble import chains_of, shape_of
from birthlens.training.footprint import how_many_fit, trained_tokens
from birthlens.training.grid import Grid
from birthlens.training.loop import DivergedError
from birthlens.training.many import check_made_so, joins, train_many
from birthlens.training.workers import workers

ENSEMBLE = 64
"""Runs in a task of a pool that are trained together, unless the caller says otherwise."""
State = Literal["trained", "continued", "reused", "failed"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one run: `message` says why it failed, why it was trained again, or why other code's run is reused.

    `seconds` and `cpu_seconds` are the cost of the whole run, over all its sessions.
    """

    path: Path
    state: State
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    message: str = ""


def run_path(config: RunConfig, folder: str | Path) -> Path:
    """Return the directory of a config's run: the first 16 digits of the SHA-256 of its canonical JSON."""
    text = json.dumps(config.to_data(), sort_keys=True, separators=(",", ":"))
    return Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]


def sweep(
    configs: Sequence[RunConfig],
    folder: str | Path,
    processes: int | None = None,
    execution: Execution = DEFAULT,
    pool: Executor | None = None,
    bundle: int | None = None,
) -> Iterator[Outcome]:
    """Bring every run to its end and yield outcomes as they arrive; equal configs are trained once.

    A run that fails in any way (it diverges, its directory contains something else, its process is killed) has the outcome
    "failed" with the reason, and the others continue. On a device other than the CPU, runs of one shape are trained together
    in this process, as many at a time as fit its memory. On the CPU each run is one task, because processes are faster there
    than ensembles (docs/many_runs.md). `pool` runs the tasks instead of this machine's processes, `bundle` runs in each: by
    default one, or `ENSEMBLE` runs of one shape if they are trained together. Its workers choose the device, which may be
    auto, and stack as many runs of a task as fit their memory.
    """
    paths = {run_path(config, folder): config for config in configs}
    rest = paths
    if pool is not None:
        tasks = _bundled(paths, bundle, execution)
        waiting = {pool.submit(prepare_all, task, execution): [path for path, _ in task] for task in tasks}
        for future in as_completed(waiting):
            yield from outcomes_of(future, waiting[future])
        return
    if execution.stacks:
        stacks, rest = stacks_of(paths, execution)
        for stack in stacks:
            yield from prepare_together(stack, execution)
    if not rest:
        return
    with workers(processes) as executor:
        alone = {executor.submit(prepare_all, [item], execution.alone): [item[0]] for item in rest.items()}
        for future in as_completed(alone):
            yield from outcomes_of(future, alone[future])


def _bundled(
    runs: Mapping[Path, RunConfig], bundle: int | None, execution: Execution
) -> list[list[tuple[Path, RunConfig]]]:
    """Divide runs into the tasks of a pool; runs of one shape are together if they are trained as ensembles."""
    size = bundle or (ENSEMBLE if execution.stacks else 1)
    groups: list[Mapping[Path, RunConfig]] = [runs]
    if execution.stacks:
        shaped, rest = by_shape(runs)
        groups = [*shaped, rest]
    listed = [list(group.items()) for group in groups]
    return [items[first : first + size] for items in listed for first in range(0, len(items), size)]


def prepare_all(runs: Sequence[tuple[Path, RunConfig]], execution: Execution = DEFAULT) -> list[Outcome]:
    """Prepare the runs of one task: as ensembles of those that fit the memory together, or one after the other."""
    rest = dict(runs)
    together: list[Outcome] = []
    if execution.stacks:
        try:
            execution = execution.here(trained_tokens(rest.values()))
        except BirthlensError as error:
            return [Outcome(path, "failed", message=f"{path}: {error}") for path in rest]
    if execution.stacks:
        stacks, rest = stacks_of(rest, execution)
        together = [outcome for stack in stacks for outcome in prepare_together(stack, execution)]
    return [*together, *(prepare(config, path, execution.alone) for path, config in rest.items())]


def outcomes_of(future: Future[list[Outcome]], paths: Sequence[Path]) -> list[Outcome]:
    """Return the outcomes of a task's runs, even if its worker was killed or lost."""
    try:
        return future.result()
    except Exception as error:  # pools of other libraries have errors of their own
        return [Outcome(path, "failed", message=f"{path}: {_reason(error)}") for path in paths]


def stacks_of(
    runs: Mapping[Path, RunConfig], execution: Execution
) -> tuple[list[dict[Path, RunConfig]], dict[Path, RunConfig]]:
    """Divide runs into ensembles, each of one shape and no larger than the memory, and runs that cannot be members."""
    groups, rest = by_shape(runs)
    free = free_memory(execution.device)
    stacks = []
    for group in groups:
        items = list(group.items())
        config = items[0][1]
        most = max(1, how_many_fit(config, len(chains_of([config])[0]), free))
        stacks += [dict(items[first : first + most]) for first in range(0, len(items), most)]
    return stacks, rest


def by_shape(runs: Mapping[Path, RunConfig]) -> tuple[list[dict[Path, RunConfig]], dict[Path, RunConfig]]:
    """Group runs by their shape; those that cannot be members of an ensemble are apart."""
    groups: dict[str, dict[Path, RunConfig]] = {}
    rest: dict[Path, RunConfig] = {}
    for path, config in runs.items():
        begun = (path / HEADER).exists()
        if obstacle_to_stacking(config) is not None or (begun and not joins(path)):
            rest[path] = config
            continue
        try:
            chain = chains_of([config])[0]
            task_of(config.task, chain).check_loss(config.training.loss)
        except (BirthlensError, OSError):
            rest[path] = config  # it fails there alone, with its own message
            continue
        shape = json.dumps(shape_of(config, len(chain)), sort_keys=True)
        groups.setdefault(shape, {})[path] = config
    return list(groups.values()), rest


def prepare_together(runs: Mapping[Path, RunConfig], execution: Execution) -> Iterator[Outcome]:
    """Train, continue or reuse runs of one shape as one ensemble; yield an outcome for each as it ends."""
    from birthlens.training.replay import replayed

    states: dict[Path, tuple[State, str]] = {}
    begun = time.perf_counter()
    cpu = time.process_time()
    with ExitStack() as locks:
        for path, config in runs.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                locks.enter_context(locked(path.with_name(f".{path.name}.lock"), wait=True))
                states[path] = standing(config, path, replayed)
                if states[path][0] != "trained":
                    check_made_so(Run(path), execution)
            except Exception as error:  # one failing run must not stop the others
                states.pop(path, None)
                yield Outcome(path, "failed", message=f"{path}: {_reason(error)}")
        for path, (state, why) in states.items():
            if state == "reused":
                yield Outcome(path, state, *cost(path), why)
        todo = [path for path, (state, _) in states.items() if state != "reused"]
        failed: set[Path] = set()
        try:
            for number, event in train_many([runs[path] for path in todo], todo, execution) if todo else ():
                if isinstance(event, DivergedError):
                    failed.add(todo[number])
                    yield Outcome(todo[number], "failed", message=f"{todo[number]}: {event}")
        except Exception as error:
            for path in todo:
                if path not in failed:
                    yield Outcome(path, "failed", message=f"{path}: {_reason(error)}")
            return
        for path in todo:
            if path in failed:
                continue
            spent = ((time.perf_counter() - begun) / len(todo), (time.process_time() - cpu) / len(todo))
            write_cost(path, [old + new for old, new in zip(cost(path), spent, strict=True)])
            yield Outcome(path, states[path][0], *cost(path), states[path][1])


def runs_of(grid: Grid, folder: str | Path, processes: int | None = None) -> dict[tuple[str, int], Run]:
    """Train the missing runs of a grid and open all of them.

    Raises:
        BirthlensError: if a run failed; the message is its reason.
    """
    configs = grid.configs()
    for outcome in sweep(list(configs.values()), folder, processes):
        if outcome.state == "failed":
            raise BirthlensError(outcome.message)
    return {key: Run(run_path(config, folder)) for key, config in configs.items()}


def trained(config: RunConfig, folder: str | Path) -> Run:
    """Return the finished run of a config: trained or continued in `folder`, or reused if it matches.

    Raises:
        BirthlensError: if it is unavailable; the message is the reason.
    """
    outcome = prepare(config, run_path(config, folder))
    if outcome.state == "failed":
        raise BirthlensError(outcome.message)
    return Run(outcome.path)


def prepare(config: RunConfig, path: Path, execution: Execution = DEFAULT) -> Outcome:
    """Train, continue or reuse the run at `path`; a run that fails is an outcome, not an error.

    If another process is working on it, wait, and then use what it made.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.name}.lock"), wait=True):
            return _prepare(config, path, execution)
    except Exception as error:  # one failing run must not stop the others of a grid; the outcome has the reason
        spent = (time.perf_counter() - wall, time.process_time() - cpu)
        return Outcome(path, "failed", *spent, f"{path}: {_reason(error)}")


def _prepare(config: RunConfig, path: Path, execution: Execution) -> Outcome:
    from birthlens.training.recording import resume, train_to_disk
    from birthlens.training.replay import replayed

    wall, cpu = time.perf_counter(), time.process_time()
    state, why = standing(config, path, replayed)
    if state != "trained":
        check_made_so(Run(path), execution)
    if state != "reused":
        for _ in train_to_disk(config, path, execution) if state == "trained" else resume(path):
            pass
        spent = (time.perf_counter() - wall, time.process_time() - cpu)
        write_cost(path, [old + new for old, new in zip(cost(path), spent, strict=True)])
    return Outcome(path, state, *cost(path), why)


def _reason(error: Exception) -> str:
    """Return why a run failed."""
    if isinstance(error, BirthlensError | OSError):
        return str(error)
    if out_of_memory(error):
        return "out of memory; use a smaller batch, context, vocabulary or model."
    return f"{type(error).__name__}: {error}"
