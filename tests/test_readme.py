"""The code of the README and of the documentation runs as it stands, and every command in them is one that exists."""

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from birthlens.cli import group

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TASKS = ROOT / "docs" / "tasks.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "data" / "README.md"]
NOT_RUN = "<!-- not run:"
"""Stands, with a reason, above a block that the tests leave out."""
SECONDS = 600


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in a language, without those that are marked as not run."""
    found = re.finditer(rf"(<!-- not run: [^>]+-->\n)?```{language}\n(.*?)```", page.read_text(), re.DOTALL)
    return [match[2] for match in found if not match[1]]


def commands(page: Path) -> list[str]:
    """Return every birthlens command of a page, in blocks and in tables."""
    text = page.read_text()
    lines = [line.strip() for block in blocks(page, "sh") for line in block.splitlines()]
    lines += re.findall(r"`(birthlens [a-z][^`]*)`", text)
    return [line.split("  #")[0] for line in lines if re.match(r"birthlens [a-z-]+( |$)", line)]


def run_python(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_of_the_readme_prints_what_the_readme_says(tmp_path: Path) -> None:
    (code,) = blocks(README, "python")
    promised = next(block for block in blocks(README, "text") if "output_memory" in block)
    printed = run_python(code, tmp_path)
    assert [line.split()[:2] for line in printed.splitlines()] == [line.split()[:2] for line in promised.splitlines()]
    for line, other in zip(printed.splitlines()[1:-1], promised.splitlines()[1:-1], strict=True):
        # Recall may differ in the last bits of a training on another machine.
        assert float(line.split()[2]) == pytest.approx(float(other.split()[2]), abs=0.1)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in (README, TASKS) and blocks(page, "python")])
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    for code in blocks(page, "python"):
        run_python(code, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_exists_with_its_options(page: Path) -> None:
    for line in commands(page):
        words = shlex.split(line)[1:]
        context = click.Context(group, info_name="birthlens")
        command = group.get_command(context, words[0])
        assert command is not None, line
        # A command named alone in a sentence is not a call, and neither is a pattern.
        if len(words) > 1 and "..." not in line and "--help" not in words:
            command.make_context(words[0], words[1:], parent=context)


def test_the_commands_are_found() -> None:
    """A test over an empty list would always pass."""
    assert len(commands(README)) > 12
    assert "birthlens demo runs/demo" in commands(ROOT / "docs" / "getting_started.md")


def test_the_task_of_the_documentation_goes_through_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its module is saved as the page says; then the page's own commands run, in their order, the first as a process."""
    (code,) = blocks(TASKS, "python")
    assert len(code.strip().splitlines()) <= 40
    (tmp_path / "repeats.py").write_text(code)
    lines = re.findall(r"^birthlens .*repeats.*$", TASKS.read_text(), re.MULTILINE)
    assert [line.split()[1] for line in lines] == ["train", "probe", "ablate", "report"]
    monkeypatch.chdir(tmp_path)
    train, *others = (shlex.split(line)[1:] for line in lines)
    done = subprocess.run([sys.executable, "-m", "birthlens", *train], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    try:
        for words in others:
            result = CliRunner().invoke(group, words)
            assert result.exit_code == 0, (words, result.output, result.exception)
    finally:
        sys.modules.pop("repeats", None)
    assert "task repeats:RepeatTask" in (tmp_path / "report.html").read_text()


def test_every_link_leads_somewhere() -> None:
    made = ("reference/", "configuration.md", "command_line.md")  # when the site is built, which checks them
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            if not target.startswith(made):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_site_names_every_command() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        site_pages = import_module("site_pages")
    finally:
        sys.path.remove(str(ROOT / "docs"))
    page = site_pages.command_page()
    assert [name for name in group.list_commands(None) if f"## birthlens {name}\n" not in page] == []
    settings = site_pages.configuration_page()
    assert "| `learning_rate` |" in settings and "### `task.kind=markov`" in settings
