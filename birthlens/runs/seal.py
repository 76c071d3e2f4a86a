"""Digests of the files of a run, which detect every changed byte and every file that belongs elsewhere.

    run.json        digest of its own content, which includes those of tables.safetensors and constants.safetensors
    other files     digest of (the digest of run.json, the file's name, its content)

A checkpoint that was renamed, or copied from another run, therefore has a wrong digest. The digests are XXH3 with 128 bits.
They detect accidents and edits, but anyone who wants to deceive can compute them again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from xxhash import xxh3_128

from birthlens.errors import BirthlensError

BLANK = "0" * 32
"""The placeholder of the digest in a safetensors file while the digest is computed."""
_FIELD = re.compile(rb'"digest":"([0-9a-f]{32})"')


def digest_of(*parts: bytes | memoryview) -> str:
    """Return the digest of some bytes; the boundaries between parts count too."""
    found = xxh3_128()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()


def content_digest(content: Mapping[str, Any], but: Collection[str] = ("digest",)) -> str:
    """Return the digest of a JSON mapping without some fields; layout and the order of keys do not count."""
    rest = {key: value for key, value in content.items() if key not in but}
    return digest_of(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


@dataclass(frozen=True)
class Seal:
    """The digests of one run, each of which depends on `run`, the digest of its run.json.

    Example:
        >>> one, other = Seal("a"), Seal("b")
        >>> one.digest("metrics.jsonl", b"") == other.digest("metrics.jsonl", b"")
        False
    """

    run: str

    def digest(self, name: str, *parts: bytes | memoryview) -> str:
        """Return the digest of a file of this run."""
        return digest_of(self.run.encode(), name.encode(), *parts)

    def sealed(self, name: str, data: bytes) -> bytes:
        """Fill in the digest of a safetensors file, whose metadata has `BLANK` in its place."""
        start, end = _place(name, data)
        view = memoryview(data)
        return b"".join([view[:start], self.digest(name, view[:start], view[end:]).encode(), view[end:]])

    def check(self, name: str, data: bytes) -> None:
        """Raise BirthlensError if the bytes of a safetensors file do not have the digest that they contain."""
        start, end = _place(name, data)
        view = memoryview(data)
        if bytes(view[start:end]) != self.digest(name, view[:start], view[end:]).encode():
            raise BirthlensError("its bytes do not match its digest: it was changed, renamed, or is another run's")


def _place(name: str, data: bytes) -> tuple[int, int]:
    """Find the digest in the header of a safetensors file."""
    header = 8 + int.from_bytes(data[:8], "little")
    found = _FIELD.search(data, 8, min(header, len(data)))
    if found is None:
        raise BirthlensError("it has no digest")
    return found.span(1)
