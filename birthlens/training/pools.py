"""Pools on other machines, as executors of the standard library: a Dask scheduler, or Slurm through submitit.

The results of a task are written to a folder that all machines share; only names and outcomes come back. A run is continued
from its last checkpoint wherever its task is started again, so a killed worker loses only the steps since then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from birthlens.errors import BirthlensError
from birthlens.reading import read_mapping

PATIENCE = 20
"""Seconds to wait for an answer from a scheduler."""
ATTEMPTS = 3
"""How often a task is started if workers are killed."""
_TOGETHER = 0.3
"""Seconds during which tasks are collected into one job array."""


@contextmanager
def dask_pool(address: str, patience: float = PATIENCE) -> Iterator[tuple[Executor, str]]:
    """Connect to a Dask scheduler; yield its pool and the address of its dashboard.

    Raises:
        BirthlensError: if Dask is not installed, or nothing answers at the address.
    """
    try:
        from distributed import Client
    except ImportError:
        raise BirthlensError("scheduler: Dask is not installed; pip install 'birthlens[cluster]'.") from None
    try:
        client = Client(address, timeout=patience, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BirthlensError(f"scheduler = {address!r} does not answer ({reason}); check that it runs.") from None
    with client:
        yield client.get_executor(retries=ATTEMPTS - 1), client.dashboard_link


@contextmanager
def slurm_pool(file: str | Path, folder: str | Path) -> Iterator[Executor]:
    """Open a pool of Slurm jobs; `file` contains arguments of submitit's `update_parameters`, and logs go to `folder`.

    The key `cluster` chooses submitit's executor: slurm by default, or local for processes of this machine.

    Raises:
        BirthlensError: if submitit is not installed, or refuses a parameter.
    """
    try:
        from submitit import AutoExecutor
    except ImportError:
        raise BirthlensError("slurm: submitit is not installed; pip install 'birthlens[slurm]'.") from None
    settings = {str(key): value for key, value in read_mapping(file, "slurm").items()}
    try:
        executor = AutoExecutor(folder=str(folder), cluster=settings.pop("cluster", None))
        executor.update_parameters(**settings)
    except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise BirthlensError(f"slurm = {str(file)!r} cannot be used: {reason}.") from None
    pool = _Jobs(executor)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class _Jobs(Executor):
    """Tasks as jobs of submitit; tasks submitted at about the same time form one job array."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self._new: list[_Task] = []
        self._guard = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., Any], /, *args: Any, **keywords: Any) -> Future[Any]:
        """Add a task to the next job array."""
        task = _Task(function, args, keywords)
        with self._guard:
            self._new.append(task)
        return task.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the running jobs if `cancel_futures`, and wait for the rest."""
        if cancel_futures:
            self._closing.set()
        if wait:
            self._thread.join()

    def _serve(self) -> None:
        running: list[_Task] = []
        while not self._closing.is_set():
            self._closing.wait(_TOGETHER)
            with self._guard:
                new, self._new = self._new, []
            self._begin(new)
            running = [task for task in running + new if not self._ended(task)]
        for task in running:
            task.job.cancel(check=False)

    def _begin(self, tasks: list[_Task]) -> None:
        if not tasks:
            return
        with self._executor.batch():
            for task in tasks:
                task.job = self._executor.submit(task.function, *task.args, **task.keywords)
                task.attempts += 1

    def _ended(self, task: _Task) -> bool:
        """Pass on the result of a job; a killed job is started again, up to `ATTEMPTS` times in all."""
        from submitit.core.utils import UncompletedJobError

        if not task.job.done():
            return False
        try:
            task.future.set_result(task.job.result())
        except UncompletedJobError as error:
            if task.attempts < ATTEMPTS:
                self._begin([task])
                return False
            last = str(error).splitlines()[-1]
            task.future.set_exception(BirthlensError(f"its job was killed {ATTEMPTS} times; the last said: {last}"))
        except Exception as error:  # the caller handles whatever the task raised
            task.future.set_exception(error)
        return True


class _Task:
    """A call, its future, and its current job."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.function = function
        self.args = args
        self.keywords = keywords
        self.future: Future[Any] = Future()
        self.job: Any = None
        self.attempts = 0
