"""One writer for a run: a lock on its directory that the system releases when its holder ends.

The lock is flock(2) on a small file, which names the process that holds it. Between processes of one machine it is
exact, and a killed holder leaves nothing that blocks the next one. On NFS, Linux turns it into a lock of the server,
which also works between machines. If the mount keeps locks local (the options `nolock` and `local_lock=flock` or
`all`), it works on one machine only; the next writer is then warned if the last one was on another machine and did not
finish. On a file system without locks, a file that only one process can create replaces them. Such a file stays when
its holder is killed: the next writer on the same machine removes it, and on another machine it must be deleted by hand.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from birthlens.errors import BirthlensError

LOCK = ".lock"
"""The name of the lock file in a run's directory; it exists while the run is written."""
_CREATED = ".created"
_log = logging.getLogger("birthlens")


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Hold the lock of a run's directory.

    Raises:
        BirthlensError: if another process holds it (its pid and host are named), or the directory cannot be written.

    Example:
        >>> import tempfile
        >>> with only_writer(Path(tempfile.mkdtemp())):
        ...     pass
    """
    with locked(directory / LOCK):
        yield


@contextmanager
def locked(file: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock on `file`, which is created and removed; with `wait`, wait for another holder instead of refusing."""
    descriptor = _flocked(file, wait)
    if descriptor is None:
        file = _created(file.with_name(file.name + _CREATED), wait)
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)


def _flocked(file: Path, wait: bool) -> int | None:
    """Return a descriptor that holds the lock, or None if the file system has no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        descriptor = _opened(file, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.read(descriptor, 1000)
            os.close(descriptor)
            raise _held(file, _parsed(holder)) from None
        except OSError as error:
            os.close(descriptor)
            with suppress(OSError):
                file.unlink(missing_ok=True)
            _log.warning(
                f"{file.parent} is on a file system without locks ({error.strerror}); a lock file replaces them."
            )
            return None
        # The last holder may have removed the file while this process waited; the lock is then on a deleted file.
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                break
        os.close(descriptor)
    before = _parsed(os.read(descriptor, 1000))
    if before and before.get("host") != platform.node():
        _log.warning(
            f"{file.parent} was last written by process {before.get('pid')} on {before.get('host')}, which did not "
            "finish. If that mount keeps locks local to each machine, make sure that the process has ended."
        )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, _self(), 0)
    return descriptor


def _created(file: Path, wait: bool) -> Path:
    """Create a file that must not exist yet, and return it; the file of a process that has ended is replaced."""
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            holder: dict[str, Any] = {}
            with suppress(OSError):
                holder = _parsed(file.read_bytes())
            if holder.get("host") == platform.node() and not _alive(holder.get("pid")):
                file.unlink(missing_ok=True)
            elif wait:
                time.sleep(0.2)
            else:
                raise _held(file, holder, f" If that process has ended, delete {file}.") from None
        except OSError as error:
            raise BirthlensError(f"{file.parent} cannot be written: {error.strerror}.") from None
        else:
            os.write(descriptor, _self())
            os.close(descriptor)
            return file


def _opened(file: Path, flags: int) -> int:
    try:
        return os.open(file, flags | getattr(os, "O_CLOEXEC", 0), 0o666)
    except OSError as error:
        raise BirthlensError(f"{file.parent} cannot be written: {error.strerror}.") from None


def _self() -> bytes:
    return json.dumps({"pid": os.getpid(), "host": platform.node()}).encode()


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _alive(pid: object) -> bool:
    """Return whether a process of this machine exists; True if that is unknown."""
    if type(pid) is not int or pid < 1:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _held(file: Path, holder: dict[str, Any], advice: str = "") -> BirthlensError:
    pid = holder.get("pid", "unknown")
    host = holder.get("host", "an unknown host")
    which = "this process" if pid == os.getpid() and host == platform.node() else f"process {pid} on {host}"
    return BirthlensError(f"{file.parent} is being written by {which}; wait until it has finished, or stop it.{advice}")
