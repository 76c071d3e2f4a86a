"""A monitor reads what `birthlens scores` reads of the same weights, and training goes on as if nobody looked."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import D_VOCAB, made, saved

import birthlens
from birthlens.analysis.behaviour.head_scores import in_context_learning_table, scores_table, transfer_table
from birthlens.analysis.behaviour.head_weights import weight_scores_table
from birthlens.config.model import ModelConfig
from birthlens.errors import BirthlensError
from birthlens.model.directory import quiet
from birthlens.model.hooked import build, load_pretrained
from birthlens.model.initialisation import initial_weights
from birthlens.tasks.positions import repeated_tokens

Watch = Callable[[Any], Any]
DROPOUT: dict[str, dict[str, Any]] = {"neox": {"hidden_dropout": 0.1}}


def hooked() -> Any:
    weights = initial_weights(ModelConfig(family="full", d_model=8, n_heads=2), D_VOCAB, 24, np.random.default_rng(0))
    model = build(weights, trained=tuple(weights))
    model.add_hook("hook_embed", lambda value, hook: 2 * value)  # the user's own, which training passes through
    return model


def plain(column: pd.Series) -> list[Any]:
    return [None if pd.isna(value) else value for value in column]


def new(name: str) -> Any:
    return hooked() if name == "hooked" else made(name, **DROPOUT.get(name, {}))


def trained(model: Any, watch: Watch = lambda model: None, steps: int = 4) -> tuple[list[Any], Any]:
    """Train by a plain loop with dropout; return weights and gradients, and the state of the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model.train()
        monitor = watch(model)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ids = torch.randint(D_VOCAB, (4, 16))
        for step in range(steps):
            out = model(ids)
            logits = out if torch.is_tensor(out) else out.logits
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimiser.step()
            if step < steps - 1:
                optimiser.zero_grad()
            if monitor is not None:
                monitor.step(step + 1)
        assert all(module.training for module in model.modules())
        state = [*model.state_dict().values(), *(p.grad for p in model.parameters()), torch.get_rng_state()]
        return state, monitor


