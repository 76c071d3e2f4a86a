"""Sweeps on other engines: any executor, a Dask scheduler with two worker processes of which one is killed, submitit."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from birthlens.claims.claim import Claim, Expectation
from birthlens.claims.reproduction import reproduce
from birthlens.claims.scorecard import Result
from birthlens.claims.statistics import orders
from birthlens.claims.tiers import Tier
from birthlens.cli import group
from birthlens.config.run import RunConfig
from birthlens.devices import Execution
from birthlens.errors import BirthlensError
from birthlens.runs.run import load_run
from birthlens.training.pools import dask_pool, slurm_pool
from birthlens.training.recording import train_to_disk
from birthlens.training.sweep import run_path, stacks_of, sweep

TINY = {
    "corpus": {"source": "markov", "vocabulary": 12},
    "task": {"context": 16, "n_triggers": 2},
    "model": {"d_model": 8},
    "training": {"steps": 6, "batch_size": 4, "engine": "functional"},
    "checkpoints": {"every": 3},
    "evaluation": {"batch_size": 4, "every": 3},
}


def tiny(*overrides: str) -> RunConfig:
    return RunConfig.parse(TINY, overrides)


def seeds(n: int, *overrides: str) -> list[RunConfig]:
    return [tiny(f"seeds.init={seed}", *overrides) for seed in range(n)]


def assert_whole(configs: list[RunConfig], folder: Path) -> None:
    for config in configs:
        run = load_run(run_path(config, folder))
        run.task  # noqa: B018  its tables are read
        assert run.finished and run.verified and run.config == config


def test_any_executor_takes_a_sweep_in_bundles(tmp_path: Path) -> None:
    class Counting(ThreadPoolExecutor):
        sizes: list[int] = []

        def submit(self, function: Any, /, *args: Any, **keywords: Any) -> Future[Any]:
            self.sizes.append(len(args[0]))
            return super().submit(function, *args, **keywords)

    configs = seeds(3)
    with Counting(1) as pool:
        outcomes = list(sweep(configs, tmp_path, pool=pool, bundle=2))
    assert [outcome.state for outcome in outcomes] == ["trained"] * 3
    assert Counting.sizes == [2, 1]
    assert_whole(configs, tmp_path)


def test_what_a_pool_loses_is_an_outcome(tmp_path: Path) -> None:
    class Losing(ThreadPoolExecutor):
        def submit(self, function: Any, /, *args: Any, **keywords: Any) -> Future[Any]:
            lost: Future[Any] = Future()
            lost.set_exception(ConnectionError("the worker went away"))
            return lost

    with Losing(1) as pool:
        outcomes = list(sweep(seeds(2), tmp_path, pool=pool))
    assert [outcome.state for outcome in outcomes] == ["failed", "failed"]
    assert "the worker went away" in outcomes[0].message


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Start a scheduler and two worker processes of this machine."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as found:
        yield found


@pytest.mark.filterwarnings("ignore")
def test_a_killed_dask_worker_s_run_is_continued_by_another(cluster: Any, tmp_path: Path) -> None:
    config = tiny("training.steps=200", "checkpoints.every=20", "evaluation.every=200")
    other = tiny("seeds.init=1")
    path = run_path(config, tmp_path)
    pids = [worker.pid for worker in cluster.workers.values()]
    assert len(set(pids)) == 2 and os.getpid() not in pids
    with dask_pool(cluster.scheduler_address) as (pool, _):
        outcomes = []
        with ThreadPoolExecutor(1) as watching:
            swept = watching.submit(lambda: list(sweep([config, other], tmp_path, pool=pool)))
            killed = kill_who_writes(path)
            outcomes = swept.result(timeout=240)
    assert killed in pids
    states = {outcome.path: outcome.state for outcome in outcomes}
    assert states[run_path(other, tmp_path)] == "trained"
    assert states[path] == "continued"
    assert_whole([config, other], tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_killed_worker_s_ensemble_is_continued_by_another(cluster: Any, tmp_path: Path) -> None:
    """The members of an ensemble, which is one task, equal those of an ensemble on this machine.

    To the bit where nobody was killed. A member that was behind at the kill makes its last steps alone, which equals those
    in the ensemble up to rounding; a wrong batch or a lost update would be off by far more.
    """
    how = Execution("auto", sampler="counter")
    long = ["training.steps=150", "checkpoints.every=15", "evaluation.every=150"]
    configs = [*seeds(2, *long), tiny("model.d_model=4", *long)]
    with dask_pool(cluster.scheduler_address) as (pool, _), ThreadPoolExecutor(1) as watching:
        swept = watching.submit(lambda: list(sweep(configs, tmp_path / "there", execution=how, pool=pool)))
        kill_who_writes(run_path(configs[0], tmp_path / "there"))
        outcomes = {outcome.path: outcome.state for outcome in swept.result(timeout=240)}
    assert [outcomes[run_path(config, tmp_path / "there")] for config in configs[:2]] == ["continued"] * 2
    assert_whole(configs, tmp_path / "there")
    list(sweep(configs, tmp_path / "here", execution=how.here()))
    for config in configs:
        here, there = (load_run(run_path(config, tmp_path / place)) for place in ("here", "there"))
        assert there.header["engine"] == here.header["engine"]
        assert (
            there.header["engine"]["reason"] == f"one of {2 if config.model.d_model == 8 else 1} runs trained together"
        )
        found, expected = there.weights(-1)["L1.W_O"], here.weights(-1)["L1.W_O"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 if config in configs[:2] else 0)


def test_a_device_that_workers_lack_fails_their_runs(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        outcomes = list(sweep(seeds(2), tmp_path, execution=Execution("cuda:99"), pool=pool))
    assert [outcome.state for outcome in outcomes] == ["failed", "failed"]
    assert "device = 'cuda:99': this machine has" in outcomes[0].message


def test_a_run_of_another_sampler_or_precision_is_not_used(tmp_path: Path) -> None:
    list(sweep(seeds(1), tmp_path, processes=1))
    for how, said in (
        (Execution(sampler="counter"), "sampler = 'counter': the run in"),
        (Execution(precision="bfloat16"), "precision = 'bfloat16': the run in"),
    ):
        (outcome,) = sweep(seeds(1), tmp_path, execution=how)
        assert outcome.state == "failed" and said in outcome.message, outcome.message
    (outcome,) = sweep(seeds(1), tmp_path, processes=1)
    assert outcome.state == "reused"
    alone = tiny("training.engine=handwritten")
    (outcome,) = sweep([alone], tmp_path, processes=1, execution=Execution(sampler="counter"))
    assert (
        load_run(outcome.path).header["engine"]["sampler"] == "counter"
    )  # trained alone, and not with another sampler


@pytest.mark.filterwarnings("ignore")
def test_ablate_on_a_cluster_gives_the_table_of_this_machine(cluster: Any, tmp_path: Path) -> None:
    for _ in train_to_disk(tiny(), tmp_path / "run"):
        pass
    words = ["ablate", str(tmp_path / "run"), "--steps", "all", "--batch-size", "8", "--methods", "zero,resample"]
    here, there = (str(tmp_path / f"{place}.csv") for place in ("here", "there"))
    assert CliRunner().invoke(group, [*words, "--out", here], catch_exceptions=False).exit_code == 0
    remote = [*words, "--out", there, "--scheduler", cluster.scheduler_address]
    done = CliRunner().invoke(group, remote, catch_exceptions=False)
    assert "3 of 3 checkpoints: step" in done.stderr and "the dashboard of" in done.stderr
    assert Path(here).read_text() == Path(there).read_text()
    assert sorted(file.name for file in Path(f"{there}.suite/steps").iterdir()) == ["0.json", "3.json", "6.json"]
    lacking = [*words, "--out", str(tmp_path / "other.csv"), *remote[-2:], "--device", "cuda:99"]
    with pytest.raises(BirthlensError, match=r"3 of 3 checkpoints failed; the first: step \d: device = 'cuda:99'"):
        CliRunner().invoke(group, lacking, catch_exceptions=False)
    with pytest.raises(BirthlensError, match="give --out in a shared folder"):
        CliRunner().invoke(group, [*words, "--scheduler", "tcp://127.0.0.1:1"], catch_exceptions=False)


def test_workers_of_slurm_run_dask_workers_that_can_train() -> None:
    """The recipe of docs/many_runs.md, up to the script that Slurm would be given."""
    jobqueue = pytest.importorskip("dask_jobqueue")
    recipe = Path(__file__).parents[2].joinpath("docs/many_runs.md").read_text().split("SLURMCluster(")[1].split(")")[0]
    settings = dict(re.findall(r'(\w+)="([^"]*)"', recipe)) | {"cores": 1, "processes": 1}
    script = jobqueue.slurm.SLURMJob("tcp://head:8786", "worker", **settings).job_script()
    assert "-m distributed.cli.dask_worker tcp://head:8786" in script and f"-p {settings['queue']}" in script


@pytest.mark.filterwarnings("ignore")
def test_a_claim_is_reproduced_on_a_cluster_as_on_this_machine(cluster: Any, tmp_path: Path) -> None:
    base = [f"{name}={json.dumps(value)}" for name, value in flat(TINY).items()]
    tier = Tier("laptop", tuple(base), 1)
    expected = (Expectation("trigger_after_output", "steps", 0),)
    claim = Claim("order", "Memories come in an order.", expected, orders.birth_order, {"run": ()})
    with dask_pool(cluster.scheduler_address) as (pool, _):
        there = list(reproduce([claim], tier, tmp_path / "there", pool=pool))
    here = list(reproduce([claim], tier, tmp_path / "here", processes=1))
    found = [next(one for one in events if isinstance(one, Result)).measured for events in (there, here)]
    assert [one.problem for one in found[0]] == [""] and len(found[0][0].values) > 3
    for mine, other in zip(*found, strict=True):
        np.testing.assert_equal(dict(mine.values), dict(other.values))
    with dask_pool(cluster.scheduler_address) as (pool, _):
        failing = Claim("wrong", "It fails.", expected, orders.frozen_first, {"run": ()})
        (result,) = (
            one for one in reproduce([failing], tier, tmp_path / "there", pool=pool) if isinstance(one, Result)
        )
    assert result.problems and "KeyError" in result.problems[0]


def flat(tree: Any) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}


@pytest.mark.filterwarnings("ignore")
def test_the_command_sweeps_on_a_cluster(cluster: Any, tmp_path: Path) -> None:
    grid = tmp_path / "grid.json"
    grid.write_text(
        json.dumps({"overrides": [f"{key}={json.dumps(value)}" for key, value in flat(TINY).items()], "seeds": 2})
    )
    words = ["sweep", str(grid), "--out", str(tmp_path / "out"), "--scheduler", cluster.scheduler_address]
    result = CliRunner().invoke(group, [*words, "--bundle", "2", "--format", "json"])
    assert result.exit_code == 0, result.output
    assert_whole([tiny(f"seeds.init={seed}", f"seeds.data={seed}") for seed in (0, 1)], tmp_path / "out")
    assert "the dashboard of" in result.output
    refused = CliRunner().invoke(group, [*words, "--processes", "2"])
    assert refused.exit_code != 0 and "--processes: the workers of a cluster train" in str(refused.exception)
    refused = CliRunner().invoke(group, [*words, "--device", "gpu"])
    assert "device = 'gpu': valid are" in str(refused.exception)
    refused = CliRunner().invoke(group, ["sweep", str(grid), "--out", str(tmp_path / "out"), "--bundle", "2"])
    assert "--bundle: it needs --scheduler or --slurm" in str(refused.exception)


def kill_who_writes(path: Path) -> int:
    """Wait until a run has some checkpoints, then kill the process that its lock names."""
    for _ in range(2400):
        kept = list((path / "checkpoints").glob("*.safetensors")) if (path / "run.json").exists() else []
        if len(kept) >= 2:
            pid = int(json.loads((path / ".lock").read_bytes())["pid"])
            os.kill(pid, signal.SIGKILL)
            return pid
        time.sleep(0.05)
    raise AssertionError("the run was never begun")


@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_that_does_not_answer_is_one_sentence() -> None:
    with (
        pytest.raises(BirthlensError, match=r"scheduler = 'tcp://127.0.0.1:1' does not answer"),
        dask_pool("tcp://127.0.0.1:1", patience=0.3),
    ):
        pass


@pytest.mark.filterwarnings("ignore")
def test_submitit_runs_a_sweep_as_jobs(tmp_path: Path) -> None:
    file = tmp_path / "slurm.yaml"
    file.write_text("cluster: local\ntimeout_min: 2\n")
    configs = seeds(2)
    with slurm_pool(file, tmp_path / "jobs") as pool:
        outcomes = list(sweep(configs, tmp_path / "runs", pool=pool, bundle=2))
    assert [outcome.state for outcome in outcomes] == ["trained", "trained"]
    assert_whole(configs, tmp_path / "runs")
    assert list((tmp_path / "jobs").glob("*_result.pkl"))


def test_a_wrong_parameter_of_slurm_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "slurm.yaml"
    file.write_text("cluster: local\nminutes: 2\n")
    with pytest.raises(BirthlensError, match=r"slurm = .*minutes"), slurm_pool(file, tmp_path / "jobs"):
        pass


def test_members_are_stacked_by_shape_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = tiny("training.engine=handwritten")
    begun = tiny("training.engine=auto", "seeds.init=9")
    next(iter(train_to_disk(begun, run_path(begun, tmp_path))))
    configs = [*seeds(5), *seeds(2, "model.d_model=16"), alone, begun]
    paths = {run_path(config, tmp_path): config for config in configs}
    stacks, rest = stacks_of(paths, Execution())
    assert [len(stack) for stack in stacks] == [5, 2]
    assert set(rest.values()) == {alone, begun}
    monkeypatch.setattr("birthlens.training.sweep.how_many_fit", lambda *_: 2)
    assert [len(stack) for stack in stacks_of(paths, Execution())[0]] == [2, 2, 1, 2]


def test_a_sweep_of_ensembles_continues_reuses_and_fails_alone(tmp_path: Path) -> None:
    how = Execution(sampler="counter")
    configs = [*seeds(2), tiny("optimiser.learning_rate=1e25"), tiny("task.n_triggers=99")]
    states = {outcome.path: outcome for outcome in sweep(configs, tmp_path, execution=how)}
    found = [states[run_path(config, tmp_path)] for config in configs]
    assert [outcome.state for outcome in found] == ["trained", "trained", "failed", "failed"]
    assert "learning_rate = 1e+25" in found[2].message and "task.n_triggers = 99" in found[3].message
    assert [outcome.state for outcome in sweep(configs[:2], tmp_path, execution=how)] == ["reused", "reused"]
    assert load_run(found[0].path).header["engine"]["sampler"] == "counter"
