"""Clamps: each does what its words say, against weights, gradients and forward passes that are computed another way."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from typed import gradient_of

from birthlens.analysis.interventions.weight_patching import replacement
from birthlens.analysis.memories.ideal import Strengths, ideal_matrices
from birthlens.config.clamp_text import from_text
from birthlens.config.clamps import KINDS
from birthlens.config.model import ModelConfig
from birthlens.config.run import RunConfig
from birthlens.errors import BirthlensError
from birthlens.model import forward
from birthlens.model.components import edges_of
from birthlens.model.edited_forward import Edits, edited_terms
from birthlens.model.hooked import build, parameters
from birthlens.model.initialisation import initial_weights
from birthlens.model.sites import Edge, Head
from birthlens.runs.run import load_run
from birthlens.tasks.kinds import chain_of
from birthlens.training.grid import Grid
from birthlens.training.loop import Trainer, train
from birthlens.training.recording import resume, train_to_disk

TINY: dict[str, dict[str, Any]] = {
    "corpus": {"source": "markov", "vocabulary": 12},
    "task": {"context": 24, "n_triggers": 3},
    "model": {"d_model": 64},
    "training": {"steps": 12, "batch_size": 8},
    "checkpoints": {"every": 4},
    "evaluation": {"batch_size": 8, "every": 2},
}
EVERY = [
    "freeze L0.W_K from=2 until=6",
    "hold L1.W_O zero from=3 until=6",
    "hold L1.W_O initial from=3 until=6",
    "hold L1.W_O step:2 from=6 until=9",
    "hold L0.W_K ideal from=2 until=7",
    "hold L0.W_K ideal_dual strength=3 from=2 until=7",
    "hold L1.W_K ledger from=2 until=7",
    "hold L1.W_K without_ledger from=2 until=7",
    "hold L1.W_O rank:2 from=2 until=7",
    "add L1.W_O 2 from=3",
    "add L1.W_O 2 held from=3 until=7",
    "reset from=6",
    "reset L1.W_O from=6",
    "set task.outputs=bigram from=3 until=6",
    "set training.loss=all from=3",
    "set optimiser.learning_rate=0.01 from=3 until=7",
    "ablate L0H0 zero from=3 until=6",
    "ablate L1H0 mean from=3",
    "ablate L0H0->L1H0.k mean from=3 until=7",
    "ablate L0H0->L1H0.k zero from=3 until=7",
    "pin L0H0 previous from=3",
    "pin L0H0 uniform from=3 until=7",
    "pin L1H0 frozen from=3 until=7",
    "copy L1H0 5 from=3 until=7",
    "stop_gradient L0H0->L1H0.k from=3",
]


def tiny(*clamps: Any, overrides: Any = ()) -> Any:
    return RunConfig.parse(TINY, [f"training.clamps={list(clamps)}", *overrides])


def path(config: Any) -> Any:
    """Return the weights at every step, and the trainer at the end."""
    found = {}
    for record in train(config):
        found[record.step] = record.weights
    return found, record.trainer


def equal(first: Any, second: Any, names: Any = ("L0.W_K", "L1.W_K", "L1.W_O")) -> Any:
    return all(np.array_equal(first[name], second[name]) for name in names)


def test_the_list_above_has_every_kind() -> None:
    assert {text.split()[0] for text in EVERY} == set(KINDS)


@pytest.mark.parametrize("text", EVERY)
def test_a_clamp_acts_from_its_first_step_on_and_a_clamped_run_resumes_to_the_bit(text: Any, tmp_path: Path) -> None:
    config = tiny(text)
    (clamp,) = config.training.clamps
    assert str(clamp) == str(RunConfig.parse({"training": {"clamps": [str(clamp)]}}).training.clamps[0])
    assert RunConfig.parse(config.to_data()) == config
    engine = [f"training.engine={'functional' if clamp in forward_clamps(config) else 'auto'}"]
    free, _ = path(tiny(overrides=engine))
    clamped, trainer = path(config)
    first = next(step for step in clamped if not equal(clamped[step], free[step]))
    at_once = text.startswith(("hold", "add")) and "step:" not in text
    assert first == clamp.start + (0 if at_once or "step:" in text else 1)
    assert trainer.engine_name == ("functional" if clamp in forward_clamps(config) else "handwritten")

    for record in train_to_disk(config, tmp_path / "run"):
        if record.step == 5:
            break  # killed in the middle of the span; step 4 is kept
    for _ in resume(tmp_path / "run"):
        pass
    assert equal(load_run(tmp_path / "run").weights(12), clamped[12])


def forward_clamps(config: Any) -> Any:
    return [clamp for clamp in config.training.clamps if str(clamp).startswith(("ablate", "pin", "copy", "stop"))]


def test_frozen_and_held_matrices_are_what_they_are_said_to_be() -> None:
    found, trainer = path(tiny("freeze L0.W_K from=2 until=6", "hold L1.W_O step:2 from=6 until=9"))
    assert all(equal(found[step], found[2], ["L0.W_K"]) for step in range(2, 7))
    assert not equal(found[7], found[6], ["L0.W_K"]) and not equal(found[2], found[1], ["L0.W_K"])
    assert all(equal(found[step], found[2], ["L1.W_O"]) for step in range(6, 10))
    assert not equal(found[10], found[9], ["L1.W_O"]) and not equal(found[5], found[2], ["L1.W_O"])
    zero, _ = path(tiny("hold L1.W_O zero from=3 until=6"))
    assert [not zero[step]["L1.W_O"].any() for step in range(12)] == [3 <= step <= 6 for step in range(12)]
    ideal, trainer = path(tiny("hold L0.W_K ideal strength=7 from=2 until=5"))
    expected = ideal_matrices(trainer.initial, trainer.task.fixed_triggers, Strengths(prev_token=7.0))["L0.W_K"]
    np.testing.assert_array_equal(ideal[4]["L0.W_K"], expected.astype(np.float32))
    scores = ideal[4]["W_pos"] @ ideal[4]["L0.W_K"][0].T @ ideal[4]["W_pos"].T * ideal[4].score_scale
    assert np.diag(scores, -1).mean() == pytest.approx(7, rel=0.2)


@pytest.mark.parametrize("source", ["ledger", "without_ledger", "rank:2"])
def test_projections_are_those_of_the_suites_and_are_trained(source: Any) -> None:
    found, trainer = path(tiny(f"hold L1.W_K {source} from=2 until=7"))
    triggers = trainer.task.fixed_triggers.tolist()
    for step in (2, 4, 6):
        again = replacement(found[step], ["L1.W_K"], source, triggers=triggers)["L1.W_K"]
        np.testing.assert_allclose(again, found[step]["L1.W_K"], atol=2e-5)
    assert not equal(found[3], found[4], ["L1.W_K"])
    left = replacement(found[8], ["L1.W_K"], source, triggers=triggers)["L1.W_K"]
    assert np.abs(left - found[8]["L1.W_K"]).max() > 1e-3


def test_a_memory_is_added_once_or_kept_at_its_strength() -> None:
    free, _ = path(tiny())
    once, trainer = path(tiny("add L1.W_O 2 from=3"))
    memory = ideal_matrices(trainer.initial, trainer.task.fixed_triggers, Strengths(output=2.0))["L1.W_O"]
    np.testing.assert_allclose(once[3]["L1.W_O"], free[3]["L1.W_O"] + memory, atol=1e-6)
    assert equal(once[2], free[2])
    held, _ = path(tiny("add L1.W_O 2 held from=3 until=7"))
    unit = memory / 2
    shares = [np.vdot(unit, held[step]["L1.W_O"]) / np.vdot(unit, unit) for step in range(10)]
    np.testing.assert_allclose(shares[3:7], 2, rtol=1e-5)
    assert abs(shares[7] - 2) > 1e-4
    without, _ = path(tiny("add L1.W_O 0 held from=3 until=7"))
    shares = [np.vdot(unit, without[step]["L1.W_O"]) / np.vdot(unit, unit) for step in range(10)]
    np.testing.assert_allclose(shares[3:7], 0, atol=1e-6)
    assert abs(shares[2]) > 1e-4 and not equal(without[4], without[3], ["L1.W_O"])


def test_a_reset_forgets_momentum() -> None:
    """Without momentum there is nothing to forget; with it, the update after the reset is the plain gradient's."""
    plain = ["optimiser.momentum=0"]
    assert equal(path(tiny("reset from=6", overrides=plain))[0][12], path(tiny(overrides=plain))[0][12])
    config = tiny("reset from=6", overrides=["optimiser.weight_decay=0"])
    found, _ = path(config)
    fresh = Trainer(tiny(overrides=["optimiser.weight_decay=0"]), chain_of(config))
    batch = fresh.task.batch(8, config.seeds.data, 6)
    with torch.no_grad():
        for name, parameter in fresh.engine.parameters.items():
            parameter.copy_(torch.from_numpy(found[6][name]))
    fresh.engine.gradients(batch, batch.in_context)
    for name, parameter in fresh.engine.parameters.items():
        np.testing.assert_allclose(found[7][name], found[6][name] - 0.2 * gradient_of(parameter), atol=1e-6)


