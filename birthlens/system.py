"""The machine: durable writes, which leave either the old file or the complete new one, and the cores of this process."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

from birthlens.errors import BirthlensError


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` under a temporary name beside `path`, fsync, and rename over it.

    Raises:
        BirthlensError: if the system refuses, with its reason.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "note.txt"
        >>> write_atomically(target, b"kept")
        >>> target.read_bytes()
        b'kept'
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise BirthlensError(f"{path} cannot be written: {error.strerror}.") from None
        raise
    _sync_directory(path.parent)


def is_temporary(path: Path) -> bool:
    """Return whether a file is a temporary one of `write_atomically`, which a killed writer leaves behind."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _sync_directory(directory: Path) -> None:
    """Make the rename itself durable, on platforms where a directory can be synced."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory is short: Python's, NumPy's for an impossible size, or PyTorch's.

    Example:
        >>> out_of_memory(MemoryError()), out_of_memory(ValueError("no"))
        (True, False)
    """
    said = (
        "allocate memory",
        "out of memory",
        "array is too big",
        "Maximum allowed dimension",
        "Maximum allowed size",
        "size calculation",
    )
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
