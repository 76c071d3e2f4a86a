"""The quick part of the fuzzer; `make break` runs the long one."""

import random
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fuzz
import hostile

SEED = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fuzz.train_tiny(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(autouse=True)
def limited():
    before = signal.signal(signal.SIGALRM, fuzz.interrupt)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", [kind for kind in fuzz.CASES if kind != "arguments"])
def test_hostile_documents_are_refused_in_one_sentence(kind, tmp_path):
    for number in range(60):
        signal.alarm(fuzz.SECONDS)
        became, message = outcome(kind, random.Random(f"{SEED} {kind} {number}"), tmp_path, None)
        signal.alarm(0)
        assert became in ("accepted", "refused"), (number, message)


def test_hostile_arguments_are_refused_in_one_sentence(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(25):
        signal.alarm(fuzz.SECONDS)
        became, message = outcome("arguments", random.Random(f"{SEED} {number}"), tmp_path, run)
        signal.alarm(0)
        assert became in ("accepted", "refused"), (number, message)


def outcome(kind, rng, place, run):
    try:
        fuzz.CASES[kind](rng, str(place), run)
    except BaseException as error:
        return fuzz.judged(error)
    return "accepted", ""


def test_the_fuzzer_draws_the_same_cases_again_and_judges_what_they_become():
    one, two = (hostile.document(random.Random("a seed"), hostile.CONFIG) for _ in range(2))
    assert one == two
    assert fuzz.judged(KeyError("x"))[0] == "traceback"
    assert fuzz.judged(MemoryError())[0] == "refused"


def test_the_fuzzer_counts_crashes_hangs_and_tracebacks(monkeypatch, tmp_path):
    def hanging(*_):
        raise fuzz.HangError

    def failing(*_):
        raise KeyError("x")

    monkeypatch.setattr(fuzz, "CASES", dict.fromkeys(fuzz.KINDS, hanging))
    assert fuzz.case(0, 0, str(tmp_path), None)[1] == "hang"
    monkeypatch.setattr(fuzz, "CASES", dict.fromkeys(fuzz.KINDS, failing))
    assert fuzz.case(0, 0, str(tmp_path), None)[1] == "traceback"
