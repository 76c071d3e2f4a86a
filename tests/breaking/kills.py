"""Work killed at random moments and begun again: what it leaves must equal that of work which nobody touched."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from breaking.runs import CONFIG, TINY, content, trained

from birthlens.analysis.interventions.suite import Suite, execute
from birthlens.claims.claim import Claim, Evidence, Expectation
from birthlens.claims.reproduction import reproduce
from birthlens.claims.scorecard import read_results
from birthlens.claims.tiers import Tier
from birthlens.config.differences import overrides
from birthlens.config.run import RunConfig
from birthlens.runs.evaluation import evaluation_batch
from birthlens.runs.files import temporaries
from birthlens.runs.run import Run
from birthlens.runs.verify import runs_below, verify
from birthlens.training.recording import resume, train_to_disk
from birthlens.training.sweep import sweep


@dataclass(frozen=True)
class Job:
    """Work that a path holds the results of: `go` begins or continues it, `read` returns all that it leaves."""

    go: Callable[[Path], None]
    read: Callable[[Path], object]


def kills(folder: Path, count: int, chance: random.Random, job: Job) -> Iterator[tuple[str, str]]:
    """Kill the job at a random moment, begin it again (often killed once more), and compare with one left alone."""
    folder.mkdir(exist_ok=True)
    reference = folder / "reference"
    job.go(reference)
    expected = job.read(reference)
    started = time.perf_counter()
    os.waitpid(_forked(job, folder / "timed"), 0)
    duration = time.perf_counter() - started
    for number in range(count):
        path = folder / f"killed{number}"
        said = []
        for _ in range(chance.choice((1, 1, 2, 3))):
            delay = chance.uniform(0, duration)
            child = _forked(job, path)
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            said.append(f"{delay * 1000:.1f} ms")
            os.waitpid(child, 0)
        yield f"kill after {', '.join(said)}", _after_kill(path, expected, job)
        shutil.rmtree(path, ignore_errors=True)


def _after_kill(path: Path, expected: object, job: Job) -> str:
    try:
        job.go(path)
        runs = runs_below(path) if any(path.rglob("run.json")) else []
        left = [run for run in runs if not verify(run).whole or temporaries(run) or (run / ".lock").exists()]
        return "equal" if job.read(path) == expected and not left else "silent"
    except Exception as error:  # whatever it is, the work is lost
        return f"crash: {type(error).__name__}: {error}"


def _forked(job: Job, path: Path) -> int:
    """Do a job in a child process, which has all modules loaded already; return its id."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            job.go(path)
        finally:
            os._exit(0)
    return child


def _train(path: Path) -> None:
    for _ in resume(path) if (path / "run.json").exists() else train_to_disk(CONFIG, path):
        pass


def _sweep(path: Path) -> None:
    configs = [RunConfig.parse(TINY, [f"seeds.init={seed}", "training.steps=6"]) for seed in range(3)]
    for outcome in sweep(configs, path, processes=1):
        if outcome.state == "failed":
            raise RuntimeError(outcome.message)


def _runs(path: Path) -> object:
    return [content(run) for run in runs_below(path)]


def _suite(path: Path) -> None:
    path.mkdir(exist_ok=True)
    subject = path.parent / "subject"  # trained for the reference, which nobody kills
    run = Run(subject if subject.exists() else trained(subject))
    suite = Suite.from_data({"heads": "all", "methods": ["zero", "mean"]})
    batch = evaluation_batch(run, 8)
    table = execute(suite, run.checkpoints(), batch, batch, path / "table.suite", {}, run.statistics)
    table.to_csv(path / "table.csv", index=False)


def _table(path: Path) -> object:
    return (path / "table.csv").read_text()


def loss_at_the_end(evidence: Evidence) -> dict[str, float]:
    """Return the last measured loss of the claim's run."""
    rows = evidence.runs["run"].rows()
    return {"loss": float(np.mean([row["value"] for row in rows if row["metric"] == "all_loss"]))}


_TIER = Tier("laptop", tuple(overrides(RunConfig(), CONFIG)), 3)
_CLAIM = Claim("tiny", "A tiny claim.", (Expectation("loss", "the loss", above=0),), loss_at_the_end, cases={"run": ()})


def _reproduce(path: Path) -> None:
    for _ in reproduce([_CLAIM], _TIER, path, processes=1):
        pass


def _scorecard(path: Path) -> object:
    results = read_results(path, [_CLAIM])
    return [(one.claim.id, one.verdict, [measured.values for measured in one.measured]) for one in results], _runs(path)


JOBS = {
    "training": (Job(_train, content), 1),
    "a sweep": (Job(_sweep, _runs), 5),
    "a suite": (Job(_suite, _table), 5),
    "a reproduction": (Job(_reproduce, _scorecard), 5),
}
"""Every job, and the share of the kills that it gets: one of so many."""
