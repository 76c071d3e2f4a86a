"""The code of the README and of the documentation runs as it stands, in an empty folder."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TASKS = (ROOT / "docs" / "tasks.md").read_text()
SECONDS = 300


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_the_python_runs(code: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch.Size" in done.stdout


def test_the_task_of_the_documentation_goes_through_every_command(tmp_path: Path) -> None:
    """Its module is saved as the page says; then the page's own commands run, in their order."""
    (code,) = re.findall(r"```python\n(.*?)```", TASKS, re.DOTALL)
    assert len(code.strip().splitlines()) <= 40
    (tmp_path / "repeats.py").write_text(code)
    commands = re.findall(r"^birthlens .*repeats.*$", TASKS, re.MULTILINE)
    assert [command.split()[1] for command in commands] == ["train", "probe", "ablate", "report"]
    for command in commands:
        words = [sys.executable, "-m", "birthlens", *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, (command, done.stderr)
    assert "task repeats:RepeatTask" in (tmp_path / "runs" / "repeats" / "report.html").read_text()


def test_every_link_leads_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), ROOT / "data" / "README.md"]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            if not target.startswith("reference/"):  # made when the site is built, which checks them
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
