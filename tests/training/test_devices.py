"""Devices: what a text names, that no tensor stays behind on the CPU, and that the sampler by counter has the task's law."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy import stats
from torch._subclasses.fake_tensor import FakeTensorMode

from birthlens.cli import group
from birthlens.config.model import parameter_shapes
from birthlens.config.run import OptimiserConfig, RunConfig
from birthlens.devices import Execution, chosen
from birthlens.errors import BirthlensError
from birthlens.model.initialisation import initial_weights
from birthlens.runs.run import load_run
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.counter_sampling import counter_batch, counter_batches, counter_program, philox
from birthlens.tasks.kinds import chain_of, task_of
from birthlens.training import drawing
from birthlens.training.loop import Trainer, train
from birthlens.training.recording import resume
from birthlens.training.stack import Stack
from birthlens.training.stacked_optimiser import StackedOptimiser

TINY = {
    "corpus": {"source": "markov", "vocabulary": 7},
    "task": {"context": 12, "n_triggers": 2},
    "model": {"d_model": 8},
    "training": {"steps": 4, "batch_size": 4},
    "checkpoints": {"every": 2},
    "evaluation": {"batch_size": 4, "every": 2},
}
LAWS = [
    [],
    ["task.triggers=random"],
    ["task.triggers=random", "task.outputs=bigram", "task.cycles=clean"],
    ["task.show_latents=true", "task.no_repeat=true", "task.offset=1"],
]


def tiny(*overrides: str) -> RunConfig:
    return RunConfig.parse(TINY, overrides)


def task_for(*overrides: str) -> BigramTask:
    config = tiny(*overrides)
    task = task_of(config.task, chain_of(config))
    assert isinstance(task, BigramTask)
    return task


@pytest.mark.parametrize("text", ["gpu", "cuda:x", "", None, "CPU"])
def test_a_text_that_names_no_device_is_refused(text: Any) -> None:
    with pytest.raises(BirthlensError, match="valid are cpu, cuda, cuda:N, mps or auto"):
        chosen(text)


def test_a_device_that_is_missing_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(BirthlensError, match="'cuda:1': this machine has no CUDA GPU that torch can use"):
        chosen("cuda:1")
    with pytest.raises(BirthlensError, match="'mps': this machine has no Apple GPU"):
        chosen("mps")
    assert chosen("auto") == ("cpu", "this machine has no GPU that torch can use")


def test_auto_takes_a_gpu_where_the_work_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert chosen("auto", 10**9)[0] == chosen("cuda")[0] == "cuda:0"
    assert chosen("auto", 1000) == ("cpu", "1,000 trained tokens are too few to be worth a GPU")
    assert chosen("cuda:1")[0] == "cuda:1"
    with pytest.raises(BirthlensError, match="'cuda:2': this machine has 2 CUDA GPUs"):
        chosen("cuda:2")


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "words",
    [["model.positions=rotary"], ["model.family=full", "model.n_heads=2", "model.feed_forward=relu"]],
    ids=["rotary", "full"],
)
def test_a_step_keeps_to_its_device(words: list[str], kind: Any) -> None:
    """Torch's fake tensors on the device meta need no hardware, and refuse every product with one on the CPU."""
    config = tiny(*words)
    batch = task_for().batch(4, 0)
    shapes = parameter_shapes(config.model, 7, 12)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        stack = Stack(config.model, shapes, config.trained, 2, Execution("meta"))
        optimiser = StackedOptimiser(stack, kind)
        fake = mode.from_tensor(batch.tokens), mode.from_tensor(batch.targets), mode.from_tensor(batch.in_context)
        tokens, targets, counted = (torch.stack([part, part]).to("meta") for part in fake)
        leaves = {name: stack.values[name].detach().requires_grad_() for name in config.trained}
        loss = stack._losses({**stack.values, **leaves}, tokens, targets, counted)
        found = torch.autograd.grad(loss.sum(), list(leaves.values()))
        moving = {name: np.array([True, False]) for name in config.trained}
        gradients = dict(zip(leaves, found, strict=True))
        optimiser.step([0, 1], gradients, [OptimiserConfig(kind=kind)] * 2, moving)
        places = {str(tensor.device) for tensor in (loss, *found, *stack.values.values())}
        with pytest.raises(Exception, match="device"):
            _ = stack.values["W_E"] @ torch.zeros(8, 3)  # so that this test can fail
    assert places == {"meta"}


