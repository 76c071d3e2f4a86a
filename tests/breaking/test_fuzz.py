"""The quick part of the fuzzer; `make break` runs the long one."""

import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fuzz  # type: ignore[import-not-found]
import hostile  # type: ignore[import-not-found]

SEED = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fuzz.train_tiny(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(autouse=True)
def limited() -> Any:
    before = signal.signal(signal.SIGALRM, fuzz.interrupt)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", [kind for kind in fuzz.CASES if kind != "arguments"])
def test_hostile_documents_are_refused_in_one_sentence(kind: Any, tmp_path: Path) -> None:
    for number in range(60):
        signal.alarm(fuzz.SECONDS)
        became, message = outcome(kind, random.Random(f"{SEED} {kind} {number}"), tmp_path, None)
        signal.alarm(0)
        assert became in ("accepted", "refused"), (number, message)


def test_hostile_arguments_are_refused_in_one_sentence(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(25):
        signal.alarm(fuzz.SECONDS)
        became, message = outcome("arguments", random.Random(f"{SEED} {number}"), tmp_path, run)
        signal.alarm(0)
        assert became in ("accepted", "refused"), (number, message)


def outcome(kind: Any, rng: Any, place: Any, run: Any) -> Any:
    try:
        fuzz.CASES[kind](rng, str(place), run)
    except BaseException as error:
        return fuzz.judged(error)
    return "accepted", ""


def test_the_fuzzer_draws_the_same_cases_again_and_judges_what_they_become() -> None:
    one, two = (hostile.document(random.Random("a seed"), hostile.CONFIG) for _ in range(2))
    assert one == two
    assert fuzz.judged(KeyError("x"))[0] == "traceback"
    assert fuzz.judged(MemoryError())[0] == "refused"


def test_the_fuzzer_counts_crashes_hangs_and_tracebacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def hanging(*_: Any) -> None:
        raise fuzz.HangError

    def failing(*_: Any) -> None:
        raise KeyError("x")

    monkeypatch.setattr(fuzz, "CASES", dict.fromkeys(fuzz.KINDS, hanging))
    assert fuzz.case(0, 0, str(tmp_path), None)[1] == "hang"
    monkeypatch.setattr(fuzz, "CASES", dict.fromkeys(fuzz.KINDS, failing))
    assert fuzz.case(0, 0, str(tmp_path), None)[1] == "traceback"