def test_settings_change_in_the_span_only() -> None:
    config = tiny(
        "set task.outputs=bigram from=3 until=6",
        "set training.loss=all from=5",
        "set optimiser.learning_rate=0.1 from=4",
    )
    trainer = Trainer(config, chain_of(config))
    settings = [trainer.clamps.settings.at(step) for step in range(8)]
    assert [one.config.task.to_data()["outputs"] for one in settings] == ["uniform"] * 3 + ["bigram"] * 3 + [
        "uniform"
    ] * 2
    assert [one.task.config for one in settings] == [one.config.task for one in settings]
    assert [one.config.training.loss for one in settings] == ["in_context"] * 5 + ["all"] * 3
    rates = []
    for _ in range(8):
        trainer.update()
        rates.append(trainer.optimiser.param_groups[0]["lr"])
    assert rates == [0.2] * 4 + [0.1] * 4


MODELS = [
    {},
    {"feed_forward": "linear"},
    {"feed_forward": "relu"},
    {"positions": "rotary"},
    {"family": "full", "n_heads": 2, "feed_forward": "relu"},
    {"family": "full", "feed_forward": "gelu", "feed_forward_layers": (1,), "block": "sequential", "attention": "relu"},
    {"family": "full", "n_heads": 2, "positions": "relative", "unembedding": "tied"},
    {"family": "full", "n_heads": 2, "positions": "rotary"},
]


