"""Provenance: a digest changes where a number could, in a really edited copy of the package, and nowhere else."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import birthlens
from birthlens.config.run import CorpusConfig
from birthlens.runs import provenance
from birthlens.runs.provenance import TRAINING, code_digest, corpus_digest, sources
from birthlens.tasks.corpus import statistics_of

PACKAGE = Path(birthlens.__file__).parent
BEHAVIOURS = "birthlens.claims.statistics.behaviours"


def edited(folder: Path, name: str, old: str, new: str) -> Path:
    """Copy the package into a folder and edit one file there."""
    shutil.copytree(PACKAGE, folder / "birthlens", ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "birthlens" / name
    text = file.read_text()
    assert old in text, (name, old)
    file.write_text(text.replace(old, new, 1))
    return folder


def test_a_copy_has_the_digest_of_its_original(tmp_path: Path) -> None:
    home = edited(tmp_path, "tasks/bigram.py", "import", "import")
    for module in (TRAINING, BEHAVIOURS):
        assert code_digest(module, home) == code_digest(module)


def moved(text: Any) -> Any:
    """Return a copy of a function's source for another module, and what is left of the first one."""
    start = text.index("def _is_power")
    return text[start:], text[:start].replace("import math\n", "").rstrip() + "\n"


def test_a_function_that_moves_to_another_module_keeps_the_digest(tmp_path: Path) -> None:
    """With its import, and where its module is called otherwise; a change on the way is found."""
    home = edited(tmp_path, "config/schedule.py", "import", "import")
    folder = home / "birthlens" / "config"
    function, rest = moved((folder / "schedule.py").read_text())
    before = code_digest(TRAINING)
    future = '"""Powers."""\n\nfrom __future__ import annotations\n\nimport math\n\n\n'
    own = "\nfrom birthlens.config.run import RunConfig\n"
    assert own in rest
    for number, (text, same) in enumerate({function: True, function.replace("== step", "<= step"): False}.items()):
        (folder / f"powers{number}.py").write_text(future + text)
        new = f"\nfrom birthlens.config.powers{number} import _is_power{own}"
        (folder / "schedule.py").write_text(rest.replace(own, new))
        provenance.code_digest.cache_clear()
        provenance._read.cache_clear()
        digest = code_digest(TRAINING, home)
        assert (digest == before) == same


def test_another_function_under_the_same_name_is_found(tmp_path: Path) -> None:
    """Both functions were in the digest before; only the import says which one is called."""
    (tmp_path / "birthlens").mkdir()
    for name, text in {
        "a": "def f(): return 1\n",
        "b": "def f(): return 2\n",
        "c": "from birthlens.a import f\nimport birthlens.b\nimport birthlens.a\n",
        "d": "from birthlens.b import f\nimport birthlens.b\nimport birthlens.a\n",
        "e": "from birthlens.a import f as g\nimport birthlens.b\nimport birthlens.a\n",
    }.items():
        (tmp_path / "birthlens" / f"{name}.py").write_text(text)
    assert len({code_digest(f"birthlens.{name}", tmp_path) for name in "cde"}) == 3


@pytest.mark.parametrize(
    ("name", "old", "new", "training", "measuring"),
    [
        ("training/loop.py", "    keep: bool", "    keep: int", True, False),
        ("training/simplified/numba_step.py", "import numpy as np", "import decimal as np", True, False),
        ("tasks/noise.py", "return", "pass\n    return", True, True),
        ("model/initialisation.py", "return", "pass\n    return", True, True),
        ("analysis/behaviour/excess.py", "return", "pass\n    return", False, True),
        ("claims/statistics/behaviours.py", "0.5", "0.6", False, True),
        ("viz/figures/style.py", "return", "pass\n    return", False, False),
        ("viz/report/scorecard.py", "WIDTH = 260", "WIDTH = 261", False, False),
        ("training/loop.py", "Batch number s", "The batch of number s", False, False),
        ("training/loop.py", "from __future__", "# a comment\n\nfrom __future__", False, False),
    ],
)
def test_an_edit_changes_the_digests_that_depend_on_it(
    tmp_path: Path, name: str, old: str, new: str, training: bool, measuring: bool
) -> None:
    home = edited(tmp_path, name, old, new)
    assert (code_digest(TRAINING, home) != code_digest(TRAINING)) == training
    assert (code_digest(BEHAVIOURS, home) != code_digest(BEHAVIOURS)) == measuring


def test_all_engines_and_the_task_are_in_what_training_depends_on() -> None:
    found = sources(TRAINING)
    for name in (
        "config.run",
        "tasks.corpus",
        "tasks.bigram",
        "tasks.facts",
        "tasks.sampling",
        "model.initialisation",
        "model.weights",
        "model.forward",
        "training.simplified.kernels",
    ):
        assert f"birthlens.{name}" in found
    assert not {"birthlens.cli", "birthlens.viz.figures", "birthlens.claims", "birthlens.training.sweep"} & found.keys()


def test_a_module_of_somebody_s_own_counts_with_what_it_imports() -> None:
    found = sources(__name__)
    assert __name__ in found and "birthlens.tasks.corpus" in found


def test_the_corpus_counts_to_the_bit() -> None:
    chain = statistics_of(CorpusConfig(source="markov", vocabulary=9))
    again = statistics_of(CorpusConfig(source="markov", vocabulary=9))
    assert corpus_digest(chain) == corpus_digest(again)
    unigram = chain.unigram.copy()
    unigram[0] += 1e-16
    for other in (replace(chain, unigram=unigram), replace(chain, vocab=chain.vocab[::-1])):
        assert corpus_digest(other) != corpus_digest(chain)
