"""run.json: what a run was made from and with, and the digests that the run's other files depend on.

In format 2 it contains a digest of its own content, and those of the tables and constants. Format 1 has neither; its
runs can be read and resumed, and are unverified.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from birthlens._version import __version__
from birthlens.errors import BirthlensError
from birthlens.model.series import series_at
from birthlens.runs.files import CONSTANTS, HEADER, TABLES
from birthlens.runs.seal import Seal, content_digest, digest_of
from birthlens.system import write_atomically

FORMAT = 2
"""The format that is written."""
LONGER = "longer"
"""The field with the number of steps to which a run was continued beyond its config's. It has a digest of its own, so that
the digests of the run's other files stay valid."""
_APART = ("digest", LONGER)
ENGINES = ("reference", "functional", "handwritten", "fused")
_LARGEST = 1 << 28
_DIGEST = re.compile(r"[0-9a-f]{32}")


def read_header(path: Path) -> dict[str, Any]:
    """Read run.json.

    Raises:
        BirthlensError: if it is missing, damaged, changed, or of a newer format.
    """
    file = path / HEADER
    if (path / "config.json").exists() and not file.exists():
        raise _no_run(path, "a directory with a Hugging Face model")
    if series_at(path) is not None:
        raise _no_run(path, "a series of model directories")
    if path.is_file():
        raise BirthlensError(f"run = {str(path)!r} is a file; give the directory that `birthlens train` wrote.")
    if not path.is_dir():
        raise BirthlensError(f"run = {str(path)!r} does not exist; give the directory that `birthlens train` wrote.")
    if not file.exists():
        raise BirthlensError(f"run = {str(path)!r} holds no run.json; it is not a run, or its training never started.")
    if file.is_file() and file.stat().st_size > _LARGEST:
        raise BirthlensError(f"{file} is damaged (it has more than {_LARGEST:,} bytes); restore it or train again.")
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BirthlensError(f"{file} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise BirthlensError(f"{file} is damaged ({error}); restore it or train again.") from None
    if isinstance(header, dict) and type(header.get("format")) is int and header["format"] > FORMAT:
        raise BirthlensError(
            f"{file} has format {header['format']}, this birthlens {__version__} reads up to {FORMAT}; upgrade birthlens."
        )
    if reason := fault(header):
        raise BirthlensError(f"{file} is damaged ({reason}); restore it or train again.")
    return dict(header)


def _no_run(path: Path, what: str) -> BirthlensError:
    return BirthlensError(f"run = {str(path)!r} is {what}; this command takes a run, whose task and config it needs.")


def write_header(path: Path, header: Mapping[str, Any]) -> Seal:
    """Write run.json with the digest of its content; return the seal for the run's other files."""
    text = json.dumps(header)  # digest what will be read: numbers and strings as JSON formats them
    digest = content_digest(json.loads(text), _APART)
    write_atomically(path / HEADER, json.dumps({**header, "digest": digest}, indent=1, ensure_ascii=False).encode())
    return Seal(digest)


def lengthen(path: Path, header: Mapping[str, Any], steps: int) -> None:
    """Record in run.json that the run is continued to a number of steps; nothing else of the run changes."""
    seal = Seal(header["digest"])
    longer = {"steps": steps, "digest": seal.digest(LONGER, str(steps).encode())}
    content = {**header, LONGER: longer}
    write_atomically(path / HEADER, json.dumps(content, indent=1, ensure_ascii=False).encode())


def steps_of(header: Mapping[str, Any]) -> int | None:
    """Return the number of steps to which a run was continued, or None."""
    return header[LONGER]["steps"] if LONGER in header else None


def seal_of(header: Mapping[str, Any]) -> Seal | None:
    """Return the seal of a run's files, or None for format 1, which has no digests."""
    return None if header["format"] == 1 else Seal(header["digest"])


def check_of(header: Mapping[str, Any], name: str) -> Callable[[bytes], None] | None:
    """Return a function that checks the bytes of a safetensors file of the run, or None if the format has no digests."""
    seal = seal_of(header)
    if seal is None:
        return None
    if name in (TABLES, CONSTANTS):
        return partial(_check_listed, header["files"][name])
    return partial(seal.check, name)


def _check_listed(expected: str, data: bytes) -> None:
    if digest_of(data) != expected:
        raise BirthlensError("its bytes do not match the digest in run.json: it was changed, or is another run's")


def fault(header: Any) -> str | None:
    """Return what is wrong with the content of run.json, or None if all is well."""
    if not isinstance(header, dict):
        return f"it holds a {type(header).__name__}, not a mapping"
    kinds = {"format": int, "birthlens": str, "config": dict, "vocab": list, "engine": dict, "versions": dict}
    for key, kind in kinds.items():
        if type(header.get(key)) is not kind:
            return f"its {key!r} is {'missing' if key not in header else 'not of type ' + kind.__name__}"
    if not 1 <= header["format"] <= FORMAT:
        return f"its 'format' is {header['format']}, valid are 1 to {FORMAT}"
    if not all(isinstance(token, str) for token in header["vocab"]):
        return "its 'vocab' holds something else than strings"
    if len(header["vocab"]) < 2 or len(set(header["vocab"])) != len(header["vocab"]):
        return "its 'vocab' must hold two or more distinct strings"
    if reason := _engine_fault(header["engine"]):
        return reason
    if not all(isinstance(version, str) for version in header["versions"].values()):
        return "its 'versions' holds something else than strings"
    for key in ("code", "commit"):
        if not isinstance(header.get(key), str | None):
            return f"its {key!r} is not a str"
    return _digest_fault(header)


def _engine_fault(engine: Mapping[str, Any]) -> str | None:
    for key in ("name", "reason"):
        if not isinstance(engine.get(key), str):
            return f"its 'engine' has no {key}"
    if engine["name"] not in ENGINES:
        return f"its engine.name is {engine['name']!r}, valid are {', '.join(ENGINES)}"
    if type(engine.get("threads")) is not int or engine["threads"] < 1:
        return f"its engine.threads is {engine.get('threads')!r}, it must be an int of 1 or more"
    return None


def _digest_fault(header: Mapping[str, Any]) -> str | None:
    if header["format"] == 1:
        found = [key for key in ("digest", "files", LONGER) if key in header]
        return f"it has the field {found[0]!r}, which format 1 has not" if found else None
    files = header.get("files")
    if not isinstance(files, dict) or files.keys() != {TABLES, CONSTANTS}:
        return f"its 'files' must give the digests of {TABLES} and {CONSTANTS}"
    if not all(isinstance(digest, str) and _DIGEST.fullmatch(digest) for digest in files.values()):
        return "its 'files' holds something else than digests"
    if header.get("digest") != content_digest(header, _APART):
        return "its content does not match its digest: it was changed after training"
    if LONGER in header:
        longer = header[LONGER]
        if not isinstance(longer, dict) or type(longer.get("steps")) is not int:
            return f"its {LONGER!r} has no number of steps"
        if longer.get("digest") != Seal(header["digest"]).digest(LONGER, str(longer["steps"]).encode()):
            return f"its {LONGER!r} does not match its digest: it was changed"
    return None
