"""Memories of heads of models from directories equal full dense products of the files' own tensors."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file
from tiny_models import D_VOCAB, saved

from birthlens.analysis.behaviour import real_memories
from birthlens.analysis.behaviour.real_memories import real_memories_table
from birthlens.errors import BirthlensError
from birthlens.model.hooked import load_pretrained
from birthlens.model.sites import Head

Array = np.ndarray
HEADS = [Head(0, 1), Head(1, 0)]


def of_file(name: str, file: Path) -> dict[str, Any]:
    """Name the tensors of HEADS in a file: embeddings e, u, p; q, k, v, o and the gain g of each head; if norms centre."""
    t = {key: value.astype(np.float64) for key, value in load_file(file).items()}
    if name == "gpt2":
        out: dict[str, Any] = {"e": t["transformer.wte.weight"], "u": t["transformer.wte.weight"], "centred": True}
        out |= {"p": t["transformer.wpe.weight"], "final": t["transformer.ln_f.weight"]}
        for head in HEADS:
            at, one = f"transformer.h.{head.layer}", slice(8 * head.head, 8 * head.head + 8)
            q, k, v = np.split(t[f"{at}.attn.c_attn.weight"], 3, axis=1)
            parts = (q[:, one], k[:, one], v[:, one], t[f"{at}.attn.c_proj.weight"][one], t[f"{at}.ln_1.weight"])
            out[str(head)] = dict(zip("qkvog", parts, strict=True))
        return out
    out = {"e": t["model.embed_tokens.weight"], "u": t["lm_head.weight"], "centred": False, "p": None}
    out["final"] = t["model.norm.weight"]
    for head in HEADS:  # four heads of width 4, whose keys and values are shared by two
        at, one = f"model.layers.{head.layer}", slice(4 * head.head, 4 * head.head + 4)
        two = slice(4 * (head.head // 2), 4 * (head.head // 2) + 4)
        q, k, v, o = (t[f"{at}.self_attn.{letter}_proj.weight"] for letter in "qkvo")
        parts = (q[one].T, k[two].T, v[two].T, o[:, one].T, t[f"{at}.input_layernorm.weight"])
        out[str(head)] = dict(zip("qkvog", parts, strict=True))
    return out


def dense(of: dict[str, Any], fold: bool) -> dict[tuple[str, str | None, str], Array]:
    """Multiply everything out."""

    def folded(states: Array, gain: Array) -> Array:
        if not fold:
            return states
        width = states.shape[1]
        centre = np.eye(width) - np.full((width, width), 1 / width) if of["centred"] else np.eye(width)
        return np.asarray(states @ centre @ np.diag(gain))

    tables: dict[tuple[str, str | None, str], Array] = {}
    first, second = str(HEADS[0]), str(HEADS[1])
    for head in (first, second):
        w = of[head]
        centre = np.eye(16) - np.full((16, 16), 1 / 16) if fold and of["centred"] else np.eye(16)
        readout = centre @ np.diag(of["final"] if fold else np.ones(16)) @ of["u"].T
        tables[head, None, "OV"] = folded(of["e"], w["g"]) @ w["v"] @ w["o"] @ readout
        if of["p"] is not None:
            states = folded(of["p"], w["g"])
            scores = states @ w["q"] @ w["k"].T @ states.T
            tables[head, None, "positions"] = np.where(np.tri(len(scores)) > 0, scores, -np.inf)
    written = folded(of["e"], of[first]["g"]) @ of[first]["v"] @ of[first]["o"]
    w = of[second]
    tables[second, first, "QK"] = folded(of["e"], w["g"]) @ w["q"] @ w["k"].T @ folded(written, w["g"]).T
    return tables


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_recalls_and_strongest_entries_are_those_of_the_dense_product(
    name: str, fold: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = saved(name, tmp_path)
    for key, value in theirs.named_parameters():
        if value.dim() == 1 and "bias" not in key:
            value.data += 0.5 * torch.rand(len(value), generator=torch.Generator().manual_seed(len(key)))
    theirs.save_pretrained(tmp_path)
    monkeypatch.setattr(real_memories, "BLOCK_ENTRIES", 7 * D_VOCAB)  # several blocks
    found = real_memories_table([(3, load_pretrained(tmp_path))], 6, HEADS, fold)
    expected = dense(of_file(name, tmp_path / "model.safetensors"), fold)
    groups: dict[Any, pd.DataFrame] = {}
    for key, rows in found.fillna({"through": ""}).groupby(["head", "through", "memory"]):
        head, through, memory = map(str, key)
        groups[head, through or None, memory] = rows
    assert set(groups) == set(expected)
    for key, table in expected.items():
        rows = groups[key]
        recall = rows[rows["metric"] == "recall"].iloc[0]
        if key[2] == "positions":
            right = table.argmax(1)[1:] == np.arange(len(table) - 1)
            chance = float(np.mean([1 / (t + 1) for t in range(1, len(table))]))
            table = table[1:]
        else:
            right = table.argmax(1) == np.arange(len(table))
            chance = 1 / D_VOCAB
        assert recall["value"] == pytest.approx(right.mean()) and recall["chance"] == pytest.approx(chance)
        assert recall["n"] == len(table)
        listed = rows[rows["metric"] == "score"]
        strongest = np.sort(table.ravel())[::-1][:6]
        np.testing.assert_allclose(listed["value"], strongest, rtol=1e-3, atol=1e-5)
        shift = int(key[2] == "positions")
        where = [(int(q) - shift, int(entry)) for q, entry in zip(listed["query"], listed["entry"], strict=True)]
        np.testing.assert_allclose([table[place] for place in where], strongest, rtol=1e-3, atol=1e-5)
        assert list(listed["place"]) == [1, 2, 3, 4, 5, 6]


def test_a_planted_memory_is_recalled_through_its_head_only(tmp_path: Path) -> None:
    """L1H0 is made to ask for what L0H1 writes: tokens are then found through it, and not through L0H0."""
    theirs = saved("gpt2", tmp_path)
    block = [layer.attn for layer in theirs.transformer.h]
    ov = block[0].c_attn.weight[:, 40:48] @ block[0].c_proj.weight[8:16]
    left, sizes, right = np.linalg.svd(ov.detach().numpy())
    block[1].c_attn.weight.data[:, :8] = block[1].c_attn.weight.new_tensor(left[:, :8])
    block[1].c_attn.weight.data[:, 16:24] = block[1].c_attn.weight.new_tensor(right[:8].T / sizes[:8])
    theirs.save_pretrained(tmp_path)
    table = real_memories_table([(0, load_pretrained(tmp_path))], 0, None, False)
    recall = table[(table["memory"] == "QK") & (table["head"] == "L1H0")].set_index("through")["value"]
    assert recall["L0H1"] > 0.7 and recall["L0H0"] < 0.3 and set(table["metric"]) == {"recall"}


def test_queries_are_thinned_and_models_that_do_not_add_up_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_memories, "MOST_QUERIES", 10)
    saved("olmo", tmp_path / "olmo")  # its norms have no weights
    table = real_memories_table([(0, load_pretrained(tmp_path / "olmo"))], 1, HEADS, True)
    assert set(table["n"]) == {10} and set(table["chance"].dropna()) == {1 / D_VOCAB}
    saved("gemma2", tmp_path / "gemma2")
    with pytest.raises(BirthlensError, match="residual stream is not the sum"):
        real_memories_table([(0, load_pretrained(tmp_path / "gemma2"))])
    with pytest.raises(BirthlensError, match="L5H0 does not exist"):
        real_memories_table([(0, load_pretrained(tmp_path / "olmo"))], heads=[Head(5, 0)])
