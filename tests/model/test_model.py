"""Models against an independent statement of the paper's equations, in its own (column vector) orientation."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from birthlens.analysis.memories.layer_norms import fold_layer_norms
from birthlens.config.model import ModelConfig, parameter_shapes, trained_by_default
from birthlens.errors import BirthlensError
from birthlens.model import forward
from birthlens.model.hooked import build, load_pretrained, parameters, weights_of
from birthlens.model.initialisation import initial_weights
from birthlens.model.sites import Head
from birthlens.model.weights import Weights, stacked

N, T = 11, 13
SIMPLIFIED = [
    {},
    {"feed_forward": "linear"},
    {"feed_forward": "relu", "d_mlp": 24},
    {"positions": "sinusoidal", "scaled_scores": False, "init": "scaled"},
    {"positions": "rotary"},
    {"positions": "rotary", "feed_forward": "linear", "n_layers": 3},
    {"init": "orthogonal"},
    {"n_layers": 1},
    {"n_layers": 3, "feed_forward": "linear"},
]
FULL = [
    {"family": "full", "n_heads": 4, "feed_forward": "relu"},
    {"family": "full", "n_heads": 2, "n_layers": 3},
    {"family": "full", "n_heads": 2, "n_layers": 1, "feed_forward": "gelu"},
    {"family": "full", "n_heads": 2, "attention": "relu"},
    {"family": "full", "n_heads": 4, "feed_forward": "relu", "positions": "rotary"},
    {"family": "full", "n_layers": 1, "attention": "linear", "scaled_scores": False},
    {"family": "full", "n_heads": 2, "n_layers": 3, "feed_forward": "relu", "feed_forward_layers": (0, 2)},
    {"family": "full", "n_heads": 2, "feed_forward": "relu", "block": "sequential"},
    {"family": "full", "feed_forward": "relu", "block": "sequential", "feed_forward_layers": (1,), "attention": "relu"},
    {"family": "full", "n_heads": 2, "n_layers": 3, "positions": "rotary"},
    {"family": "full", "positions": "rotary", "attention": "linear"},
    {"family": "full", "n_heads": 2, "positions": "relative", "feed_forward": "relu"},
    {"family": "full", "n_layers": 1, "positions": "relative", "attention": "relu", "scaled_scores": False},
]
TIED = {"family": "full", "n_heads": 2, "n_layers": 1, "feed_forward": "gelu", "unembedding": "tied"}
ids = lambda kw: ",".join(f"{k}={v}" for k, v in kw.items()) or "plain"  # noqa: E731


def drawn(kw: dict[str, Any], dtype: type[Any] = np.float64, seed: int = 0) -> Weights:
    """Weights of a config with d_model = 16, every entry moved off its initial value so that nothing is zero."""
    config = ModelConfig(d_model=16, **kw)
    rng = np.random.default_rng(seed)
    weights = initial_weights(config, N, T, rng, dtype)
    own = [n for n in weights if not (config.tied and n == "W_U")]
    return weights.replaced({n: (weights[n] + 0.1 * rng.standard_normal(weights[n].shape)).astype(dtype) for n in own})


def papers_model(p: dict[str, torch.Tensor], config: ModelConfig, tokens: torch.Tensor) -> torch.Tensor:
    """The paper's section 4.2 (and 3.2) one position at a time: matrices act from the left on column vectors."""
    d, heads = config.d_model, config.n_heads
    width = d // heads
    full = config.family == "full"
    scale = 1 / math.sqrt(width) if config.scaled_scores else 1.0

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean()
        return centred / torch.sqrt((centred**2).mean() + 1e-5) * p[f"{name}.w"] + p[f"{name}.b"]

    def rotate(v: torch.Tensor, t: int) -> torch.Tensor:
        out = v.clone()
        for i in range(0, len(v), 2):
            angle = t / 10000 ** (i / len(v))
            c, s = math.cos(angle), math.sin(angle)
            out[i], out[i + 1] = c * v[i] - s * v[i + 1], s * v[i] + c * v[i + 1]
        return out

    out = []
    for sequence in tokens:
        xs = [p["W_E"][z] + (p["W_pos"][t] if "W_pos" in p else 0) for t, z in enumerate(sequence)]
        for layer in range(config.n_layers):
            read = [norm(x, f"L{layer}.ln1") for x in xs] if full else xs
            new = []
            for t in range(len(xs)):
                y = xs[t].clone()
                for h in range(heads):
                    W = {name: p[f"L{layer}.W_{name}"][h].T for name in "QKVO"}
                    bias = {name: p[f"L{layer}.b_{name}"][h] if full else 0 for name in "QKV"}
                    q = W["Q"] @ read[t] + bias["Q"]
                    keys = [W["K"] @ read[s] + bias["K"] for s in range(t + 1)]
                    if config.positions == "rotary" and (full or layer == 0):
                        q, keys = rotate(q, t), [rotate(k, s) for s, k in enumerate(keys)]
                    if config.positions == "relative":
                        keys = [k + p[f"L{layer}.W_R"][h, t - s] for s, k in enumerate(keys)]
                    scores = torch.stack([scale * (q @ k) for k in keys])
                    attention = {
                        "softmax": lambda s: torch.softmax(s, 0),
                        "relu": lambda s: torch.where(s > 0, s, 0 * s) / len(s),
                        "linear": lambda s: s / len(s),
                    }[config.attention](scores)
                    values = torch.stack([W["V"] @ read[s] + bias["V"] for s in range(t + 1)])
                    y = y + W["O"] @ (values.T @ attention)
                if full:
                    y = y + p[f"L{layer}.b_O"]
                if f"L{layer}.W_F" in p:
                    y = y + p[f"L{layer}.W_F"].T @ y
                if f"L{layer}.W_in" in p:
                    before = xs[t] if config.block == "parallel" else y
                    inner = norm(before, f"L{layer}.ln2") if full else y
                    hidden = p[f"L{layer}.W_in"].T @ inner + (p[f"L{layer}.b_in"] if full else 0)
                    normal = (1 + torch.erf(hidden / math.sqrt(2))) / 2
                    active = hidden * normal if config.feed_forward == "gelu" else torch.relu(hidden)
                    y = y + p[f"L{layer}.W_out"].T @ active + (p[f"L{layer}.b_out"] if full else 0)
                new.append(y)
            xs = new
        final = [norm(x, "ln_final") for x in xs] if full else xs
        out.append(torch.stack([p["W_U"].T @ x + (p["b_U"] if full else 0) for x in final]))
    return torch.stack(out)


