"""Exact splits of scores and logits against TransformerLens's own numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from birthlens.analysis.behaviour.decomposition import decompose, logit_split_table, score_split_table
from birthlens.config.model import ModelConfig
from birthlens.errors import BirthlensError
from birthlens.model.hooked import build
from birthlens.model.initialisation import initial_weights
from birthlens.model.sites import Head, hook_name
from birthlens.model.weights import Weights

MODELS: dict[str, dict[str, Any]] = {
    "simplified": {},
    "unscaled, linear feed-forward": {"feed_forward": "linear", "scaled_scores": False},
    "relu feed-forward": {"feed_forward": "relu"},
    "three layers": {"n_layers": 3},
    "full": {"family": "full", "n_heads": 2, "feed_forward": "relu"},
    "full, attention only": {"family": "full", "n_heads": 2, "n_layers": 3},
    "full, rectified, in sequence": {
        "family": "full",
        "feed_forward": "gelu",
        "feed_forward_layers": (0,),
        "block": "sequential",
        "attention": "relu",
    },
}


def model_of(name: str) -> tuple[Weights, list[int], dict[str, np.ndarray]]:
    generator = np.random.default_rng(3)
    weights = initial_weights(ModelConfig(**{"d_model": 16, **MODELS[name]}), 7, 10, generator)
    # Off the initial zeros and ones of biases and gains, in float64 throughout.
    moved = {
        n: weights[n] + 0.2 * generator.standard_normal(weights[n].shape) for n in weights if not n.endswith("W_Q")
    }
    weights = weights.replaced({n: weights[n].astype(np.float64) for n in weights} | moved)
    sequence = generator.integers(7, size=9).tolist()
    model = build(weights, dtype=torch.float64)
    with torch.no_grad():
        logits, cache = model.run_with_cache(torch.tensor([sequence]))
    found = {"logits": logits[0].numpy()}
    for head in weights.heads:
        for site in ("attn_scores", "pattern"):
            found[f"{head}.{site}"] = cache[hook_name(site, head.layer)][0, head.head].numpy()
    return weights, sequence, found


@pytest.mark.parametrize("name", MODELS)
def test_scores_patterns_and_logits_are_the_models(name: str) -> None:
    weights, sequence, found = model_of(name)
    traced = decompose(weights, sequence)
    np.testing.assert_allclose(traced.logits, found["logits"], rtol=1e-9, atol=1e-10)
    causal = np.tri(len(sequence), dtype=bool)
    for head in weights.heads:
        np.testing.assert_allclose(
            traced.scores[head][causal], found[f"{head}.attn_scores"][causal], rtol=1e-8, atol=1e-9
        )
        np.testing.assert_allclose(traced.patterns[head], found[f"{head}.pattern"], atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("split", [{}, {"paths": True}, {"sources": True}])
def test_score_splits_sum_to_the_models_score(name: str, split: dict[str, bool]) -> None:
    weights, sequence, found = model_of(name)
    for head in weights.heads:
        for query, key in [(8, 5), (3, 3), (0, 0)]:
            table = score_split_table(weights, sequence, head, query, key, **split)
            assert table["value"].sum() == pytest.approx(found[f"{head}.attn_scores"][query, key], rel=1e-8, abs=1e-9)
            assert not table.duplicated(["query", "key"]).any()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("paths", [True, False])
def test_logit_splits_sum_to_the_models_logit(name: str, paths: bool) -> None:
    weights, sequence, found = model_of(name)
    for pos, token in [(8, 2), (0, 6)]:
        table = logit_split_table(weights, sequence, pos, token, paths)
        assert table["value"].sum() == pytest.approx(found["logits"][pos, token], rel=1e-8, abs=1e-9)
        centred = found["logits"][pos, token] - found["logits"][pos].mean()
        assert table["centred"].sum() == pytest.approx(centred, rel=1e-8, abs=1e-9)


def test_terms_are_what_they_say() -> None:
    weights, z, _ = model_of("simplified")
    head, scale = Head(1, 0), weights.score_scale
    traced = decompose(weights, z)
    table = score_split_table(weights, z, head, 8, 5, sources=True).set_index(["query", "key"])["value"]
    e, p, qk = weights["W_E"], weights["W_pos"], weights.qk(head)
    assert table["W_E", "W_E"] == pytest.approx(scale * e[z[8]] @ qk @ e[z[5]])
    assert table["W_pos", "W_E"] == pytest.approx(scale * p[8] @ qk @ e[z[5]])
    # The induction term: the query's token against what layer 0 copied to the key from the position before it.
    copied = traced.patterns[Head(0, 0)][5, 4] * (e[z[4]] + p[4]) @ weights.ov(Head(0, 0))
    assert table["W_E", "L0H0 @ 4"] == pytest.approx(scale * e[z[8]] @ qk @ copied)
    assert len(table) == (2 + 9) * (2 + 6)
    paths = logit_split_table(weights, z, 8, 2).set_index("path")["value"]
    through = (
        traced.patterns[head][8] @ (traced.patterns[Head(0, 0)] @ e[z] @ weights.ov(Head(0, 0))) @ weights.ov(head)
    )
    assert paths["W_E > L0H0 > L1H0"] == pytest.approx(through @ weights["W_U"][:, 2])
    assert len(paths) == 2 * 2 * 2


def test_bad_questions_are_named() -> None:
    weights, z, _ = model_of("simplified")
    with pytest.raises(BirthlensError, match="0 <= key_pos <= query_pos < 9"):
        score_split_table(weights, z, Head(1, 0), 3, 5)
    with pytest.raises(BirthlensError, match="head = L4H0"):
        score_split_table(weights, z, Head(4, 0), 5, 3)
    with pytest.raises(BirthlensError, match="choose one"):
        score_split_table(weights, z, Head(1, 0), 5, 3, paths=True, sources=True)
    with pytest.raises(BirthlensError, match="0 <= token < 7"):
        logit_split_table(weights, z, 3, 7)
    with pytest.raises(BirthlensError, match="1 to 10 tokens from 0 to 6"):
        decompose(weights, [0, 9])
    rotary = initial_weights(ModelConfig(d_model=8, positions="rotary"), 5, 4, np.random.default_rng(0))
    with pytest.raises(BirthlensError, match="rotary"):
        decompose(rotary, [0, 1])
    deep = initial_weights(ModelConfig(d_model=8, n_layers=6, n_heads=4, family="full"), 5, 4, np.random.default_rng(0))
    with pytest.raises(BirthlensError, match="paths=False"):
        decompose(deep, [0, 1], paths=True)
