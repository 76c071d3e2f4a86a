"""Reproduction: train what is missing, measure each claim on each seed, judge, and keep what was measured.

folder/runs/             one run a config (`sweep`), shared by all claims that ask for it
folder/measurements/     one file a claim, tier and seed; used again only where claim, settings, configs, the version of
                         birthlens and the source of the statistic are the same
folder/scorecard.*       rewritten whenever a claim is judged
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from birthlens import __version__
from birthlens.claims.catalogue import CLAIMS
from birthlens.claims.claim import Claim, Evidence
from birthlens.claims.scorecard import Measured, Result, plain, write_scorecard
from birthlens.claims.tiers import Tier
from birthlens.config import RunConfig
from birthlens.disk import write_atomically
from birthlens.runs import Run
from birthlens.sweep import Grid, Outcome, cores, prepare, run_path, told_when_killed, workers


@dataclass
class _Job:
    """One claim on one seed: the runs it waits for, by case, and what came out."""

    claim: Claim
    tier: Tier
    seed: int
    configs: dict[str, RunConfig]
    paths: dict[str, Path]
    waiting: set[Path] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    measured: Measured | None = None


Progress = Outcome | Result
"""What `reproduce` yields: a run that is done with, or a claim that is judged."""


def reproduce(
    claims: Sequence[Claim], tier: Tier, folder: str | Path, processes: int | None = None, seeds: int | None = None
) -> Iterator[Progress]:
    """Check claims; yield each run's outcome and each claim's result as they come, and keep the scorecard up to date.

    `seeds` replaces the number of seeds of the tier and of every claim. What is on disk and matches is used again: an
    interrupted reproduction continues.

    Raises:
        BirthlensError: where a worker process is killed.
    """
    folder = Path(folder)
    (folder / "measurements").mkdir(parents=True, exist_ok=True)
    jobs = [job for claim in claims for job in _jobs(claim, tier, folder / "runs", seeds)]
    book, started = _Book(claims, tier, folder, command_of(claims, tier, seeds)), time.perf_counter()
    for claim in claims:
        if claim.reason(tier.name):
            yield book.judge(claim, [], time.perf_counter() - started)
    with workers(processes) as pool, told_when_killed():
        for event in _work(jobs, folder, pool, (processes or cores()) + 1):
            if isinstance(event, Outcome):
                book.costs[event.path] = event
                yield event
            elif all(job.measured for job in jobs if job.claim is event.claim):
                mine = [job for job in jobs if job.claim is event.claim]
                yield book.judge(event.claim, mine, time.perf_counter() - started)


def _work(jobs: Sequence[_Job], folder: Path, pool: Executor, room: int) -> Iterator[Outcome | _Job]:
    """Train and measure on the pool, in the order of the jobs; a job is measured as soon as its runs are there.

    At most `room` runs wait in the pool, so that measurements need not queue behind all of them.
    """
    wanted: dict[Path, RunConfig] = {}
    for job in jobs:
        wanted |= {path: job.configs[case] for case, path in job.paths.items()}
        job.waiting = set(job.paths.values())
    to_train, to_measure = deque(wanted.items()), deque(job for job in jobs if not job.waiting)
    pending: dict[Future[Any], _Job | None] = {}
    while pending or to_train or to_measure:
        while to_measure and len(pending) < room:
            job = to_measure.popleft()
            pending[pool.submit(_measure, job, folder)] = job
        while to_train and len(pending) < room:
            path, config = to_train.popleft()
            pending[pool.submit(prepare, config, path)] = None
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            finished = pending.pop(future)
            if finished is not None:
                finished.measured = future.result()
                yield finished
                continue
            outcome = future.result()
            yield outcome
            for job in (job for job in jobs if outcome.path in job.waiting):
                job.waiting.discard(outcome.path)
                if outcome.state == "failed":
                    job.problems.append(outcome.message)
                if not job.waiting:
                    to_measure.append(job)


def _measure(job: _Job, folder: Path) -> Measured:
    """Take a claim's statistic on one seed, or read it where it was taken before of the very same things."""
    if job.problems:
        return Measured(job.seed, problem="; ".join(job.problems))
    file = folder / "measurements" / f"{job.claim.id}.{job.tier.name}.seed{job.seed}.json"
    identity = _identity(job)
    known = _read(file)
    if known.get("made_of") == identity:
        values = {name: math.nan if value is None else value for name, value in known["values"].items()}
        return Measured(job.seed, values, "", known["seconds"], known["cpu_seconds"])
    wall, cpu = time.perf_counter(), time.process_time()
    evidence = Evidence({c: Run(p) for c, p in job.paths.items()}, job.seed, job.claim.settings_at(job.tier.name))
    assert job.claim.statistic is not None  # claims without one have no jobs
    try:
        values = {name: float(value) for name, value in job.claim.statistic(evidence).items()}
    except (
        Exception
    ) as error:  # one statistic must not take the whole reproduction with it; the scorecard says what it was
        return Measured(job.seed, {}, f"{type(error).__name__}: {error}")
    cost = {"seconds": round(time.perf_counter() - wall, 3), "cpu_seconds": round(time.process_time() - cpu, 3)}
    write_atomically(file, json.dumps({"made_of": identity, "values": plain(values), **cost}, indent=1).encode())
    return Measured(job.seed, values, "", **cost)


