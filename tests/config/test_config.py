"""Configs: round trips, and errors that name field, value and what would be valid."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from birthlens.config.model import ModelConfig, parameter_names, trained_by_default
from birthlens.config.presets import PRESETS, preset
from birthlens.config.run import RunConfig
from birthlens.config.task import TaskConfig
from birthlens.errors import BirthlensError

models = st.builds(
    ModelConfig,
    d_model=st.sampled_from([8, 16, 32]),
    n_layers=st.integers(1, 4),
    feed_forward=st.sampled_from(["none", "linear", "relu"]),
    positions=st.sampled_from(["random", "sinusoidal", "rotary"]),
    scaled_scores=st.booleans(),
    init=st.sampled_from(["authors", "scaled", "orthogonal"]),
)
tasks = st.builds(
    TaskConfig,
    context=st.integers(2, 500),
    n_triggers=st.integers(0, 40),
    triggers=st.sampled_from(["fixed", "random"]),
    offset=st.integers(0, 10),
    outputs=st.sampled_from(["uniform", "bigram"]),
    no_repeat=st.booleans(),
    cycles=st.sampled_from(["published", "clean"]),
    split=st.sampled_from(["none", "train", "test"]),
)


@given(models, tasks, st.sampled_from(["config.yaml", "config.json"]))
def test_a_config_survives_a_file(
    tmp_path_factory: pytest.TempPathFactory, model: ModelConfig, task: TaskConfig, name: str
) -> None:
    config = RunConfig(model=model, task=task)
    path = tmp_path_factory.mktemp("config") / name
    config.save(path)
    assert RunConfig.load(path) == config
    assert RunConfig.parse(config.to_data()) == config


@given(models)
def test_what_is_trained_by_default_exists(model: ModelConfig) -> None:
    assert set(trained_by_default(model)) <= set(parameter_names(model))
    assert "L0.W_K" in trained_by_default(model)


FULL = ["model.family=full"]
MLP = [*FULL, "model.feed_forward=relu"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task.context=1"], ["task.context", "1", "2"]),
        (["task.contxt=3"], ["task.contxt", "3", "context"]),
        (["colour.x=3"], ["colour", "corpus, task, model"]),
        (["training.steps=-1"], ["training.steps", "-1", "0"]),
        (["training.steps=many"], ["training.steps", "'many'", "int"]),
        (["optimiser.learning_rate=-0.5"], ["optimiser.learning_rate", "-0.5", "0"]),
        (["optimiser.learning_rate=.nan"], ["optimiser.learning_rate", "nan", "finite"]),
        (["training.freeze_until={L0.W_X: 3}"], ["freeze_until", "'L0.W_X'", "L0.W_K, L1.W_K, L1.W_O"]),
        (["training.trained=[W_X]"], ["trained", "'W_X'", "W_E"]),
        (["model.n_heads=3"], ["n_heads", "3", "128"]),
        (["task.triggers=loose"], ["task.triggers", "'loose'", "'fixed' or 'random'"]),
        (["steps=3"], ["'steps=3'", "section.key=value"]),
        (["corpus.source=text"], ["corpus.path", "None", "text"]),
        (["training.steps=true"], ["training.steps", "True", "got bool"]),
        (["task.n_triggers=True"], ["task.n_triggers", "True", "got bool"]),
        (["optimiser.learning_rate=yes"], ["optimiser.learning_rate", "True", "got bool"]),
        (["task.no_repeat='yes'"], ["task.no_repeat", "'yes'", "bool"]),
        (["optimiser.learning_rate=1e300"], ["optimiser.learning_rate", "1e300", "<= 1e+30"]),
        (["checkpoints.steps=[3, 9999]"], ["checkpoints.steps", "9999", "training.steps = 300"]),
        (["checkpoints.steps=[3, -1]"], ["checkpoints.steps.1 = -1", ">= 0"]),
        (["optimiser.betas=[0.9]"], ["optimiser.betas = [0.9]", "list of length 2"]),
        (["training.trained=W_E"], ["training.trained = 'W_E'", "list"]),
        (["training.trained=[3]"], ["training.trained.0 = 3", "str"]),
        (["training.freeze_until=[1]"], ["training.freeze_until = [1]", "mapping, got list"]),
        (["training.steps=null"], ["training.steps = None", "int"]),
        (["task.no_repeat=1"], ["task.no_repeat = 1", "bool"]),
        (["model.positions=rotary", "model.d_model=9"], ["d_model", "9", "even"]),
        ([*FULL, "model.positions=sinusoidal"], ["model.positions = 'sinusoidal'", "random, rotary or relative"]),
        ([*FULL, "model.positions=rotary", "model.d_model=6", "model.n_heads=2"], ["even width, not 3"]),
        (["model.positions=relative"], ["model.positions = 'relative'", "only the full model"]),
        (["model.unembedding=tied"], ["model.unembedding = 'tied'", "only the full model", "family: full"]),
        ([*FULL, "model.unembedding=tied", "training.trained=[W_E, W_U]"], ["training.trained: W_U", "name W_E"]),
        ([*FULL, "model.unembedding=tied", "model.zeroed=[W_U]"], ["model.zeroed: W_U is W_E transposed"]),
        (
            [*FULL, "model.unembedding=tied", "training.clamps=[freeze W_U]"],
            ["training.clamps: W_U is W_E transposed", "name W_E"],
        ),
        (["model.attention=relu"], ["model.attention = 'relu'", "only the full model", "family: full"]),
        (["model.feed_forward=gelu"], ["model.feed_forward = 'gelu'", "only the full model"]),
        (["model.block=sequential"], ["model.block = 'sequential'", "only the full model"]),
        ([*FULL, "model.block=sequential"], ["model.block = 'sequential'", "no MLP", "feed_forward: relu"]),
        ([*FULL, "model.feed_forward_layers=[0]"], ["model.feed_forward_layers = [0]", "no MLP"]),
        ([*MLP, "model.feed_forward_layers=[0, 2]"], ["model.feed_forward_layers = [0, 2]", "from 0 to 1"]),
        ([*MLP, "model.feed_forward_layers=[]"], ["model.feed_forward_layers = []", "at least one"]),
        ([*MLP, "model.feed_forward_layers=[1, 0]"], ["model.feed_forward_layers = [1, 0]", "in order"]),
        ([*MLP, "model.attention=cosine"], ["model.attention", "'cosine'", "'relu' or 'linear'"]),
    ],
)
def test_errors_name_field_value_and_remedy(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(BirthlensError) as caught:
        RunConfig.parse({}, overrides)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and message.endswith(".")


def test_a_section_by_itself_speaks_the_same_way() -> None:
    with pytest.raises(BirthlensError, match=r"task\.context = 0"):
        TaskConfig(context=0)


def test_numbers_may_be_spelled_as_text_or_be_numpys() -> None:
    config = RunConfig.parse({}, ["optimiser.learning_rate=1e-3", "training.steps='7'", "seeds.data=9.0"])
    assert (config.optimiser.learning_rate, config.training.steps, config.seeds.data) == (1e-3, 7, 9)
    numpys: Any = {"context": np.int64(5), "split_fraction": np.float32(0.5)}
    task = TaskConfig(**numpys, no_repeat=True)
    assert (task.context, task.split_fraction) == (5, 0.5) and type(task.context) is int
    assert json.loads(json.dumps(task.to_data())) == task.to_data()


def test_sections_compare_hash_and_show_themselves() -> None:
    one, same = TaskConfig(context=9, cycles="clean"), TaskConfig(cycles="clean").changed(context=9)
    assert one == same and hash(one) == hash(same) and one != TaskConfig() and one != ModelConfig()
    assert eval(repr(one)) == one
    with pytest.raises(BirthlensError, match=r"task\.1 = 2 is unknown"):
        RunConfig(task={1: 2})  # type: ignore[arg-type]
    with pytest.raises(BirthlensError, match=r"task = 3: it must be a section"):
        RunConfig(task=3)  # type: ignore[arg-type]


def test_configs_are_frozen() -> None:
    with pytest.raises(AttributeError, match="frozen"):
        TaskConfig().context = 3  # type: ignore[misc]
    with pytest.raises(AttributeError, match="frozen"):
        del TaskConfig().context
    frozen = RunConfig.parse({"training": {"freeze_until": {"L0.W_K": 3}}})
    changes: tuple[Callable[[Any], object], ...] = (
        lambda steps: steps.update(W_E=7),
        lambda steps: steps.clear(),
        lambda steps: steps.pop("L0.W_K"),
    )
    for change in changes:
        with pytest.raises(TypeError, match="frozen"):
            change(frozen.training.freeze_until)
    with pytest.raises(TypeError, match="frozen"):
        frozen.training.freeze_until["L0.W_K"] = 7
    assert frozen.training.freeze_until == {"L0.W_K": 3}
    for copied in (pickle.loads(pickle.dumps(frozen)), copy.deepcopy(frozen), RunConfig(**frozen.to_data())):
        assert copied == frozen and copied.to_yaml() == frozen.to_yaml()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name: str) -> None:
    assert preset(name).training.steps > 0


def test_the_paper_preset_is_the_papers_setting() -> None:
    config = preset("paper")
    assert isinstance(config.task, TaskConfig)
    assert (config.model.d_model, config.task.context, config.training.batch_size, config.task.n_triggers) == (
        128,
        256,
        512,
        5,
    )
    sgd = config.optimiser
    assert (sgd.kind, sgd.learning_rate, sgd.momentum, sgd.weight_decay) == ("sgd", 0.2, 0.9, 1e-4)
    assert config.training.loss == "in_context" and config.trained == ("L0.W_K", "L1.W_K", "L1.W_O")


def test_an_unknown_preset_lists_the_valid_ones() -> None:
    with pytest.raises(BirthlensError, match="demo, laptop, paper, paper-full"):
        preset("fast")


def test_an_empty_section_keeps_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("task:\ntraining:\n  steps: 3\n")
    assert RunConfig.load(path, ["task.context=9"]) == RunConfig.parse({}, ["training.steps=3", "task.context=9"])


@pytest.mark.parametrize(
    ("text", "word"),
    [("[1, 2]", "list"), ("a: [", "YAML"), ("1: 2", "1 = 2"), ("1: {a: 2}", "key 1"), ("task: {1: 2}", "key 1")],
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(BirthlensError, match=word):
        RunConfig.load(path)
    with pytest.raises(BirthlensError, match="cannot be read"):
        RunConfig.load(tmp_path / "absent.yaml")
