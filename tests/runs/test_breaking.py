"""The quick part of the break test of runs; `PYTHONPATH=tests python -m breaking` is the long one."""

import random
from pathlib import Path
from typing import Any

import pytest
from breaking import runs as breaking
from breaking.kills import JOBS, kills

from birthlens.runs.reuse import standing
from birthlens.training.recording import resume, train_to_disk


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return breaking.trained(tmp_path_factory.mktemp("broken") / "finished")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return breaking.trained(tmp_path_factory.mktemp("broken") / "other", "seeds.data=1", "seeds.init=1")


def test_a_flipped_bit_is_found_in_every_file(finished: Any) -> None:
    counts, wrong = breaking.tried(breaking.flips(finished, 90, random.Random(0)))
    assert not wrong and counts["found"] == 90


def test_a_flipped_bit_is_found_in_an_unfinished_run(tmp_path: Path) -> None:
    path = breaking.trained(tmp_path / "run", until=7)
    counts, wrong = breaking.tried(breaking.flips(path, 40, random.Random(1)))
    assert not wrong and counts["found"] == 40


def test_files_of_other_runs_and_steps_are_found(finished: Any, other: Any) -> None:
    counts, wrong = breaking.tried(breaking.swaps(finished, other))
    assert not wrong
    assert counts == {"found": 29, "harmless": 1}  # both runs have the same tables, and 5 checkpoints


def test_edits_are_found(finished: Any) -> None:
    counts, wrong = breaking.tried(breaking.edits(finished))
    assert not wrong and counts["found"] > 800
    assert counts["harmless"] < 30  # a value that is what it is changed to, such as the seed 7 or an empty list


def test_cut_and_removed_files_are_found(finished: Any) -> None:
    counts, wrong = breaking.tried(breaking.cuts(finished))
    assert not wrong
    assert counts["harmless"] == 1  # metrics.jsonl with a torn line after its end, as a kill leaves it


@pytest.mark.parametrize("name", JOBS)
def test_work_killed_at_any_moment_is_continued_to_the_same_bits(name: str, tmp_path: Path) -> None:
    job, share = JOBS[name]
    count = 8 // min(share, 4)
    counts, wrong = breaking.tried(kills(tmp_path, count, random.Random(2), job))
    assert not wrong and counts == {"equal": count}


def test_a_run_killed_between_its_last_step_and_the_state_there_is_completed(tmp_path: Path) -> None:
    path = tmp_path / "run"
    earlier = b""
    for record in train_to_disk(breaking.CONFIG, path):
        if record.step == 9:
            earlier = (path / "resume.safetensors").read_bytes()
    expected = breaking.content(path)
    (path / "resume.safetensors").write_bytes(earlier)
    left = path / ".cost.json.1-1.tmp"
    left.write_text("{")
    state, _ = standing(breaking.CONFIG, path, lambda run: None)
    assert state == "continued" and not left.exists()
    list(resume(path))
    assert breaking.content(path) == expected
    assert standing(breaking.CONFIG, path, lambda run: None)[0] == "reused"
