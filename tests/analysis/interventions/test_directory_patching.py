"""Parts of one model directory in another: all of them are the other model, one is what copying it by hand gives."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import D_VOCAB, saved

from birthlens.analysis.interventions.directory_patching import directory_patching_table, part_of
from birthlens.errors import BirthlensError
from birthlens.model.directory import load_causal
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.positions import repeated_tokens

ATTENTION = {
    "gpt2": r"transformer\.h\.1\.attn\.", "neox": r"gpt_neox\.layers\.1\.attention\.", "opt": r"layers\.1\.self_attn\.",
    "llama": r"model\.layers\.1\.self_attn\.",
}  # fmt: skip
"""The tensors of the attention of layer 1, as each architecture names them."""


@pytest.fixture(scope="module")
def batch() -> TokenBatch:
    return repeated_tokens(4, 6, D_VOCAB, np.random.default_rng(0))


def loss_of(directory: Path, batch: TokenBatch) -> float:
    with torch.no_grad():
        logits = load_causal(directory)(batch.tokens).logits
    where = batch.occurrence == 2
    return float(torch.nn.functional.cross_entropy(logits[where], batch.targets[where]))


@pytest.mark.parametrize("name", ATTENTION)
def test_parts_move_as_by_hand(name: str, batch: TokenBatch, tmp_path: Path) -> None:
    places = {step: tmp_path / str(step) for step in (0, 5)}
    for step, place in places.items():
        saved(name, place, seed=step)
    names = [key for key, _ in load_causal(places[0]).named_parameters()]
    everything = "+".join(dict.fromkeys(map(part_of, names)))
    table = directory_patching_table(places, batch, [everything, "L1.attention"], [0, 5], [0])
    rows: Any = table[table["metric"] == "in_context_loss"].set_index(["matrix", "from_step"])["value"]
    assert rows[everything, 0] == pytest.approx(loss_of(places[0], batch), abs=1e-5)
    assert rows[everything, 5] == pytest.approx(loss_of(places[5], batch), abs=1e-5)
    own, donor = (load_file(place / "model.safetensors") for place in places.values())
    moved = [key for key in own if re.search(ATTENTION[name], key)]
    assert moved
    save_file(own | {key: donor[key] for key in moved}, places[0] / "model.safetensors", {"format": "pt"})
    assert rows["L1.attention", 5] == pytest.approx(loss_of(places[0], batch), abs=1e-5)
    assert abs(rows["L1.attention", 5] - rows["L1.attention", 0]) > 1e-3
    assert (table.loc[table["from_step"] == 0, "change"] == 0).all() and (table["to_step"] == 0).all()


def test_unknown_parts_and_unlike_shapes_are_one_sentence(batch: TokenBatch, tmp_path: Path) -> None:
    places = {0: tmp_path / "a", 1: tmp_path / "b"}
    saved("neox", places[0])
    saved("neox", places[1], hidden_size=8)
    with pytest.raises(
        BirthlensError, match=r"matrices = 'L2.mlp': the model's parts are embeddings, L0\.norms, L0\.att"
    ):
        directory_patching_table(places, batch, ["L0.mlp+L2.mlp"])
    with pytest.raises(BirthlensError, match=r"b and .*a differ in the shape of"):
        directory_patching_table(places, batch)
    with pytest.raises(BirthlensError, match=r"to_steps = \[7\]"):
        directory_patching_table(places, batch, to_steps=[7])
