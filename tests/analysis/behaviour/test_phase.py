"""Phase diagrams: every value held to its run, and refinement to a made-up boundary."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from birthlens.analysis.behaviour import phase as phases
from birthlens.analysis.behaviour.births import accuracy_birth, held_out, memory_births
from birthlens.analysis.behaviour.phase import Diagram, measured, phase_table
from birthlens.analysis.memories.names import MEMORIES
from birthlens.cli import group
from birthlens.config.run import RunConfig
from birthlens.errors import BirthlensError
from birthlens.runs.run import load_run
from birthlens.training.sweep import Outcome, run_path
from birthlens.viz.figures.phase import phase_map

OVERRIDES = [
    "corpus.source=markov", "corpus.vocabulary=12", "task.context=24", "training.batch_size=8", "training.steps=12",
    "checkpoints.every=6", "evaluation.every=3", "optimiser.learning_rate=0.5", "training.engine=functional",
    "evaluation.batch_size=16",
]  # fmt: skip
TREE: dict[str, Any] = {
    "overrides": OVERRIDES,
    "axes": {"task.n_triggers": [1, 4], "model.d_model": [8, 16]},
    "seeds": 2,
}


def made(value: Any, x: list[Any], y: list[Any], refine: int, monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    """A diagram whose values are a function of the two settings, without a run."""
    known: dict[Path, float] = {}

    def train(configs: Any) -> Any:
        for config in configs:
            path = run_path(config, "nowhere")
            known[path] = value(config.task.n_triggers, config.model.d_model)
            yield Outcome(path, "trained")

    monkeypatch.setattr(phases, "Run", lambda path: path)
    monkeypatch.setattr(phases, "measured", lambda path, _: known[path])
    tree = {"axes": {"task.n_triggers": x, "model.d_model": y}, "seeds": 1}
    return phase_table(Diagram(tree, "task.n_triggers", "model.d_model"), "nowhere", train, refine)


def test_added_points_bisect_the_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Born above a width that grows with the triggers: after a few rounds the added points lie beside that line."""

    def birth(triggers: int, width: int) -> float:
        return 100.0 if width >= 20 * triggers else float("nan")

    table = made(birth, [1, 4], [16, 256], 24, monkeypatch)
    assert not table.duplicated(["task.n_triggers", "model.d_model"]).any()
    assert len(table) == 4 + table["added"].sum() <= 4 + 24, "a grid of such a resolution has 2 x 241 points"
    for triggers in (1, 4):
        row = table[table["task.n_triggers"] == triggers]
        assert row[row["n"] == 0]["model.d_model"].max() == 20 * triggers - 1
        assert row[row["n"] == 1]["model.d_model"].min() == 20 * triggers


def test_a_flat_diagram_adds_nothing_and_whole_numbers_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(made(lambda *_: 7.0, [1, 8], [16, 64], 5, monkeypatch)) == 4
    steps = made(lambda triggers, _: float(triggers > 2), [1, 3], [16, 17], 9, monkeypatch)
    assert set(steps["task.n_triggers"]) == {1, 2, 3}, "nothing lies between two neighbouring whole numbers"


def test_middles_are_geometric_where_the_axis_is() -> None:
    assert phases._middle(0.05, 0.2, [0.05, 0.2, 0.8]) == pytest.approx(0.1)
    assert phases._middle(0.1, 0.2, [0.1, 0.2, 0.3]) == pytest.approx(0.15)
    assert phases._middle(4, 5, [1, 4, 5]) is None


