"""Reproduction: train what is missing, measure each claim on each seed, judge it, and save the measurements.

folder/runs/             one run for each config (`sweep`), shared by all claims that need it
folder/measurements/     one file for each claim, tier and seed; reused only if nothing changed that it depends on
                         (`identity`)
folder/scorecard.*       rewritten whenever a claim is judged (`book`)
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from birthlens.claims.book import Also, Book
from birthlens.claims.claim import Claim, Evidence
from birthlens.claims.identity import configs_of, difference, made_of
from birthlens.claims.scorecard import Measured, Result, numbers, plain
from birthlens.claims.tiers import Tier
from birthlens.config.run import RunConfig
from birthlens.runs.run import Run
from birthlens.system import cores, write_atomically
from birthlens.training.sweep import Outcome, outcomes_of, prepare_all, run_path
from birthlens.training.workers import workers

AT_ONCE = 256
"""Tasks that wait in a cluster's pool at most."""


@dataclass
class _Job:
    """One claim on one seed: the runs that it needs, by case, and the result."""

    claim: Claim
    tier: Tier
    seed: int
    configs: dict[str, RunConfig]
    paths: dict[str, Path]
    made_of: dict[str, Any]
    waiting: set[Path] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    measured: Measured | None = None


Progress = Outcome | Result
"""What `reproduce` yields: a finished run, or a judged claim."""


def reproduce(
    claims: Sequence[Claim],
    tier: Tier,
    folder: str | Path,
    processes: int | None = None,
    seeds: int | None = None,
    also: Also | None = None,
    pool: Executor | None = None,
) -> Iterator[Progress]:
    """Check claims; yield each run's outcome and each claim's result as they arrive, and keep the scorecard up to date.

    `seeds` replaces the number of seeds of the tier and of every claim. Matching runs and measurements on disk are reused,
    so an interrupted reproduction continues. `also` is called whenever the scorecard's files are written.

    A run or measurement that fails, or whose process is killed, is recorded as a problem of its claims; all others continue.
    """
    folder = Path(folder)
    (folder / "measurements").mkdir(parents=True, exist_ok=True)
    jobs = [job for claim in claims for job in _jobs(claim, tier, folder / "runs", seeds)]
    book = Book(claims, tier, folder, seeds, also)
    for claim in claims:
        if claim.reason(tier.name):
            yield book.judge(claim, [], set())
    room = (processes or cores()) + 1 if pool is None else AT_ONCE
    with workers(processes) if pool is None else nullcontext(pool) as executor:
        for event in _work(jobs, folder, executor, room):
            if isinstance(event, Outcome):
                book.costs[event.path] = event
                yield event
            elif all(job.measured for job in jobs if job.claim is event.claim):
                mine = [job for job in jobs if job.claim is event.claim]
                measured = [job.measured for job in mine if job.measured]
                yield book.judge(event.claim, measured, {path for job in mine for path in job.paths.values()})


def _work(jobs: Sequence[_Job], folder: Path, pool: Executor, room: int) -> Iterator[Outcome | _Job]:
    """Train and measure in the pool, in the order of the jobs; a job is measured as soon as its runs are finished.

    At most `room` runs wait in the pool, so that measurements do not queue behind all of them.
    """
    wanted: dict[Path, RunConfig] = {}
    for job in jobs:
        wanted |= {path: job.configs[case] for case, path in job.paths.items()}
        job.waiting = set(job.paths.values())
    to_train = deque(wanted.items())
    to_measure = deque(job for job in jobs if not job.waiting)
    pending: dict[Future[Any], _Job | Path] = {}
    while pending or to_train or to_measure:
        while to_measure and len(pending) < room:
            job = to_measure.popleft()
            pending[pool.submit(_measure, job, folder)] = job
        while to_train and len(pending) < room:
            path, config = to_train.popleft()
            pending[pool.submit(prepare_all, [(path, config)])] = path
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            finished = pending.pop(future)
            if isinstance(finished, _Job):
                finished.measured = _measured(future, finished)
                yield finished
                continue
            (outcome,) = outcomes_of(future, [finished])
            yield outcome
            for job in (job for job in jobs if outcome.path in job.waiting):
                job.waiting.discard(outcome.path)
                if outcome.state == "failed":
                    job.problems.append(outcome.message)
                if not job.waiting:
                    to_measure.append(job)


def _measured(future: Future[Measured], job: _Job) -> Measured:
    try:
        return future.result()
    except Exception as error:  # a pool of another library has errors of its own
        return Measured(job.seed, problem=str(error) or type(error).__name__)


def _measure(job: _Job, folder: Path) -> Measured:
    """Compute a claim's statistic on one seed, or read it from disk if nothing it depends on has changed."""
    if job.problems:
        return Measured(job.seed, problem="; ".join(job.problems))
    file = folder / "measurements" / f"{job.claim.id}.{job.tier.name}.seed{job.seed}.json"
    identity = {**job.made_of, "seed": job.seed, "runs": {case: path.name for case, path in job.paths.items()}}
    known = _read(file)
    again = ""
    if known:
        if known["made_of"] == identity:
            return Measured(job.seed, numbers(known["values"]), "", known["seconds"], known["cpu_seconds"])
        again = f"measured again: the earlier measurement had {difference(known['made_of'], identity)}"
    wall = time.perf_counter()
    cpu = time.process_time()
    assert job.claim.statistic is not None  # claims without one have no jobs
    try:
        runs = {case: Run(path) for case, path in job.paths.items()}
        found = job.claim.statistic(Evidence(runs, job.seed, job.claim.settings_at(job.tier.name)))
        values = {name: float(value) for name, value in found.items()}
    except (
        Exception
    ) as error:  # one failing statistic must not stop the whole reproduction; the scorecard reports the error
        return Measured(job.seed, {}, f"{type(error).__name__}: {error}")
    cost = {"seconds": round(time.perf_counter() - wall, 3), "cpu_seconds": round(time.process_time() - cpu, 3)}
    write_atomically(file, json.dumps({"made_of": identity, "values": plain(values), **cost}, indent=1).encode())
    return Measured(job.seed, values, "", **cost, again=again)


def _read(file: Path) -> dict[str, Any]:
    """Read an earlier measurement; empty if there is none, or it is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        numbers(found["values"]), dict(found["made_of"]), float(found["seconds"]), float(found["cpu_seconds"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return dict(found)


def _jobs(claim: Claim, tier: Tier, runs: Path, seeds: int | None) -> list[_Job]:
    if claim.reason(tier.name):
        return []
    count = seeds or claim.seeds.get(tier.name, tier.seeds)
    configs = configs_of(claim, tier, range(count))
    identity = made_of(claim, tier)
    jobs = []
    for seed in range(count):
        mine = {case: configs[case, seed] for case in claim.cases}
        paths = {case: run_path(config, runs) for case, config in mine.items()}
        jobs.append(_Job(claim, tier, seed, mine, paths, identity))
    return jobs
