"""Sweeps: what is there and matches is used again, what is not is trained, what is something else is refused by name."""

import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from resealing import replace, reseal

from birthlens.config.run import RunConfig
from birthlens.errors import BirthlensError
from birthlens.model.weights import load_tensors
from birthlens.runs.run import load_run
from birthlens.training.grid import Grid
from birthlens.training.recording import train_to_disk
from birthlens.training.replay import replayed
from birthlens.training.sweep import outcomes_of, prepare, run_path, runs_of, sweep, trained
from birthlens.training.workers import WorkerKilledError, workers

TINY = {
    "corpus": {"source": "markov", "vocabulary": 12},
    "task": {"context": 16, "n_triggers": 2},
    "model": {"d_model": 8},
    "training": {"steps": 6, "batch_size": 4},
    "checkpoints": {"every": 2},
    "evaluation": {"batch_size": 4, "every": 2},
}
CONFIG = RunConfig.parse(TINY)
GRID = Grid(CONFIG, {"fixed": (), "random": ("task.triggers=random",)}, seeds=(0, 1))


def states(configs: Any, folder: Any, **kw: Any) -> Any:
    return sorted(outcome.state for outcome in sweep(configs, folder, processes=1, **kw))


def test_a_grid_is_every_case_with_every_seed() -> None:
    axes, cases = {"task.offset": [0, 3], "model.d_model": [8, 16]}, {"a": [], "b": ["task.triggers=random"]}
    tree = {"preset": "laptop", "overrides": ["training.steps=9"], "axes": axes, "cases": cases, "seeds": 3}
    grid = Grid.parse(tree)
    configs = grid.configs()
    assert len(configs) == 2 * 4 * 3
    one = configs["b task.offset=3 model.d_model=16", 2]
    assert (one.model.d_model, one.training.steps, one.task.to_data()["offset"]) == (16, 9, 3)
    assert one.task.to_data()["triggers"] == "random"
    assert (one.seeds.init, one.seeds.data, one.seeds.evaluation) == (2, 2, RunConfig().seeds.evaluation)
    assert len({run_path(config, ".") for config in configs.values()}) == len(configs)
    assert Grid.parse({"axes": {"task.offset": [0]}}).configs().keys() == {("task.offset=0", 0)}


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"axis": {}}, "'axis' is unknown; valid are preset"),
        ({"seeds": 0}, "seeds = 0"),
        ({"cases": ["a"]}, "cases = ['a']"),
        ({"axes": {"task.offset": 3}}, "it must map names to lists"),
        ({"overrides": "training.steps=3"}, "give a list"),
        ({"overrides": [1]}, "give a list"),
        ({"overrides": {}}, "give a list"),
        ({"cases": {"a": [None]}}, "cases.a = [None]"),
        ({"cases": 0}, "it must map names to lists"),
        ({"cases": {"1": [], 1: []}}, "the same text"),
        ({"preset": ["demo"]}, "give the name of a preset"),
        ({"seeds": True}, "seeds = True"),
        ({1: 2}, "1 is unknown"),
        ({"axes": {"task.offset": []}}, "list at least one value"),
        ({"axes": {"task.offset": [1, 1]}}, "two cases have the name 'task.offset=1'"),
        ({"axes": {"task.offset=3 #": [1]}}, "without '='"),
        ({"axes": {f"task.a{i}": list(range(10)) for i in range(12)}}, "has 1000000000000 runs"),
        ({"seeds": 10**12}, "has 1000000000000 runs"),
        ({"cases": {"a": ["task.offset=3"]}, "axes": {"task.offset": [1]}}, "is set in cases.a and listed in axes"),
        ({"seeds": 2, "overrides": ["seeds.data=0"]}, "seeds.data is set in overrides"),
        ({"seeds": 2, "axes": {"seeds.init": [0, 1]}}, "seeds.init is set in axes"),
        ({"seeds": 2, "cases": {"a": ["seeds.init = 3"]}}, "seeds.init is set in cases.a"),
    ],
)
def test_a_wrong_grid_is_refused(tree: Any, said: Any) -> None:
    with pytest.raises(BirthlensError, match="sweep") as error:
        Grid.parse(tree)
    assert said in str(error.value)


