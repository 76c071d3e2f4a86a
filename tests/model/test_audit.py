"""Faults planted in a series that was really trained are found with their steps, and the series itself gives none."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from tiny_models import D_VOCAB, made, saved

from birthlens.cli import group
from birthlens.errors import BirthlensError
from birthlens.model import fingerprints
from birthlens.model.audit import audit_table
from birthlens.model.directory import quiet
from birthlens.model.series import Series, series_at

GRID = (0, 1, 2, 4, 8, 16, 32, 40, 60, 80, 100, 120, 140)
Fault = Callable[[Path], object]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a small GPT-NeoX and keep it at the steps of `GRID`."""
    pytest.importorskip("transformers")
    place = tmp_path_factory.mktemp("audit")
    model = made("neox", seed=4)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(GRID[-1] + 1):
        if step in GRID:
            with quiet():
                model.save_pretrained(place / f"step{step}")
        ids = torch.randint(D_VOCAB, (8, 8), generator=generator).repeat(1, 2)
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return place


def swapped(one: int, other: int) -> Fault:
    def swap(place: Path) -> None:
        (place / f"step{one}").rename(place / "aside")
        (place / f"step{other}").rename(place / f"step{one}")
        (place / "aside").rename(place / f"step{other}")

    return swap


def copied(source: int, to: int) -> Fault:
    def copy(place: Path) -> None:
        shutil.rmtree(place / f"step{to}")
        shutil.copytree(place / f"step{source}", place / f"step{to}")

    return copy


def dropped(*steps: int) -> Fault:
    def drop(place: Path) -> None:
        for step in steps:
            shutil.rmtree(place / f"step{step}")

    return drop


def configured(step: int) -> Fault:
    def write(place: Path) -> None:
        file = place / f"step{step}" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"rotary_pct": 0.5, "use_cache": False}))

    return write


def tokenizers(place: Path) -> None:
    for step in GRID:
        (place / f"step{step}" / "vocab.json").write_text('{"a": 0}' if step != 16 else '{"a": 1}')


def foreign(step: int) -> Fault:
    return lambda place: saved("neox", place / f"step{step}", seed=99)


def shifted(place: Path) -> None:
    """Give every checkpoint the label of the one before; the last step, and with it the initialisation, is lost."""
    shutil.rmtree(place / "step0")
    for before, after in pairwise(GRID):
        (place / f"step{after}").rename(place / f"step{before}")


PLANTED: dict[str, tuple[Fault, set[tuple[str, int]]]] = {
    "nothing": (lambda place: None, set()),
    "equal": (copied(40, 60), {("equal", 60)}),
    "swapped": (swapped(40, 60), {("order", 40), ("order", 60)}),
    "far": (swapped(16, 80), {("order", 16), ("order", 80)}),
    "first": (shifted, {("initialisation", 0)}),
    "untrained": (swapped(0, 40), {("initialisation", 0), ("initialisation", 40)}),
    "another run": (foreign(60), {("foreign", 60)}),
    "another start": (foreign(0), {("foreign", 0)}),
    "even": (dropped(80), {("missing", 100)}),
    "powers": (dropped(4), {("missing", 8)}),
    "config": (configured(8), {("config", 8)}),
    "tokenizer": (tokenizers, {("tokenizer", 16)}),
    "shape": (lambda place: saved("neox", place / "step2", hidden_size=8), {("config", 2), ("tensors", 2)}),
}


def audited(place: Path) -> pd.DataFrame:
    series = series_at(place)
    assert series is not None
    return audit_table(series)


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found_and_nothing_else(fault: str, trained: Path, tmp_path: Path) -> None:
    place = shutil.copytree(trained, tmp_path / "series")
    plant, expected = PLANTED[fault]
    plant(place)
    table = audited(place)
    found = set(zip(table["kind"], table["step"], strict=True))
    assert expected <= found, table.to_string()
    # A step in a wrong place, or a foreign one, can make its neighbours look wrong too, but less so.
    others = table[[pair not in expected for pair in zip(table["kind"], table["step"], strict=True)]]
    if fault in ("swapped", "far", "untrained", "another run", "another start"):
        strongest = table.iloc[: max(len(expected) - 1, 1)]
        assert set(zip(strongest["kind"], strongest["step"], strict=True)) & expected
    else:
        assert others.empty, table.to_string()


def test_samples_estimate_the_distances_of_whole_tensors(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {step: trained / f"step{step}" for step in (0, 16, 100)}
    few = {step: fingerprints.fingerprint(path) for step, path in place.items()}
    monkeypatch.setattr(fingerprints, "SAMPLES", 10**6)
    whole = {step: fingerprints.fingerprint(path) for step, path in place.items()}
    from birthlens.model.audit import _moving, _products

    names = _moving(whole)
    exact = _products(whole, names)
    from safetensors.torch import load_file

    matrices = [
        torch.cat([tensor.flatten() for name, tensor in sorted(load_file(path / "model.safetensors").items())
                   if tensor.dim() > 1])
        for path in place.values()
    ]  # fmt: skip
    expected = [[float(a.double() @ b.double()) for a in matrices] for b in matrices]
    np.testing.assert_allclose(exact, expected, rtol=1e-5)
    np.testing.assert_allclose(_products(few, names), exact, rtol=0.1)


def test_the_command_says_it_in_sentences(trained: Path, tmp_path: Path) -> None:
    def said(*arguments: Any) -> str:
        done = CliRunner().invoke(group, ["audit", *map(str, arguments)], catch_exceptions=False)
        assert done.exit_code == 0
        return done.output

    assert said(trained) == "13 checkpoints, no suspicious findings.\n"
    place = shutil.copytree(trained, tmp_path / "series")
    copied(40, 60)(place)
    assert "1.00  equal: Steps 40 and 60 hold the same weights.\n13 checkpoints, 1 suspicious finding." in said(place)
    table = pd.read_csv(tmp_path / "a.csv") if said(place, "--out", tmp_path / "a.csv") else None
    assert table is not None and table[["kind", "step", "other", "strength"]].values.tolist() == [
        ["equal", 60, 40, 1.0]
    ]
    for wrong, message in ((trained / "step0", "is no series of model directories"), (tmp_path / "no", "is no series")):
        refused = CliRunner().invoke(group, ["audit", str(wrong)]).exception
        assert isinstance(refused, BirthlensError) and message in str(refused)
    with pytest.raises(BirthlensError, match="a series of one step"):
        audit_table(Series(place, {0: place / "step0"}))
    (place / "step2" / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BirthlensError, match=r"step2/model.safetensors is a Git LFS pointer"):
        audited(place)
