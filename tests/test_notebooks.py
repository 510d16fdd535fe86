"""Notebooks run from the first cell to the last; trainings are short, and little is left."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")
def test_notebook(path, tmp_path):
    if path.stem == "figure7":
        tmp_path = FOLDER  # it reads the results of experiments/
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = re.sub(r"\bepochs=\d+", "epochs=1", cell.source)
        cell.source = re.sub(r"\bthreshold=[\d.]+", "threshold=10", cell.source)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} >= {"embedded", "figure7", "quickstart"}