def test_seeds_that_a_sweep_lists_are_those_that_it_trains() -> None:
    grid = Grid.parse({"axes": {"seeds.init": [0, 1, 2]}, "overrides": ["seeds.data=7"]})
    assert {(config.seeds.init, config.seeds.data) for config in grid.configs().values()} == {(0, 7), (1, 7), (2, 7)}
    assert [seed for _, seed in grid.configs()] == [0, 1, 2]
    with pytest.raises(BirthlensError, match="is set in axes"):
        Grid.parse({"axes": {"seeds.init": [0, 1, 2]}}, seeds=2)


def test_a_seed_of_the_base_or_a_case_is_not_overwritten() -> None:
    base = RunConfig.parse(TINY, ["seeds.init=4", "seeds.data=5"])
    (config,) = Grid(base, {"one": ()}).configs().values()
    assert config == base
    with pytest.raises(BirthlensError, match=r"seeds\.init = 4, but the number of seeds"):
        Grid(base, {"one": ()}, seeds=(0, 1)).configs()
    same = RunConfig.parse(TINY, ["seeds.init=4", "seeds.data=4"])
    assert list(Grid(same, {"one": ()}, seeds=(4,)).configs().values()) == [same]


def test_equal_configs_share_a_run_and_a_second_sweep_trains_nothing(tmp_path: Path) -> None:
    configs = [*GRID.configs().values(), *GRID.configs().values()]
    assert states(configs, tmp_path) == ["trained"] * 4
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert states(configs, tmp_path) == ["reused"] * 4
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    runs = runs_of(GRID, tmp_path, processes=1)
    assert runs["random", 1].config.task.to_data()["triggers"] == "random" and runs["random", 1].config.seeds.data == 1


def test_processes_train_the_same_bits_as_this_process(tmp_path: Path) -> None:
    configs = [GRID.configs()["fixed", seed] for seed in (0, 1)]
    for folder, processes in (("one", 1), ("two", 2)):
        assert {outcome.state for outcome in sweep(configs, tmp_path / folder, processes)} == {"trained"}
    for config in configs:
        one, two = (load_run(run_path(config, tmp_path / folder)).weights(-1) for folder in ("one", "two"))
        assert all(np.array_equal(one[name], two[name]) for name in one)


def test_an_interrupted_run_is_continued_to_the_same_weights(tmp_path: Path) -> None:
    path, whole = run_path(CONFIG, tmp_path), tmp_path / "whole"
    for _ in train_to_disk(CONFIG, whole):
        pass
    for record in train_to_disk(CONFIG, path):
        if record.step == 3:
            break
    outcome = prepare(CONFIG, path)
    assert outcome.state == "continued" and outcome.cpu_seconds > 0
    ours, theirs = load_run(path).weights(-1), load_run(whole).weights(-1)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_stopped_before_its_first_checkpoint_is_begun_again(tmp_path: Path) -> None:
    path = run_path(CONFIG, tmp_path)
    for _ in train_to_disk(CONFIG, path):
        break
    (path / "resume.safetensors").unlink()
    assert prepare(CONFIG, path).state == "trained"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda header: header["config"]["training"].update(batch_size=5), "another config"),
        (lambda header: header["vocab"].reverse(), "another text"),
    ],
)
def test_what_does_not_match_is_never_used(tmp_path: Path, change: Any, said: Any) -> None:
    path = run_path(CONFIG, tmp_path)
    prepare(CONFIG, path)
    reseal(path, change)
    outcome = prepare(CONFIG, path)
    assert outcome.state == "failed" and said in outcome.message and str(path) in outcome.message


BY_OTHERS = {
    "another birthlens": lambda header: header.update(birthlens="0.0.1"),
    "other training code": lambda header: header.update(code="0123456789abcdef"),
    "unknown training code": lambda header: header.pop("code"),
}


def test_what_other_packages_made_is_trained_anew_and_that_is_said(tmp_path: Path) -> None:
    path = run_path(CONFIG, tmp_path)
    prepare(CONFIG, path)
    reseal(path, lambda header: header["versions"].update(torch="1.0"))
    outcome = prepare(CONFIG, path)
    assert outcome.state == "trained" and "again, since it was made by other code (torch 1.0" in outcome.message
    assert prepare(CONFIG, path).state == "reused"


