"""What is read is checked before it is used, digests or not: shown on a run of format 1, which has none."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from breaking.runs import CONFIG, content, trained
from click.testing import CliRunner
from resealing import reseal
from typed import present

from birthlens.cli import basics
from birthlens.config.run import RunConfig
from birthlens.errors import BirthlensError
from birthlens.model.weights import load_tensors, load_with_metadata, save_tensors
from birthlens.runs.files import temporaries
from birthlens.runs.run import Run
from birthlens.runs.verify import runs_below, verify
from birthlens.tasks.kinds import chain_of, task_of
from birthlens.training.loop import Trainer, train
from birthlens.training.recording import resume, train_to_disk
from birthlens.training.replay import replayed

STORED = Path(__file__).parents[1] / "stored" / "format_1"


@pytest.fixture
def old(tmp_path: Path) -> Any:
    """Return a copy of a run of format 1, of 60 steps with checkpoints at 0, 30 and 60."""
    return Path(shutil.copytree(STORED, tmp_path / "old"))


@pytest.fixture
def one_thread() -> Any:
    """Train on one thread, which gives the bits of two for a run as small as the stored one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def interrupted(path: Any) -> None:
    """Take a run of format 1 back to what it was on disk at step 30."""
    run = Run(path)
    trainer = Trainer(run.config, run.statistics)
    for record in train(run.config, trainer=trainer):
        if record.step == 30:
            break
    state, notes = trainer.snapshot()
    save_tensors(path / "resume.safetensors", state, {"notes": json.dumps(notes)})
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 30))
    (path / "checkpoints" / "step_00000060.safetensors").unlink()


