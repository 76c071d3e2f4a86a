"""The same functions on models that birthlens did not make: GPT-2 and GPT-NeoX, saved here and loaded from disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import _GROUPED, _HIDDEN, ARCHITECTURES, D_VOCAB, saved
from transformer_lens.model_bridge import TransformerBridge

from birthlens.analysis.behaviour.attention import attention_table
from birthlens.analysis.behaviour.head_scores import scores_table, transfer_table
from birthlens.analysis.behaviour.head_weights import composition_table, weight_scores_table
from birthlens.analysis.interventions.ablation import ablation_table
from birthlens.analysis.interventions.corruptions import pair_of
from birthlens.analysis.interventions.edge_tables import edge_table
from birthlens.analysis.interventions.patching import patched_table, patching_table
from birthlens.analysis.interventions.runner import intervene
from birthlens.analysis.interventions.spec import AnyIntervention, Cases, EdgeIntervention, Intervention, frozen_norms
from birthlens.errors import BirthlensError
from birthlens.model.components import edges_of
from birthlens.model.hooked import load_pretrained
from birthlens.model.sites import Head, Logits, Mlp
from birthlens.tasks.positions import batch_of_tokens, repeated_tokens


@pytest.fixture(scope="module", params=["gpt2", "neox"])
def pretrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp(request.param)
    return saved(request.param, directory), load_pretrained(directory)


@pytest.fixture(scope="module")
def batch() -> Any:
    return repeated_tokens(5, 8, D_VOCAB, np.random.default_rng(0))


@pytest.fixture(scope="module")
def pair(batch: Any) -> Any:
    return pair_of(batch, repeated_tokens(5, 8, D_VOCAB, np.random.default_rng(1)))


def test_logits_are_those_of_the_model_on_disk(pretrained: Any, batch: Any) -> None:
    theirs, ours = pretrained
    with torch.no_grad():
        torch.testing.assert_close(ours(batch.tokens), theirs(batch.tokens).logits, atol=1e-5, rtol=1e-5)


def test_zero_ablation_of_a_head_equals_zeroed_output_weights(pretrained: Any, batch: Any) -> None:
    theirs, ours = pretrained
    table = ablation_table([(0, ours)], batch, heads="L1H1", methods=("zero",), metrics=("all.loss",), draws=0)
    width = ours.cfg.d_head
    kept = {name: value.clone() for name, value in theirs.state_dict().items()}
    try:
        if hasattr(theirs, "transformer"):
            theirs.transformer.h[1].attn.c_proj.weight.data[width:] = 0  # Conv1D: rows are inputs
        else:
            theirs.gpt_neox.layers[1].attention.dense.weight.data[:, width:] = 0
        with torch.no_grad():
            logits = theirs(batch.tokens).logits
    finally:
        theirs.load_state_dict(kept)
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.targets)
    assert table.loc[table["ablated"] == "L1H1", "value"].item() == pytest.approx(float(loss), abs=1e-5)
    assert abs(table.loc[table["ablated"] == "L1H1", "change"].item()) > 1e-4


def test_every_ablation_takes_effect(pretrained: Any, batch: Any) -> None:
    _, ours = pretrained
    reference = repeated_tokens(5, 8, D_VOCAB, np.random.default_rng(2))
    methods = ("zero", "mean", "resample", "uniform_pattern", "previous_token_pattern", "dropped_value")
    table = ablation_table(
        [(0, ours)], batch, reference, methods=methods, components=True, metrics=("all.loss",), draws=0
    )
    cut = table[table["ablated"] != "none"]
    assert len(cut) == 4 * 6 + 3 * (2 + (2 if ours.cfg.positional_embedding_type == "standard" else 1))
    # Another sequence's positions are the same ones; everything else must change something, or it was ignored.
    same = (cut["ablated"] == "pos_embed") & (cut["method"] == "resample")
    assert (cut.loc[~same, "change"].abs() > 1e-7).all() and (cut.loc[same, "change"].abs() < 1e-6).all()


def test_patching_and_edges_obey_their_laws(pretrained: Any, pair: Any) -> None:
    _, ours = pretrained
    everything = patching_table([(0, ours)], pair, ["resid_pre", "resid_post"], by=("head",), draws=0)
    np.testing.assert_allclose(everything["recovered"].iloc[[0, 3]], 1, atol=1e-3)
    edges = edges_of(ours.cfg, [Logits()])
    cases: Cases = {"logits": [EdgeIntervention(edge, "patch") for edge in edges]}
    assert patched_table(ours, pair, cases)["recovered"].item() == pytest.approx(1, abs=1e-3)
    for letter in "qkv":
        receiver = next(e.receiver for e in edges_of(ours.cfg) if str(e.receiver) == f"L1H1.{letter}")
        cases = {
            "edges": [EdgeIntervention(edge, "patch") for edge in edges_of(ours.cfg, [receiver])],
            "node": [Intervention(letter, "patch", heads=(Head(1, 1),))],
        }
        values = patched_table(ours, pair, cases)["value"]
        assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_frozen_norms_make_edges_into_the_logits_add_up(pretrained: Any, pair: Any) -> None:
    _, ours = pretrained
    norms, edges = frozen_norms(ours.cfg), edges_of(ours.cfg, [Logits()])
    cases: dict[str, Sequence[AnyIntervention]] = {
        str(edge): [EdgeIntervention(edge, "patch"), *norms] for edge in edges
    }
    cases["together"] = [*(EdgeIntervention(edge, "patch") for edge in edges), *norms]
    table = patched_table(ours, pair, cases)
    changes = (table["value"] - table["corrupted"]).to_numpy()
    assert changes[:-1].sum() == pytest.approx(changes[-1], abs=1e-3) and abs(changes[-1]) > 0.01


def test_attribution_is_exact_where_the_model_is_linear(pretrained: Any, pair: Any) -> None:
    _, ours = pretrained
    edges = [str(edge) for edge in edges_of(ours.cfg, [Logits()])]
    table = edge_table([(0, ours)], pair, edges, attribution_steps=(0,), freeze_norms=True)
    np.testing.assert_allclose(table["attribution_0"], table["recovered"], atol=1e-3)


def test_scores_and_transfer_take_the_model(pretrained: Any, batch: Any) -> None:
    _, ours = pretrained
    patterns = scores_table([(0, ours)], batch)
    assert set(patterns["head"]) == {"L0H0", "L0H1", "L1H0", "L1H1"} and patterns["value"].between(0, 1).all()
    transfer = transfer_table([(0, ours)], np.random.default_rng(0), n=4, length=8)
    assert set(transfer["score"]) == {"strict", "any_successor", "accuracy", "loss"}
    assert np.isfinite(attention_table([(0, ours)], batch)["value"]).sum() > 10
    assert len(composition_table([(0, ours)], np.random.default_rng(0), draws=3)) == 2 * 2 * 3
    weights = weight_scores_table([(0, ours)])
    assert ("previous_token" in set(weights["score"])) == (ours.cfg.positional_embedding_type == "standard")


def test_nothing_is_left_behind(pretrained: Any, batch: Any) -> None:
    _, ours = pretrained
    with torch.no_grad():
        before = ours(batch.tokens)
        edge = EdgeIntervention(edges_of(ours.cfg)[-1], "zero")
        with intervene(ours, [Intervention("pattern", "uniform", 0), edge], batch):
            changed = ours(batch.tokens)
        assert torch.equal(ours(batch.tokens), before) and not torch.allclose(before, changed)


def test_tokens_and_directories_that_do_not_fit(pretrained: Any, tmp_path: Path) -> None:
    _, ours = pretrained
    foreign = batch_of_tokens(torch.full((2, 6), D_VOCAB + 3))
    with pytest.raises(BirthlensError, match="vocabulary ends at 29"):
        ablation_table([(0, ours)], foreign, methods=("zero",))
    with pytest.raises(BirthlensError, match="not a directory with a Hugging Face model"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BirthlensError, match="has no weights"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["gptj", "bloom", "phi", "falcon"])
def test_edges_that_an_architecture_does_not_show_are_refused_by_its_name(
    name: str, pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3}
    monkeypatch.setitem(ARCHITECTURES, "falcon", ("Falcon", sizes))
    monkeypatch.setitem(
        ARCHITECTURES, "phi", ("Phi", {**sizes, "intermediate_size": 24, "max_position_embeddings": 24})
    )
    saved(name, tmp_path)
    model = load_pretrained(tmp_path)
    edge = next(edge for edge in edges_of(model.cfg) if isinstance(edge.receiver, Mlp))
    with pytest.raises(BirthlensError, match=r"(?i)site mlp_in of layer 0: .* no effect in this model \(" + name):
        patched_table(model, pair, {"edge": [EdgeIntervention(edge, "patch")]})


def test_models_that_transformer_lens_gets_wrong_or_cannot_run_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "stablelm", ("StableLm", {**_HIDDEN, **_GROUPED}))
    theirs = saved("stablelm", tmp_path)
    with pytest.raises(BirthlensError, match=rf"{tmp_path}' \(StableLmForCausalLM\) has other logits"):
        load_pretrained(tmp_path)

    def broken(*arguments: object, **settings: object) -> Any:
        raise RuntimeError("shape '[1, 4]' is invalid\nand more")

    for owner, said in ((type(theirs), "cannot be run"), (TransformerBridge, "cannot be run by TransformerLens")):
        with monkeypatch.context() as context, pytest.raises(BirthlensError, match=rf"\(StableLm.*\) {said}: shape"):
            context.setattr(owner, "forward", broken)
            load_pretrained(tmp_path)