def _identity(job: _Job) -> dict[str, Any]:
    """Return everything that a measurement depends on, so that another thing's is never taken for it."""
    statistic = job.claim.statistic
    source = inspect.getsource(sys.modules[statistic.__module__]) if statistic else ""
    identity = {
        "claim": job.claim.id,
        "birthlens": __version__,
        "statistic": getattr(statistic, "__qualname__", ""),
        "source": hashlib.sha256(source.encode()).hexdigest()[:16],
        "seed": job.seed,
        "settings": job.claim.settings_at(job.tier.name),
        "runs": {case: path.name for case, path in job.paths.items()},
    }
    return dict(json.loads(json.dumps(identity)))  # tuples become lists, as in the file


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _jobs(claim: Claim, tier: Tier, runs: Path, seeds: int | None) -> list[_Job]:
    if claim.reason(tier.name):
        return []
    count = seeds or claim.seeds.get(tier.name, tier.seeds)
    configs = Grid(tier.config, claim.cases, range(count)).configs()
    jobs = []
    for seed in range(count):
        mine = {case: configs[case, seed] for case in claim.cases}
        jobs.append(_Job(claim, tier, seed, mine, {case: run_path(config, runs) for case, config in mine.items()}))
    return jobs


class _Book:
    """Results so far, in the order of the claims, with the cost of every run; it keeps the scorecard's files up to date."""

    def __init__(self, claims: Sequence[Claim], tier: Tier, folder: Path, command: str) -> None:
        self.claims, self.tier, self.folder, self.command = claims, tier, folder, command
        self.costs: dict[Path, Outcome] = {}
        self._results: dict[str, Result] = {}

    def judge(self, claim: Claim, jobs: Sequence[_Job], elapsed: float) -> Result:
        measured = sorted((job.measured for job in jobs if job.measured), key=lambda one: one.seed)
        paths = {path for job in jobs for path in job.paths.values()}
        spent = [(self.costs[path].seconds, self.costs[path].cpu_seconds) for path in paths]
        spent += [(one.seconds, one.cpu_seconds) for one in measured]
        seconds, cpu_seconds = (sum(column) for column in zip(*spent, strict=True)) if spent else (0.0, 0.0)
        result = Result(claim, self.tier.name, measured, len(paths), seconds, cpu_seconds)
        self._results[claim.id] = result
        results = [self._results[claim.id] for claim in self.claims if claim.id in self._results]
        write_scorecard(results, self.folder, self.command, self._totals(results, elapsed))
        return result

    def _totals(self, results: Sequence[Result], elapsed: float) -> Mapping[str, float]:
        cpu = sum(outcome.cpu_seconds for outcome in self.costs.values())
        cpu += sum(one.cpu_seconds for result in results for one in result.measured)
        return {"runs": len(self.costs), "cpu_seconds": round(cpu, 1), "seconds_this_time": round(elapsed, 1)}


def command_of(claims: Sequence[Claim], tier: Tier, seeds: int | None = None) -> str:
    """Return the command that checks these claims.

    Example:
        >>> from birthlens.claims.tiers import TIERS
        >>> command_of(CLAIMS, TIERS["laptop"])
        'birthlens reproduce all --tier laptop'
    """
    every = [claim.id for claim in claims] == [claim.id for claim in CLAIMS]
    asked = "all" if every else " ".join(claim.id for claim in claims)
    return f"birthlens reproduce {asked} --tier {tier.name}" + (f" --seeds {seeds}" if seeds else "")
