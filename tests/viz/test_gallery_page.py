"""The gallery page has every figure, twice; dark figures keep their data and are readable on their ground."""

import base64
import re
from pathlib import Path
from typing import Any

import matplotlib.colors as colours
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from matplotlib.image import imread
from matplotlib.text import Text
from typed import present

from birthlens.cli import group
from birthlens.config.run import RunConfig
from birthlens.runs.run import Run, load_run
from birthlens.training.recording import train_to_disk
from birthlens.viz import figures
from birthlens.viz.figures.dark import GROUND, darken
from birthlens.viz.figures.gallery import RUN_FIGURES
from birthlens.viz.report import gallery_page

TINY = [
    "corpus.source=markov", "corpus.vocabulary=10", "task.context=16", "task.n_triggers=2", "training.steps=4",
    "training.batch_size=4", "checkpoints.every=2", "evaluation.every=2", "evaluation.batch_size=4",
    "training.engine=functional",
]  # fmt: skip


def trained(out: Path, *more: str) -> Run:
    for _ in train_to_disk(RunConfig.parse({}, [*TINY, *more]), out):
        pass
    return load_run(out)


def test_every_figure_is_there_for_light_and_dark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {kind: RUN_FIGURES[kind] for kind in ("behaviour", "recall")}  # drawing all of them takes a minute
    monkeypatch.setattr(gallery_page, "RUN_FIGURES", few)
    trained(tmp_path / "run", "model.d_model=8")
    page = tmp_path / "gallery.html"
    result = CliRunner().invoke(group, ["gallery", str(tmp_path / "run"), "--out", str(page)])
    assert result.exit_code == 0, result.output
    text = page.read_text()
    for kind in few:
        part = text[text.index(f'<section id="{kind}"') :].partition("</section>")[0]
        pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", part)
        assert len(pictures) == 2, kind
        dark, light = (decoded(tmp_path, each) for each in pictures)
        assert light.shape == dark.shape
        assert light[2, 2, :3].min() > 0.95 and dark[2, 2, :3].max() < 0.2, "the corner shows the ground"
        assert f"birthlens plot run --kind {kind} " in part
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text).replace("http-equiv", "")


def decoded(folder: Path, text: str) -> Any:
    file = folder / "picture.png"
    file.write_bytes(base64.b64decode(text))
    return imread(file)


def test_what_a_run_does_not_have_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ("behaviour", "recall", "memories", "ledger")
    monkeypatch.setattr(gallery_page, "RUN_FIGURES", {kind: RUN_FIGURES[kind] for kind in kinds})
    run = trained(tmp_path / "run", "model.family=full", "model.n_heads=2", "model.d_model=8")
    page = tmp_path / "gallery.html"
    result = CliRunner().invoke(group, ["gallery", str(run.path), "--steps", "last", "--out", str(page)])
    assert result.exit_code == 0, result.output
    assert page.read_text().count("Not shown: ") == 3
    refused = CliRunner().invoke(group, ["gallery", str(run.path), "--out", str(tmp_path / "x.pdf")])
    assert "must end in .html" in str(refused.exception)


def brightness(colour: Any) -> float:
    return float(np.dot(colours.to_rgb(colour), [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("what", ["lines", "map"])
def test_a_dark_figure_keeps_its_data_and_can_be_read(what: str) -> None:
    rows = [(step, name, step * (1 + i)) for i, name in enumerate("abcdefg") for step in (0, 1, 2)]
    table = pd.DataFrame(rows, columns=["step", "case", "value"])
    figure = figures.timeline(table, "case") if what == "lines" else figures.heatmap(table, "step", "case")
    before = [line.get_xydata() for ax in figure.axes for line in ax.lines]
    cells = [image.get_array() for ax in figure.axes for image in ax.images]
    inside = [text.get_color() for ax in figure.axes if ax.images for text in ax.texts]
    darken(figure)
    after = [line.get_xydata() for ax in figure.axes for line in ax.lines]
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    for one, ax in zip(cells, [ax for ax in figure.axes if ax.images], strict=True):
        assert np.array_equal(present(one), present(ax.images[0].get_array()))
    assert inside == [text.get_color() for ax in figure.axes if ax.images for text in ax.texts]
    assert figure.get_facecolor() == colours.to_rgba(GROUND)
    own = {id(text) for ax in figure.axes if ax.images for text in ax.texts}
    for text in figure.findobj(Text):
        if id(text) not in own and text.get_text():
            assert brightness(text.get_color()) > 0.7
    for ax in figure.axes:
        for line in ax.lines:
            assert brightness(line.get_color()) > 0.15
