"""The hand-written training step, in torch and compiled, against autograd through the HookedTransformer."""

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from typed import gradient_of

from birthlens.config.model import ModelConfig
from birthlens.errors import BirthlensError
from birthlens.model.hooked import build, parameters
from birthlens.model.initialisation import initial_weights
from birthlens.training.simplified import numba_step as fused
from birthlens.training.simplified.folding import TRAINABLE
from birthlens.training.simplified.numba_step import FusedStep
from birthlens.training.simplified.torch_step import SimplifiedStep

STEPS = pytest.mark.parametrize("step_class", [SimplifiedStep, FusedStep])
PAPER = ("L0.W_K", "L1.W_K", "L1.W_O")


def model_weights(
    d_model: Any = 24, d_vocab: Any = 11, n_ctx: Any = 80, feed_forward: Any = "none", seed: Any = 0, **kw: Any
) -> Any:
    config = ModelConfig(d_model=d_model, feed_forward=feed_forward, **kw)
    return initial_weights(config, d_vocab, n_ctx, np.random.default_rng(seed))


def random_batch(d_vocab: Any, shape: Any, share: Any, seed: Any = 0) -> Any:
    generator = np.random.default_rng(seed)
    tokens, targets = generator.integers(0, d_vocab, (2, *shape))
    return tokens, targets, generator.random(shape) < share


def by_autograd(weights: Any, trained: Any, tokens: Any, targets: Any, mask: Any, dtype: Any = torch.float64) -> Any:
    """Return loss, gradients, and the losses and logits at the mask, by the HookedTransformer, in float64."""
    model = build(weights, trained, dtype=dtype)
    logits = model(torch.tensor(tokens))[torch.tensor(mask)]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(targets[mask]), reduction="none")
    if trained:
        losses.mean().backward()
    moving = parameters(model, weights.config)
    return losses.mean().item(), {name: gradient_of(moving[name]) for name in trained}, losses.detach(), logits.detach()


def check_against_autograd(step_class: Any, weights: Any, trained: Any, tokens: Any, targets: Any, mask: Any) -> None:
    """The relative error of a gradient is norm(found - exact) / norm(exact), for each matrix: at most 1e-5.

    Of a gradient that nearly vanishes (few targets, saturated attention) float32 keeps what its rounding of the scores
    leaves: there the HookedTransformer's own float32 says how near to the exact one it can be (and, where terms of
    order one cancel to nothing, a few roundings of such terms).
    """
    step = step_class(weights, weights.score_scale, trained)
    result = step.loss_and_gradients(tokens, targets, mask)
    loss, gradients, losses, logits = by_autograd(weights, trained, tokens, targets, mask)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert list(result.gradients) == list(trained)
    for name, exact in gradients.items():
        found = result.gradients[name]
        assert found.dtype == np.float32 and found.shape == weights[name].shape
        error, bound = np.linalg.norm(found - exact), 1e-5 * np.linalg.norm(exact)
        if error > bound:
            single = by_autograd(weights, trained, tokens, targets, mask, torch.float32)[1][name]
            bound = 4 * np.linalg.norm(single - exact) + 8 * np.finfo(np.float32).eps
        assert error <= bound, name

    outcome = step.evaluate(tokens, targets, mask, logits=True)
    for each in (outcome, result.outcome):
        np.testing.assert_allclose(each.losses, losses, rtol=1e-4, atol=1e-4)
        chosen = logits[torch.arange(len(logits)), torch.from_numpy(each.predictions)]
        assert (logits.max(-1).values - chosen <= 1e-4).all()
    np.testing.assert_allclose(outcome.logits, logits, rtol=1e-4, atol=1e-4)
    assert result.n_correct == (result.outcome.predictions == targets[mask]).sum()
    assert len(step.evaluate(tokens, targets, mask).logits) == 0


@STEPS
@limits(max_examples=40)
@given(st.data())
def test_gradients_and_outcomes_equal_autograd_for_any_shape_mask_and_subset(step_class: Any, data: Any) -> None:
    draw = data.draw
    d_model, d_vocab = draw(st.integers(1, 40), "d_model"), draw(st.integers(2, 70), "d_vocab")
    n_ctx = draw(st.integers(2, 140), "n_ctx")
    shape = draw(st.integers(1, 20), "batch"), draw(st.integers(2, n_ctx), "pos")
    feed_forward = draw(st.sampled_from(["none", "linear"]), "feed_forward")
    valid = PAPER if feed_forward == "none" else TRAINABLE
    trained = draw(st.lists(st.sampled_from(valid), unique=True), "trained")
    kinds = {
        "init": draw(st.sampled_from(["authors", "scaled", "orthogonal"]), "init"),
        "scaled_scores": draw(st.booleans(), "scaled_scores"),
        "positions": draw(st.sampled_from(["random"] if d_model % 2 else ["random", "sinusoidal"]), "positions"),
    }
    share, seed = draw(st.sampled_from([1.0, 0.3, 0.02]), "share"), draw(st.integers(0, 99), "seed")
    tokens, targets, mask = random_batch(d_vocab, shape, share, seed)
    mask[draw(st.integers(0, shape[0] - 1), "row with a target"), draw(st.integers(0, shape[1] - 1), "target")] = True
    if shape[0] > 1 and draw(st.booleans(), "a sequence without target"):
        mask[(np.flatnonzero(mask.any(axis=1))[0] + 1) % shape[0]] = False
    weights = model_weights(d_model, d_vocab, n_ctx, feed_forward, seed, **kinds)
    check_against_autograd(step_class, weights, trained, tokens, targets, mask)


