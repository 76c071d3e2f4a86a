"""The numbers of a stored run stay what they were: tables that earlier code wrote, made again by this code.

`tests/stored/format_1` is a small run of the first format. The tables beside it were written by version 0.1.0 with the
commands below. Names of columns and values must agree, numbers to rounding. order.csv was written again when memories that
are never born stopped counting as ties: its onsets are those of 0.1.0, and its other rows say "never".
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from birthlens.cli import group

STORED = Path(__file__).parent / "stored"
COMMANDS = {
    "probe": [],
    "ablate": ["--steps", "all", "--methods", "zero,mean", "--batch-size", "16"],
    "edges": ["--steps", "last", "--batch-size", "16"],
    "patch": ["--steps", "last", "--batch-size", "16", "--corruption", "triggers_swapped"],
    "scores": ["--steps", "last", "--batch-size", "16"],
    "order": [],
    "weight-patch": [],
}
TABLES = {"weight-patch": "transplant"}
RTOL = 1e-3
ATOL = 1e-5
"""Float32 through a few hundred sums; ranks and margins amplify it."""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_table_is_what_earlier_code_wrote(command: str, tmp_path: Path) -> None:
    run = shutil.copytree(STORED / "format_1", tmp_path / "format_1")
    out = tmp_path / "table.csv"
    done = CliRunner().invoke(group, [command, str(run), *COMMANDS[command], "--out", str(out)])
    assert done.exit_code == 0, done.output
    expected = pd.read_csv(STORED / f"{TABLES.get(command, command)}.csv")
    found = pd.read_csv(out)
    assert list(found.columns) == list(expected.columns)
    assert len(found) == len(expected)
    for column in expected.columns:
        if pd.api.types.is_numeric_dtype(expected[column]):
            np.testing.assert_allclose(found[column], expected[column], rtol=RTOL, atol=ATOL, err_msg=column)
        elif column != "run":
            assert found[column].fillna("").tolist() == expected[column].fillna("").tolist(), column
