"""Sink measures against plain loops over the activations of a HookedTransformer."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from birthlens.analysis.behaviour.sinks import sink_table
from birthlens.config.model import ModelConfig
from birthlens.config.run import RunConfig
from birthlens.errors import BirthlensError
from birthlens.model.hooked import build
from birthlens.model.initialisation import initial_weights
from birthlens.tasks.kinds import chain_of, task_of
from birthlens.tasks.positions import batch_of_tokens


def test_every_measure_equals_a_plain_loop() -> None:
    config = RunConfig.parse(
        {}, ["corpus.source=markov", "corpus.vocabulary=9", "task.n_triggers=2", "task.context=10"]
    )
    batch = task_of(config.task, chain_of(config)).batch(6, 0, 0)
    model = ModelConfig(family="full", d_model=8, n_layers=2, n_heads=2, feed_forward="relu")
    weights = initial_weights(model, 9, 10, np.random.default_rng(0))
    hooked = build(weights)
    with torch.no_grad():
        _, cache = hooked.run_with_cache(batch.tokens)
    expected: dict[tuple[object, ...], list[float]] = {}
    for layer in range(2):
        for b in range(len(batch)):
            for group in ("in_context", "other"):
                positions = [t for t in range(1, 10) if bool(batch.in_context[b, t]) == (group == "in_context")]
                residual = cache[f"blocks.{layer}.hook_resid_pre"][b].norm(dim=-1).tolist()
                if positions:
                    mean = sum(residual[t] for t in positions) / len(positions)
                    expected.setdefault((layer, None, "residual_ratio", group), []).append(residual[0] / mean)
                for h in range(2):
                    pattern = cache[f"blocks.{layer}.attn.hook_pattern"][b, h].tolist()
                    q = cache[f"blocks.{layer}.attn.hook_q"][b, :, h]
                    k = cache[f"blocks.{layer}.attn.hook_k"][b, :, h]
                    v = cache[f"blocks.{layer}.attn.hook_v"][b, :, h].norm(dim=-1).tolist()
                    key = (layer, f"L{layer}H{h}")
                    for t in positions:
                        scores = [float(q[t] @ k[s]) / math.sqrt(4) for s in range(t + 1)]
                        logit = scores[0] - sum(scores[1:]) / t
                        expected.setdefault((*key, "attention_to_first", group), []).append(pattern[t][0])
                        expected.setdefault((*key, "attention_to_previous", group), []).append(pattern[t][t - 1])
                        expected.setdefault((*key, "sink_logit", group), []).append(logit)
                    if positions:
                        mean = sum(v[t] for t in positions) / len(positions)
                        expected.setdefault((*key, "first_value", group), []).append(v[0])
                        expected.setdefault((*key, "value_ratio", group), []).append(v[0] / mean)
    found = sink_table([(3, weights)], batch, chunk=4)
    assert set(found["step"]) == {3} and len(found) == len(expected)
    for row in found.to_dict("records"):
        head = row["head"] if isinstance(row["head"], str) else None
        wanted = expected[row["layer"], head, row["measure"], row["group"]]
        assert row["n"] == len(wanted)
        assert row["value"] == pytest.approx(np.mean(wanted), rel=1e-4, abs=1e-6), row


@pytest.mark.parametrize("option", [{"positions": "relative"}, {"positions": "rotary"}, {"scaled_scores": False}])
def test_sink_logits_are_of_the_models_own_scores(option: dict[str, Any]) -> None:
    weights = initial_weights(
        ModelConfig(family="full", d_model=8, n_layers=1, **option), 5, 6, np.random.default_rng(0)
    )
    batch = batch_of_tokens(torch.randint(5, (3, 7), generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        _, cache = build(weights, n_ctx=6).run_with_cache(batch.tokens)
    scores = cache["blocks.0.attn.hook_attn_scores"][:, 0].tolist()
    other = ~batch.in_context
    expected = [
        row[t][0] - sum(row[t][1 : t + 1]) / t for b, row in enumerate(scores) for t in range(1, 6) if other[b, t]
    ]
    table = sink_table([(0, weights)], batch)
    found = table[(table["measure"] == "sink_logit") & (table["group"] == "other")]
    assert found["value"].item() == pytest.approx(np.mean(expected), rel=1e-4)


def test_one_position_has_no_sink() -> None:
    weights = initial_weights(ModelConfig(d_model=8), 5, 4, np.random.default_rng(0))
    with pytest.raises(BirthlensError, match="at least two"):
        sink_table([(0, weights)], batch_of_tokens(torch.zeros(2, 1, dtype=torch.long)))
