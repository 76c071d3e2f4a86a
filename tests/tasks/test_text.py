"""Windows of a text: parts, roles and n-grams against plain loops, and the vocabulary that is saved with a run."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from birthlens.cli import group
from birthlens.config.run import RunConfig
from birthlens.config.task import TextConfig
from birthlens.errors import BirthlensError
from birthlens.runs.run import Run, load_run
from birthlens.tasks.kinds import chain_of, task_of
from birthlens.tasks.predictors.reference import predict
from birthlens.tasks.task import HELD_OUT
from birthlens.tasks.text import TextTask
from birthlens.tasks.tokenizing import encoded
from birthlens.training.recording import resume, train_to_disk

WORDS = "the cat sat on the mat and the dog sat on the log while a cat and a dog ran to the mat. "
TEXT = WORDS * 6 + "so the mouse, seeing them, hid in a hole; the cat hid too. " * 4


def task(tokens: str = "characters", text: str = TEXT, **settings: Any) -> TextTask:
    values: dict[str, Any] = {"context": 12, "tokens": tokens, "held_out": 0.2, **settings}
    config = TextConfig(**({"vocabulary": 40} if tokens == "pairs" else {}) | values)
    return TextTask(config, TextTask.chain_of_text(config, text))


def test_training_and_evaluation_read_their_own_part_of_the_text() -> None:
    one = task()
    stream = one.stream.tolist()
    cut = len(stream) - round(0.2 * len(stream))
    for index, first, end in ((0, 0, cut), (7, 0, cut), (HELD_OUT, cut, len(stream)), (HELD_OUT + 1, cut, len(stream))):
        batch = one.batch(40, 3, index)
        windows = {tuple(stream[i : i + 13]) for i in range(first, end - 12)}
        rows = np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1).tolist()
        assert all(tuple(row) in windows for row in rows)
        assert (batch.tokens[:, 1:] == batch.targets[:, :-1]).all()


def test_roles_are_those_of_a_plain_loop() -> None:
    one = task()
    batch = one.batch(30, 0)
    for tokens, targets, *marks in zip(batch.tokens, batch.targets, *(batch.marks[r] for r in one.roles), strict=True):
        pairs: set[tuple[int, int]] = set()
        seen: set[int] = set()
        for t, pair in enumerate(zip(tokens.tolist(), targets.tolist(), strict=True)):
            expected = (pair in pairs, pair[0] in seen and pair not in pairs, pair[0] not in seen)
            assert tuple(bool(mark[t]) for mark in marks) == expected
            pairs.add(pair)
            seen.add(pair[0])


def slow_law(stream: list[int], n: int, history: tuple[int, ...]) -> list[float]:
    """Return p(w | history) by counting in loops, shorter histories first."""
    law = [1 / n] * n
    for length in range(len(history) + 1):
        known = history[len(history) - length :]
        found: Counter[int] = Counter()
        for i in range(length, len(stream)):
            if tuple(stream[i - length : i]) == known:
                found[stream[i]] += 1
        kinds = len(found)
        if kinds:
            law = [(found[w] + kinds * law[w]) / (sum(found.values()) + kinds) for w in range(n)]
    return law


def test_another_successor_is_a_pair_that_is_replaced_everywhere() -> None:
    one = task(context=24)
    batch = one.batch(30, 0)
    corrupted = one.corrupted("other_successor", batch, np.random.default_rng(0))
    clean = np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1).tolist()
    other = np.concatenate([corrupted.tokens, corrupted.targets[:, -1:]], axis=1).tolist()
    replaced = 0
    for row, (before, after) in enumerate(zip(clean, other, strict=True)):
        known = [t for t in range(24) if batch.in_context[row, t] and before[t] != before[t + 1]]
        expected = list(before)
        if known:
            pair = before[known[-1]], before[known[-1] + 1]
            new = after[known[-1] + 1]
            for t in range(24):
                if (before[t], before[t + 1]) == pair:
                    expected[t + 1] = new
            replaced += 1
            assert new != pair[1] and corrupted.in_context[row, known[-1]]
        assert after == expected
    assert replaced > 20


@pytest.mark.parametrize(("name", "order"), [("unigram", 0), ("bigram", 1), ("trigram", 2)])
def test_n_grams_are_those_of_a_slow_count(name: str, order: int) -> None:
    one = task()
    batch = one.batch(3, 0, HELD_OUT)
    found = predict(name, one, batch)
    known = one.stream[: one.cut].tolist()
    backed_off = 0
    for row, tokens in enumerate(batch.tokens.tolist()):
        for t in range(len(tokens)):
            history = tuple(tokens[max(0, t + 1 - order) : t + 1]) if order else ()
            backed_off += order == 2 and history not in set(pairwise(known))
            np.testing.assert_allclose(found[row, t], slow_law(known, len(one.statistics), history), atol=1e-12)
    assert order < 2 or backed_off, "some history of the held-out part is new"
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-12)


def test_nothing_is_counted_in_the_held_out_part() -> None:
    other = TEXT[: len(TEXT) - 100] + TEXT[: len(TEXT) - 100][-100:][::-1]
    one = task("pairs")
    two = task("pairs", other)
    assert one.statistics.vocab == two.statistics.vocab
    assert not np.array_equal(one.stream[one.cut :], two.stream[two.cut :])
    same = min(one.cut, two.cut) - 30
    np.testing.assert_array_equal(one.stream[:same], two.stream[:same])
    characters, changed = task(), task(text=other)
    np.testing.assert_array_equal(characters.statistics.bigram, changed.statistics.bigram)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("text")
    (folder / "words.txt").write_text(TEXT)
    overrides = [
        "task.kind=text", "task.context=12", "task.vocabulary=40", "corpus.source=text", f"corpus.path={folder}/words.txt",
        "model.family=full", "model.d_model=8", "model.n_heads=2", "model.init=scaled", "optimiser.kind=adamw",
        "optimiser.warm_up=2", "optimiser.decay=cosine", "training.steps=6", "training.batch_size=4", "training.loss=all",
        "checkpoints.every=3", "evaluation.batch_size=8", "task.held_out=0.3",
    ]  # fmt: skip
    for _ in train_to_disk(RunConfig.parse({}, overrides), folder / "run"):
        pass
    (folder / "words.txt").unlink()
    return load_run(folder / "run")


def test_pairs_are_built_from_the_text_and_saved_with_the_run(run: Run) -> None:
    statistics = run.statistics
    assert len(statistics) == 40
    assert max(map(len, statistics.vocab)) >= 3
    assert statistics.stream is not None
    assert "".join(statistics.vocab[i] for i in statistics.stream) == TEXT
    assert encoded(statistics, TEXT) == statistics.stream.tolist()
    task = run.task
    assert isinstance(task, TextTask)
    assert len(task.stream) == len(statistics.stream)
    shorter = encoded(statistics, "the cat ran")
    assert "".join(statistics.vocab[i] for i in shorter) == "the cat ran" and len(shorter) < 11
    with pytest.raises(BirthlensError, match="lacks"):
        encoded(statistics, "the Cät")
    merges: defaultdict[int, int] = defaultdict(int)
    for token in statistics.vocab:
        merges[len(token)] += 1
    assert merges[1] == len(set(TEXT))


def test_a_run_on_a_text_goes_through_every_command(run: Run, tmp_path: Path) -> None:
    """The text itself is gone by now: all that is needed is in the run."""
    path = str(run.path)
    page = str(tmp_path / "page.html")
    calls = [
        ["probe", path, "--what", "behaviour"],
        ["probe", path, "--what", "attention", "--steps", "last"],
        ["ablate", path, "--methods", "mean", "--batch-size", "8"],
        ["patch", path, "--sites", "z", "--draws", "0"],
        ["edges", path, "--edges", "L0H0->logits", "--draws", "0"],
        ["scores", path, "--kind", "weights"],
        ["scores", path, "--kind", "composition"],
        *(["scores", path, "--kind", kind, "--batch-size", "8"] for kind in ("heads", "transfer", "in-context-learning")),
        ["attention", path, "--text", "the cat sat", "--out", page],
        ["report", path, "--quick", "--out", str(tmp_path / "report.html")],
    ]  # fmt: skip
    for call in calls:
        done = CliRunner().invoke(group, call)
        assert done.exit_code == 0, (call, done.output, done.exception)
    assert "trigram" in (tmp_path / "report.html").read_text()
    assert list(resume(run.path)) == []


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["corpus.source=markov"], "needs a text"),
        (["task.tokens=characters", "task.vocabulary=80"], "leave it out"),
        (["task.vocabulary=30"], "distinct characters"),
        (["task.context=2000000"], "part of the text has"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(BirthlensError, match=sentence):
        config = RunConfig.parse({}, ["task.kind=text", *overrides])
        task_of(config.task, chain_of(config))


def test_a_text_that_gives_too_few_pairs_is_refused() -> None:
    with pytest.raises(BirthlensError, match="gives only"):
        task("pairs", "abababab" * 40, vocabulary=100)