@STEPS
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_gradients_equal_autograd_at_the_size_of_the_paper(step_class: Any, share: Any) -> None:
    weights = model_weights(128, 65, 256, "linear")
    batch = random_batch(65, (17, 256), share)
    batch[2][3] = False  # a sequence without targets
    batch[2][8:16] = False  # and eight of them in a row
    check_against_autograd(step_class, weights, TRAINABLE, *batch)


@STEPS
@pytest.mark.parametrize("n", [33, 75, 300])
def test_gradients_of_a_batch_in_several_parts_equal_autograd(step_class: Any, n: Any) -> None:
    weights = model_weights(8, 6, 12, "linear")
    check_against_autograd(step_class, weights, TRAINABLE, *random_batch(6, (n, 12), 0.3))


@STEPS
def test_sharp_attention_loses_no_accuracy(step_class: Any) -> None:
    weights = model_weights(32, 11, 90)
    sharp = {name: 6 * weights[name] for name in ("L0.W_K", "L1.W_K")}
    check_against_autograd(step_class, weights.replaced(sharp), PAPER, *random_batch(11, (4, 90), 0.5))


@STEPS
def test_trained_weights_are_read_at_every_call(step_class: Any) -> None:
    weights, batch = model_weights(), random_batch(11, (9, 80), 0.3)
    moving = weights.replaced({name: weights[name].copy() for name in PAPER})
    step = step_class(moving, weights.score_scale, PAPER)
    step.loss_and_gradients(*batch)
    for name in PAPER:
        moving[name][...] *= 1.5
    check_against_autograd(lambda *_: step, moving, PAPER, *batch)


def bits(result: Any) -> Any:
    gradients = b"".join(gradient.tobytes() for gradient in result.gradients.values())
    return result.loss, gradients + b"".join(array.tobytes() for array in result.outcome)


def test_the_compiled_step_has_the_same_bits_in_every_call_and_for_every_number_of_threads() -> None:
    weights, batch = model_weights(40, 13, 140, "linear"), random_batch(13, (70, 140), 0.3)
    one, two, three = (FusedStep(weights, 0.2, TRAINABLE, threads=threads) for threads in (1, 2, 3))
    expected = bits(one.loss_and_gradients(*batch))
    for step in (one, two, three, two):
        two.evaluate(*batch)  # what another call leaves in memory must not matter
        assert bits(step.loss_and_gradients(*batch)) == expected


def test_the_torch_step_has_the_same_bits_in_every_call() -> None:
    weights, batch = model_weights(40, 13, 140), random_batch(13, (20, 140), 0.3)
    step = SimplifiedStep(weights, 0.2, PAPER)
    assert bits(step.loss_and_gradients(*batch)) == bits(step.loss_and_gradients(*batch))


def test_both_steps_take_the_same_path_of_training() -> None:
    generator = np.random.default_rng(0)
    batches = [random_batch(11, (8, 40), 0.4, seed) for seed in range(50)]
    start, paths = model_weights(16, 11, 40, seed=int(generator.integers(99))), []
    for step_class in (SimplifiedStep, FusedStep):
        weights = start.replaced({name: start[name].copy() for name in PAPER})
        step, losses = step_class(weights, start.score_scale, PAPER), []
        for batch in batches:
            result = step.loss_and_gradients(*batch)
            losses.append(result.loss)
            for name, gradient in result.gradients.items():
                weights[name][...] -= 0.2 * gradient
        paths.append(losses)
    np.testing.assert_allclose(paths[0], paths[1], rtol=1e-4)
    assert paths[0][0] != paths[0][-1]


@STEPS
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", PAPER)
def test_a_diverged_run_shows_in_its_loss_and_leaves_nothing_behind(step_class: Any, name: Any, value: Any) -> None:
    weights, batch = model_weights(), random_batch(11, (9, 80), 0.3)
    moving = weights.replaced({name: weights[name].copy() for name in PAPER})
    step = step_class(moving, weights.score_scale, PAPER)
    before = bits(step.loss_and_gradients(*batch))
    moving[name][0, 3, 5] = value
    with np.errstate(all="ignore"):
        assert not math.isfinite(step.loss_and_gradients(*batch).loss)
    moving[name][...] = weights[name]
    assert bits(step.loss_and_gradients(*batch)) == before