def test_the_command_writes_what_the_runs_say_and_continues(tmp_path: Path) -> None:
    grid = tmp_path / "grid.json"
    grid.write_text(json.dumps(TREE))
    words = ["phase", str(grid), "--x", "task.n_triggers", "--y", "model.d_model", "--out", str(tmp_path / "out")]
    for value in ("accuracy", "birth"):
        result = CliRunner().invoke(group, [*words, "--value", value, "--processes", "1", "--refine", "2"])
        assert result.exit_code == 0, result.output
        table = pd.read_csv(tmp_path / "out" / "phase.csv")
        assert (tmp_path / "out" / "phase.svg").stat().st_size > 5000
        for _, cell in table.iterrows():
            words_of = [f"task.n_triggers={cell['task.n_triggers']}", f"model.d_model={cell['model.d_model']}"]
            each = []
            for seed in (0, 1):
                seeds = [f"seeds.init={seed}", f"seeds.data={seed}"]
                config = RunConfig.parse({}, [*OVERRIDES, *words_of, *seeds])
                each.append(measured(load_run(run_path(config, tmp_path / "out")), value))
            known = [one for one in each if np.isfinite(one)]
            assert cell["n"] == len(known) and cell["never"] == 2 - len(known)
            assert cell["value"] == pytest.approx(np.mean(known)) if known else np.isnan(cell["value"])
    assert "reused" in result.output, "the second diagram trains nothing again"


def test_measured_reads_the_metrics_and_the_births(tmp_path: Path) -> None:
    from birthlens.training.recording import train_to_disk

    for _ in train_to_disk(RunConfig.parse({}, [*OVERRIDES, "model.d_model=16"]), tmp_path / "run"):
        pass
    run = load_run(tmp_path / "run")
    measurements = run.metrics().query("split == 'held_out'")
    rows = measurements[measurements["metric"] == "in_context_accuracy"].set_index("step")["value"]
    steps, values = held_out(run.metrics(), "in_context_accuracy")
    assert dict(zip(steps.tolist(), values.tolist(), strict=True)) == rows.to_dict()
    assert measured(run, "accuracy") == rows.iloc[-1]
    assert measured(run, "loss") == measurements[measurements["metric"] == "all_loss"]["value"].iloc[-1]
    births = memory_births(run)
    assert set(births) == set(MEMORIES)
    assert np.array_equal([measured(run, name) for name in births], list(births.values()), equal_nan=True)
    ordered = births["output_memory"] <= births["trigger_memory"] <= births["prev_token_memory"]
    assert measured(run, "order") == float(ordered)
    assert np.isnan(accuracy_birth(run.metrics())) == (rows.iloc[-1] < 0.5)


@pytest.mark.parametrize(
    ("changes", "names", "sentence"),
    [
        ({}, ("task.n_triggers", "task.n_triggers"), "are both"),
        ({}, ("task.n_triggers", "model.n_heads"), "not an axis of the grid"),
        (
            {"axes": {"task.n_triggers": [1], "model.d_model": [8], "task.offset": [0, 1]}},
            None,
            "further axis 'task.offset'",
        ),
        ({"cases": {"a": []}}, None, "the grid has cases"),
        ({"axes": None}, None, "it has none"),
    ],
)
def test_grids_that_are_no_diagram_are_refused(changes: Any, names: Any, sentence: str) -> None:
    with pytest.raises(BirthlensError, match=sentence):
        Diagram({**TREE, **changes}, *(names or ("task.n_triggers", "model.d_model")))


def test_the_map_shows_never_and_sometimes() -> None:
    table = pd.DataFrame(
        {"a": [1, 2, 1, 2], "b": [1, 1, 2, 2], "value": [np.nan, 3.0, 5.0, 9.0], "spread": [np.nan, 1.0, 2.0, 3.0],
         "n": [0, 1, 2, 2], "never": [2, 1, 0, 0]}
    )  # fmt: skip
    figure = phase_map(table, "a", "b", "step")
    crosses = [len(np.asarray(each.get_offsets())) for each in figure.axes[0].collections[-2:]]
    assert crosses == [1, 1]
    drawn = figure.axes[0].images[0].get_array()
    assert drawn is not None and np.array_equal(
        np.ma.filled(drawn, np.nan), np.array([[np.nan, 3], [5, 9]]), equal_nan=True
    )
