"""Forks: without a change they repeat their parent to the bit; with one they keep its state and say what they changed."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from birthlens.config.run import RunConfig
from birthlens.devices import Execution
from birthlens.errors import BirthlensError
from birthlens.runs.run import Run, load_run
from birthlens.training.forking import fork, trainer_at
from birthlens.training.loop import train
from birthlens.training.recording import resume, train_to_disk

TINY = {
    "corpus": {"source": "markov", "vocabulary": 12},
    "task": {"context": 24, "n_triggers": 3},
    "model": {"d_model": 16},
    "training": {"steps": 12, "batch_size": 8},
    "checkpoints": {"every": 4},
    "evaluation": {"batch_size": 8, "every": 2},
}


def trained(out: Any, *overrides: Any) -> Any:
    for _ in train_to_disk(RunConfig.parse(TINY, overrides), out):
        pass
    return load_run(out)


def forked(parent: Any, out: Any, at: Any, changes: Any = (), clamps: Any = ()) -> Any:
    for _ in fork(parent.path, out, at, changes, clamps):
        pass
    return load_run(out)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained(tmp_path_factory.mktemp("fork") / "parent")


def check_equal(fork_run: Any, parent_run: Any) -> Any:
    steps = [step for step in fork_run.steps if step in parent_run.steps]
    for step in steps:
        for name in parent_run.config.trained:
            np.testing.assert_array_equal(fork_run.weights(step)[name], parent_run.weights(step)[name])
    ours, theirs = (
        run.metrics().query(f"step > {fork_run.steps[0]}").reset_index(drop=True) for run in (fork_run, parent_run)
    )
    assert ours.equals(theirs) and len(ours)
    return steps


@pytest.mark.parametrize("engine", ["reference", "functional", "handwritten", "fused"])
@pytest.mark.parametrize(
    "optimiser",
    [[], ["optimiser.kind=adamw", "optimiser.learning_rate=0.003", "optimiser.warm_up=3"]],
    ids=["sgd", "adamw"],
)
def test_a_fork_without_a_change_equals_its_parent_to_the_bit(engine: Any, optimiser: Any, tmp_path: Path) -> None:
    run = trained(tmp_path / "parent", f"training.engine={engine}", *optimiser)
    assert check_equal(forked(run, tmp_path / "kept", 4), run) == [4, 8, 12]
    assert check_equal(forked(run, tmp_path / "between", 7), run) == [8, 12]
    assert load_run(tmp_path / "between").steps == [7, 8, 12]
    assert load_run(tmp_path / "between").header["engine"]["name"] == engine


def test_a_fork_draws_its_batches_as_its_parent_does(tmp_path: Path) -> None:
    config = RunConfig.parse(TINY, [])
    for _ in train_to_disk(config, tmp_path / "parent", Execution(sampler="counter")):
        pass
    run = load_run(tmp_path / "parent")
    assert check_equal(forked(run, tmp_path / "fork", 6), run) == [8, 12]
    assert check_equal(forked(load_run(tmp_path / "fork"), tmp_path / "second", 7), run) == [8, 12]
    clamped = forked(run, tmp_path / "clamped", 6, (), ["pin L0H0 previous from=9"])
    again = forked(clamped, tmp_path / "again", 7)
    assert clamped.header["engine"]["sampler"] == again.header["engine"]["sampler"] == "counter"
    assert check_equal(again, clamped) == [8, 12]


def test_sensitive_checkpoints_are_those_of_the_parent(tmp_path: Path) -> None:
    sensitive = ["checkpoints.sensitivity=0.001", "checkpoints.every=12", "optimiser.learning_rate=1"]
    run = trained(tmp_path / "parent", *sensitive)
    assert len(run.steps) > 3
    at = run.steps[1]
    assert forked(run, tmp_path / "fork", at).steps == [step for step in run.steps if step >= at]


def test_a_fork_of_a_fork_repeats_the_first_run(parent: Any, tmp_path: Path) -> None:
    second = forked(forked(parent, tmp_path / "first", 4), tmp_path / "second", 6)
    assert check_equal(second, parent) == [8, 12]
    assert "first at step 6, without a change" in str(second.parent)


def test_lineage_is_kept_relative_and_shown(parent: Any, tmp_path: Path) -> None:
    run = forked(
        parent, tmp_path / "fork", 4, ["optimiser.learning_rate=0.1", "training.steps=14"], ["freeze L0.W_K until=9"]
    )
    header = json.loads((tmp_path / "fork" / "run.json").read_text())
    assert not header["parent"]["run"].startswith("/")
    assert run.parent.path.resolve() == parent.path.resolve() and run.parent.step == 4
    assert set(run.parent.changes) == {"optimiser.learning_rate=0.1", "training.steps=14"}
    assert run.parent.clamps == ("freeze L0.W_K from=4 until=9",)
    assert run.finished and run.steps == [4, 8, 12, 14]
    for step in (4, 8):
        np.testing.assert_array_equal(run.weights(step)["L0.W_K"], parent.weights(4)["L0.W_K"])
        assert step == 4 or not np.array_equal(run.weights(step)["L1.W_O"], parent.weights(step)["L1.W_O"])
    assert parent.parent is None


def test_the_data_stream_goes_on_unless_its_seed_changes(parent: Any, tmp_path: Path) -> None:
    """The first update of a fork with another rate sees the loss of its parent's; with another seed it does not."""
    losses = {}
    for name, changes in {"rate": ["optimiser.learning_rate=0.01"], "seed": ["seeds.data=5"]}.items():
        table = forked(parent, tmp_path / name, 4, changes).metrics()
        losses[name] = table.query("split == 'train' and step == 5")["value"].iloc[0]
    expected = parent.metrics().query("split == 'train' and step == 5")["value"].iloc[0]
    assert losses["rate"] == expected != losses["seed"]