def test_a_second_process_finds_the_compiled_code_on_disk() -> None:
    FusedStep(model_weights(), 0.2, PAPER).loss_and_gradients(*random_batch(11, (2, 80), 0.3))
    program = (
        "import numpy as np\n"
        "from birthlens.config.model import ModelConfig\n"
        "from birthlens.model.initialisation import initial_weights\n"
        "from birthlens.training.simplified.numba_step import FusedStep\n"
        "from birthlens.training.simplified.kernels import run_sequences\n"
        "for d_model, feed_forward in ((8, 'none'), (13, 'linear')):\n"
        "    config = ModelConfig(d_model=d_model, feed_forward=feed_forward)\n"
        "    step = FusedStep(initial_weights(config, 5, 9, np.random.default_rng(0)), 1.0, ['L1.W_O'])\n"
        "    tokens = np.zeros((3, 7), dtype=int)\n"
        "    step.loss_and_gradients(tokens, tokens, tokens == 0)\n"
        "    step.evaluate(tokens, tokens, tokens == 0, logits=True)\n"
        "found = run_sequences.stats\n"
        "print(sum(found.cache_hits.values()), sum(found.cache_misses.values()), len(run_sequences.signatures))\n"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["1", "0", "1"]


def test_without_numba_the_torch_step_works_and_the_compiled_one_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused.available()
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "birthlens.training.simplified.kernels")
    monkeypatch.delitem(sys.modules, "birthlens.training.simplified.buffers")
    assert not fused.available()
    weights, batch = model_weights(), random_batch(11, (2, 80), 0.3)
    with pytest.raises(BirthlensError, match=r"kernels cannot be loaded.*numba.*SimplifiedStep"):
        FusedStep(weights, 0.2, PAPER)
    assert math.isfinite(SimplifiedStep(weights, 0.2, PAPER).loss_and_gradients(*batch).loss)


@STEPS
def test_bad_input_is_refused(step_class: Any) -> None:
    weights = model_weights()
    tokens, targets, mask = random_batch(11, (2, 80), 0.3)
    step = step_class(weights, 0.2, PAPER)
    refused = partial(pytest.raises, BirthlensError)
    with refused(match="no position of the batch is marked"):
        step.loss_and_gradients(tokens, targets, np.zeros_like(mask))
    assert [len(part) for part in step.evaluate(tokens, targets, np.zeros_like(mask))] == [0, 0, 0]
    with refused(match=r"tokens go from 0 to 11; valid are 0 to 10"):
        step.loss_and_gradients(np.where(tokens == tokens[0, 0], 11, 0), targets, mask)
    with refused(match=r"targets go from -1 to 0"):
        step.evaluate(tokens, -(targets == targets[0, 0]).astype(int), mask)
    with refused(match=r"shapes \(2, 80\), \(2, 80\) and \(2, 79\)"):
        step.evaluate(tokens, targets, mask[:, 1:])
    with refused(match="81 positions; this model has n_ctx = 80"):
        step.evaluate(*(np.pad(array, ((0, 0), (0, 1))) for array in (tokens, targets, mask)))
    with refused(match="mask has dtype int64"):
        step.evaluate(tokens, targets, mask.astype(int))
    with refused(match=r"trained names L1.W_F; this model has gradients for L0.W_K, L1.W_K, L1.W_O only"):
        step_class(weights, 0.2, ["L1.W_F"])
    with refused(match=r"trained names W_E"):
        step_class(weights, 0.2, ["W_E"])
    with refused(match=r"L1.W_Q is missing; .* needs float32 \(1, 24, 24\)"):
        step_class({name: weights[name] for name in weights if not name.startswith("L1")}, 0.2, [])
    with refused(match=r"W_pos is missing"):
        step_class({name: weights[name] for name in weights if name != "W_pos"}, 0.2, [])
    with refused(match=r"W_U is float64"):
        step_class({**weights, "W_U": weights["W_U"].astype(float)}, 0.2, [])
    with refused(match="has no weight L1.W_in, L1.W_out"):
        step_class(model_weights(feed_forward="relu"), 0.2, [])
    with refused(match=r"n_ctx \+ d_vocab = 2081"):
        step_class(model_weights(d_model=2, d_vocab=2001), 0.2, [])


def test_threads_must_be_positive() -> None:
    with pytest.raises(BirthlensError, match="threads = 0"):
        FusedStep(model_weights(), 0.2, PAPER, threads=0)


@pytest.mark.long
def test_the_process_that_compiles_first_has_the_bits_of_all_later_ones(tmp_path: Path) -> None:
    program = """
import hashlib
from birthlens.config.run import RunConfig
from birthlens.training.loop import train
words = ["model.d_model=32", "task.context=24", "training.batch_size=8", "training.steps=3", "training.engine=fused"]
for record in train(RunConfig.parse({}, [*words, "evaluation.batch_size=2"])):
    pass
print(hashlib.sha256(b"".join(record.weights[name].tobytes() for name in record.weights)).hexdigest())
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    said = [
        subprocess.run(
            [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
        ).stdout
        for _ in range(2)
    ]
    assert said[0] == said[1] != ""
    assert list(tmp_path.rglob("kernels.*.compiled")), "the kernels were compiled into this cache"