@pytest.mark.parametrize("change", BY_OTHERS.values(), ids=BY_OTHERS)
def test_what_other_code_made_is_used_where_a_replay_gives_the_same_bits(tmp_path: Path, change: Any) -> None:
    path = run_path(CONFIG, tmp_path)
    prepare(CONFIG, path)
    reseal(path, change)
    before = {file: file.read_bytes() for file in path.rglob("*.*")}
    outcome = prepare(CONFIG, path)
    assert outcome.state == "reused" and before == {file: file.read_bytes() for file in path.rglob("*.*")}
    assert outcome.message == "made by other code, of which 2 steps replayed here are equal to the bit"


OTHER_NUMBERS = {
    "constants": "constants.safetensors",
    "step 0": "checkpoints/step_00000000.safetensors",
    "step 2": "checkpoints/step_00000002.safetensors",
}


@pytest.mark.parametrize("name", OTHER_NUMBERS.values(), ids=OTHER_NUMBERS)
def test_what_other_code_made_is_trained_anew_where_one_bit_differs(tmp_path: Path, name: Any) -> None:
    path = run_path(CONFIG, tmp_path)
    prepare(CONFIG, path)
    tensors = {key: tensor.copy() for key, tensor in load_tensors(path / name).items()}
    bits = next(iter(tensors.values())).reshape(-1).view(np.uint32)
    bits[0] ^= 1
    replace(path, name, tensors)
    assert prepare(CONFIG, path).state == "reused"  # the digests match, and the code is this
    reseal(path, BY_OTHERS["other training code"])
    outcome = prepare(CONFIG, path)
    assert outcome.state == "trained" and "whose first steps give other numbers" in outcome.message
    assert "0123456789abcdef" in outcome.message and prepare(CONFIG, path).message == ""


def test_a_replay_compares_measurements_too(tmp_path: Path) -> None:
    path = run_path(CONFIG, tmp_path)
    prepare(CONFIG, path)
    assert replayed(load_run(path)) == 2 and replayed(load_run(path), longest=1) is None
    first, *others = (path / "metrics.jsonl").read_text().splitlines()
    row = {**json.loads(first), "value": np.nextafter(json.loads(first)["value"], 10)}
    (path / "metrics.jsonl").write_text("".join(line + "\n" for line in (json.dumps(row), *others)))
    reseal(path)
    assert replayed(load_run(path)) is None


def test_an_unfinished_run_of_other_code_is_continued_where_a_replay_agrees(tmp_path: Path) -> None:
    path = run_path(CONFIG, tmp_path)
    for record in train_to_disk(CONFIG, path):
        if record.step == 5:
            break
    reseal(path, BY_OTHERS["other training code"])
    assert prepare(CONFIG, path).state == "continued" and load_run(path).finished


def cut(name: Any, share: Any = 0.5) -> Any:
    def act(path: Any) -> None:
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: int(len(data) * share)])

    return act


def a_line_less(path: Any) -> None:
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(lines[:-1]))


