"""The experiments' scripts: what they write says what made it."""

import json
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from birthlens.config.run import RunConfig
from birthlens.runs.files import versions
from birthlens.training.grid import Grid

ANALYSES = Path(__file__).parents[2] / "analyses"
NO_QUESTION = ("asking.py", "run_notebooks.py")


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ANALYSES))
    import asking

    return asking


def test_a_table_has_beside_it_what_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asking: ModuleType
) -> None:
    out = tmp_path / "new" / "how_long.csv"
    monkeypatch.setattr(sys, "argv", ["how_long.py", "--seeds", "2", "--out", str(out)])
    arguments = asking.options("/somewhere/how_long.py", "How long?")
    assert out.parent.is_dir()  # pictures are saved before the table
    grid = Grid(RunConfig.parse({}, ["task.context=64"]), {"wide": ("model.d_model=256",)}, (0, 1))
    table = pd.DataFrame({"case": ["wide"] * 2, "seed": [0, 1], "quantity": "x", "value": [1.23456, 2.0]})
    asking.keep(arguments, table, grid)
    assert list(pd.read_csv(out)["value"]) == [1.2346, 2.0]
    made = json.loads(out.with_suffix(".json").read_text())
    assert made["command"] == "python analyses/how_long.py --seeds 2" and made["seeds"] == [0, 1]
    assert made["grid"] == {"base": ["task.context=64"], "cases": {"wide": ["model.d_model=256"]}}
    assert made["versions"] == versions() and len(made["code"]) == 16 and len(made["date"]) == 10


def test_parts_of_a_table_stand_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asking: ModuleType) -> None:
    monkeypatch.setattr(sys, "argv", ["how_long.py", "--out", str(tmp_path / "how_long.csv"), "--steps", "7"])
    arguments = asking.options("/somewhere/how_long.py", "How long?", tiers=False, steps=5, width=3)
    assert (arguments.steps, arguments.width) == (7, 3)
    part = pd.DataFrame({"value": [0.123456]})
    asking.keep(arguments, None, Grid(RunConfig(), {"run": ()}, (4,)), first=part, second=2 * part)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "how_long.json",
        "how_long_first.csv",
        "how_long_second.csv",
    ]
    assert list(pd.read_csv(tmp_path / "how_long_second.csv")["value"]) == [0.2469]
    assert json.loads((tmp_path / "how_long.json").read_text())["seeds"] == [4]


def test_a_grid_of_a_tier_is_recorded(monkeypatch: pytest.MonkeyPatch, asking: ModuleType) -> None:
    monkeypatch.setattr(sys, "argv", ["x"])
    script = str(ANALYSES / "what_do_the_heads_attend_to.py")
    arguments = asking.options(script, "")
    assert asking.grid_of(script, arguments) is arguments.grid and len(arguments.grid.seeds) == 5


@pytest.mark.parametrize("script", sorted(path.name for path in ANALYSES.glob("*.py") if path.name not in NO_QUESTION))
def test_every_script_starts_and_says_its_question(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ANALYSES))
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ANALYSES / script), run_name="__main__")
    assert end.value.code == 0 and "?" in capsys.readouterr().out
