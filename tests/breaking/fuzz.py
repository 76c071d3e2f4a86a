"""A fuzzer over configs, corpora, counts, sweeps, suites and arguments: no traceback, no hang, no crash, one sentence each.

    python tests/breaking/fuzz.py COUNT [SEED] [PROCESSES]

Cases are drawn from (SEED, number), so that one can be run again: `python tests/breaking/fuzz.py --again SEED NUMBER`. They
run in processes of limited memory. A case that takes longer than the time limit is interrupted and counted as a hang; a
process that dies is replaced, and its case counted as a crash.
"""

import contextlib
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import hostile  # type: ignore[import-not-found]

MEMORY = 8 * 2**30
"""Bytes of address space of a process; PyTorch takes half of it."""
SECONDS = 60
"""Time limit of a case."""
KINDS = [*["config", "sweep", "suite", "counts"] * 2, "corpus", "overrides", *["arguments"] * 3]
TINY = [
    f"{section}.{key}={json.dumps(value)}" for section, keys in hostile.CONFIG.items() for key, value in keys.items()
]


class HangError(BaseException):
    """A case took longer than its limit."""


def case(seed: Any, number: Any, place: Any, run: Any) -> Any:
    """Run one case; return its kind, what became of it, and the message or traceback."""
    rng = random.Random(f"{seed} {number}")
    kind = rng.choice(KINDS)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            said = CASES[kind](rng, place, run)
        if warned and any(issubclass(one.category, RuntimeWarning) for one in warned):
            return kind, "warning", str(warned[0].message)
    except HangError:
        return kind, "hang", traceback.format_exc()
    except BaseException as error:
        return kind, *judged(error)
    return kind, "accepted", said or ""


def judged(error: Any) -> Any:
    """Say what became of a case that raised: a refusal is a BirthlensError of one short sentence, or a lack of memory."""
    from birthlens.errors import BirthlensError
    from birthlens.system import out_of_memory

    if isinstance(error, BirthlensError):
        message = str(error)
        good = "\n" not in message and message.endswith(".") and len(message) <= 1000
        return ("refused" if good else "no sentence"), message
    if out_of_memory(error):
        return "refused", "out of memory"
    return "traceback", traceback.format_exc()


def written(place: Any, data: Any, ending: Any) -> Any:
    path = Path(place) / f"input{ending}"
    path.write_bytes(data)
    return path


def config(rng: Any, place: Any, _: Any) -> None:
    from birthlens.config.run import RunConfig

    found = RunConfig.load(written(place, *hostile.document(rng, hostile.CONFIG)))
    assert RunConfig.parse(found.to_data()) == found
    hash(found)
    found.to_yaml()


def overrides(rng: Any, place: Any, _: Any) -> None:
    from birthlens.config.run import RunConfig

    words = hostile.arguments(random.Random(rng.random()), place, "run")
    changed = [word for word in words if "=" in word] or [
        f"{rng.choice(hostile.OVERRIDES)}={rng.choice(hostile.SCALARS[10:])}"
    ]
    RunConfig.parse(hostile.CONFIG, changed).to_yaml()


def sweep(rng: Any, place: Any, _: Any) -> None:
    from birthlens.analysis.behaviour.phase import Diagram
    from birthlens.reading import read_mapping
    from birthlens.training.grid import Grid
    from birthlens.training.sweep import run_path

    path = written(place, *hostile.document(rng, hostile.SWEEP))
    if rng.random() < 0.3:
        names = ["task.n_triggers", "model.d_model", "training.steps", "x"]
        diagram = Diagram(read_mapping(path, "sweep"), rng.choice(names), rng.choice(names))
        for point in diagram.points[:20]:
            diagram.configs(point)
        return
    grid = Grid.load(path)
    for found in grid.configs().values():
        run_path(found, place)


def suite(rng: Any, place: Any, _: Any) -> None:
    from birthlens.analysis.interventions.suite import Suite
    from birthlens.config.model import ModelConfig
    from birthlens.reading import read_mapping

    path = written(place, *hostile.document(rng, hostile.SUITE))
    found = Suite.from_data(read_mapping(path, "suite"))
    assert Suite.from_data(found.to_data()) == found
    found.cases_for(ModelConfig(d_model=8))


def corpus(rng: Any, place: Any, _: Any) -> None:
    statistics_used(written(place, hostile.corpus(rng), ".txt"))


def counts(rng: Any, place: Any, _: Any) -> None:
    statistics_used(written(place, *hostile.counts(rng)))