DAMAGES = {
    "a checkpoint gone": lambda path: (path / "checkpoints" / "step_00000002.safetensors").unlink(),
    "the last checkpoint gone": lambda path: (path / "checkpoints" / "step_00000006.safetensors").unlink(),
    "all checkpoints gone": lambda path: shutil.rmtree(path / "checkpoints"),
    "a checkpoint cut": cut("checkpoints/step_00000004.safetensors"),
    "constants gone": lambda path: (path / "constants.safetensors").unlink(),
    "tables cut": cut("tables.safetensors"),
    "header cut": cut("run.json"),
    "metrics cut": cut("metrics.jsonl"),
    "a measurement less": a_line_less,
    "no metrics": lambda path: (path / "metrics.jsonl").unlink(),
    "cost cut": cut("cost.json"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_run_is_made_anew_and_that_is_said(tmp_path: Path, damage: Any) -> None:
    path = run_path(CONFIG, tmp_path)
    prepare(CONFIG, path)
    whole = load_run(path).weights(-1)
    damage(path)
    outcome = prepare(CONFIG, path)
    assert outcome.state == "trained" and "again, since it is damaged" in outcome.message
    assert all(np.array_equal(whole[name], load_run(path).weights(-1)[name]) for name in whole)
    assert prepare(CONFIG, path).state == "reused"


@pytest.mark.parametrize("name", ["resume.safetensors", "checkpoints/step_00000002.safetensors"])
def test_a_damaged_beginning_is_not_continued(tmp_path: Path, name: Any) -> None:
    path = run_path(CONFIG, tmp_path)
    for record in train_to_disk(CONFIG, path):
        if record.step == 5:
            break
    cut(name)(path)
    assert prepare(CONFIG, path).state == "trained"


def test_a_damaged_run_with_somebody_s_files_is_left_alone(tmp_path: Path) -> None:
    path = run_path(CONFIG, tmp_path)
    prepare(CONFIG, path)
    (path / "report.html").write_text("<p>mine")
    DAMAGES["a checkpoint cut"](path)
    outcome = prepare(CONFIG, path)
    assert outcome.state == "failed" and "report.html" in outcome.message and (path / "report.html").exists()


def test_a_directory_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    path = run_path(CONFIG, tmp_path)
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    outcome = prepare(CONFIG, path)
    assert outcome.state == "failed" and "thesis.tex" in outcome.message and (path / "thesis.tex").exists()


def test_a_run_that_diverges_fails_alone(tmp_path: Path) -> None:
    diverging = RunConfig.parse(TINY, ["optimiser.learning_rate=1e30"])
    found = {outcome.path: outcome for outcome in sweep([diverging, CONFIG], tmp_path, processes=1)}
    assert found[run_path(CONFIG, tmp_path)].state == "trained"
    failed = found[run_path(diverging, tmp_path)]
    assert failed.state == "failed" and "optimiser.learning_rate" in failed.message
    with pytest.raises(BirthlensError, match="learning_rate"):
        runs_of(Grid(diverging, {"base": ()}), tmp_path, processes=1)


@pytest.mark.parametrize(
    ("error", "said"), [(MemoryError(), "out of memory"), (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero")]
)
def test_a_run_that_fails_in_any_way_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any, said: Any
) -> None:
    from birthlens.training import recording

    real = recording.train_to_disk

    def failing(config: Any, path: Any, execution: Any) -> Any:
        if config.task.triggers == "random":
            raise error
        return real(config, path, execution)

    monkeypatch.setattr(recording, "train_to_disk", failing)
    outcomes = list(sweep(list(GRID.configs().values()), tmp_path, processes=1))
    assert sorted(outcome.state for outcome in outcomes) == ["failed", "failed", "trained", "trained"]
    assert all(said in outcome.message for outcome in outcomes if outcome.state == "failed")


def test_a_folder_that_cannot_be_made_fails_every_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (outcome,) = sweep([CONFIG], tmp_path / "file" / "runs", processes=1)
    assert outcome.state == "failed" and "Not a directory" in outcome.message


def killed(number: Any) -> Any:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_process_fails_its_task_alone() -> None:
    with workers(2) as pool:
        futures = [pool.submit(killed, number) for number in range(5)]
        with pytest.raises(WorkerKilledError, match="killed"):
            futures[1].result()
        assert [future.result() for number, future in enumerate(futures) if number != 1] == [0, 2, 3, 4]
    (outcome,) = outcomes_of(futures[1], [run_path(CONFIG, "folder")])
    assert outcome.state == "failed" and "out of memory?" in outcome.message


def test_two_sweeps_at_once_train_each_run_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: prepare(CONFIG, run_path(CONFIG, tmp_path)), range(3)))
    assert sorted(outcome.state for outcome in found) == ["reused", "reused", "trained"]


def test_costs_add_up_over_sessions(tmp_path: Path) -> None:
    path = run_path(CONFIG, tmp_path)
    first = prepare(CONFIG, path)
    assert prepare(CONFIG, path).cpu_seconds == pytest.approx(first.cpu_seconds, abs=1e-3)


def test_a_run_by_name_is_trained_once_and_refused_where_it_is_another(tmp_path: Path) -> None:
    first = trained(CONFIG, tmp_path)
    stamp = (first.path / "resume.safetensors").stat().st_mtime_ns
    assert first.finished and first.config == CONFIG
    assert (trained(CONFIG, tmp_path).path / "resume.safetensors").stat().st_mtime_ns == stamp
    reseal(first.path, lambda header: header["config"]["training"].update(batch_size=5))
    with pytest.raises(BirthlensError, match="another config"):
        trained(CONFIG, tmp_path)
