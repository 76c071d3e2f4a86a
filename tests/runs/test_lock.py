"""One writer for a run: a second one is refused by name, and a dead one is no obstacle."""

import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from breaking.runs import CONFIG, content, trained
from typed import close, present

from birthlens.errors import BirthlensError
from birthlens.runs.lock import locked, only_writer
from birthlens.runs.run import Run
from birthlens.training.recording import resume, train_to_disk

HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom birthlens.runs.lock import only_writer\n"
    "with only_writer(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
)


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Hold the lock of a run in another process."""
    path = trained(tmp_path / "run", until=7)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    said = present(process.stdout)
    assert said.readline() == "held\n"
    yield path, process
    process.kill()
    process.wait()
    said.close()


def test_a_live_run_is_neither_resumed_nor_overwritten(holder: Any) -> None:
    path, process = holder
    before = {file: file.read_bytes() for file in path.rglob("*.*")}
    said = rf"{path} is being written by process {process.pid} on {platform.node()}"
    with pytest.raises(BirthlensError, match=said):
        next(resume(path))
    with pytest.raises(BirthlensError, match=said):
        next(train_to_disk(CONFIG, path))
    assert before == {file: file.read_bytes() for file in path.rglob("*.*")}
    assert len(Run(path).steps) == 3  # reading needs no lock


def test_a_dead_holder_is_survived(holder: Any, tmp_path: Path) -> None:
    path, process = holder
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (path / ".lock").exists()
    for _ in resume(path):
        pass
    assert content(path) == content(trained(tmp_path / "whole")) and not (path / ".lock").exists()


def test_this_process_is_a_holder_like_any_other(tmp_path: Path) -> None:
    records = train_to_disk(CONFIG, tmp_path / "run")
    next(records)
    with pytest.raises(BirthlensError, match="is being written by this process"):
        next(resume(tmp_path / "run"))
    close(records)
    assert next(resume(tmp_path / "run")).step == 1


def test_two_writers_at_once_make_one_run(tmp_path: Path) -> None:
    """Many threads begin the same run; one does, and the others are refused."""
    outcomes: list[object] = []
    start = threading.Barrier(6)

    def begin() -> None:
        start.wait()
        try:
            for _ in train_to_disk(CONFIG, tmp_path / "run"):
                pass
            outcomes.append("trained")
        except BirthlensError as error:
            outcomes.append(
                "refused" if "being written" in str(error) or "already holds a run" in str(error) else error
            )

    threads = [threading.Thread(target=begin) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes, key=str) == ["refused"] * 5 + ["trained"]
    assert content(tmp_path / "run") == content(trained(tmp_path / "alone"))


def test_waiting_holders_take_turns(tmp_path: Path) -> None:
    inside = []
    most = []

    def turn() -> None:
        with locked(tmp_path / ".lock", wait=True):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=turn) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8 and not list(tmp_path.iterdir())


def test_an_unfinished_holder_on_another_host_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".lock").write_text(json.dumps({"pid": 7, "host": "elsewhere"}))
    with only_writer(tmp_path):
        pass
    assert "process 7 on elsewhere, which did not finish" in caplog.text


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand for a file system without locks."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_locks_a_file_takes_their_place(
    tmp_path: Path, no_locks: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with only_writer(tmp_path):
        assert "file system without locks (No locks available)" in caplog.text
        with pytest.raises(BirthlensError, match=r"this process; .* delete .*\.lock\.created"), only_writer(tmp_path):
            pass
    assert not list(tmp_path.iterdir())
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    file = tmp_path / ".lock.created"
    file.write_text(json.dumps({"pid": int(dead.stdout), "host": platform.node()}))
    with only_writer(tmp_path):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    file.write_text(json.dumps({"pid": int(dead.stdout), "host": "elsewhere"}))
    with pytest.raises(BirthlensError, match=r"process \d+ on elsewhere"), only_writer(tmp_path):
        pass


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(BirthlensError, match=r"nowhere cannot be written: No such file"),
        only_writer(tmp_path / "nowhere"),
    ):
        pass
