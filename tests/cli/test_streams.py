"""Standard streams: one rule for all commands where they are closed, full or left, and text that steers no terminal."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from birthlens.cli import group
from birthlens.cli.tables import escaped_json, without_formulas

COMMANDS = {"list": ["reproduce", "--list"], "csv": ["corpus", "--format", "csv"]}


def shell(line: Any, **environment: Any) -> Any:
    command = ["bash", "-c", line.replace("birthlens", f"{sys.executable} -m birthlens")]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_a_reader_that_leaves_ends_the_command_quietly(arguments: Any) -> None:
    # The reader is gone before the first word is written.
    done = shell(f"birthlens {' '.join(arguments)} | sleep 0; echo ${{PIPESTATUS[0]}}")
    assert done.stdout.strip() == "0" and done.stderr == ""


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_closed_streams_swallow_what_is_written(arguments: Any) -> None:
    line = f"birthlens {' '.join(arguments)}"
    assert shell(f"{line} >&-").returncode == 0
    assert shell(f"{line} <&- >&- 2>&-").returncode == 0
    full = shell(f"{line} > /dev/full")
    assert full.returncode == 2
    assert full.stderr == "birthlens: standard output cannot be written: No space left on device.\n"


def test_a_refusal_keeps_its_status_where_nobody_reads_it() -> None:
    assert shell("birthlens steps nowhere 2>&-").returncode == 2
    assert shell("birthlens steps nowhere 2> /dev/full").returncode == 2


ASCII = {
    "a variable": {"PYTHONIOENCODING": "ascii"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("environment", ASCII.values(), ids=ASCII)
def test_streams_that_encode_little(tmp_path: Path, environment: Any) -> None:
    (tmp_path / "text").write_text("äöü → äöü", encoding="utf-8")
    for style in ("table", "csv", "json"):
        done = shell(f"birthlens corpus {tmp_path}/text --format {style}", **environment)
        assert done.returncode == 0 and done.stderr == "" and "\\xe4" in done.stdout
    refused = shell(f"birthlens steps {tmp_path}/é", **environment)
    assert refused.returncode == 2 and refused.stderr.isascii()


def test_a_path_that_is_not_utf_8(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")
    with open(name, "w") as file:
        file.write("to be or not to be")
    for style in ("table", "csv", "json"):
        command = [sys.executable, "-m", "birthlens", "corpus", name, "--format", style]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stderr == "" and "dcff" in done.stdout.lower()


def test_messages_steer_no_terminal() -> None:
    for line in ("birthlens steps $'a\\x1b[2Jb'", "birthlens $'a\\x1b[2Jb'", "birthlens train x $'a\\x1b[2Jb.c=1'"):
        done = shell(line)
        assert done.returncode == 2 and "\x1b" not in done.stderr and len(done.stderr) < 2000


def test_a_spreadsheet_gets_no_formulas(tmp_path: Path) -> None:
    labels = ["=1+1", "+a", "-b", "@c", " =d", "-3", "plain", "\uff1de", "a\tb"]
    safe = ["'=1+1", "'+a", "'-b", "'@c", "' =d", "-3", "plain", "'\uff1de", "a b"]
    assert [without_formulas(label) for label in labels] == safe
    grid = tmp_path / "grid.json"
    tiny = ["corpus.source=markov", "model.d_model=8", "training.steps=0", "task.context=8", "evaluation.batch_size=2"]
    grid.write_text(json.dumps({"overrides": tiny, "cases": {"=cmd|' /C calc'!A0": []}}))
    for style, first in (("csv", "=cmd"), ("spreadsheet", "'=cmd")):
        done = CliRunner().invoke(
            group, ["sweep", str(grid), "--out", str(tmp_path), "--processes", "1", "--format", style]
        )
        assert done.exit_code == 0 and done.stdout.splitlines()[1].startswith(first)


def test_json_stays_json_without_steering() -> None:
    text = json.dumps({"a\u202e": "\x9b2J\u200b"}, ensure_ascii=False)
    assert escaped_json(text).isascii() and json.loads(escaped_json(text)) == json.loads(text)