def moved(kw: Any) -> Any:
    generator = np.random.default_rng(1)
    weights = initial_weights(ModelConfig(d_model=16, **kw), 7, 12, generator)
    drawn = {
        name: 0.3 * generator.standard_normal(weights[name].shape)
        for name in weights
        if not (weights.config.tied and name == "W_U")
    }
    return weights.replaced({name: (weights[name] + drawn[name]).astype(np.float32) for name in drawn})


@pytest.mark.parametrize("kw", MODELS)
def test_the_edited_forward_pass_without_edits_is_the_forward_pass(kw: Any) -> None:
    weights = moved(kw)
    tokens = torch.randint(0, 7, (3, 10), generator=torch.Generator().manual_seed(0))
    tensors = forward.tensors_of(weights)
    expected = forward.logits(tensors, weights.config, tokens)
    torch.testing.assert_close(edited_terms(tensors, weights.config, tokens).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kw", MODELS)
def test_gradients_without_an_edge_and_through_it_add_up(kw: Any) -> None:
    """The gradient is a sum over paths: what one edge carries is what is lost when it carries no gradient."""
    weights = moved(kw)
    tokens = torch.randint(0, 7, (3, 10), generator=torch.Generator().manual_seed(0))

    def gradient(edges: Any) -> Any:
        tensors = {name: tensor.clone().requires_grad_(True) for name, tensor in forward.tensors_of(weights).items()}
        found = edited_terms(tensors, weights.config, tokens, Edits(edges=dict.fromkeys(edges)))
        cross_entropy(found.logits.flatten(0, 1), tokens.flatten()).backward()
        return tensors["L0.W_V"].grad

    every = [edge for edge in edges_of(weights.config) if isinstance(edge.sender, Head) and edge.sender.layer == 0]
    whole = gradient([])
    alone = sum(gradient([other for other in every if other != edge]) for edge in every)
    if weights.config.feed_forward == "none":  # no path has two edges of layer 0
        torch.testing.assert_close(alone, whole, rtol=1e-3, atol=1e-5)
    assert gradient(every) is None or not gradient(every).any()


def hooked_loss(weights: Any, batch: Any, hooks: Any) -> Any:
    model = build(weights, ("L0.W_K", "L1.W_K", "L1.W_O"))
    logits = model.run_with_hooks(batch.tokens, fwd_hooks=hooks)[batch.in_context]
    loss = cross_entropy(logits, batch.targets[batch.in_context])
    loss.backward()
    return loss.item(), {name: parameters(model, weights.config)[name].grad for name in ("L0.W_K", "L1.W_K", "L1.W_O")}


@pytest.mark.parametrize(
    "text", ["ablate L0H0 zero", "ablate L1H0 mean", "pin L0H0 previous", "pin L1H0 uniform", "pin L1H0 frozen"]
)
def test_a_clamped_step_equals_hooks_on_the_hooked_transformer(text: Any) -> None:
    config = tiny(f"{text} from=2")
    trainer = Trainer(config, chain_of(config))
    for _ in range(2):
        trainer.update()
    start = trainer.weights()
    held_out = trainer.held_out.tokens
    trainer.update()
    now = trainer.weights()
    _, head, *_ = text.split()
    layer = Head.parse(head).layer
    model = build(start)
    n = held_out.shape[1]
    with torch.no_grad():
        z = model.run_with_cache(held_out)[1][f"blocks.{layer}.attn.hook_z"].mean((0, 1))
    batch = trainer.task.batch(8, config.seeds.data, 3)
    if text.startswith("ablate"):
        value = torch.zeros_like(z) if "zero" in text else z
        hooks = [(f"blocks.{layer}.attn.hook_z", lambda old, hook: value.expand_as(old))]
    else:
        with torch.no_grad():
            frozen = model.run_with_cache(batch.tokens)[1][f"blocks.{layer}.attn.hook_pattern"]
        previous = torch.eye(n).roll(1, 0)
        previous[0] = torch.eye(n)[0]
        previous = previous.tril()
        uniform = torch.ones(n, n).tril() / torch.ones(n, n).tril().sum(1, keepdim=True)
        pattern = {"previous": previous, "uniform": uniform, "frozen": frozen}[text.split()[2]]
        hooks = [(f"blocks.{layer}.attn.hook_pattern", lambda old, hook: pattern.expand_as(old))]
    loss, gradients = hooked_loss(now, batch, hooks)
    assert trainer.engine.gradients(batch, batch.in_context) == pytest.approx(loss, rel=1e-5)
    for name, parameter in trainer.engine.parameters.items():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        expected = torch.zeros_like(parameter) if gradients[name] is None else gradients[name]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_a_head_that_copies_adds_its_attention_to_the_logits_of_the_tokens() -> None:
    """Against the HookedTransformer: without the head's output, plus the strength times its attention to each token."""
    config = tiny("copy L1H0 5 from=2")
    trainer = Trainer(config, chain_of(config))
    for _ in range(3):
        trainer.update()
    now = trainer.weights()
    batch = trainer.task.batch(8, config.seeds.data, 3)
    model = build(now, ("L0.W_K", "L1.W_K", "L1.W_O"))
    patterns = []
    hooks = [
        ("blocks.1.attn.hook_pattern", lambda pattern, hook: patterns.append(pattern)),
        ("blocks.1.attn.hook_z", lambda z, hook: torch.zeros_like(z)),
    ]
    logits = model.run_with_hooks(batch.tokens, fwd_hooks=hooks).clone()
    for sequence, (tokens, pattern) in enumerate(zip(batch.tokens, patterns[0][:, 0], strict=True)):
        for query in range(len(tokens)):
            for key in range(query + 1):
                logits[sequence, query, tokens[key]] += 5 * pattern[query, key]
    loss = cross_entropy(logits[batch.in_context], batch.targets[batch.in_context])
    loss.backward()
    assert trainer.engine.gradients(batch, batch.in_context) == pytest.approx(loss.item(), rel=1e-5)
    expected = parameters(model, now.config)
    for name in ("L0.W_K", "L1.W_K"):
        torch.testing.assert_close(trainer.engine.parameters[name].grad, expected[name].grad, rtol=1e-3, atol=1e-6)
    output = trainer.engine.parameters["L1.W_O"]
    assert output.grad is None or not output.grad.any()


@pytest.mark.parametrize("clamp", ["copy L1H0", "stop_gradient L1H0->logits"])
def test_a_clamp_may_leave_nothing_to_learn(clamp: str) -> None:
    found, _ = path(tiny(f"{clamp} until=6", overrides=["training.trained=[L1.W_O]", "training.steps=8"]))
    assert equal(found[6], found[0], ["L1.W_O"]) and not equal(found[7], found[6], ["L1.W_O"])


def test_an_ablated_edge_carries_its_mean() -> None:
    weights = moved({})
    tokens = torch.randint(0, 7, (3, 10), generator=torch.Generator().manual_seed(0))
    tensors = forward.tensors_of(weights)
    edge = Edge.parse("L0H0->L1H0.k")
    whole = edited_terms(tensors, weights.config, tokens)
    mean = whole.written[edge.sender].mean((0, 1))
    found = edited_terms(tensors, weights.config, tokens, Edits(edges={edge: mean}))
    x = whole.logits.new_zeros(0)
    del x
    resid = sum(term for sender, term in whole.written.items() if str(sender) != "L1H0")
    keys = resid - whole.written[edge.sender] + mean
    scores = (resid @ tensors["L1.W_Q"][0]) @ (keys @ tensors["L1.W_K"][0]).mT * weights.score_scale  # type: ignore[operator]
    pattern = scores.masked_fill(torch.ones(10, 10).triu(1).bool(), -torch.inf).softmax(-1)
    expected = (resid + pattern @ resid @ tensors["L1.W_V"][0] @ tensors["L1.W_O"][0]) @ tensors["W_U"]
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("clamps", "message"),
    [
        (["freeze L9.W_K"], "L9.W_K is not a trained matrix; valid are L0.W_K, L1.W_K, L1.W_O"),
        (["freeze L0.W_Q"], "L0.W_Q is not a trained matrix"),
        (["freeze"], "its matrix is missing; write 'freeze MATRIX from=STEP until=STEP'"),
        (["melt L0.W_K"], "it must begin with one of freeze, hold, add"),
        (["freeze L0.W_K from=5 until=5"], "until = 5 must be larger than from = 5"),
        (["freeze L0.W_K from=12"], "it starts after the last update; training.steps = 12"),
        (["freeze L0.W_K until=9", "hold L0.W_K zero from=8"], "contradicts 'freeze L0.W_K until=9'"),
        (["pin L0H0 uniform", "ablate L0H0"], "contradicts 'pin L0H0 uniform'"),
        (["set model.d_model=3"], "model.d_model cannot change during training"),
        (["set task.outputs=odd"], "task.outputs = 'odd': expected 'uniform' or 'bigram'"),
        (["hold L0.W_K rank"], "at = rank needs its number"),
        (["hold L0.W_K zero strength=2"], "strength = 2.0 goes with at = ideal or ideal_dual, not zero"),
        (["reset until=4"], "it acts once, at from = 0; leave until out"),
        (["pin L0H0 uniform odd"], "'odd' does not fit"),
        ([{"kind": "melt"}], "kind = 'melt' is unknown; valid are freeze, hold, add"),
        ([{1: 2}], "kind = None is unknown"),
        ([3], "training.clamps.0 = 3: expected mapping, got int"),
        (["hold L1.W_O rank:["], "is not YAML"),
        (["add L1.W_O .nan"], "training.clamps.0.strength = nan: expected a finite number"),
        (["add L1.W_O 2 heldd"], "'heldd' does not fit"),
        (["pin L0H0 odd"], "training.clamps.0.pattern = 'odd': expected 'previous' or 'uniform' or 'frozen'"),
        ([{"kind": "ablate", "target": "L00H0 "}, "copy L0H0"], "contradicts 'ablate L0H0 zero': both fix L0H0"),
        (["stop_gradient L0H0->L1H0.k", {"kind": "ablate", "target": "L0H0 -> L1H0.k"}], "both fix L0H0->L1H0.k"),
        (["hold L1.W_O zero", "add L1.W_O 3 from=4"], "L1.W_O is held at step 4, so nothing can be added to it"),
        (["add L1.W_O 3 from=4", "hold L1.W_O rank:2 from=4"], "L1.W_O is held at step 4"),
    ],
)
def test_what_a_config_refuses(clamps: Any, message: Any) -> None:
    with pytest.raises(BirthlensError, match=message.replace("(", r"\(")):
        RunConfig.parse({**TINY, "training": {**TINY["training"], "clamps": clamps}})


