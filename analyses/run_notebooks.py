"""Run the notebooks and keep their pictures and tables in them; interactive attention views, which are large, are left out.

python analyses/run_notebooks.py
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbclient
import nbformat

HERE = Path(__file__).parent
LONGEST = 20_000
"""Characters of the longest HTML that is kept: tables are shorter, attention views longer."""


def main() -> None:
    """Run every notebook, or those that are named, in an empty folder, and write each back with its outputs."""
    os.environ["BIRTHLENS_RUNS"] = "runs"
    for path in [HERE / name for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        notebook = nbformat.read(path, 4)  # type: ignore[no-untyped-call]
        with tempfile.TemporaryDirectory() as folder:
            nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": folder}}).execute()
            for cell in notebook.cells:
                cell.metadata.pop("execution", None)
                if cell.cell_type == "code":
                    cell.outputs = [kept(output) for output in cell.outputs if output.get("name") != "stderr"]
        nbformat.write(notebook, path)  # type: ignore[no-untyped-call]
        print(path.name, f"{path.stat().st_size / 1e6:.1f} MB")


def kept(output: Any) -> Any:
    """Return an output without large HTML; what remains of it is its text."""
    data = output.get("data", {})
    if len(data.get("text/html", "")) > LONGEST:
        del data["text/html"]
    return output


if __name__ == "__main__":
    main()
