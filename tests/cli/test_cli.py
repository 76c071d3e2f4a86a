"""The command line: what it prints, what it refuses, and what it does not import."""

import io
import json
import math
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner
from typed import present

from birthlens.cli import HOMES, Commands, group, main
from birthlens.config.run import RunConfig
from birthlens.errors import BirthlensError
from birthlens.runs.run import load_run

TINY = ["corpus.source=markov", "corpus.vocabulary=12", "task.context=24", "task.n_triggers=3", "model.d_model=16",
        "training.steps=12", "training.batch_size=8", "checkpoints.every=4", "evaluation.batch_size=8"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("cli") / "run"
    result = CliRunner().invoke(group, ["train", str(path), *TINY])
    assert result.exit_code == 0, result.output
    return path


def in_a_process(*arguments: Any) -> Any:
    """Run the program in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "birthlens", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done


def birthlens(*arguments: Any, code: Any = 0) -> Any:
    """Run the whole program, from its arguments to its exit status, in this process."""
    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["birthlens", *map(str, arguments)])
        try:
            main()
        except SystemExit as stopped:
            status = stopped.code or 0
    assert status == code and "Traceback" not in err.getvalue(), err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


@pytest.mark.parametrize("name", sorted(HOMES))
def test_every_command_has_help_with_an_example(name: Any) -> None:
    assert present(Commands().get_command(None, name)).name == name
    result = CliRunner().invoke(group, [name, "--help"])
    assert result.exit_code == 0
    assert f"Example: birthlens {name}" in result.output


def test_train_is_quiet_off_a_terminal(tmp_path: Path) -> None:
    done = in_a_process("train", tmp_path / "run", *TINY)
    assert done.stdout == ""
    first, last, *notes = done.stderr.splitlines()
    assert all("note: the held-out loss" in note for note in notes)
    assert first == "birthlens: engine handwritten: 2,304 trained tokens are too few to be worth compiling"
    assert "12 steps" in last


def test_train_names_its_engine_before_it_fails(tmp_path: Path) -> None:
    done = birthlens("train", tmp_path / "run", *TINY, "model.n_layers=3", "optimiser.learning_rate=1e30", code=2)
    first, last = done.stderr.splitlines()
    assert (
        first == "birthlens: engine functional: it needs the two-layer simplified model, not a 3-layer simplified one"
    )
    assert "optimiser.learning_rate" in last


def test_steps_lists_kept_steps(run: Any) -> None:
    assert json.loads(birthlens("steps", run, "--format", "json").stdout) == [0, 4, 8, 12]
    assert "0 4 8 12" in birthlens("steps", run).stdout
    assert birthlens("steps", run, "--format", "csv").stdout.splitlines() == ["step", "0", "4", "8", "12"]


@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_probe_writes_tidy_tables(run: Any, tmp_path: Path, ending: Any) -> None:
    out = tmp_path / f"t.{ending}"
    birthlens("probe", run, "--steps", "0,-1", "--out", out)
    readers: dict[str, Any] = {"csv": pd.read_csv, "json": pd.read_json, "parquet": pd.read_parquet}
    table = readers[ending](out)
    assert {"step", "memory", "metric", "candidates", "value", "chance", "n"} <= set(table.columns)
    assert sorted(table["step"].unique()) == [0, 12]
    recall = table[(table["metric"] == "recall") & (table["memory"] == "trigger_memory") & (table["basis"] == "raw")]
    assert dict(zip(recall["candidates"], recall["n"], strict=False)) == {
        "all": 12, "triggers": 3, "triggers among all": 3,
    }  # fmt: skip


def test_probe_of_behaviour(run: Any, tmp_path: Path) -> None:
    rows = json.loads(birthlens("probe", run, "--what", "behaviour", "--steps", "last", "--format", "json").stdout)
    assert {"in_context", "global", "all"} <= {row["role"] for row in rows}


def test_corpus_prints_statistics(tmp_path: Path) -> None:
    text = tmp_path / "abc.txt"
    text.write_text("abcabcabd")
    facts = json.loads(birthlens("corpus", text, "--format", "json").stdout)
    assert (facts["tokens"], facts["distinct tokens"], facts["distinct bigrams"]) == (9, 4, 4)
    assert facts["tokens without successor"] == 1 and facts["most frequent"][:2] == ["a", "b"]


def test_a_config_can_be_shown_and_used(tmp_path: Path) -> None:
    shown = birthlens("train", "nowhere", "--preset", "demo", "--show-config", "training.steps=3").stdout
    (tmp_path / "c.yaml").write_text(shown)
    again = birthlens("train", "nowhere", "--config", tmp_path / "c.yaml", "--show-config").stdout
    assert shown == again and "steps: 3" in shown


def test_a_users_text(tmp_path: Path) -> None:
    # YAML would cut this name at its #.
    text = tmp_path / "my novel: it's #2 \N{OPEN BOOK}.txt"
    text.write_text("she sells sea shells by the sea shore " * 5)
    (tmp_path / "my novel").write_text("another text altogether")
    birthlens("train", tmp_path / "run", "--corpus", text, *TINY[2:])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["corpus"]["path"] == str(text)
    text.unlink()
    assert "trigger" in birthlens("probe", tmp_path / "run").stdout


def test_a_training_logs_to_tensorboard_and_to_no_run_but_its_own(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, scalars = [], []

    class SummaryWriter:
        def __init__(self, path: Any) -> None:
            opened.append(path)

        def add_scalar(self, name: Any, value: Any, step: Any) -> None:
            scalars.append((name, step))

        def close(self) -> None:
            opened.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    result = CliRunner().invoke(group, ["train", str(run), *TINY, "--log", "tensorboard"])
    assert isinstance(result.exception, BirthlensError) and not opened
    result = CliRunner().invoke(group, ["train", str(tmp_path / "new"), *TINY, "--log", "tensorboard"])
    assert result.exit_code == 0, result.output
    assert opened == [str(tmp_path / "new" / "tensorboard"), "closed"]
    assert ("held_out/in_context_accuracy", 12) in scalars


@pytest.mark.parametrize("refusal", [None, "api_key not configured (no-tty)"])
def test_weights_and_biases_gets_every_measurement_or_its_refusal_is_told(
    refusal: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[Any] = []
    session = SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finished")
    )

    def init(**options: Any) -> Any:
        if refusal is not None:
            raise RuntimeError(refusal + "\nmore lines")
        logged.append(options)
        return session

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    result = CliRunner().invoke(group, ["train", str(tmp_path / "new"), *TINY, "--log", "wandb"])
    if refusal is not None:
        assert isinstance(result.exception, BirthlensError)
        said = str(result.exception)
        assert refusal in said and "more lines" not in said and "wandb login" in said and "--resume" in said
        return
    assert result.exit_code == 0, result.output
    assert logged[0]["name"] == "new" and logged[0]["config"]["training"]["steps"] == 12 and logged[-1] == "finished"
    measured = [
        (row["step"], f"{row['split']}/{row['metric']}", row["value"]) for row in load_run(tmp_path / "new").rows()
    ]
    assert [(step, name, value) for step, values in logged[1:-1] for name, value in values.items()] == measured


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "OUT", "task.contxt=3"], ["task.contxt", "context"]),
        (["train", "OUT", "task.n_triggers=70"], ["task.n_triggers = 70", "64"]),
        (["train", "OUT", "task.context=1"], ["task.context = 1"]),
        (["train", "OUT", "optimiser.learning_rate=-1"], ["learning_rate = -1"]),
        (["train", "OUT", "training.freeze_until={W_X: 2}"], ["W_X"]),
        (["train", "OUT", "--preset", "fast"], ["preset = 'fast'", "demo"]),
        (["train", "OUT", "--corpus", "absent.txt"], ["absent.txt", "cannot be read"]),
        (["train", "OUT", "--resume"], ["does not exist"]),
        (["train", "RUN"], ["already holds a run", "--resume"]),
        (["train", "RUN", "--resume", "--show-config"], ["--show-config", "run.json", "leave it out"]),
        (["train", "RUN", "--resume", "--preset", "demo"], ["--preset: --resume takes its config from the run"]),
        (["train", "RUN", "--resume", "task.context=3"], ["task.context=3", "only training.steps=N", "fork"]),
        (["train", "RUN", "--resume", "training.steps=1e3"], ["training.steps=1e3", "only training.steps=N"]),
        (["train", "RUN", "--resume", "training.steps=3"], ["training.steps = 3", "has 12 already"]),
        (["train", "OUT", "--corpus", "a.txt", "corpus.path=b.txt"], ["corpus.path=b.txt", "--corpus a.txt"]),
        (["train", "OUT", "--show-config", "--log", "wandb"], ["--log: --show-config trains nothing"]),
        (["attention", "RUN", "--text", "a b", "--row", "2"], ["--row: the sequences are given"]),
        (["scores", "RUN", "--kind", "weights", "--batch-size", "3"], ["--batch-size", "reads weights"]),
        (["scores", "RUN", "--kind", "weights", "--seed", "3"], ["--seed", "draws nothing"]),
        (
            ["weight-patch", "RUN", "--metric", "all_loss", "--format", "csv"],
            ["--metric: every metric is in the table"],
        ),
        (["weight-patch", "RUN", "--by", "ideal", "--from", "0"], ["--from: ", "--by"]),
        (["memories", "RUN", "--cells", "--whole"], ["--cells, --whole: it acts with --ledger only", "leave them out"]),
        (["memories", "RUN", "--ledger", "--fold"], ["--fold: ", "no layer norms"]),
        (["edges", "RUN", "--integration-steps", "3"], ["--integration-steps: it acts with --attribution only"]),
        (["watch", "RUN", "--once", "--every", "3"], ["--every: --once prints one frame"]),
        (["reproduce", "order-fixed", "--paper", "noise"], ["--paper: the claims are named"]),
        (["reproduce", "--list", "--seeds", "3"], ["--seeds: --list runs nothing"]),
        (["bench", "--from", "x.json", "--quick"], ["--quick: --from measures nothing"]),
        (["steps", "absent"], ["absent", "does not exist"]),
        (["probe", "RUN", "--steps", "3"], ["step = 3", "0, 4, 8, 12"]),
        (["probe", "RUN", "--steps", "some"], ["steps = 'some'", "every:N"]),
        (["probe", "RUN", "--out", "x.txt"], ["x.txt", ".csv, .json, .parquet"]),
        (["probe", "RUN", "--out", "absent/x.csv"], ["absent", "does not exist"]),
        (["probe", "RUN", "--out", "/dev/null/x.csv"], ["/dev/null", "does not exist"]),
        (["train", "OUT", "task.context=100000000000"], ["out of memory", "task.context"]),
        (["train", "OUT", "task.split=train", "task.split_fraction=0.001"], ["split_fraction = 0.001", "no output"]),
        (["train", "/dev/null"], ["'/dev/null' is a file"]),
        (["steps", "RUN/run.json"], ["run.json' is a file"]),
        (["frobnicate"], ["frobnicate"]),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    run: Any,
    tmp_path: Path,
    arguments: Any,
    words: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [word.replace("RUN", str(run)).replace("OUT", str(tmp_path / "out")) for word in arguments]
    before = sorted(run.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["birthlens", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists() and sorted(run.rglob("*")) == before


def test_what_the_system_refuses_is_one_sentence(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr(sys, "argv", ["birthlens", "probe", str(run), "--out", str(tmp_path / "x.csv")])
    monkeypatch.setattr("birthlens.system.os.replace", refuse)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "x.csv cannot be written: Permission denied." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("birthlens.runs.run.load_run", refuse)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "birthlens: somewhere cannot be used: Permission denied.\n"


def test_updates_without_a_target_are_told(tmp_path: Path) -> None:
    # The rarest tokens of the chain are its triggers: none comes twice in so few tokens.
    rare = ["corpus.source=markov", "corpus.zipf_exponent=9", "task.offset=60", "task.n_triggers=2", "task.context=8"]
    size = ["model.d_model=8", "training.batch_size=2", "evaluation.batch_size=2", "training.steps=3"]
    done = birthlens("train", tmp_path / "run", *rare, "task.cycles=clean", *size)
    assert "3 of 3 updates were skipped" in done.stderr and "training.batch_size" in done.stderr


def test_binary_and_empty_corpora_are_refused(tmp_path: Path) -> None:
    (tmp_path / "b.bin").write_bytes(b"\x00\x01\xff")
    (tmp_path / "e.txt").write_text("")
    assert "b.bin" in birthlens("corpus", tmp_path / "b.bin", code=2).stderr
    assert "0 distinct" in birthlens("corpus", tmp_path / "e.txt", code=2).stderr


IMPORTS = (
    "import sys; sys.argv = {argv!r}; sys.stdout = open('/dev/null', 'w'); {body}; print(*sys.modules, file=sys.stderr)"
)


def modules_after(body: Any, argv: Any = ()) -> Any:
    code = IMPORTS.format(argv=["birthlens", *map(str, argv)], body=body)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


RUN_MAIN = "from birthlens.cli import group; group(standalone_mode=False)"


def test_start_up_imports_little(run: Any) -> None:
    assert not {"torch", "transformer_lens", "pandas", "numba"} & modules_after("import birthlens")
    for argv in (["--help"], ["train", "--help"], ["steps", run]):
        loaded = modules_after(RUN_MAIN, argv)
        assert not {"torch", "transformer_lens", "pandas", "numba", "rich"} & loaded, argv
    probed = modules_after(RUN_MAIN, ["probe", run, "--format", "csv"])
    assert not {"torch", "transformer_lens", "pandas", "jaxtyping", "numpy.ma", "birthlens.cli.scoring"} & probed
    assert "transformer_lens" not in modules_after(RUN_MAIN, ["probe", run, "--what", "behaviour"])


def test_a_held_out_loss_worse_than_uniform_is_told(tmp_path: Path) -> None:
    words = ["train", str(tmp_path / "a"), *TINY, "training.steps=4", "optimiser.learning_rate=3"]
    done = CliRunner().invoke(group, words, catch_exceptions=False)
    metrics = load_run(tmp_path / "a").metrics().query("split == 'held_out' and metric == 'global_loss'")
    assert metrics.sort_values("step")["value"].iloc[-1] > math.log(12)
    wanted = "the held-out loss is above that of uniform guessing (2.485 nats)"
    notes = [line for line in done.stderr.splitlines() if wanted in line]
    assert len(notes) == 1 and " global " in notes[0]


def test_a_mistyped_command_or_key_gets_a_suggestion() -> None:
    done = CliRunner().invoke(group, ["trian", "x"])
    assert done.exit_code == 2 and "No such command 'trian'. The closest is train." in done.output
    with pytest.raises(BirthlensError, match=r"The closest is steps\."):
        RunConfig.parse({}, ["training.stesp=3"])