@pytest.mark.parametrize("name", ["hooked", "gpt2", "neox"])
def test_training_is_the_same_to_the_bit(name: str) -> None:
    alone, _ = trained(new(name))
    watched, monitor = trained(new(name), lambda model: birthlens.Monitor(model, every=2, n=3))
    assert list(dict.fromkeys(monitor.table()["step"])) == [2, 4]
    assert len(alone) == len(watched)
    for one, other in zip(alone, watched, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_scores_are_those_of_the_saved_model(name: str, tmp_path: Path) -> None:
    """TransformerLens reads the directory; the monitor read the live model."""
    model = made(name)
    probes = ["heads", "in-context-learning", "transfer"]
    _, monitor = trained(model, lambda live: birthlens.Monitor(live, probes, every=4, n=3, seed=5))
    with quiet():
        model.eval().save_pretrained(tmp_path)
    on_disk = [(4, load_pretrained(tmp_path))]
    batch = repeated_tokens(3, 12, D_VOCAB, np.random.default_rng([5, 0]))
    found = monitor.table().set_index("probe")
    tables = {
        "heads": scores_table(on_disk, batch),
        "in-context-learning": in_context_learning_table(on_disk, batch),
        "transfer": transfer_table(on_disk, np.random.default_rng([5, 7]), 3),
    }
    for probe, expected in tables.items():
        rows = found.loc[[probe]]
        np.testing.assert_allclose(rows["value"], expected["value"], atol=1e-5)
        for column in {"layer", "head", "score", "n", "step"} & set(expected):
            assert plain(rows[column]) == plain(expected[column])
    assert model.config._attn_implementation == "sdpa"


def test_memories_follow_the_weights_of_a_hooked_transformer() -> None:
    said: dict[int, Any] = {}
    model, now = hooked(), []
    monitor = birthlens.Monitor(model, ["weights"], every=1, log=said.__setitem__)
    for step in (0, 1):
        table = monitor.step(step)
        expected = weight_scores_table([(step, model)])
        assert table is not None and plain(table["through"]) == plain(expected["through"])
        pd.testing.assert_series_equal(table["value"], expected["value"])
        now.append(table["value"].tolist())
        with torch.no_grad():
            model.embed.W_E.neg_().add_(0.3 * model.unembed.W_U.T)
    assert now[0] != now[1] and list(said) == [0, 1]
    assert said[1]["weights/L0H1>L1H0/induction"] in now[1] and len(said[0]) == len(now[0])
    assert monitor.step(1) is None and len(monitor.table()) == 2 * len(now[0])


def test_a_bridge_is_read_as_it_trains(tmp_path: Path) -> None:
    """The class of models that TransformerLens 4 has."""
    saved("llama", tmp_path)
    bridge = load_pretrained(tmp_path)
    monitor = birthlens.Monitor(bridge, ["heads", "weights"], every=1, n=3, seed=5)
    batch = repeated_tokens(3, 12, D_VOCAB, np.random.default_rng([5, 0]))
    for step in (0, 1):
        table = monitor.step(step)
        assert table is not None
        heads = scores_table([(step, bridge)], batch)
        weights = weight_scores_table([(step, bridge)])
        np.testing.assert_allclose(table["value"], [*heads["value"], *weights["value"]], atol=1e-6)
        with torch.no_grad():
            for parameter in bridge.parameters():
                parameter.mul_(0.7)
    first, second = (monitor.table().query("step == @step")["value"].to_numpy() for step in (0, 1))
    assert not np.allclose(first, second, atol=1e-3, equal_nan=True)


def test_other_precisions_and_wrappers_are_read() -> None:
    ids = torch.randint(D_VOCAB, (3, 17), generator=torch.Generator().manual_seed(0))
    single = birthlens.Monitor(made("neox").to(torch.bfloat16).float(), sequences=ids).step(0)
    compiled: Any = torch.compile(made("neox").to(torch.bfloat16), backend="eager")
    wrapped = birthlens.Monitor(torch.nn.DataParallel(compiled), sequences=ids).step(0)
    assert single is not None and wrapped is not None
    pd.testing.assert_frame_equal(single, wrapped)
    half = hooked().to(torch.bfloat16)
    table = birthlens.Monitor(half, sequences=ids).step(0)
    assert table is not None and np.isfinite(table["value"]).all() and half.cfg.dtype == torch.bfloat16


def test_a_trainer_takes_the_callback(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    def run(callbacks: Callable[[Any], list[Any]]) -> list[torch.Tensor]:
        model = made("gpt2", resid_pdrop=0.2)
        data = [{"input_ids": torch.arange(i, i + 8), "labels": torch.arange(i, i + 8)} for i in range(6)]
        settings = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], disable_tqdm=True, use_cpu=True,
            save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        with quiet(), torch.random.fork_rng():
            Trainer(model, settings, train_dataset=data, callbacks=callbacks(model)).train()
        return [p.detach() for p in model.parameters()]

    monitors: list[birthlens.Monitor] = []

    def watched(model: Any) -> list[Any]:
        monitors.append(birthlens.Monitor(model, every=2, n=2))
        return [monitors[0].trainer_callback()]

    assert all(torch.equal(one, other) for one, other in zip(run(lambda model: []), run(watched), strict=True))
    assert set(monitors[0].table()["step"]) == {0, 2}


def test_a_lightning_module_calls_it(tmp_path: Path) -> None:
    lightning = pytest.importorskip("pytorch_lightning", exc_type=ImportError)

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self, every: int) -> None:
            super().__init__()
            self.model = made("gpt2", resid_pdrop=0.2)
            self.monitor = birthlens.Monitor(self.model, every=every, n=2) if every else None

        def training_step(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids, labels=ids).loss

        def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
            if self.monitor is not None and self.trainer.is_global_zero:
                self.monitor.step(self.global_step)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def fitted(every: int) -> Module:
        with quiet(), torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(3)
            module = Module(every)
            rows: Any = [torch.arange(i, i + 8) for i in range(10)]
            data: Any = torch.utils.data.DataLoader(rows, batch_size=2)
            trainer = lightning.Trainer(
                max_steps=5, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False, default_root_dir=tmp_path,
            )  # fmt: skip
            trainer.fit(module, data)
        return module

    alone = fitted(0)
    watched = fitted(2)
    assert all(torch.equal(one, other) for one, other in zip(alone.parameters(), watched.parameters(), strict=True))
    assert watched.monitor is not None and watched.monitor.table()["step"].unique().tolist() == [2, 4]


def test_what_cannot_be_monitored_is_one_sentence() -> None:
    model = made("gpt2")
    for wrong, message in (
        ({"probes": ["heads", "taste"]}, r"probes = \['taste'\]: valid are heads, in-context-learning"),
        ({"probes": []}, "valid are heads"),
        ({"every": 0}, "every = 0"),
        ({"probes": ["weights"]}, "not from a GPT2LMHeadModel; save the model and use `birthlens scores DIRECTORY"),
        ({"sequences": torch.full((2, 8), D_VOCAB)}, f"hold id {D_VOCAB}; the model's vocabulary ends at 29"),
        ({"sequences": torch.rand(2, 8)}, "give ids"),
        ({"sequences": torch.zeros(2, 40, dtype=torch.long)}, "39 positions; the model has 24"),
    ):
        with pytest.raises(BirthlensError, match=message):
            birthlens.Monitor(model, **wrong)
    for other in (torch.nn.Linear(2, 2), "gpt2"):
        with pytest.raises(BirthlensError, match="give a HookedTransformer, a TransformerBridge, or a causal"):
            birthlens.Monitor(other)
    from transformers import BertConfig, BertForMaskedLM

    sizes: dict[str, Any] = {
        "vocab_size": 9,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    with torch.random.fork_rng(), pytest.raises(BirthlensError, match="BertForMaskedLM is not a causal model"):
        birthlens.Monitor(BertForMaskedLM(BertConfig(**sizes)))
    monitor = birthlens.Monitor(model)
    model.resize_token_embeddings(D_VOCAB + 8)
    with pytest.raises(BirthlensError, match="has changed shape or is gone"):
        monitor.step(0)
