"""The notebooks run from top to bottom, show what they promise, and are committed with their pictures."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (pip install birthlens[notebooks])")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (pip install birthlens[notebooks])")

HOME = Path(__file__).parents[2] / "analyses"
NOTEBOOKS = sorted(HOME.glob("*.ipynb"))
SMALL = (
    "training.steps=20 checkpoints.every=5 evaluation.every=5 evaluation.batch_size=16 "
    "training.batch_size=16 model.d_model=32 task.context=32"
)
LEAST = {
    "guided_tour": {"image/png": 7, "text/html": 2},
    "bring_your_own": {"image/png": 2, "text/html": 4},
    "experiments_on_training": {"image/png": 4, "text/html": 2},
}


def test_all_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(LEAST)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_its_pictures(path: Path) -> None:
    """As `python analyses/run_notebooks.py` writes it: run from top to bottom, without errors, paths or large pages."""
    assert path.stat().st_size < 2_500_000
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= LEAST[path.stem]["image/png"]
    said = [str(cell.source) for cell in cells]
    said += [str(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in outputs]
    assert not [text for text in said if "/work" in text or "/tmp" in text or "/home" in text]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_promises(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIRTHLENS_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BIRTHLENS_OVERRIDES", SMALL)
    monkeypatch.setenv("BIRTHLENS_STEPS", "5")
    (tmp_path / "runs").mkdir()
    notebook = nbformat.read(path, 4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    for kind, least in LEAST[path.stem].items():
        assert sum(kind in output.get("data", {}) for output in outputs) >= least
    if path.stem == "guided_tour":
        assert (tmp_path / "runs" / "demo.html").stat().st_size < 10_000_000