def test_every_device_but_the_cpu_in_float32_trains_on_a_stack(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    words = ["corpus.source=markov", "corpus.vocabulary=7", "task.context=12", "task.n_triggers=2", "model.d_model=8"]
    words += ["training.steps=4", "training.batch_size=4", "checkpoints.every=2", "evaluation.batch_size=4"]
    how = ["--precision", "bfloat16", "--sampler", "counter", "--device", "auto"]
    result = CliRunner().invoke(group, ["train", out, *words, *how], catch_exceptions=False)
    assert "device cpu: this machine has no GPU" in result.stderr or torch.cuda.is_available()
    run = load_run(out)
    recorded = {key: run.header["engine"][key] for key in ("name", "device", "precision", "sampler")}
    assert recorded == {"name": "functional", "device": "cpu", "precision": "bfloat16", "sampler": "counter"}
    again = list(train(run.config, execution=Execution("cpu", "bfloat16", "counter")))
    assert again[-1].weights["L1.W_O"].tobytes() == run.weights(-1)["L1.W_O"].tobytes()
    assert len(list(resume(out, steps=6))) == 2  # with the sampler that it began with
    longer = list(train(load_run(out).config, execution=Execution("cpu", "bfloat16", "counter")))
    assert longer[-1].weights["L1.W_O"].tobytes() == load_run(out).weights(-1)["L1.W_O"].tobytes()


def test_a_missing_device_of_a_command_is_one_sentence(tmp_path: Path) -> None:
    if torch.cuda.device_count() > 99:
        pytest.skip("this machine has a hundred GPUs")
    result = CliRunner().invoke(group, ["train", str(tmp_path / "run"), "--device", "cuda:99"])
    assert isinstance(result.exception, BirthlensError) and "cuda:99" in str(result.exception)
    assert not (tmp_path / "run").exists()


def test_the_engines_of_the_cpu_are_refused_elsewhere() -> None:
    with pytest.raises(BirthlensError, match=r"training\.engine = 'fused' trains one run on the CPU in float32"):
        next(train(tiny("training.engine=fused"), execution=Execution(precision="bfloat16")))


def test_the_sampler_by_counter_is_for_the_bigram_task() -> None:
    config = RunConfig.parse({}, ["task.kind=backcopy", "task.context=16"])
    with pytest.raises(BirthlensError, match="sampler = 'counter': the task 'backcopy' has none"):
        next(train(config, execution=Execution(sampler="counter")))


def test_philox_gives_the_published_numbers() -> None:
    """The known answers of Random123 for Philox4x32-10."""
    for words, key, expected in (
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ):
        counter: Any = tuple(torch.tensor([word]) for word in words)
        low, high = (torch.tensor([word]) for word in key)
        assert [int(word) for word in philox(counter, (low, high))] == expected


@pytest.mark.parametrize("words", LAWS, ids=["fixed", "random", "clean", "listed"])
def test_the_sampler_by_counter_has_the_law_of_the_task(words: list[str]) -> None:
    """Triggers, outputs and successors against their exact laws, by chi-square with fixed seeds; marks by recounting."""
    task = task_for(*words)
    batch = counter_batch(task, 4000, seed=1)
    k = task.config.n_triggers
    listed = k if task.config.show_latents else 0
    sequence = torch.cat([batch.tokens, batch.targets[:, -1:]], dim=1).numpy()
    triggers, outputs = batch.triggers.numpy(), batch.outputs.numpy()
    d_vocab = len(task.statistics)
    if task.fixed_triggers is None:
        assert_law(np.bincount(triggers[:, 0], minlength=d_vocab), task.statistics.unigram)
        second = np.zeros(d_vocab)
        for first, p in enumerate(task.statistics.unigram):  # the second draw without replacement, by its definition
            rest = np.where(np.arange(d_vocab) == first, 0, task.statistics.unigram)
            second += p * rest / rest.sum()
        assert_law(np.bincount(triggers[:, 1], minlength=d_vocab), second)
    expected = task.output_distribution(triggers)
    for number in range(k):
        assert_law(np.bincount(outputs[:, number], minlength=d_vocab), expected[:, number].mean(0))
    assert_law(np.bincount(sequence[:, listed], minlength=d_vocab), task.statistics.unigram)
    forced = np.full((len(sequence), d_vocab), -1)
    np.put_along_axis(forced, triggers, outputs, axis=1)
    now, later = sequence[:, listed:-1], sequence[:, listed + 1 :]
    override = np.take_along_axis(forced, now, axis=1)
    assert (later[override >= 0] == override[override >= 0]).all()
    for token in range(d_vocab):
        free = later[(override < 0) & (now == token)]
        assert_law(np.bincount(free, minlength=d_vocab), task.statistics.bigram[token])
    for row in range(50):
        seen = dict.fromkeys(triggers[row].tolist(), 0)
        for place in range(listed, task.config.context):
            token = int(sequence[row, place])
            if token in seen:
                seen[token] += 1
            assert int(batch.occurrence[row, place]) == seen.get(token, 0)
    assert (batch.occurrence[:, :listed] == 0).all()


def assert_law(counts: Any, law: Any) -> None:
    """Hold counts to a law at the level 1e-5, and what the law rules out to zero."""
    assert counts[law == 0].sum() == 0
    possible = law > 0
    if possible.sum() > 1 and counts.sum():
        expected = counts.sum() * law[possible] / law[possible].sum()
        assert stats.chisquare(counts[possible], expected).pvalue > 1e-5


def test_absorbed_positions_are_those_of_the_sampler_on_the_cpu() -> None:
    task = task_for("task.n_triggers=5")
    batch = counter_batch(task, 500, seed=3)
    for row in range(500):
        follows = dict(zip(batch.triggers[row].tolist(), batch.outputs[row].tolist(), strict=True))
        for token, absorbed in zip(batch.tokens[row].tolist(), batch.absorbed[row].tolist(), strict=True):
            for _ in range(6):
                token = follows.get(token, -1)
            assert absorbed == (token >= 0)
    assert batch.absorbed.any() and not batch.absorbed.all()


def test_a_batch_depends_on_its_seed_and_index_alone() -> None:
    task = task_for("task.triggers=random")
    alone = counter_batch(task, 6, seed=2**40 + 1, index=2**40)
    few = counter_batch(task, 3, seed=2**40 + 1, index=2**40)
    _, together = counter_batches(task, 6, [0, 2**40 + 1], [7, 2**40])
    assert torch.equal(alone.tokens, together.tokens) and torch.equal(alone.tokens[:3], few.tokens)
    for seed, index in ((1, 2**40), (2**40 + 1, 0), (2**40, 2**40)):
        assert not torch.equal(alone.tokens, counter_batch(task, 6, seed, index).tokens)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")


@pytest.mark.gpu
@gpu
def test_a_gpu_trains_as_the_cpu_does() -> None:
    config = tiny("training.engine=functional")
    for cpu, cuda in zip(train(config), train(config, execution=Execution("cuda:0")), strict=True):
        for name in config.trained:
            np.testing.assert_allclose(cuda.weights[name], cpu.weights[name], rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.gpu
@gpu
def test_the_sampler_by_counter_draws_the_same_on_a_gpu() -> None:
    task = task_for()
    assert torch.equal(counter_batch(task, 64, 5, 6, "cuda:0").tokens.cpu(), counter_batch(task, 64, 5, 6).tokens)


def test_initial_weights_are_the_same_for_every_engine() -> None:
    config = tiny()
    first = initial_weights(config.model, 7, 12, np.random.default_rng(config.seeds.init))
    record = next(train(config, execution=Execution(precision="bfloat16")))
    assert all(record.weights[name].tobytes() == first[name].tobytes() for name in first)


def test_batches_drawn_ahead_for_many_runs_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    programs: list[int] = []

    def counted(task: Any, n: int, seeds: list[int], *rest: Any) -> TokenBatch:
        programs.append(len(seeds))
        return counter_program(task, n, seeds, *rest)

    monkeypatch.setattr(drawing, "counter_program", counted)
    words = [
        ["seeds.data=1"],
        ["seeds.data=2"],
        ["training.batch_size=3"],
        ["training.clamps=[set task.offset 1 from=2]"],
    ]
    configs = [tiny(*each, "training.steps=6", "training.engine=functional") for each in words]
    trainers = [Trainer(each, chain_of(each), execution=Execution(sampler="counter")) for each in configs]
    draws = drawing.Draws(trainers, 40)  # 40 sequences: 5 steps of two runs of 4, 13 steps of one run of 3
    for _ in range(6):
        together = draws.of(range(4))
        for number, trainer in enumerate(trainers):
            alone = trainer.draw()
            assert torch.equal(together[number].batch.tokens, alone.batch.tokens)
            assert torch.equal(together[number].mask, alone.mask) and together[number].config == alone.config
            trainer.advance()
    assert programs == [10, 6, 2]
