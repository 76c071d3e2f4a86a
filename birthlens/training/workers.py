"""A pool for training and measuring: a process of one thread for each core, each replaced if it is killed.

Every process has a thread of this process that waits for it, so that the death of one (out of memory, for example)
fails only the task it worked on, and the others continue.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

from birthlens.errors import BirthlensError
from birthlens.system import cores

_PATIENCE = 0.5
"""Seconds to wait, when a process has died, in case the whole pool is being closed: an interrupt ends processes first."""


class WorkerKilledError(BirthlensError):
    """A worker process was killed; the message says what to do."""


@contextmanager
def workers(processes: int | None = None) -> Iterator[Executor]:
    """Open a pool: one process for each core by default; `processes=1` is a thread of this process.

    On leaving, tasks that have not started are dropped.

    Raises:
        BirthlensError: for a number below 1.
    """
    count = cores() if processes is None else processes
    if count < 1:
        raise BirthlensError(f"processes = {count}: it must be 1 or more.")
    pool: Executor = ThreadPoolExecutor(1) if count == 1 else _Processes(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class _Processes(Executor):
    """`count` processes; a task whose process is killed raises WorkerKilledError."""

    def __init__(self, count: int) -> None:
        self._threads = ThreadPoolExecutor(count)
        self._idle: SimpleQueue[ProcessPoolExecutor] = SimpleQueue()
        self._closing = threading.Event()
        for _ in range(count):
            self._idle.put(_process())

    def submit(self, function: Callable[..., Any], /, *args: Any, **keywords: Any) -> Future[Any]:
        """Call a function in a process."""
        return self._threads.submit(self._call, function, args, keywords)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait for the running tasks, then end the processes."""
        self._closing.set()
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
        while not self._idle.empty():
            self._idle.get().shutdown(wait)

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        process = self._idle.get()
        try:
            return process.submit(function, *args, **keywords).result()
        except BrokenProcessPool:
            process.shutdown()
            process = _process()
            self._closing.wait(_PATIENCE)
            raise WorkerKilledError(
                "its process was killed (out of memory?); run the same command again to continue, with fewer processes "
                "if it happens again."
            ) from None
        finally:
            self._idle.put(process)


def _process() -> ProcessPoolExecutor:
    """Return a pool of one process, which starts with its first task."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_one_thread)


def _one_thread() -> None:
    """Limit a worker to one thread, let an interrupt end it quietly, and end it when its parent ends."""
    import torch
    from threadpoolctl import threadpool_limits

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    threadpool_limits(1)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def leave() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=leave, daemon=True).start()