@pytest.mark.parametrize("kw", SIMPLIFIED + FULL, ids=ids)
def test_logits_and_gradients_equal_the_papers_equations(kw: dict[str, Any]) -> None:
    weights = drawn(kw)
    config = weights.config
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, N, (2, 7)))
    mine = {name: torch.from_numpy(weights[name].copy()).requires_grad_() for name in weights}
    expected = papers_model(mine, config, tokens)
    expected.logsumexp(-1).sum().backward()

    model = build(weights, list(weights), n_ctx=T, dtype=torch.float64)
    hooked = model(tokens)
    hooked.logsumexp(-1).sum().backward()
    torch.testing.assert_close(hooked, expected, rtol=1e-10, atol=1e-10)

    tensors = {name: tensor.detach().clone().requires_grad_() for name, tensor in mine.items()}
    fast = forward.logits(tensors, config, tokens)
    fast.logsumexp(-1).sum().backward()
    torch.testing.assert_close(fast, expected, rtol=1e-10, atol=1e-10)

    for name, live in parameters(model, config).items():
        torch.testing.assert_close(live.grad, mine[name].grad, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(tensors[name].grad, mine[name].grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kw", SIMPLIFIED + FULL, ids=ids)
def test_patterns_equal_the_hooked_ones(kw: dict[str, Any]) -> None:
    weights = drawn(kw, np.float32)
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, N, (3, T)))
    _, cache = build(weights, n_ctx=T).run_with_cache(tokens)
    found = forward.activations(forward.tensors_of(weights), weights.config, tokens)
    for layer, pattern in enumerate(found.patterns):
        torch.testing.assert_close(pattern, cache["pattern", layer], rtol=1e-5, atol=1e-6)
    plain = forward.logits(forward.tensors_of(weights), weights.config, tokens)
    torch.testing.assert_close(found.logits, plain, rtol=1e-4, atol=1e-5)
    mask = torch.from_numpy(np.random.default_rng(2).random((3, T)) < 0.4)
    some = forward.logits_at(forward.tensors_of(weights), weights.config, tokens, mask)
    torch.testing.assert_close(some, plain[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kw", [*SIMPLIFIED, *FULL, TIED], ids=ids)
def test_weights_go_through_a_model_bit_for_bit(kw: dict[str, Any]) -> None:
    weights = drawn(kw, np.float32)
    back = weights_of(build(weights, n_ctx=T), weights.config)
    assert all(np.array_equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize("kw", SIMPLIFIED + FULL, ids=ids)
def test_only_the_chosen_parameters_move(kw: dict[str, Any]) -> None:
    weights = drawn(kw, np.float32)
    trained = trained_by_default(weights.config)
    model = build(weights, trained, n_ctx=T)
    moving = {name for name, tensor in parameters(model, weights.config).items() if tensor.requires_grad}
    assert moving == set(trained)
    assert sum(tensor.requires_grad for tensor in model.parameters()) == len(trained)


def test_a_tied_unembedding_is_the_embedding_with_the_gradients_of_both() -> None:
    weights = drawn(TIED)
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, N, (2, 7)))
    mine = {name: torch.from_numpy(weights[name].copy()).requires_grad_() for name in weights if name != "W_U"}
    expected = papers_model({**mine, "W_U": mine["W_E"].T}, weights.config, tokens)
    expected.logsumexp(-1).sum().backward()

    model = build(weights, mine, dtype=torch.float64)
    assert {"unembed.W_U", "unembed.b_U"} & {name for name, _ in model.named_parameters()} == {"unembed.b_U"}
    tensors = {name: tensor.detach().clone().requires_grad_() for name, tensor in mine.items()}
    live = parameters(model, weights.config)
    for logits, leaves in ((model(tokens), live), (forward.logits(tensors, weights.config, tokens), tensors)):
        logits.logsumexp(-1).sum().backward()
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
        for name in mine:
            torch.testing.assert_close(leaves[name].grad, mine[name].grad, rtol=1e-9, atol=1e-10)

    with torch.no_grad():
        live["W_E"].add_(1)
    moved = weights_of(model, weights.config)
    assert np.array_equal(moved["W_U"], weights["W_E"].T + 1) and np.array_equal(model.W_U.detach(), moved["W_U"])
    still = build(weights, dtype=torch.float64)
    torch.testing.assert_close(still(tokens), expected.detach(), rtol=1e-10, atol=1e-10)


def test_tied_weights_stay_tied() -> None:
    weights = drawn(TIED)
    turned = weights.replaced({"W_E": -weights["W_E"]})
    assert np.array_equal(turned["W_U"], -weights["W_U"])
    assert np.array_equal(stacked([weights, turned])["W_U"][1], turned["W_U"])
    for wrong in ({"W_U": -weights["W_U"]}, {"W_E": -weights["W_E"], "W_U": weights["W_U"]}):
        with pytest.raises(BirthlensError, match="W_U is W_E transposed; give W_E alone"):
            weights.replaced(wrong)
    with pytest.raises(BirthlensError, match="name W_E"):
        build(weights, ["W_U"])
    folded = fold_layer_norms(weights)
    assert folded.config.unembedding == "own" and not np.array_equal(folded["W_U"], folded["W_E"].T)


def test_the_cache_holds_the_feed_forward() -> None:
    weights = drawn({"feed_forward": "linear"}, np.float32)
    tokens = torch.arange(5)[None]
    _, cache = build(weights).run_with_cache(tokens)
    assert not cache["mlp_out", 0].any()
    expected = cache["resid_mid", 1] @ torch.from_numpy(weights["L1.W_F"])
    torch.testing.assert_close(cache["mlp_out", 1], expected)
    torch.testing.assert_close(cache["resid_post", 1], cache["resid_mid", 1] + cache["mlp_out", 1])


def test_building_leaves_global_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    numpy_before = np.random.get_state(legacy=False)["state"]["key"].copy()  # noqa: NPY002
    build(drawn({}, np.float32))
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state(legacy=False)["state"]["key"])  # noqa: NPY002


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 100),
    st.sampled_from(["authors", "scaled"]),
    st.sampled_from([8, 64]),
    st.sampled_from(["none", "relu"]),
)
def test_the_authors_initialisation_has_their_scales(seed: int, init: Any, d: int, feed_forward: Any) -> None:
    config = ModelConfig(d_model=d, init=init, feed_forward=feed_forward)
    weights = initial_weights(config, 65, 64, np.random.default_rng(seed))
    size = math.sqrt(np.square(weights["W_E"]).mean()) * (math.sqrt(d) if init == "scaled" else 1)
    assert abs(size - 1) < 0.15
    for name in ("L0.W_K", "L0.W_V", "L0.W_O", "L1.W_V", "L1.W_O", "W_U"):
        assert np.abs(weights[name]).max() <= 1 / math.sqrt(d)
        # The mean of n squares of a uniform variable has relative variance 0.8 / n; six standard deviations.
        assert abs(np.square(weights[name]).mean() * 3 * d - 1) < 6 * math.sqrt(0.8 / weights[name].size)
    assert np.array_equal(weights["L1.W_Q"][0], np.eye(d))
    assert {name: w.shape for name, w in weights.items()} == parameter_shapes(config, 65, 64)


