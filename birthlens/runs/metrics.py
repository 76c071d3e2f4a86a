"""metrics.jsonl: one measurement per line, to which training only appends.

In format 2 each line ends in a digest of itself and of the previous digest; the first one includes that of run.json. A line
that was changed, removed, moved, or belongs to another run is therefore detected. Missing lines at the end are detected by
resume.safetensors, which contains the digest of the last line at its step. A kill can only truncate the last line,
which then has no line end; it is dropped.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from birthlens.errors import BirthlensError
from birthlens.runs.files import METRICS
from birthlens.runs.seal import Seal
from birthlens.system import write_atomically

COLUMNS = ("step", "split", "metric", "value", "n")
_DIGITS = 16
_SEALED = re.compile(rb'(\{.*), "digest": "([0-9a-f]{16})"\}')


def next_digest(seal: Seal, before: str, text: bytes) -> str:
    """Return the digest of a line, given that of the line before it."""
    return seal.digest(METRICS, before.encode(), text)[:_DIGITS]


def lines_of(rows: Iterable[Mapping[str, Any]], seal: Seal | None, digest: str = "") -> tuple[bytes, str]:
    """Format rows as lines, after a line with the given digest; return them, and the digest of the last."""
    lines = []
    for row in rows:
        text = json.dumps({key: row[key] for key in row if key != "digest"}).encode()
        if seal is not None:
            digest = next_digest(seal, digest, text[:-1])
            text = text[:-1] + f', "digest": "{digest}"}}'.encode()
        lines.append(text + b"\n")
    return b"".join(lines), digest


def append(path: Path, lines: bytes) -> None:
    """Append lines to metrics.jsonl, durably."""
    if not lines:
        return
    try:
        with open(path / METRICS, "ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise BirthlensError(f"{path / METRICS} cannot be written: {error.strerror}.") from None


def rewrite(path: Path, rows: Iterable[Mapping[str, Any]], seal: Seal | None) -> str:
    """Replace metrics.jsonl by the given rows; return the digest of the last."""
    lines, digest = lines_of(rows, seal)
    write_atomically(path / METRICS, lines)
    return digest


def read_metrics(path: Path, seal: Seal | None = None, end: str | None = None) -> list[dict[str, Any]]:
    """Read the measurements of a run; `end` is the digest of a line that must be present.

    Raises:
        BirthlensError: if a line is damaged or missing; the message names it.
    """
    file = path / METRICS
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        data = b""
    except OSError as error:
        raise BirthlensError(f"{file} cannot be read: {error.strerror}.") from None
    *lines, torn = data.split(b"\n")
    rows = []
    digest = ""
    met = end in (None, "")
    for number, line in enumerate(lines, start=1):
        if seal is not None:
            digest = _checked(file, number, line, seal, digest)
            met = met or digest == end
        rows.append(_row(file, number, line))
    if torn and seal is None and (row := _maybe_row(torn)) is not None:
        rows.append(row)
    if not met:
        raise BirthlensError(
            f"{file} is damaged: it lacks its last lines, which were there when the last checkpoint was written; "
            "restore it or train again."
        )
    return rows


def _checked(file: Path, number: int, line: bytes, seal: Seal, before: str) -> str:
    """Return the digest of a line, or raise BirthlensError if it has another."""
    found = _SEALED.fullmatch(line)
    if found is None or found[2].decode() != next_digest(seal, before, found[1]):
        raise BirthlensError(
            f"{file} is damaged at line {number}: the line, or one before it, was changed, removed, or is another run's; "
            "restore it or train again."
        )
    return found[2].decode()


def _row(file: Path, number: int, line: bytes) -> dict[str, Any]:
    row = _maybe_row(line)
    if row is None:
        raise BirthlensError(f"{file} is damaged at line {number}; restore it or train again.")
    return row


def _maybe_row(line: bytes) -> dict[str, Any] | None:
    """Return the measurement in a line, or None if there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not row.keys() >= set(COLUMNS):
        return None
    whole = type(row["step"]) is int and row["step"] >= 0 and type(row["n"]) is int
    named = isinstance(row["split"], str) and isinstance(row["metric"], str)
    return row if whole and named and type(row["value"]) in (int, float) else None


def updates(rows: Sequence[Mapping[str, Any]], first: int, last: int) -> int:
    """Count the updates after step `first` up to step `last` that had a loss; the others changed nothing."""
    return sum(row["split"] == "train" and row["metric"] == "loss" and first < row["step"] <= last for row in rows)