@pytest.mark.parametrize(
    ("clamp", "message"),
    [
        ("pin L2H0 uniform", "head = L2H0 does not exist; valid heads are L0H0, L1H0"),
        ("pin L0H0->L1H0.k uniform", "is an edge; a pattern belongs to a head"),
        ("copy L0H0->L1H0.k", "is an edge; only a head such as L1H0 copies"),
        ("ablate L1H0->L0H0.k", "the sender must come before the receiver"),
        ("hold L0.W_K step:9 from=4", "step 9 comes after from = 4"),
        ("hold L1.W_O rank:99", "clamp 'hold L1.W_O rank:99': rank = 99 is too large; valid are 1 to 64"),
        ("set task.n_triggers=11 from=3", None),
        ("set task.n_triggers=13 from=3", "clamp 'set task.n_triggers=13 from=3': task.n_triggers = 13"),
    ],
)
def test_what_a_trainer_refuses(clamp: Any, message: Any) -> None:
    config = tiny(clamp)
    if message is None:
        Trainer(config, chain_of(config))
        return
    with pytest.raises(BirthlensError, match=message):
        Trainer(config, chain_of(config))


def test_the_axis_of_a_grid_varies_clamps(tmp_path: Path) -> None:
    """In YAML, as texts and as mappings."""
    (tmp_path / "grid.yaml").write_text(
        "axes: {training.clamps: [[], [freeze L0.W_K until=5], [{kind: pin, head: L0H0, pattern: uniform, from: 3}]]}"
    )
    configs = Grid.load(tmp_path / "grid.yaml").configs()
    clamps = [[str(clamp) for clamp in config.training.clamps] for config in configs.values()]
    assert clamps == [[], ["freeze L0.W_K until=5"], ["pin L0H0 uniform from=3"]]


@pytest.mark.parametrize("clamp", ["hold L0.W_K ideal", "add L0.W_K 2", "hold L0.W_K ledger from=2"])
def test_a_model_without_memories_is_refused_by_the_name_of_the_clamp(clamp: str) -> None:
    config = tiny(clamp, overrides=["model.n_layers=1"])
    with pytest.raises(BirthlensError, match=f"clamp '{config.training.clamps[0]}': .*simplified model"):
        Trainer(config, chain_of(config))


def test_engines_that_cannot_take_a_clamp_say_so() -> None:
    for engine in ("fused", "handwritten", "reference"):
        with pytest.raises(BirthlensError, match="the clamp 'pin L0H0 uniform' acts in the forward pass"):
            Trainer(tiny("pin L0H0 uniform", overrides=[f"training.engine={engine}"]), chain_of(tiny()))
    assert from_text("freeze L0.W_K until=50") == {"kind": "freeze", "matrix": "L0.W_K", "until": 50}
