"""What each position of the data added to a memory's margin: held to gradients by autograd and to the weights of the run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from typed import present

from birthlens.analysis.memories.circuits import output_memory, prev_token_memory, trigger_memory
from birthlens.config.run import RunConfig
from birthlens.errors import BirthlensError
from birthlens.model import forward
from birthlens.runs.run import Run, load_run
from birthlens.tasks.parts import GROUPINGS
from birthlens.training.data_attribution import data_attribution_table
from birthlens.training.forking import trainer_at
from birthlens.training.recording import train_to_disk

TINY = {
    "corpus": {"source": "markov", "vocabulary": 10},
    "task": {"context": 16, "n_triggers": 3},
    "model": {"d_model": 16},
    "optimiser": {"learning_rate": 0.5, "weight_decay": 0.01},
    "training": {"steps": 9, "batch_size": 6},
    "checkpoints": {"every": 1},
    "evaluation": {"batch_size": 4, "every": 9},
}
ADAM = ("optimiser.kind=adamw", "optimiser.learning_rate=0.01", "optimiser.betas=[0.8, 0.9]")


def trained(out: Path, *overrides: str) -> Run:
    for _ in train_to_disk(RunConfig.parse(TINY, list(overrides)), out):
        pass
    return load_run(out)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("data") / "run")


def margin(run: Run, memory: str, step: int) -> float:
    """Read the margin off the whole table of scores."""
    weights = run.weights(step)
    triggers = run.triggers
    if memory == "prev_token_memory":
        found = prev_token_memory(weights)
        pairs = [(t, t - 1) for t in range(1, len(found.inputs))]
    else:
        found = trigger_memory(weights) if memory == "trigger_memory" else output_memory(weights)
        asked = triggers if memory == "trigger_memory" and triggers is not None else range(len(found.inputs))
        pairs = [(k, k) for k in asked]
    scale = weights.score_scale if found.circuit.writes == "residual" else 1.0
    table = found.scores().astype(np.float64) * scale
    outputs = table[:, :-1] if memory == "prev_token_memory" else table
    return float(np.mean([table[i, j] - outputs[i].mean() for i, j in pairs]))


@pytest.mark.parametrize(
    ("by", "memory"),
    [*[(by, "trigger_memory") for by in GROUPINGS], ("role", "prev_token_memory"), ("role", "output_memory")],
)
def test_parts_sum_to_the_change_of_the_margin(run: Run, by: Any, memory: str) -> None:
    table = data_attribution_table(run, memory, 2, 8, by)
    change = margin(run, memory, 8) - margin(run, memory, 2)
    total = table[table["by"] == "total"]["value"].item()
    assert total == pytest.approx(change, rel=1e-4, abs=1e-6)
    assert table[table["by"] != "total"]["value"].sum() == pytest.approx(total, rel=1e-4, abs=1e-6)
    assert abs(table[table["by"] == by]["value"]).sum() > 1e-4  # the data did something


@pytest.mark.parametrize(
    "overrides",
    [
        ADAM,
        ("optimiser.warm_up=3", "optimiser.decay=linear"),
        ("training.freeze_until={L1.W_O: 4}",),
        ("training.clamps=['freeze L1.W_O from=3 until=5', 'set optimiser.momentum=0.5 from=4']",),
        ("training.clamps=['hold L0.W_K ideal from=2']",),
        ("task.n_triggers=1", "task.context=4", "training.batch_size=1"),  # some batches have no position of the loss
        ("model.family=full", "model.n_heads=2", *ADAM),
        ("training.engine=handwritten", "optimiser.momentum=0"),
    ],
    ids=str,
)
def test_windows_sum_under_other_settings(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    found = trained(tmp_path / "run", *overrides)
    memory = "L1H1.OV" if "model.family=full" in overrides else "output_memory"
    table = data_attribution_table(found, memory, 1, 9, "role", every=3)
    ends = list(zip(table["from"].unique(), table["until"].unique(), strict=True))
    assert ends == [(1, 4), (4, 7), (7, 9)]
    for first, _ in ends:
        part = table[table["from"] == first]
        total = part[part["by"] == "total"]["value"].item()
        assert part[part["by"] != "total"]["value"].sum() == pytest.approx(total, rel=2e-4, abs=2e-6)
    whole = data_attribution_table(found, memory, 1, 9, "role")
    changes = [each[each["by"] == "total"]["value"].sum() for each in (table, whole)]
    assert changes[0] == pytest.approx(changes[1], rel=1e-6, abs=1e-9) or "full" in str(overrides)


@pytest.mark.parametrize("overrides", [(), ADAM], ids=["sgd", "adamw"])
def test_each_sequence_has_what_its_gradient_moved(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """A plain loop: the recursion of the optimiser, of the gradient of one sequence alone, by autograd."""
    found = trained(tmp_path / "run", *overrides, "training.engine=functional")
    start, stop, name = 3, 6, "L1.W_K"
    table = data_attribution_table(found, "trigger_memory", start, stop, "sequence")
    got = dict(zip(table["part"], table["value"], strict=True))
    trainer = trainer_at(found, start)
    triggers = list(present(trainer.task.fixed_triggers))
    moments: dict[tuple[int, int], torch.Tensor] = {}
    moved: dict[tuple[int, int], torch.Tensor] = {}
    for step in range(start, stop):
        draw = trainer.draw()
        weights = forward.tensors_of(trainer.weights())
        settings = draw.config.optimiser
        for row in range(len(draw.batch)):
            leaf = weights[name].clone().requires_grad_()
            logits = forward.logits({**weights, name: leaf}, found.config.model, draw.batch.tokens[row : row + 1])[0]
            mask = draw.mask[row]
            loss = functional.cross_entropy(logits[mask], draw.batch.targets[row][mask], reduction="sum")
            share = torch.autograd.grad(loss / draw.mask.sum(), leaf)[0].double()
            moments[step, row] = share * (1 - settings.betas[0]) if overrides else share
        trainer.update()
        scale: Any = 1.0
        if overrides:
            state = trainer.optimiser.state[trainer.engine.parameters[name]]
            number = float(state["step"])
            root = (state["exp_avg_sq"].double() / (1 - settings.betas[1] ** number)).sqrt()
            scale = (root + 1e-8) * (1 - settings.betas[0] ** number)
        kept = settings.betas[0] if overrides else settings.momentum
        for key, moment in moments.items():
            past = moment * kept ** (step - key[0])
            moved[key] = moved.get(key, torch.zeros_like(past)) - settings.learning_rate * past / scale
    fixed = trainer.initial
    memory = trigger_memory(fixed)
    for (step, row), change in moved.items():
        left = memory.inputs.vectors[triggers] @ fixed["L1.W_Q"][0]
        scores = fixed.score_scale * left @ change[0].numpy().T @ memory.outputs.vectors.T
        wanted = np.mean([scores[i, k] - scores[i].mean() for i, k in enumerate(triggers)])
        part = f"step {step} sequence {row}"
        assert got.get(part, 0.0) == pytest.approx(float(wanted), rel=1e-3, abs=1e-7)


def test_roles_are_a_partition(run: Run) -> None:
    table = data_attribution_table(run, "output_memory", 0, 4, "role")
    parts = table[table["by"] == "role"]
    assert set(parts["part"]) <= {"in_context (rest)", "in_context_unabsorbed", "no role"}
    counted = sum(int(trainer_at(run, step).draw().mask.sum()) for step in range(4))
    assert parts["n"].sum() == counted == table[table["by"] == "total"]["n"].item()


@pytest.mark.parametrize(
    ("memory", "span", "by", "words"),
    [
        ("output_memory", (3, 3), "role", "from = 3, until = 3"),
        ("output_memory", (0, 10), "role", "must lie in steps 0 to 9"),
        ("output_memory", (-1, 9), "role", "from = -1"),
        ("no_memory", (0, 9), "role", "no_memory"),
        ("L0H0.OV: W_E -> W_U", (0, 9), "role", "does not train"),
    ],
)
def test_bad_input_is_one_sentence(run: Run, memory: str, span: tuple[int, int], by: Any, words: str) -> None:
    with pytest.raises(BirthlensError, match=words.replace("(", r"\(")):
        data_attribution_table(run, memory, *span, by)


@pytest.mark.parametrize(
    "clamp", ["hold L1.W_O zero from=4", "ablate L0H0 from=4", "add L1.W_O 2 from=4", "reset from=4"]
)
def test_clamps_that_no_data_explain_are_refused(tmp_path: Path, clamp: str) -> None:
    found = trained(tmp_path / "run", f"training.clamps=['{clamp}']")
    data_attribution_table(found, "output_memory", 0, 3)
    with pytest.raises(BirthlensError, match="choose another span"):
        data_attribution_table(found, "output_memory", 3, 6)
