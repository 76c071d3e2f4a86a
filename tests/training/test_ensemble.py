"""Ensembles: each member equals its solo run, fails alone, and is an ordinary run on disk; a killed ensemble resumes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typed import close

from birthlens.config.model import ModelConfig
from birthlens.config.run import RunConfig
from birthlens.devices import Execution
from birthlens.errors import BirthlensError
from birthlens.model.forward import logits, tensors_of
from birthlens.model.initialisation import initial_weights
from birthlens.model.stacked_forward import stacked_logits
from birthlens.runs.run import load_run
from birthlens.training import many
from birthlens.training.engines import choose
from birthlens.training.footprint import bytes_of_a_run, how_many_fit, sequences_that_fit
from birthlens.training.loop import DivergedError, StepRecord, train
from birthlens.training.many import train_many
from birthlens.training.recording import resume, train_to_disk

TINY = {
    "corpus": {"source": "markov", "vocabulary": 12},
    "task": {"context": 24, "n_triggers": 3},
    "model": {"d_model": 16},
    "training": {"steps": 8, "batch_size": 8, "engine": "functional"},
    "checkpoints": {"every": 4},
    "evaluation": {"batch_size": 4, "every": 2},
}
FULL = ["model.family=full", "model.n_heads=2", "model.feed_forward=relu", "optimiser.kind=adamw"]
DIFFERENT = [
    [],
    ["seeds.init=3", "seeds.data=4", "optimiser.learning_rate=0.05", "training.batch_size=19", "model.init=scaled"],
    ["optimiser.momentum=0", "task.n_triggers=2", "task.offset=2", "training.freeze_until={L1.W_K: 3}"],
    ["task.outputs=bigram", "task.cycles=clean", "optimiser.weight_decay=0.1", "optimiser.warm_up=4"],
    ["training.trained=[L1.W_O, L0.W_K]", "training.clamps=[freeze L0.W_K until=5, reset from=6]"],
    ["training.clamps=[hold L1.W_K at=initial from=2 until=5, set optimiser.momentum 0 from=3 until=6]"],
]


def tiny(*overrides: str) -> RunConfig:
    return RunConfig.parse(TINY, overrides)


def different(*overrides: str) -> list[RunConfig]:
    return [tiny(*words, *overrides) for words in DIFFERENT]


def weights(record: StepRecord) -> dict[str, Any]:
    """Return the weights but for key biases: no score depends on them, so that AdamW divides rounding by rounding."""
    return {name: array for name, array in record.weights.items() if not name.endswith("b_K")}


def assert_members_are_solo_runs(configs: Sequence[RunConfig], tolerance: float) -> None:
    solo = [train(config) for config in configs]
    for number, record in train_many(configs):
        assert isinstance(record, StepRecord)
        alone = next(solo[number])
        assert record.step == alone.step and record.keep == alone.keep
        assert (record.loss is None) == (alone.loss is None)
        expected = weights(alone)
        for name, array in weights(record).items():
            assert np.abs(array - expected[name]).max() <= tolerance * max(np.abs(expected[name]).max(), 1), name
        assert [{**row, "value": 0} for row in record.metrics] == [{**row, "value": 0} for row in alone.metrics]
        found, wanted = ([row["value"] for row in each.metrics] for each in (record, alone))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert all(next(records, None) is None for records in solo)


def test_a_member_is_its_solo_run_step_by_step() -> None:
    assert_members_are_solo_runs(different(), 2e-6)


def test_a_member_of_a_full_model_is_its_solo_run() -> None:
    assert_members_are_solo_runs([tiny(*words, *FULL, "training.steps=4") for words in DIFFERENT[:4]], 2e-5)
    options = ["model.positions=rotary", "model.unembedding=tied", "training.steps=2"]
    assert_members_are_solo_runs([tiny(*FULL, *options, f"seeds.init={seed}") for seed in (0, 1)], 2e-5)


def test_full_models_with_chosen_layers_in_sequence_are_stacked() -> None:
    config = ModelConfig(
        family="full", d_model=16, n_heads=2, feed_forward="gelu", block="sequential", feed_forward_layers=(1,)
    )
    solo = [tensors_of(initial_weights(config, 7, 12, np.random.default_rng(seed)), torch.float64) for seed in (0, 1)]
    tokens = torch.randint(0, 7, (2, 3, 10), generator=torch.Generator().manual_seed(0))
    found = stacked_logits({name: torch.stack([each[name] for each in solo]) for name in solo[0]}, config, tokens)
    expected = torch.stack([logits(each, config, tokens[run]) for run, each in enumerate(solo)])
    torch.testing.assert_close(found.view(expected.shape), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "words",
    [
        ["model.feed_forward=linear", "model.n_layers=1", "training.loss=all"],
        ["model.positions=rotary"],
    ],
    ids=["linear", "rotary"],
)
def test_every_kind_of_model_is_stacked(words: list[str]) -> None:
    few = [tiny(*words, "training.steps=3", f"seeds.init={seed}") for seed in (0, 1)]
    assert_members_are_solo_runs(few, 2e-6)


def test_pieces_of_runs_and_batches_change_only_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("birthlens.training.stack.ON_CPU", 4)
    assert_members_are_solo_runs([tiny(*words, "training.steps=3") for words in DIFFERENT[:3]], 2e-6)


def test_one_that_diverges_stops_alone(tmp_path: Path) -> None:
    configs = [tiny(), tiny("optimiser.learning_rate=1e25"), tiny("seeds.init=1")]
    folders = [tmp_path / str(number) for number in range(3)]
    steps: dict[int, list[int]] = {0: [], 1: [], 2: []}
    errors = {}
    for number, event in train_many(configs, folders):
        if isinstance(event, DivergedError):
            errors[number] = str(event)
        else:
            steps[number].append(event.step)
    assert list(errors) == [1] and "learning_rate = 1e+25" in errors[1]
    assert steps[0] == steps[2] == list(range(9))
    assert [load_run(folder).steps[-1] for folder in folders] == [8, 0, 8]
    assert any(row["step"] > 0 for row in load_run(folders[1]).rows())  # what was measured before it diverged


def test_a_stopped_ensemble_resumes_to_the_same_bits(tmp_path: Path) -> None:
    configs = [tiny(*DIFFERENT[number]) for number in (1, 4, 5)]
    whole = [tmp_path / f"whole{number}" for number in range(len(configs))]
    parts = [tmp_path / f"part{number}" for number in range(len(configs))]
    for _ in train_many(configs, whole):
        pass
    stopped = train_many(configs, parts)
    for _, record in stopped:
        if isinstance(record, StepRecord) and record.step == 6:
            break
    close(stopped)
    assert [load_run(part).steps for part in parts] == [[0, 4]] * len(configs)
    first = next(iter(train_many(configs, parts)))[1]
    assert isinstance(first, StepRecord) and first.step == 5
    for _ in train_many(configs, parts):
        pass
    for left, right in zip(whole, parts, strict=True):
        for name, array in load_run(left).weights(-1).items():
            assert array.tobytes() == load_run(right).weights(-1)[name].tobytes(), name
        assert load_run(left).rows() == load_run(right).rows()
    assert list(train_many(configs, parts)) == []


def test_a_member_on_disk_is_an_ordinary_run(tmp_path: Path) -> None:
    config = tiny()
    for number, record in train_many([config, tiny("seeds.init=1")], [tmp_path / "a", tmp_path / "b"]):
        if number == 1 and isinstance(record, StepRecord) and record.step == 6:
            break
    for _ in resume(tmp_path / "a"):  # alone
        pass
    for _ in train_to_disk(config, tmp_path / "solo"):
        pass
    run, solo = load_run(tmp_path / "a"), load_run(tmp_path / "solo")
    assert run.finished and run.steps == solo.steps and run.verified
    assert run.header["engine"] == {
        "name": "functional",
        "reason": "one of 2 runs trained together",
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "precision": "float32",
        "sampler": "numpy",
    }
    np.testing.assert_allclose(run.weights(-1)["L1.W_O"], solo.weights(-1)["L1.W_O"], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model.d_model=8", "members 0 and 1 differ in model.d_model (16 and 8)"),
        ("task.context=12", "differ in task.context (24 and 12)"),
        ("corpus.vocabulary=9", "differ in the size of the vocabulary (12 and 9)"),
        ("optimiser.kind=adamw", "differ in optimiser.kind (sgd and adamw)"),
        ("training.engine=handwritten", "member 1 cannot be part of an ensemble: training.engine = 'handwritten'"),
        ("training.clamps=[ablate L0H0]", "member 1 cannot be part of an ensemble: the clamp"),
    ],
)
def test_members_of_other_shapes_are_refused(words: str, message: str) -> None:
    with pytest.raises(BirthlensError) as error:
        next(iter(train_many([tiny(), tiny(words)])))
    assert message in str(error.value)


@pytest.mark.parametrize("option", ["model.attention=relu", "model.positions=relative"])
def test_attention_of_other_kinds_trains_alone(option: str) -> None:
    name, _, value = option.partition("=")
    words = f"{name} = '{value}' runs in the functional and reference engines only"
    with pytest.raises(BirthlensError, match=f"member 0 cannot be part of an ensemble: {words}"):
        next(iter(train_many([tiny(*FULL, option)])))
    with pytest.raises(BirthlensError, match=f"device = 'cuda': {words}"):
        choose(tiny(*FULL, option), 12, Execution("cuda"))


def test_a_run_of_another_engine_does_not_join(tmp_path: Path) -> None:
    config = tiny("training.engine=auto")
    next(iter(train_to_disk(config, tmp_path / "run")))
    with pytest.raises(BirthlensError, match="begun with the engine handwritten, which trains one run at a time"):
        next(iter(train_many([config], [tmp_path / "run"])))


def test_too_little_memory_says_how_many_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "free_memory", lambda device: 1_000_000)
    fit = how_many_fit(tiny(), 12, 1_000_000)
    assert 1 <= fit < 20
    with pytest.raises(BirthlensError, match=f"20 runs do not fit the free memory of cpu; {fit} fit at once"):
        next(iter(train_many([tiny(f"seeds.init={seed}") for seed in range(20)])))


def test_the_footprint_counts_weights_and_sequences() -> None:
    n_weights = 2 * 12 * 16 + 24 * 16 + 8 * 16 * 16  # embeddings and unembedding, positions, two layers of four maps
    assert bytes_of_a_run(tiny(), 12) == 4 * 6 * n_weights
    assert sequences_that_fit(tiny(), 12, 10, 10 * bytes_of_a_run(tiny(), 12)) == 1


def test_bfloat16_is_near_float32_and_another_thing() -> None:
    configs = [tiny("training.steps=2"), tiny("training.steps=2", "seeds.init=1")]
    last = {n: record for n, record in train_many(configs) if isinstance(record, StepRecord) and record.step == 2}
    exact = {n: (record.loss, record.weights["L1.W_O"]) for n, record in last.items()}
    for number, record in train_many(configs, execution=Execution(precision="bfloat16")):
        if isinstance(record, StepRecord) and record.step == 2:
            loss, matrix = exact[number]
            assert record.loss != loss and record.loss == pytest.approx(loss, rel=0.02)
            assert np.abs(record.weights["L1.W_O"] - matrix).max() < 0.05
