"""The notebooks run from their first cell to the last, at a reduced size."""

import os
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[1]
PARAMETERS = """
CONFIG = "tests/micro.py:micro"
STEPS = 2
STACK = "LA"
RUNS = {runs!r}
"""


def notebook(name):
    return nbformat.read(ROOT / "notebooks" / name, as_version=4)


def codes(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_stored_without_outputs(path):
    for cell in codes(notebook(path.name)):
        assert cell.outputs == [] and cell.execution_count is None


def test_hypenet(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    # The second stack is the first one again, so that its programs are compiled already.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
    book = notebook("hypenet.ipynb")
    [parameters] = [c for c in book.cells if "parameters" in c.metadata.get("tags", ())]
    parameters.source = PARAMETERS.format(runs=str(tmp_path))
    resources = dict(metadata=dict(path=str(ROOT)))
    NotebookClient(book, timeout=300, kernel_name="python3", resources=resources).execute()
    shown = [out for cell in codes(book) for out in cell.outputs if out.output_type != "stream"]
    assert len([out for out in shown if "image/png" in out.get("data", {})]) == 3
    text = "".join(o.text for cell in codes(book) for o in cell.outputs if "text" in o)
    for line in ("?q", "LA -> 1 x LA", "LLLALLLALLLALLLALLLALLLALLLALLLALLLA -> 9 x LLLA"):
        assert line in text, text
    for name in ("hybrid", "LA"):
        assert (tmp_path / name / "evaluation.json").exists()
