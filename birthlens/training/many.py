"""Training many runs together to disk: each member is an ordinary run, and is continued, read and locked as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from birthlens.config.run import RunConfig
from birthlens.devices import DEFAULT, Execution, free_memory
from birthlens.errors import BirthlensError
from birthlens.labels import counted
from birthlens.runs.files import HEADER
from birthlens.runs.lock import only_writer
from birthlens.runs.run import Run
from birthlens.runs.writer import directory_of
from birthlens.tasks.corpus import BigramStatistics
from birthlens.training.ensemble import Ensemble, Event, chains_of
from birthlens.training.footprint import how_many_fit
from birthlens.training.loop import DivergedError
from birthlens.training.recording import Recorder, check_constants, new_recorder, rewound
from birthlens.training.stack import Member


def train_many(
    configs: Sequence[RunConfig],
    folders: Sequence[str | Path] | None = None,
    execution: Execution = DEFAULT,
) -> Iterator[Event]:
    """Train runs of one shape as one tensor program; yield (number, record) for every step of every member.

    A member that diverges stops alone: its event contains the error instead of a record. With `folders`, member i is
    written to folders[i] as an ordinary run: a new one is started, and an unfinished one is continued from its last kept
    step. A kept step is on disk when it is yielded, and survives if the process is killed.

    Raises:
        BirthlensError: if members do not share a shape, do not fit the memory, or a folder cannot be used.

    Example:
        >>> base = RunConfig.parse({"model": {"d_model": 8}, "task": {"context": 12}}, ["training.steps=2"])
        >>> configs = [base.changed(seeds=base.seeds.changed(init=seed)) for seed in range(3)]
        >>> [(number, record.step) for number, record in train_many(configs)][-3:]
        [(0, 2), (1, 2), (2, 2)]
    """
    chains = chains_of(configs)
    if configs:
        check_memory(configs, chains, execution)
    if folders is None:
        yield from Ensemble(configs, chains, execution=execution).train()
        return
    if len(folders) != len(configs):
        raise BirthlensError(f"{len(configs)} configs, but {counted(len(folders), 'folder')}; give one for each.")
    with ExitStack() as locks:
        pairs = zip(configs, folders, strict=True)
        runs = [_opened(config, Path(folder), locks, execution) for config, folder in pairs]
        yield from _written(configs, chains, [Path(folder) for folder in folders], runs, execution)


def check_memory(configs: Sequence[RunConfig], chains: Sequence[BigramStatistics], execution: Execution) -> None:
    """Raise BirthlensError if the weights of the members and one piece of their sequences do not fit the memory."""
    fit = how_many_fit(configs[0], len(chains[0]), free_memory(execution.device))
    if fit < len(configs):
        raise BirthlensError(
            f"{counted(len(configs), 'run')} do not fit the free memory of {execution.device}; {fit} fit at once."
        )


def _opened(config: RunConfig, folder: Path, locks: ExitStack, execution: Execution) -> Run | None:
    """Lock a member's directory, and return the run in it, if there is one."""
    if not (folder / HEADER).exists():
        locks.enter_context(only_writer(directory_of(folder)))
        return None
    locks.enter_context(only_writer(Run(folder).path))
    run = Run(folder)
    if run.config != config:
        raise BirthlensError(f"out = {str(folder)!r} holds a run of another config; choose another directory.")
    if obstacle := obstacle_to_joining(run):
        raise BirthlensError(f"{folder} {obstacle}; continue it with `birthlens train OUT --resume`.")
    check_made_so(run, execution)
    return run


def check_made_so(run: Run, execution: Execution) -> None:
    """Raise BirthlensError if a run was begun with another precision or sampler, which its config does not say."""
    for field in ("precision", "sampler"):
        known = run.header["engine"].get(field, getattr(DEFAULT, field))
        wanted = getattr(execution, field)
        if known != wanted:
            raise BirthlensError(f"{field} = {wanted!r}: the run in {run.path} has {known}; choose another directory.")


def obstacle_to_joining(run: Run) -> str | None:
    """Return why an existing run cannot continue in an ensemble; None if it can."""
    engine = run.header["engine"]["name"]
    return None if engine == Member.name else f"was begun with the engine {engine}, which trains one run at a time"


def joins(path: Path) -> bool:
    """Return whether the run in a directory can continue in an ensemble; one that cannot be read is judged elsewhere."""
    try:
        return obstacle_to_joining(Run(path)) is None
    except BirthlensError:
        return True


def _written(
    configs: Sequence[RunConfig],
    chains: Sequence[BigramStatistics],
    paths: Sequence[Path],
    runs: Sequence[Run | None],
    execution: Execution,
) -> Iterator[Event]:
    """Train the members and write their records."""
    continued = [None if run is None else rewound(run) for run in runs]
    begun_with = [config if found is None else found[1] for config, found in zip(configs, continued, strict=True)]
    states = [None if found is None else found[2] for found in continued]
    ensemble = Ensemble(begun_with, chains, states, execution)
    recorders = []
    for config, path, run, found, trainer in zip(configs, paths, runs, continued, ensemble.trainers, strict=True):
        if run is None or found is None:
            recorders.append(new_recorder(trainer, config, path))
        else:
            check_constants(run, trainer)
            recorders.append(Recorder(found[0], trainer))
    for number, event in ensemble.train():
        if isinstance(event, DivergedError):
            recorders[number].diverged()
        else:
            recorders[number].take(event)
        yield number, event
