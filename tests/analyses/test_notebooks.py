"""The notebooks run from top to bottom, show what they promise, and are committed without outputs."""

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
def test_a_notebook_is_committed_clean(path: Path) -> None:
    for cell in nbformat.read(path, 4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert "/work" not in cell.source and "/tmp" not in cell.source


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
