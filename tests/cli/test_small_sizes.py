"""Runs of the smallest sizes: every command says what it can, or in a sentence why it cannot; none warns or prints NaN."""

import io
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner

from birthlens.cli import group
from birthlens.errors import BirthlensError

SMALL = (
    "corpus.source=markov", "corpus.vocabulary=6", "model.d_model=4", "training.batch_size=1", "evaluation.batch_size=1",
    "checkpoints.every=1",
)  # fmt: skip
RUNS = {
    "one checkpoint of two positions": ("task.n_triggers=1", "task.context=2", "training.steps=0"),
    "one trigger": ("task.n_triggers=1", "task.context=8", "training.steps=2"),
    "no trigger": ("task.n_triggers=0", "task.context=8", "training.steps=2", "training.loss=all"),
}
ONE_SEQUENCE = ("--batch-size", "1")
COMMANDS = (
    ("steps",), ("verify",), ("watch", "--once"), ("memories",), ("memories", "--ledger"),
    ("associations", "--matrix", "output_memory"), ("probe",), ("probe", "--full"), ("probe", "--what", "behaviour"),
    ("probe", "--what", "attention"), ("order",), ("order", "--sensitivity"), ("weight-patch", "--sequences", "1"),
    ("ablate", *ONE_SEQUENCE), ("patch", *ONE_SEQUENCE), ("edges", "--corruption", "other_outputs", *ONE_SEQUENCE),
    ("scores", *ONE_SEQUENCE), ("scores", "--kind", "attention", *ONE_SEQUENCE), ("scores", "--kind", "weights"),
    ("scores", "--kind", "composition"), ("scores", "--kind", "transfer", *ONE_SEQUENCE),
    ("scores", "--kind", "in-context-learning", *ONE_SEQUENCE), ("scores", "--kind", "sinks", *ONE_SEQUENCE),
)  # fmt: skip
PLOTS = ("birth", "behaviour", "recall", "ledger", "edges")


@pytest.fixture(scope="module", params=RUNS)
def small(request: Any, tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("small") / "run"
    done = CliRunner().invoke(group, ["train", str(path), *SMALL, *RUNS[request.param]], catch_exceptions=False)
    assert done.exit_code == 0
    return Path(path)


def said(arguments: Any) -> tuple[bool, str, str]:
    """Whether a command did what it was asked, what it printed, and what it told beside that or instead."""
    done = CliRunner().invoke(group, list(map(str, arguments)))
    if done.exception is not None:
        assert isinstance(done.exception, BirthlensError), (arguments, done.exception)
        return False, "", str(done.exception)
    return True, done.stdout, done.stderr


def test_every_command_says_what_it_can_say(small: Path) -> None:
    for command in COMMANDS:
        worked, printed, told = said((command[0], small, *command[1:]))
        text = printed + told
        assert text.strip() and not re.search(r"\b(nan|inf)\b|-0\.000\b", text), (command, text)
        assert worked or told.rstrip().endswith("."), (command, told)


def test_experiments_on_training_say_what_they_can_say(small: Path, tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "overrides: [corpus.source=markov, corpus.vocabulary=6, model.d_model=4, training.steps=0, task.context=4]\n"
        "axes: {task.n_triggers: [1], training.batch_size: [1]}\n"
    )
    commands = [
        *(("data-attribution", small, f"{name}_memory") for name in ("output", "trigger", "prev_token")),
        *(("data-attribution", small, "output_memory", "--by", by, "--every", 1) for by in ("sequence", "position")),
        ("contrast", small, small),
        ("contrast", small, small, "--what", "steps"),
        ("contrast", small, small, "--what", "first"),
        *(
            ("phase", grid, "--x", "task.n_triggers", "--y", "training.batch_size", "--out", tmp_path / "phase",
             "--processes", 1, "--refine", 2, "--value", value)
            for value in ("birth", "order", "accuracy")
        ),
    ]  # fmt: skip
    done = 0
    for command in commands:
        worked, printed, told = said(command)
        text = printed + told
        assert text.strip() and not re.search(r"\b(nan|inf)\b|-0\.000\b", text), (command, text)
        assert worked or told.rstrip().endswith("."), (command, told)
        done += worked
    assert done >= 5


def test_a_table_in_which_nothing_was_counted_is_refused_and_a_part_is_told(small: Path) -> None:
    counted = 0
    for command in COMMANDS[10:]:
        worked, printed, told = said((command[0], small, *command[1:], "--format", "csv"))
        if worked and ",n" in printed.splitlines()[0] and command[0] not in ("order", "memories"):
            table = pd.read_csv(io.StringIO(printed))
            group = next((name for name in ("role", "score", "probe", "metric") if name in table), "step")
            most = table.groupby(group)["n"].max()
            counted += 1
            assert most.max() > 0, command
            assert all(str(name) in told for name in most.index[most == 0]), (command, told)
    assert counted >= 4


def test_pages_and_pictures_are_made_or_refused(small: Path, tmp_path: Path) -> None:
    import xml.etree.ElementTree as ET

    for kind in PLOTS:
        out = tmp_path / f"{kind}.svg"
        worked, _, told = said(("plot", small, "--kind", kind, "--out", out))
        assert worked or told.endswith("."), told
        if worked:
            drawn = [
                element for element in ET.fromstring(out.read_text()).iter() if element.get("id", "").startswith("ax")
            ]
            assert drawn, kind
    for command in ("report", "attention"):
        out = tmp_path / f"{command}.html"
        worked, _, told = said((command, small, "--out", out))
        assert worked, told
        page = re.sub(r"<script.*?</script>|<style.*?</style>", "", out.read_text(), flags=re.DOTALL)
        assert not re.search(r"[+-]?\b(nan|inf)\b", re.sub(r"<[^>]+>", " ", page))
