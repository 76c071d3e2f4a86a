"""Closed-form gradients against autograd and plain loops; first step, three steps and updates against their definitions."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from typed import gradient_of, present

from birthlens.analysis.theory import first_step, three_steps, updates
from birthlens.analysis.theory import gradients as theory
from birthlens.config.model import ModelConfig
from birthlens.config.run import CorpusConfig, RunConfig, TaskConfig
from birthlens.errors import BirthlensError
from birthlens.model import forward
from birthlens.model.initialisation import initial_weights
from birthlens.model.weights import Weights
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.corpus import markov_chain
from birthlens.training.loop import train

STATISTICS = markov_chain(CorpusConfig(source="markov", vocabulary=10, concentration=1.0))
TASK = BigramTask(TaskConfig(context=14, n_triggers=3), STATISTICS)


def weights(d_model: int = 12, seed: int = 0, **fields: Any) -> Weights:
    config = ModelConfig(d_model=d_model, **fields)
    return initial_weights(config, 10, 14, np.random.default_rng(seed), dtype=np.float64)


def by_autograd(w: Weights, batch: TokenBatch, readout: theory.Readout) -> dict[str, torch.Tensor]:
    """The mean in-context loss and its gradients, by an independent forward pass and autograd."""
    tensors = {
        name: t.requires_grad_(name in theory.MATRICES) for name, t in forward.tensors_of(w, torch.float64).items()
    }
    logits = forward.activations(tensors, w.config, batch.tokens).logits
    if not readout.direct_path:
        empty = {**tensors, "L1.W_O": torch.zeros_like(tensors["L1.W_O"])}
        logits = logits - forward.activations(empty, w.config, batch.tokens).logits
    if readout.bias is not None:
        logits = logits + readout.bias
    mask = batch.in_context
    torch.nn.functional.cross_entropy(logits[mask], batch.targets[mask]).backward()
    return {name: present(tensors[name].grad) for name in theory.MATRICES}


@pytest.mark.parametrize("empty", [(), ("L0.W_K",), ("L0.W_K", "L1.W_K")])
@pytest.mark.parametrize("readout", [theory.Readout(), theory.Readout(False, torch.linspace(-1, 1, 10).double())])
def test_gradients_equal_autograd(empty: tuple[str, ...], readout: theory.Readout) -> None:
    w, batch = weights(), TASK.batch(6, seed=1)
    w = w.replaced({name: np.zeros_like(w[name]) for name in empty})
    tensors = forward.tensors_of(w, torch.float64)
    found = theory.simplified_gradients(
        tensors, w.score_scale, batch.tokens, batch.targets, batch.in_context, readout=readout
    )
    for name, expected in by_autograd(w, batch, readout).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


def test_attention_gradient_at_zero_is_the_papers_formula() -> None:
    w, batch = first_step.zeroed(weights()), TASK.batch(3, seed=2)
    w = w.replaced({"L1.W_O": weights(seed=4)["L1.W_O"]})
    tensors = forward.tensors_of(w, torch.float64)
    found = theory.simplified_gradients(tensors, w.score_scale, batch.tokens, batch.targets, batch.in_context)["L1.W_K"]
    run = theory.simplified_pass(tensors, w.score_scale, batch.tokens)
    total, expected = int(batch.in_context.sum()), np.zeros((12, 12))
    x1, unembedding = run.x1.numpy(), w["W_U"]
    for b, t in np.argwhere(batch.in_context.numpy()):
        error = run.logits[b, t].softmax(-1).numpy()
        error[batch.targets[b, t]] -= 1
        g = unembedding @ error / total
        values = x1[b, : t + 1] @ w["L1.W_V"][0] @ w["L1.W_O"][0]
        for s in range(t + 1):
            expected += w.score_scale / (t + 1) * g @ (values[s] - values.mean(0)) * np.outer(x1[b, s], x1[b, t])
    np.testing.assert_allclose(found[0], expected, atol=1e-12)


def test_centring_subtracts_the_mean_query() -> None:
    w, batch = weights(), TASK.batch(4, seed=1)
    tensors, mask = forward.tensors_of(w, torch.float64), batch.in_context
    plain, centred = (
        theory.simplified_gradients(tensors, w.score_scale, batch.tokens, batch.targets, mask, ["L1.W_O"], readout)
        for readout in (theory.Readout(), theory.Readout(centred=True))
    )
    run = theory.simplified_pass(tensors, w.score_scale, batch.tokens)
    error = (
        (run.logits.softmax(-1) - torch.nn.functional.one_hot(batch.targets, 10))[mask] @ tensors["W_U"].T / mask.sum()
    )
    removed = torch.outer(run.z1[mask].mean(0), error.sum(0))
    torch.testing.assert_close(centred["L1.W_O"][0], plain["L1.W_O"][0] - removed)


def test_clean_and_noisy_gradients_equal_autograd_and_each_other() -> None:
    generator = np.random.default_rng(0)
    inputs, outputs, start = (generator.standard_normal(s) for s in ((5, 6), (4, 7), (6, 7)))
    joint = generator.dirichlet(np.ones(20)).reshape(5, 4)
    matrix = torch.tensor(start, requires_grad=True)
    log_p = (torch.tensor(inputs) @ matrix @ torch.tensor(outputs).T).log_softmax(-1)
    (-(torch.tensor(joint) * log_p).sum()).backward()
    np.testing.assert_allclose(theory.clean_gradient(joint, inputs, outputs, start), gradient_of(matrix), atol=1e-12)
    drawn = generator.choice(20, size=40_000, p=joint.reshape(-1))
    draws = [theory.noisy_gradient(inputs[part // 4], part % 4, outputs, start) for part in np.array_split(drawn, 40)]
    found = theory.estimate(draws)
    z = (found.mean - gradient_of(matrix)) / found.error
    assert np.abs(z).max() < 5 and 0.5 < z.std() < 2
    x, y = inputs[drawn[:50] // 4] + generator.standard_normal((50, 6)), drawn[:50] % 4
    matrix.grad = None
    torch.nn.functional.cross_entropy(torch.tensor(x) @ matrix @ torch.tensor(outputs).T, torch.tensor(y)).backward()
    np.testing.assert_allclose(theory.noisy_gradient(x, y, outputs, start), gradient_of(matrix), atol=1e-12)


def test_population_gradients_have_error_bars_that_hold() -> None:
    w = Weights(weights().config, {name: t.astype(np.float32) for name, t in weights().items()})
    one, other = (theory.population_gradients(w, TASK, batches=12, sequences=32, seed=s) for s in (0, 1))
    for name in theory.MATRICES:
        z = (one[name].mean - other[name].mean) / np.hypot(one[name].error, other[name].error)
        assert 0.4 < z.std() < 2.5, name


def test_counts_table_is_its_definition() -> None:
    batch = TASK.batch(3, seed=5)
    found = first_step.counts_table(batch, batch.in_context.numpy(), 10)
    expected, total = np.zeros((10, 10)), int(batch.in_context.sum())
    for b, t in np.argwhere(batch.in_context.numpy()):
        prefix = batch.tokens[b, : t + 1].tolist()
        for j in range(10):
            for k in range(10):
                expected[j, k] += prefix.count(j) / len(prefix) * (int(batch.targets[b, t] == k) - 0.1) / total
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_counts_predict_the_first_step_exactly_for_orthonormal_codebooks() -> None:
    d = 128
    w = first_step.zeroed(initial_weights(ModelConfig(d_model=d, init="orthogonal"), 10, 14, np.random.default_rng(0)))
    w = w.replaced({"W_pos": np.zeros_like(w["W_pos"])})  # what layer 0 writes of positions is in no codebook
    batch = TASK.batch(16, seed=0)
    measured, _ = first_step._measure(w, batch)
    expected = first_step.counts_table(batch, batch.in_context.numpy(), 10)
    # Norms: |w_E|^2 = d and |u|^2 = 1/3, W_V twice; the unembedding is orthogonal to the rest, so the prediction is uniform.
    np.testing.assert_allclose(measured, expected * d / 9, atol=1e-4)


def test_first_step_correlation_grows_with_width() -> None:
    table = first_step.first_step_table(TASK, ModelConfig(), widths=(16, 512), sequences=64, starts=("zero",))
    off = table[(table.entries == "off_diagonal") & (table.prediction == "model")].set_index("d_model").correlation
    assert off[512] > 0.85 > off[16] + 0.2 and len(table) == 2 * 3 * 3


SMALL = three_steps.sizes(widths=[96], vocabularies=[16], contexts=[32], sequences=[2048])
CASE = SMALL["d=96 N=16 T=32 batch=2048"]


def final(recipe: three_steps.Recipe) -> dict[str, float]:
    _, task, statistics, model = CASE
    table = three_steps.three_steps_table(recipe, BigramTask(task.changed(n_triggers=4), statistics), model)
    assert list(table.step.unique()) == [1, 2, 3]
    last = table[table.step == 3]
    return {**dict(zip(last.metric, last.value, strict=True)), "least_gradient": table.gradient.min()}


def test_three_steps_make_an_induction_head() -> None:
    found = final(CASE[0])
    assert min(found[f"recall {name}"] for name in theory.MATRICES) > 0.9 and found["in_context_accuracy"] > 0.9


@pytest.mark.parametrize("first", ["L1.W_K", "L0.W_K"])
def test_no_other_memory_can_come_first(first: str) -> None:
    second, third = (name for name in theory.MATRICES if name != first)
    found = final(replace(CASE[0], order=(first, second, third), sequences=256))
    assert found["least_gradient"] == 0 and found[f"recall {first}"] == 0 and found["in_context_accuracy"] < 0.5


def test_recipe_names_what_is_wrong() -> None:
    with pytest.raises(BirthlensError, match="name each of"):
        three_steps.Recipe(order=("L1.W_O", "L1.W_O", "L0.W_K"))


def test_updates_along_the_gradient_have_cosine_one() -> None:
    start = initial_weights(ModelConfig(d_model=48), 10, 14, np.random.default_rng(0))
    batch = TASK.batch(64, seed=7)
    found = theory.simplified_gradients(
        forward.tensors_of(start), start.score_scale, batch.tokens, batch.targets, batch.in_context
    )
    moved = start.replaced({name: start[name] - 0.5 * found[name].numpy() for name in ("L1.W_O", "L1.W_K")})
    table = updates.update_cosine_table([(0, start), (1, moved)], TASK, "in_context", sequences=64, seed=7)
    assert set(table.matrix) == {"L1.W_O", "L1.W_K"}
    np.testing.assert_allclose(table[table.prediction == "gradient"].cosine, 1, atol=1e-3)
    whole = table[table.family == "all"]
    np.testing.assert_allclose(whole.share, 1, atol=1e-9)
    np.testing.assert_allclose(whole.null, 1 / 48)
    assert (table.share <= 1 + 1e-9).all() and table.cosine.abs().max() <= 1 + 1e-9


@pytest.mark.parametrize("loss", ["in_context", "all"])
def test_updates_are_compared_with_the_gradient_of_the_runs_own_loss(loss: str) -> None:
    config = RunConfig.parse(
        {
            "corpus": {"source": "markov", "vocabulary": 10, "concentration": 1.0},
            "task": {"context": 14, "n_triggers": 3},
            "model": {"d_model": 24},
            "optimiser": {"kind": "sgd", "learning_rate": 1.0, "momentum": 0.0, "weight_decay": 0.0},
            "training": {"steps": 1, "batch_size": 1024, "loss": loss},
        }
    )
    kept = [(record.step, record.weights) for record in train(config)]
    cosine = {}
    for asked in ("in_context", "all"):
        table = updates.update_cosine_table(kept, TASK, asked, sequences=1024, seed=1)
        table = table[(table.family == "all") & (table.prediction == "gradient")]
        cosine[asked] = table.set_index("matrix").cosine
    other = "all" if loss == "in_context" else "in_context"
    assert (cosine[loss] > 0.9).all() and (1 - cosine[loss] < (1 - cosine[other]) / 3).all(), cosine


def test_updates_of_the_ideal_memory_are_recognised() -> None:
    start = weights(d_model=128)
    moved = start.replaced({n: start[n] + m[None] for n, m in updates.ideal_memories(start, 14).items()})
    table = updates.update_cosine_table([(3, start), (5, moved)], TASK, "in_context", sequences=8)
    own = table[(table.prediction == "memory") & (table.family == "all")]
    np.testing.assert_allclose(own.cosine, 1, atol=1e-9)
    families = {"L1.W_O": "tokens -> outputs", "L1.W_K": "remapped <- tokens", "L0.W_K": "positions <- positions"}
    for matrix, family in families.items():
        assert table[(table.matrix == matrix) & (table.family == family)].share.iloc[0] == pytest.approx(1)


def test_updates_need_a_model_the_formulas_cover() -> None:
    w = initial_weights(ModelConfig(d_model=8, n_layers=1), 10, 14, np.random.default_rng(0))
    with pytest.raises(BirthlensError, match="two layers"):
        updates.update_cosine_table([(0, w)], TASK, "in_context")
