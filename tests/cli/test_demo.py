"""The demo command: trains, probes and reports; a second call uses what is there, another run is not touched."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner
from typed import close

from birthlens.cli import group
from birthlens.config import presets
from birthlens.errors import BirthlensError
from birthlens.training.recording import train_to_disk

SMALL = {"task": {"context": 16}, "model": {"d_model": 16}, "training": {"steps": 6, "batch_size": 4},
         "checkpoints": {"every": 2}, "evaluation": {"batch_size": 4, "every": 2}}  # fmt: skip


def demo(path: Any) -> Any:
    return CliRunner().invoke(group, ["demo", str(path)])


def test_the_demo_trains_probes_and_reports_and_the_second_time_does_not_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(presets.PRESETS, "demo", SMALL)
    run = tmp_path / "runs" / "demo"
    first = demo(run)
    assert first.exit_code == 0, first.output
    assert str(run / "report.html") in first.output and "in-context accuracy" in first.output
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert set(pd.read_csv(run / "memories.csv")["step"]) == {0, 2, 4, 6}
    written = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    (run / "report.html").write_text(written[run / "report.html"].decode() + "<!-- read -->")
    second = demo(run)
    assert second.exit_code == 0 and "nothing to train" in second.output
    assert (run / "report.html").read_text().endswith("<!-- read -->")
    assert all(file.read_bytes() == written[file] for file in written if file.name != "report.html")


def test_an_interrupted_demo_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "demo", SMALL)
    records = train_to_disk(presets.preset("demo"), tmp_path / "demo")
    for record in records:
        if record.step == 3:
            break
    close(records)
    assert "6 steps" in demo(tmp_path / "demo").output
    assert set(pd.read_csv(tmp_path / "demo" / "memories.csv")["step"]) == {0, 2, 4, 6}


def test_another_run_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "demo", SMALL)
    for _ in train_to_disk(presets.preset("demo", ["seeds.init=7"]), tmp_path / "demo"):
        pass
    with pytest.raises(BirthlensError, match="another config; name another directory"):
        CliRunner().invoke(group, ["demo", str(tmp_path / "demo")], catch_exceptions=False)
