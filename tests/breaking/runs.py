"""Runs broken in every way that chance or a careless hand can break them; each change must be found, or change nothing.

`PYTHONPATH=tests python -m breaking --count 500` tries that many flipped bits and kills, and every swap and edit. It prints
what was tried and what was found. A silent change is one after which a run is read without an error, but differently.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from birthlens.config.run import RunConfig
from birthlens.errors import BirthlensError
from birthlens.runs.run import Run
from birthlens.runs.verify import verify
from birthlens.training.recording import train_to_disk

TINY = {
    "corpus": {"source": "markov", "vocabulary": 12},
    "task": {"context": 16, "n_triggers": 2},
    "model": {"d_model": 8},
    "optimiser": {"kind": "adamw", "learning_rate": 0.003},
    "training": {"steps": 12, "batch_size": 4, "engine": "handwritten"},
    "checkpoints": {"every": 3},
    "evaluation": {"batch_size": 4, "every": 2},
}
CONFIG = RunConfig.parse(TINY)


def trained(path: Path, *overrides: str, until: int | None = None) -> Path:
    """Train a small run, to its end or to the step `until`."""
    for record in train_to_disk(RunConfig.parse(TINY, overrides), path):
        if record.step == until:
            break
    return path


def content(path: Path) -> object:
    """Read everything that a run holds, as plain values that can be compared."""
    run = Run(path)
    state, notes = run.state()
    tables = (run.statistics.vocab, run.statistics.unigram.tobytes(), run.statistics.bigram.tobytes(), run.triggers)
    return (
        run.header,
        tables,
        len(run.task.statistics),
        {name: tensor.tobytes() for name, tensor in run.constants.items()},
        {step: {name: tensor.tobytes() for name, tensor in run.checkpoint(step).items()} for step in run.steps},
        run.rows(),
        {name: tensor.tobytes() for name, tensor in state.items()},
        notes,
    )


def outcome(path: Path, expected: object, changed: Path) -> str:
    """Read a run that was changed, and say what came of it."""
    try:
        read = content(path)
    except BirthlensError as error:
        named = changed.name in str(error) or changed.parent.name in str(error)
        return "found" if named else f"found without its name: {error}"
    except Exception as error:  # any other is a traceback for the user
        return f"crash: {type(error).__name__}: {error}"
    return "harmless" if read == expected else "silent"


def files_of(path: Path) -> list[Path]:
    """List the files of a run."""
    return sorted(file for file in path.rglob("*") if file.is_file())


def flips(path: Path, count: int, chance: random.Random) -> Iterator[tuple[str, str]]:
    """Flip one bit at a time: in the files in turn, half of them in the first 200 bytes, where the headers are."""
    expected = content(path)
    files = files_of(path)
    for number in range(count):
        file = files[number % len(files)]
        data = bytearray(file.read_bytes())
        reach = min(200, len(data)) if chance.random() < 0.5 else len(data)
        place = chance.randrange(reach)
        bit = chance.randrange(8)
        whole = bytes(data)
        data[place] ^= 1 << bit
        file.write_bytes(data)
        yield f"bit {bit} of byte {place} in {file.name}", outcome(path, expected, file)
        file.write_bytes(whole)


def swaps(path: Path, other: Path) -> Iterator[tuple[str, str]]:
    """Give a run each file of another run of the same shape, and each checkpoint the place of each other one."""
    expected = content(path)
    for file in files_of(path):
        whole = file.read_bytes()
        shutil.copyfile(other / file.relative_to(path), file)
        yield f"{file.name} of another run", outcome(path, expected, file)
        file.write_bytes(whole)
    checkpoints = files_of(path / "checkpoints")
    for file in checkpoints:
        whole = file.read_bytes()
        for source in checkpoints:
            if source != file:
                file.write_bytes(source.read_bytes())
                yield f"{source.name} as {file.name}", outcome(path, expected, file)
                file.write_bytes(whole)


def leaves(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value in nested mappings and lists."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict | list) and value:
            yield from leaves(value, (*place, key))
        yield (*place, key)


def edits(path: Path) -> Iterator[tuple[str, str]]:
    """Change, remove or reverse each value of run.json; remove, repeat, change and exchange the lines of metrics.jsonl."""
    expected = content(path)
    header = path / "run.json"
    whole = header.read_bytes()

    def edited(change: Callable[[Any, Any], None], place: tuple[Any, ...]) -> bytes:
        tree = json.loads(whole)
        inner = tree
        for key in place[:-1]:
            inner = inner[key]
        change(inner, place[-1])
        return json.dumps(tree).encode()

    def other(inner: Any, key: Any) -> None:
        value = inner[key]
        inner[key] = {bool: not value, int: 7, float: 0.125, str: f"{value}x"}.get(type(value), 1)

    def removed(inner: Any, key: Any) -> None:
        del inner[key]

    def reverse(inner: Any, key: Any) -> None:
        inner[key] = inner[key][::-1] if isinstance(inner[key], list | str) else None

    for place in leaves(json.loads(whole)):
        for change in (other, removed, reverse):
            text = edited(change, place)
            header.write_bytes(text)
            yield f"{'.'.join(map(str, place))} {change.__name__} in run.json", outcome(path, expected, header)
    header.write_bytes(whole)

    metrics = path / "metrics.jsonl"
    whole = metrics.read_bytes()
    lines = whole.splitlines(keepends=True)
    for number, line in enumerate(lines):
        before, after = lines[:number], lines[number + 1 :]
        numbered = json.loads(line)
        for name, changed in {
            "removed": [*before, *after],
            "repeated": [*before, line, line, *after],
            "changed": [*before, json.dumps({**numbered, "value": 0.5}).encode() + b"\n", *after],
            "last": [*before, line],
            "moved": [*before, *after[:1], line, *after[1:]],
        }.items():
            metrics.write_bytes(b"".join(changed))
            yield f"line {number + 1} {name} in metrics.jsonl", outcome(path, expected, metrics)
    metrics.write_bytes(whole)


def cuts(path: Path) -> Iterator[tuple[str, str]]:
    """Cut every file at several lengths, empty it, lengthen it, and remove it; a removed checkpoint is for `verify`."""
    expected = content(path)
    for file in files_of(path):
        whole = file.read_bytes()
        for share in (0.0, 0.1, 0.5, 0.9, 1.0):
            file.write_bytes(whole[: min(int(share * len(whole)), len(whole) - 1)])
            yield f"{file.name} cut at {share:.0%}", outcome(path, expected, file)
        file.write_bytes(whole + b"\0")
        yield f"{file.name} lengthened", outcome(path, expected, file)
        file.unlink()
        found = not verify(path).whole if (path / "run.json").exists() else outcome(path, expected, file) == "found"
        yield f"{file.name} removed", "found" if found else "silent"
        file.write_bytes(whole)


def tried(cases: Iterator[tuple[str, str]]) -> tuple[Counter[str], list[str]]:
    """Count outcomes, and list the cases that must not be: silent changes, crashes, messages without the file's name."""
    counts: Counter[str] = Counter()
    wrong = []
    for case, result in cases:
        kind = result.partition(":")[0]
        counts[kind] += 1
        if kind not in ("found", "harmless", "equal"):
            wrong.append(f"{case}: {result}")
    return counts, wrong