def test_a_run_of_format_1_is_read_and_said_to_be_unverified(old: Any, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(old)
    assert not run.verified and "its files are read unverified" in caplog.text
    assert run.steps == [0, 30, 60] and len(run.metrics()) == 144 and run.state()[1]["step"] == 60
    assert verify(old).lines() == [f"{old}: unverified, as format 1 has no digests; 8 files can be read"]


def test_a_run_of_format_1_is_resumed_in_its_format(old: Any, one_thread: Any) -> None:
    interrupted(old)
    for _ in resume(old):
        pass
    assert content(old) == content(STORED)
    assert (old / "run.json").read_bytes() == (STORED / "run.json").read_bytes()


def test_a_run_whose_last_checkpoint_is_gone_is_trained_again_to_the_same_bits(
    old: Any, one_thread: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (old / "checkpoints" / "step_00000060.safetensors").unlink()
    for _ in resume(old):
        pass
    assert content(old) == content(STORED)
    assert "step_00000060.safetensors is missing; training starts again from step 0" in caplog.text


def test_the_code_of_today_gives_the_numbers_of_a_stored_run(one_thread: Any) -> None:
    assert replayed(Run(STORED)) == 30


def change(name: Any, **tensors: Any) -> Any:
    """Return an edit of the tensors of a file; None removes one."""

    def act(path: Any) -> None:
        found, metadata = load_with_metadata(path / name)
        found = {key: tensor.copy() for key, tensor in found.items()}
        for key, edit in tensors.items():
            key = key.replace("__", ".")
            found[key] = edit(found.get(key))
            if found[key] is None:
                del found[key]
        save_tensors(path / name, found, metadata)

    return act


def notes(**values: Any) -> Any:
    def act(path: Any) -> None:
        tensors, metadata = load_with_metadata(path / "resume.safetensors")
        save_tensors(
            path / "resume.safetensors", tensors, {"notes": json.dumps({**json.loads(metadata["notes"]), **values})}
        )

    return act


def set_to(place: Any, value: Any) -> Any:
    def edit(tensor: Any) -> Any:
        tensor[place] = value
        return tensor

    return edit


def state(edit: Any, quantity: Any = None) -> Any:
    def act(path: Any) -> None:
        tensors, metadata = load_with_metadata(path / "resume.safetensors")
        changed = {
            key: edit(tensor.copy()) if quantity in (None, key.split("/")[0]) else tensor
            for key, tensor in tensors.items()
        }
        save_tensors(path / "resume.safetensors", changed, metadata)

    return act


CHECKPOINT = "checkpoints/step_00000030.safetensors"
FAULTS = {
    "a negative probability": (change("tables.safetensors", bigram=set_to((0, 0), -0.5)), "negative or not finite"),
    "a probability that is NaN": (
        change("tables.safetensors", bigram=set_to((3, 2), np.nan)),
        "negative or not finite",
    ),
    "an infinite unigram": (change("tables.safetensors", unigram=set_to(0, np.inf)), "negative or not finite"),
    "a row that sums to 2": (
        change("tables.safetensors", bigram=set_to((0, 0), 2.0)),
        "bigram whose probabilities do not",
    ),
    "a table in float32": (change("tables.safetensors", unigram=lambda t: t.astype(np.float32)), "unigram in float32"),
    "no bigram": (change("tables.safetensors", bigram=lambda t: None), "lacks the table bigram"),
    "another table": (change("tables.safetensors", trigram=lambda t: np.zeros(2)), "also holds ['trigram']"),
    "a trigger twice": (change("tables.safetensors", triggers=set_to(0, 1)), "distinct tokens from 0 to 11"),
    "a trigger out of range": (change("tables.safetensors", triggers=set_to(0, 12)), "distinct tokens from 0 to 11"),
    "other triggers": (change("tables.safetensors", triggers=set_to(0, 11)), "the most frequent tokens are"),
    "triggers in int32": (
        change("tables.safetensors", triggers=lambda t: t.astype(np.int32)),
        "in int32, not a list of",
    ),
    "no triggers": (
        change("tables.safetensors", triggers=lambda t: None),
        "lacks triggers, but task.triggers = 'fixed'",
    ),
    "weights that are NaN": (
        change(CHECKPOINT, L1__W_O=set_to((0, 0, 0), np.nan)),
        "numbers in L1.W_O that are not finite",
    ),
    "weights in float64": (
        change(CHECKPOINT, L1__W_O=lambda t: t.astype(np.float64)),
        "L1.W_O in float64, not float32",
    ),
    "weights that are lacking": (change(CHECKPOINT, L1__W_O=lambda t: None), "lacks L1.W_O"),
    "weights of no model": (change(CHECKPOINT, W_X=lambda t: np.zeros(3, np.float32)), "also holds ['W_X']"),
    "a constant that is infinite": (
        change("constants.safetensors", W_E=set_to((0, 0), np.inf)),
        "numbers in W_E that are",
    ),
    "a trained matrix among constants": (
        change("constants.safetensors", L1__W_O=lambda t: np.zeros((1, 16, 16), np.float32)),
        "also holds ['L1.W_O']",
    ),
    "an empty state": (state(lambda t: t[:0]), "of shape (0"),
    "a state that is NaN": (state(lambda t: np.full_like(t, np.nan), "exp_avg"), "that are not finite"),
    "a state in float64": (state(lambda t: t.astype(np.float64), "exp_avg_sq"), "in float64, not float32"),
    "another Adam step": (state(lambda t: t + 1, "step"), "counts 61 updates of L0.W_K, but metrics.jsonl 60"),
    "no state for a matrix": (
        change("resume.safetensors", **{"exp_avg/L0__W_K": lambda t: None}),
        "lacks exp_avg/L0.W_K",
    ),
    "state of no matrix": (change("resume.safetensors", **{"exp_avg/W_X": lambda t: np.zeros(1)}), "['exp_avg/W_X']"),
    "a step that is no number": (notes(step=True), "does not say which step"),
    "a step beyond the end": (notes(step=61), "belongs to step 61 of 60"),
    "a loss that is NaN": (notes(last_kept_loss=float("nan")), "last_kept_loss = nan"),
    "another engine": (notes(engine="fused"), "is of the engine 'fused', the run of 'handwritten'"),
}


@pytest.mark.parametrize(("damage", "said"), FAULTS.values(), ids=FAULTS)
def test_what_cannot_be_is_refused_by_the_name_of_its_file(old: Any, damage: Any, said: Any) -> None:
    before = {file: file.read_bytes() for file in old.rglob("*.*")}
    damage(old)
    (name,) = [file.name for file in old.rglob("*.*") if file.is_file() and file.read_bytes() != before[file]]
    with pytest.raises(BirthlensError) as error:
        content(old)
    assert said in str(error.value) and str(old) in str(error.value) and name in str(error.value)
    verdict = verify(old)
    assert not verdict.whole and any(said in text for text in verdict.damages) and verdict.saved


def test_a_checkpoint_that_is_nan_is_named_when_training_goes_on(old: Any) -> None:
    interrupted(old)
    change(CHECKPOINT, L1__W_O=set_to((0, 0, 0), np.nan))(old)
    with pytest.raises(BirthlensError, match=r"step_00000030.safetensors has numbers in L1.W_O that are not finite"):
        next(resume(old))


def test_constants_that_the_seed_does_not_give_are_refused_when_training_goes_on(old: Any) -> None:
    interrupted(old)
    change("constants.safetensors", W_E=set_to((0, 0), 0.5))(old)
    with pytest.raises(BirthlensError, match=r"constants.safetensors has another W_E than seeds.init = 0 gives here"):
        next(resume(old))


def test_the_end_of_the_measurements_is_known(tmp_path: Path) -> None:
    path = trained(tmp_path / "run")
    lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (path / "metrics.jsonl").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(BirthlensError, match=r"metrics.jsonl is damaged: it lacks its last lines"):
        Run(path).metrics()


def test_a_state_is_read_where_matrices_began_to_move_late_or_not_at_all(tmp_path: Path) -> None:
    frozen = "training.freeze_until={L0.W_K: 5, L1.W_O: 12}"
    for kind in ("sgd", "adamw"):
        path = trained(tmp_path / kind, frozen, f"optimiser.kind={kind}", until=7)
        for _ in resume(path):
            pass
        names = {name.split("/")[1] for name in Run(path).state()[0]}
        assert names == {"L0.W_K", "L1.W_K"}
        whole = trained(tmp_path / f"whole {kind}", frozen, f"optimiser.kind={kind}")
        assert content(path) == content(whole)
    assert Run(trained(tmp_path / "plain", "optimiser.kind=sgd", "optimiser.momentum=0")).state()[0] == {}


@pytest.mark.parametrize("kind", ["bigram", "noise", "backcopy", "markov", "facts"])
def test_runs_of_every_task_are_whole(tmp_path: Path, kind: Any) -> None:
    tree = {
        "task": {"kind": kind, "context": 16}, "model": {"d_model": 8}, "corpus": {"source": "markov", "vocabulary": 12},
        "training": {"steps": 2, "batch_size": 4, "loss": "all"}, "evaluation": {"batch_size": 4},
    }  # fmt: skip
    for _ in train_to_disk(RunConfig.parse(tree), tmp_path / "run"):
        pass
    assert verify(tmp_path / "run").whole


def test_triggers_of_another_kind_of_task_are_refused(tmp_path: Path) -> None:
    config = RunConfig.parse({"task": {"kind": "noise", "context": 16}, "model": {"d_model": 8}}, ["training.steps=1",
                             "training.batch_size=4", "evaluation.batch_size=4"])  # fmt: skip
    for _ in train_to_disk(config, tmp_path / "run"):
        pass
    tables = dict(load_tensors(tmp_path / "run" / "tables.safetensors"))
    tables["triggers"] = tables["triggers"][::-1].copy()
    save_tensors(tmp_path / "run" / "tables.safetensors", tables)
    reseal(tmp_path / "run")
    with pytest.raises(BirthlensError, match=r"tables.safetensors has triggers \[.*\], the task \["):
        _ = Run(tmp_path / "run").task


def test_what_killed_writers_leave_is_swept_by_the_next(tmp_path: Path) -> None:
    path = trained(tmp_path / "run", until=7)
    left = [path / ".resume.safetensors.7-8.tmp", path / "checkpoints" / ".step_00000006.safetensors.7-8.tmp"]
    for file in left:
        file.write_bytes(b"torn")
    mine = path / ".table.csv.7-8.tmp"
    mine.write_bytes(b"somebody else's")
    assert sorted(temporaries(path)) == sorted(left) and content(path)
    for _ in resume(path):
        pass
    assert not temporaries(path) and mine.exists()


def test_temporary_files_are_no_strangers(tmp_path: Path) -> None:
    for name in (".run.json.7-8.tmp", "checkpoints/.step_00000000.safetensors.7-8.tmp", ".lock"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(b"torn")
    trained(tmp_path / "run")
    assert verify(tmp_path / "run").whole and not temporaries(tmp_path / "run")


def test_a_config_is_hashable() -> None:
    one = RunConfig.parse({}, ["training.freeze_until={L0.W_K: 5, L1.W_O: 7}"])
    two = RunConfig.parse({}, ["training.freeze_until={L1.W_O: 7, L0.W_K: 5}"])
    assert hash(one) == hash(two) and one == two and len({one, two, RunConfig(), RunConfig()}) == 2


def test_verify_says_what_can_be_saved(tmp_path: Path) -> None:
    for name in ("a", "b"):
        trained(tmp_path / "runs" / name)
    shutil.copytree(STORED, tmp_path / "runs" / "old")
    done = CliRunner().invoke(basics.verify, [str(tmp_path / "runs")], catch_exceptions=False)
    runs = tmp_path / "runs"
    assert done.exit_code == 0 and done.stdout.splitlines() == [
        f"{runs / 'a'}: whole, 10 files match their digests",
        f"{runs / 'b'}: whole, 10 files match their digests",
        f"{runs / 'old'}: unverified, as format 1 has no digests; 8 files can be read",
    ]
    (runs / "a" / "checkpoints" / "step_00000003.safetensors").unlink()
    (runs / "b" / "tables.safetensors").write_bytes(b"")
    with pytest.raises(BirthlensError, match="2 of 3 runs are damaged") as error:
        CliRunner().invoke(basics.verify, [str(runs)], catch_exceptions=False)
    assert error
    assert verify(runs / "a").lines() == [
        f"{runs / 'a'}: damaged (1 fault)",
        f"  {runs / 'a' / 'checkpoints'} lacks the planned steps 3.",
        "  4 of 4 checkpoints can be used.",
        "  The measurements can be used.",
        "  Training had finished.",
    ]
    assert "Every checkpoint needs tables.safetensors: restore it" in verify(runs / "b").saved[0]
    with pytest.raises(BirthlensError, match="does not exist"):
        runs_below(tmp_path / "nowhere")


def test_an_unfinished_run_is_whole_and_its_chain_can_be_drawn_from(tmp_path: Path) -> None:
    path = trained(tmp_path / "run", until=7)
    assert verify(path).whole and Run(path).task.batch(2, 0).tokens.shape == (2, 16)
    triggers = present(task_of(CONFIG.task, chain_of(CONFIG)).fixed_triggers)
    assert triggers.tolist() == Run(path).triggers
