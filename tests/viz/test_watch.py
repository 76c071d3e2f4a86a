"""Watching: what one frame says, on running, silent, finished and unborn runs."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from seeing_runs import run, unfinished

from birthlens.analysis.behaviour.trajectory import memories_over
from birthlens.cli import seeing
from birthlens.runs.files import checkpoint_file
from birthlens.runs.run import load_run
from birthlens.viz.watch import BARS, Watch, sparkline


def words(watch: Any, now: Any = None) -> Any:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(watch.frame(now))
    return capture.get()


def test_a_frame_shows_the_last_measurements() -> None:
    source = run()
    text = words(Watch(source))
    metrics = source.metrics()
    accuracy = metrics[metrics["metric"] == "in_context_accuracy"]["value"].iloc[-1]
    assert "step 12 of 12, 5 checkpoints: finished" in text
    assert f"{accuracy:.3f}" in next(line for line in text.splitlines() if line.startswith("in-context accuracy"))
    table = (
        memories_over(source, [12], bases=("raw",))
        .to_pandas()
        .query("metric == 'recall' and memory == 'output_memory'")
    )
    value = table[table["candidates"] == "all"]["value"].iloc[0]
    assert f"{value:.3f}" in next(line for line in text.splitlines() if line.startswith("output recall, all"))


def test_a_low_terminal_shows_what_fits_and_says_what_does_not() -> None:
    whole = words(Watch(run())).splitlines()
    low = words(Watch(run(), height=12)).splitlines()
    assert len(low) <= 11
    assert [line.split() for line in low[:-1]] == [line.split() for line in whole[: len(low) - 1]]
    assert low[-1].strip() == f"{len(whole) - len(low) + 1} more rows in a taller terminal"
    assert "1 layer," in words(Watch(run("one_layer")))
    assert any(line.startswith("previous-token recall") for line in whole)


def test_a_running_run_says_its_pace_and_a_silent_one_that_it_is_silent(tmp_path: Path) -> None:
    import os

    path = tmp_path / "run"
    shutil.copytree(unfinished().path, path)
    for index, step in enumerate((0, 3, 6)):  # a checkpoint every 30 s: 0.1 steps a second
        os.utime(checkpoint_file(path, step), (1000 + 30 * index,) * 2)
    watch = Watch(load_run(path))
    assert not watch.over
    assert "0.1 steps/s, 50 s to go" in words(watch, now=1070)
    assert "no new checkpoint for 16 min 40 s" in words(watch, now=2060)


def test_a_run_before_its_first_checkpoint_waits(tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(run().path, path)
    shutil.rmtree(path / "checkpoints")
    watch = Watch(load_run(path))
    assert "waiting for the first checkpoint" in words(watch) and not watch.over


@pytest.mark.parametrize("kind", ["full", "one_layer", "rotary", "random", "no_triggers"])
def test_runs_of_every_shape_can_be_watched(kind: Any) -> None:
    text = words(Watch(run(kind), width=20))
    assert "finished" in text and "all loss" in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_the_command_prints_one_frame_where_nobody_looks() -> None:
    done = CliRunner().invoke(seeing.watch, [str(run().path)], catch_exceptions=False)
    assert done.exit_code == 0 and "finished" in done.output and "\x1b" not in done.output


@example([1.7976931348623157e308, -9.9e291], 2)
@example([5e-324, 0.0, -5e-324], 3)
@given(st.lists(st.floats() | st.integers(-5, 5), max_size=200), st.integers(1, 60))
def test_sparklines_are_as_long_as_asked_and_rank_as_the_values(values: Any, width: Any) -> None:
    drawn = sparkline(values, width)
    assert len(drawn) == min(len(values), width) and set(drawn) <= set(BARS) | {" "}
    if 0 < len(values) <= width:
        finite = [(v, BARS.index(c)) for v, c in zip(values, drawn, strict=True) if math.isfinite(v)]
        ordered = [bar for _, bar in sorted(finite)]
        assert ordered == sorted(ordered)