def test_a_clamped_parent_hands_its_clamps_on(tmp_path: Path) -> None:
    clamps = ["training.clamps=[add L1.W_O 2 from=4, 'hold L0.W_K step:2 from=6 until=10', 'pin L1H0 frozen from=3']"]
    run = trained(tmp_path / "parent", *clamps)
    for at in (3, 4, 7):
        check_equal(forked(run, tmp_path / f"fork{at}", at), run)


def test_a_matrix_is_held_at_a_later_step_of_the_parent(parent: Any, tmp_path: Path) -> None:
    run = forked(parent, tmp_path / "fork", 3, (), ["hold L1.W_O step:12 until=10"])
    np.testing.assert_array_equal(run.weights(4)["L1.W_O"], parent.weights(12)["L1.W_O"])
    early = forked(run, tmp_path / "second", 10, (), ["hold L1.W_O step:1"])
    expected = next(r.weights for r in train(parent.config) if r.step == 1)
    np.testing.assert_array_equal(early.weights(12)["L1.W_O"], expected["L1.W_O"])


def test_a_killed_fork_resumes_to_the_bit(parent: Any, tmp_path: Path) -> None:
    changes = ["training.steps=16"], ["hold L1.W_O step:12 from=9 until=11", "ablate L1H0 mean from=5 until=7"]
    whole = forked(parent, tmp_path / "whole", 5, *changes)
    for record in fork(parent.path, tmp_path / "killed", 5, *changes):
        if record.step == 9:
            break
    for _ in resume(tmp_path / "killed"):
        pass
    check_equal(load_run(tmp_path / "killed"), whole)
    assert load_run(tmp_path / "killed").header["engine"]["name"] == "functional"


def test_a_replay_that_differs_is_said_and_kept_weights_are_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trained(tmp_path / "parent", "training.engine=handwritten")
    trainer = trainer_at(run, 12)
    assert trainer.step == 12 and not caplog.records
    other = trained(tmp_path / "other", "training.engine=handwritten", "seeds.data=1")
    header = json.loads((other.path / "run.json").read_text())
    assert header["config"]["seeds"]["data"] == 1
    import unittest.mock

    wrong = {name: array + 1 for name, array in run.checkpoint(8).items()}
    with (
        unittest.mock.patch.object(Run, "checkpoint", lambda self, step: wrong),
        caplog.at_level(logging.WARNING),
    ):
        trainer = trainer_at(run, 8)
    assert "gives other weights than it kept at step 0" in caplog.text
    np.testing.assert_array_equal(trainer.engine.tensors()["L0.W_K"], wrong["L0.W_K"])


@pytest.mark.parametrize(
    ("at", "changes", "clamps", "message"),
    [
        (13, [], [], "step = 13 is outside .*; it has steps 0 to 12"),
        (-9, [], [], "step = -9 is outside"),
        (12, [], [], "training.steps = 12: a fork at step 12 needs more steps than that"),
        (4, ["model.d_model=8"], [], "model.d_model cannot change in a fork"),
        (4, ["corpus.vocabulary=13"], [], "corpus.vocabulary cannot change in a fork"),
        (4, ["task.context=8"], [], "task.context cannot change in a fork"),
        (4, ["optimiser.kind=adamw"], [], "optimiser.kind cannot change in a fork"),
        (4, ["training.clamps=[freeze L0.W_K]"], [], "a fork keeps the clamps of its parent; add others with --clamp"),
        (4, ["task.offset=11"], [], "task.n_triggers = 3: the vocabulary of 12 tokens leaves 1"),
        (4, [], ["freeze L0.W_K from=2"], "it starts before the fork, which begins at step 4"),
        (4, [], ["freeze L5.W_K"], "L5.W_K is not a trained matrix"),
        (4, [], ["hold L1.W_O step:40"], "step = 40 is outside"),
    ],
)
def test_what_a_fork_refuses(parent: Any, tmp_path: Path, at: Any, changes: Any, clamps: Any, message: Any) -> None:
    with pytest.raises(BirthlensError, match=message):
        forked(parent, tmp_path / "fork", at, changes, clamps)
    assert not (tmp_path / "fork").exists()


def test_a_fork_whose_parent_is_gone_starts_from_what_it_keeps(parent: Any, tmp_path: Path) -> None:
    run = forked(forked(parent, tmp_path / "first", 4), tmp_path / "second", 5)
    (tmp_path / "first").rename(tmp_path / "moved")
    assert trainer_at(run, 12).step == 12
    with pytest.raises(BirthlensError, match=r"is a fork of .*first, which does not exist"):
        trainer_at(run, 8)
