"""Standard streams under one rule for all commands, and text from outside made harmless before it is printed.

A stream that is closed or missing swallows what is written to it. Where the reader of standard output has gone away (head,
less), the command ends with status 0; where nobody reads standard error, the command goes on without it. Characters that a
stream cannot encode are written as escapes.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

import click

from birthlens.errors import BirthlensError
from birthlens.labels import neutral


def tell(text: str = "", err: bool = False, nl: bool = True) -> None:
    """Print text on standard output or standard error, without anything that could steer a terminal."""
    click.echo(neutral(text), err=err, nl=nl)


def note(text: str) -> None:
    """Print a note about the results on standard error."""
    tell(f"birthlens: note: {text}", err=True)


@contextmanager
def standard_streams() -> Iterator[None]:
    """Put standard streams under the rule of this module, for the time of a command.

    Raises:
        BirthlensError: if standard output cannot be written, on a full disk for instance.
    """
    _fill_missing()
    before = (sys.stdout, sys.stderr)
    sys.stdout = _Stream(before[0] or _opened(1), "standard output")
    sys.stderr = _Stream(before[1] or _opened(2), "standard error", needed=False)
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            sys.stdout, sys.stderr = before


class _Stream(io.TextIOBase):
    """A text stream that does not end in a traceback; it has no `buffer`, so that nothing is written past it."""

    def __init__(self, inner: Any, name: str, needed: bool = True) -> None:
        self._inner: IO[str] = inner
        self._name = name
        self._needed = needed
        if isinstance(inner, io.TextIOWrapper):
            inner.reconfigure(errors="backslashreplace")

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream."""
        return getattr(self._inner, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write text."""
        if text == "":  # click asks in this way whether the stream takes text, and would swallow an error
            return 0
        try:
            return self._inner.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Write what waits."""
        try:
            self._inner.flush()
        except OSError as error:
            self._give_up(error)

    def isatty(self) -> bool:
        """Return whether a person looks."""
        return self._inner.isatty()

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self._inner.fileno()

    def writable(self) -> bool:
        """Return True: it can be written."""
        return True

    def _give_up(self, error: OSError) -> None:
        """Send the rest nowhere; end the command where standard output is what nobody can read."""
        with suppress(OSError, io.UnsupportedOperation):
            _redirect(self._inner.fileno())
            self._inner.flush()
        if not self._needed:
            return
        if isinstance(error, BrokenPipeError):
            sys.exit(0)
        raise BirthlensError(f"{self._name} cannot be written: {error.strerror}.") from None


def _fill_missing() -> None:
    """Open the null device on standard descriptors that are closed, or the next file opened would take their place."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            _redirect(descriptor)


def _redirect(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


def _opened(descriptor: int) -> IO[Any]:
    return open(descriptor, "w", encoding="utf-8", closefd=False)


def device_said(text: str, tokens: int | None = None, operations: int | None = None) -> str:
    """Return the device of `--device`, and say which one auto has taken, and why."""
    from birthlens.devices import chosen

    device, reason = chosen(text, tokens, operations)
    if text == "auto":
        tell(f"birthlens: device {device}: {reason}", err=True)
    return device