def test_orthogonal_codebooks_are_jointly_orthogonal_where_they_fit() -> None:
    config = ModelConfig(d_model=64, init="orthogonal")
    weights = initial_weights(config, 12, 20, np.random.default_rng(0), np.float64)
    remapped = weights["W_E"] @ weights.ov(Head(0, 0))
    families = [weights["W_E"], weights["W_pos"], remapped, weights["W_U"].T]
    unit = np.concatenate([family / np.linalg.norm(family, axis=1, keepdims=True) for family in families])
    np.testing.assert_allclose(unit @ unit.T, np.eye(len(unit)), atol=1e-10)
    usual = initial_weights(ModelConfig(d_model=64), 12, 20, np.random.default_rng(0))
    for name in ("W_E", "W_pos", "W_U"):
        assert abs(np.linalg.norm(weights[name]) / np.linalg.norm(usual[name]) - 1) < 0.1


def test_orthogonal_codebooks_keep_apart_what_d_model_allows() -> None:
    weights = initial_weights(ModelConfig(d_model=32, init="orthogonal"), 12, 64, np.random.default_rng(0), np.float64)
    np.testing.assert_allclose(weights["W_E"] @ weights["W_E"].T, 32 * np.eye(12), atol=1e-9)
    np.testing.assert_allclose(weights["W_E"] @ weights["W_pos"].T, 0, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(weights["W_pos"], axis=1), math.sqrt(32))


def test_errors_say_what_is_valid() -> None:
    weights = drawn({}, np.float32)
    with pytest.raises(BirthlensError, match=r"L2H0.*L0H0, L1H0"):
        weights.qk(Head(2, 0))
    with pytest.raises(BirthlensError, match=r"missing \['W_U'\]"):
        Weights(weights.config, {name: weights[name] for name in weights if name != "W_U"})
    with pytest.raises(BirthlensError, match="W_X"):
        build(weights, ["W_X"])


@pytest.mark.parametrize(
    ("config", "file", "said"),
    [
        ('{"model_type": "gpt2"}', "pytorch_model.bin", "convert it to safetensors"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "evil.Evil"}}', "model.safetensors", "birthlens runs none"),
        ("[" * 100_000, "model.safetensors", "levels deep"),
    ],
)
def test_a_directory_whose_loading_would_run_code_is_refused(tmp_path: Path, config: str, file: str, said: str) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / file).write_bytes(b"junk")
    with pytest.raises(BirthlensError, match=said):
        load_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()