def statistics_used(path: Any) -> None:
    import numpy as np

    from birthlens.config.run import TaskConfig
    from birthlens.runs.provenance import corpus_digest
    from birthlens.tasks.bigram import BigramTask
    from birthlens.tasks.corpus import from_file

    statistics = from_file(path)
    np.testing.assert_allclose(statistics.bigram.sum(1), 1, rtol=1e-6)
    corpus_digest(statistics)
    if len(statistics) < 500:
        batch = BigramTask(TaskConfig(context=8, n_triggers=1), statistics).sample(2, np.random.default_rng(0))
        assert int(batch.tokens.min()) >= 0 and int(batch.tokens.max()) < len(statistics)


def arguments(rng: Any, place: Any, run: Any) -> Any:
    """Run the command line in this process, and hold what it prints to the rules."""
    from birthlens.cli import main

    words = hostile.arguments(rng, place, run)
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["birthlens", *words]
    status: str | int = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stopped:
        status = stopped.code or 0
    except HangError:
        raise
    except BaseException:
        raise AssertionError(f"traceback of {shortly(words)}\n{traceback.format_exc()}") from None
    finally:
        sys.argv = before
    said = err.getvalue()
    if "\x1b" in out.getvalue() + said or status not in (0, 1, 2) or "Traceback" in said:
        raise AssertionError(f"status {status} of {shortly(words)}: {said[-2000:]!r}")
    if status == 2 and not said.strip():
        raise AssertionError(f"status 2 without a word of {shortly(words)}")
    return f"status {status}"


def shortly(words: Any) -> Any:
    return [word if len(word) < 200 else f"{word[:60]}... ({len(word)})" for word in words]


CASES = {name: globals()[name] for name in dict.fromkeys(KINDS)}


def train_tiny(folder: Any) -> Any:
    """Train the run that the commands read."""
    from birthlens.config.run import RunConfig
    from birthlens.training.recording import train_to_disk

    for _ in train_to_disk(RunConfig.parse({}, TINY), Path(folder) / "run"):
        pass
    return str(Path(folder) / "run")


def work(seed: Any, numbers: Any, results: Any) -> None:
    """Run cases in a process of limited memory, and send what became of each."""
    import faulthandler

    import numba  # noqa: F401  imported before memory is limited
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, interrupt)
    with tempfile.TemporaryDirectory() as folder:
        run = train_tiny(folder)
        for number in numbers:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                os.chdir(place)
                results.put((number, None))
                faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
                signal.setitimer(signal.ITIMER_REAL, SECONDS)
                try:
                    found = case(seed, number, place, run)
                except HangError:
                    found = ("?", "hang", "")
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    faulthandler.cancel_dump_traceback_later()
                os.chdir(folder)
                results.put((number, found))
    results.put((None, None))


def interrupt(*_: Any) -> None:
    raise HangError


def share(seed: Any, numbers: Any) -> Any:
    """Yield (number, kind, what became of it, message) of each case; a process that dies costs the case it was at."""
    context = multiprocessing.get_context("spawn")
    left = list(numbers)
    while left:
        results = context.Queue()
        process = context.Process(target=work, args=(seed, left, results))
        process.start()
        at = left[0]
        while True:
            try:
                number, found = results.get(timeout=5)
            except Exception:
                if process.is_alive():
                    continue
                yield at, "?", "crash", f"exit code {process.exitcode}"
                left = [one for one in left if one > at]
                break
            if number is None:
                left = []
                break
            at = number
            if found is not None:
                yield number, *found
        process.join()


def collect(seed: Any, numbers: Any, results: Any) -> None:
    for found in share(seed, numbers):
        results.put(found)
    results.put(None)


def main(count: Any, seed: Any = 0, processes: Any = 2) -> Any:
    """Run `count` cases; print what became of them by kind, and each fault; return the number of faults."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    shares = [range(start, count, processes) for start in range(processes)]
    collectors = [context.Process(target=collect, args=(seed, numbers, results)) for numbers in shares]
    for one in collectors:
        one.start()
    table: Counter[tuple[str, str]] = Counter()
    done = faults = 0
    while done < len(collectors):
        found = results.get()
        if found is None:
            done += 1
            continue
        number, kind, became, message = found
        table[kind, became] += 1
        if became not in ("accepted", "refused"):
            faults += 1
            print(f"--- case {seed} {number} ({kind}): {became}\n{message}", flush=True)
    for one in collectors:
        one.join()
    for (kind, became), n in sorted(table.items()):
        print(f"{kind:10} {became:12} {n:6}")
    print(f"{sum(table.values())} cases, {faults} faults")
    return faults


if __name__ == "__main__":
    if sys.argv[1] == "--again":
        signal.signal(signal.SIGALRM, interrupt)
        with tempfile.TemporaryDirectory() as folder:
            run = train_tiny(folder)
            for number in sys.argv[3:]:
                with tempfile.TemporaryDirectory(dir=folder) as place:
                    signal.alarm(SECONDS)
                    print(*case(int(sys.argv[2]), int(number), place, run), sep="\n")
        sys.exit()
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
