"""A series of model directories, in every layout, is read step by step as the models themselves."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner
from tiny_models import saved

from birthlens.cli import group
from birthlens.errors import BirthlensError
from birthlens.model.series import series_at

STEPS = (0, 1000, 12000)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models")
    for step in STEPS:
        saved("neox", folder / f"m{step}", seed=step)
    return folder


def laid_out(kind: str, models: Path, place: Path) -> Path:
    place.mkdir()
    if kind == "file":
        (place / "series.yaml").write_text("".join(f"{step}: {models / f'm{step}'}\n" for step in reversed(STEPS)))
        return place / "series.yaml"
    for step in STEPS:
        if kind == "cache":
            snapshot = f"{step:040x}"
            (place / "refs").mkdir(exist_ok=True)
            (place / "refs" / f"step{step}").write_text(snapshot)
            shutil.copytree(models / f"m{step}", place / "snapshots" / snapshot)
            (place / "refs" / "main").write_text(snapshot)
        else:
            shutil.copytree(models / f"m{step}", place / f"{kind}{step}")
    return place


def table(*arguments: Any) -> pd.DataFrame:
    out = Path(arguments[1]).parent / "table.csv"
    done = CliRunner().invoke(group, [*map(str, arguments), "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return pd.read_csv(out)


@pytest.mark.parametrize("kind", ["cache", "step", "step_", "checkpoint-", "file"])
def test_every_layout_gives_the_steps_in_order(kind: str, models: Path, tmp_path: Path) -> None:
    place = laid_out(kind, models, tmp_path / "series")
    series = series_at(place)
    assert series is not None and series.steps == list(STEPS)
    assert series.select("every:2") == [0, 12000] and series.select("1000,-1") == [1000, 12000]


@pytest.mark.parametrize("command", [["scores"], ["scores", "--kind", "weights"], ["ablate", "--methods", "zero"]])
def test_a_table_of_a_series_is_the_tables_of_its_models(command: Any, models: Path, tmp_path: Path) -> None:
    place = laid_out("cache", models, tmp_path / "models--them--tiny")
    size = [] if "weights" in command else ["--batch-size", "4"]
    whole = table(command[0], place, *command[1:], *size, "--steps", "all")
    assert list(dict.fromkeys(whole["step"])) == list(STEPS)
    values = set()
    for step, rows in whole.groupby("step"):
        (tmp_path / str(step)).mkdir()
        alone = table(command[0], shutil.copytree(models / f"m{step}", tmp_path / str(step) / "m"), *command[1:], *size)
        pd.testing.assert_frame_equal(rows.drop(columns="step").reset_index(drop=True), alone.drop(columns="step"))
        values.add(round(float(rows["value"].sum()), 6))
    assert len(values) == len(STEPS)


def test_what_is_no_series_is_one_sentence(models: Path, tmp_path: Path) -> None:
    place = laid_out("step", models, tmp_path / "series")
    assert series_at(models / "m0") is None and series_at(tmp_path / "absent") is None
    series = series_at(place)
    assert series is not None
    for wrong in ("5", "some", "every:0", "-7"):
        with pytest.raises(BirthlensError, match="step"):
            series.select(wrong)
    shutil.copytree(place / "step1000", place / "checkpoint-1000")
    with pytest.raises(BirthlensError, match="two directories of step 1000, checkpoint-1000 and step1000"):
        series_at(place)
    shutil.rmtree(place / "checkpoint-1000")
    shutil.rmtree(place / "step0")
    saved("neox", place / "step0", hidden_size=8)
    done = CliRunner().invoke(group, ["scores", str(place), "--steps", "all", "--batch-size", "2"])
    assert isinstance(done.exception, BirthlensError)
    assert "step1000 (step 1000) has d_model = 16, step 0 has 8" in str(done.exception)
    (tmp_path / "bad.yaml").write_text("soon: here\n")
    with pytest.raises(BirthlensError, match="map steps to directories"):
        series_at(tmp_path / "bad.yaml")
    cache = laid_out("cache", models, tmp_path / "models--a--b")
    (cache / "refs" / "step7").write_text("0" * 39 + "f")
    with pytest.raises(BirthlensError, match="step7 names the snapshot"):
        series_at(cache)
