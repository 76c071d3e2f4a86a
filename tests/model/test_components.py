"""Models of other builds: shared keys and values, and positions that never enter the residual stream."""

from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch

from birthlens.analysis.interventions.ablation import ablation_table
from birthlens.analysis.interventions.corruptions import Pair, pair_of
from birthlens.analysis.interventions.edge_tables import edge_table
from birthlens.analysis.interventions.patching import patched_table, patching_table
from birthlens.analysis.interventions.spec import EdgeIntervention, Intervention
from birthlens.config.model import ModelConfig
from birthlens.errors import BirthlensError
from birthlens.model.components import edges_of, has_positions, heads_at
from birthlens.model.hooked import HookedTransformer, HookedTransformerConfig
from birthlens.model.sites import Head, Logits
from birthlens.tasks.positions import repeated_tokens

SHAPE = {"n_layers": 2, "d_model": 16, "n_ctx": 16, "d_head": 4, "n_heads": 4, "d_vocab": 9, "attn_only": True,
         "normalization_type": None, "init_weights": False, "device": "cpu"}  # fmt: skip
needs_3_9 = pytest.mark.skipif(
    int(version("transformer-lens").split(".")[0]) >= 4, reason="only TransformerLens 3.9 builds such models"
)


def model(**fields: Any) -> HookedTransformer:
    model = HookedTransformer(HookedTransformerConfig(**SHAPE, **fields))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def grouped() -> HookedTransformer:
    return model(n_key_value_heads=2, positional_embedding_type="standard")


@pytest.fixture(scope="module")
def pair() -> Pair:
    generator = np.random.default_rng(0)
    return pair_of(repeated_tokens(5, 6, 9, generator), repeated_tokens(5, 6, 9, generator))


@needs_3_9
def test_grouped_queries_share_keys_and_values(grouped: HookedTransformer, pair: Pair) -> None:
    assert [heads_at(grouped.cfg, site) for site in ("q", "k", "v", "z", "pattern")] == [4, 2, 2, 4, 4]
    table = patching_table([(0, grouped)], pair, ["k", "q", "pattern"], draws=0)
    counts = table.groupby("site")["head"].nunique()
    assert counts.to_dict() == {"k": 2 * 2, "q": 2 * 4, "pattern": 2 * 4}
    cut = ablation_table([(0, grouped)], pair.clean, pair.corrupted, metrics=("all.loss",), draws=0)
    assert cut["ablated"].nunique() == 1 + 8 and np.isfinite(cut["value"]).all()
    for build in (lambda: ablation_table([(0, grouped)], pair.clean, pair.corrupted, methods=("dropped_value",)),
                  lambda: edge_table([(0, grouped)], pair, ["embed->L1H3.k"])):  # fmt: skip
        with pytest.raises(BirthlensError, match=r"at site [kv], whose heads are shared; valid heads are L0H0"):
            build()


@needs_3_9
def test_edges_into_a_shared_key_make_it_the_sources(grouped: HookedTransformer, pair: Pair) -> None:
    edges = edges_of(grouped.cfg)
    assert len({str(edge.receiver) for edge in edges}) == 2 * (4 + 2 + 2) + 1
    for letter in "qkv":
        receiver = next(edge.receiver for edge in edges if str(edge.receiver) == f"L1H1.{letter}")
        cases: dict[str, list[Intervention | EdgeIntervention]] = {
            "edges": [EdgeIntervention(edge, "patch") for edge in edges_of(grouped.cfg, [receiver])],
            "node": [Intervention(letter, "patch", heads=(Head(1, 1),))],
        }
        values = patched_table(grouped, pair, cases)["value"]
        assert values[0] == pytest.approx(values[1], abs=1e-4)


@pytest.mark.parametrize(
    "kind", [pytest.param("alibi", marks=needs_3_9), "rotary", pytest.param("shortformer", marks=needs_3_9)]
)
def test_positions_that_act_on_attention_are_no_sender(kind: str, pair: Pair) -> None:
    other = model(
        positional_embedding_type=kind, **({"rotary_dim": 4, "rotary_adjacent_pairs": True} if kind == "rotary" else {})
    )
    assert not has_positions(other.cfg) and all(str(edge.sender) != "pos_embed" for edge in edges_of(other.cfg))
    table = ablation_table(
        [(0, other)], pair.clean, pair.corrupted, methods=("zero",), components=True, metrics=("all.loss",), draws=0
    )
    assert "embed" in set(table["ablated"]) and "pos_embed" not in set(table["ablated"])
    edges = [str(edge) for edge in edges_of(other.cfg, [Logits()])]
    found = edge_table([(0, other)], pair, edges, attribution_steps=(0, 2))
    np.testing.assert_allclose(found["attribution_0"], found["recovered"], atol=1e-3)
    with pytest.raises(BirthlensError, match="adds no positions to its input"):
        patching_table([(0, other)], pair, ["pos_embed"])


def test_both_kinds_of_config_are_read() -> None:
    assert has_positions(ModelConfig()) and has_positions(ModelConfig(positions="sinusoidal"))
    assert not has_positions(ModelConfig(positions="rotary")) and heads_at(ModelConfig(), "k") == 1
