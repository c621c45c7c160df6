"""The notebooks run from their first cell to the last, at a reduced size."""

import os
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[1]
HYPENET = """
CONFIG = "tests/micro.py:micro"
STEPS = 2
STACK = "LA"
RUNS = {runs!r}
"""
HALO = """
CONFIG = "tests/halo/micro_halo.py:micro"
RUN = {runs!r}
"""
HSA = """
CONFIG = "configs/hsa.py:tiny,seq_len=64,batch_size=2,model.width=32,evaluation.examples=10"
STEPS = 2
WALK = (1, 40)
EXAMPLES = 5
RUN = {runs!r}
"""


def notebook(name):
    return nbformat.read(ROOT / "notebooks" / name, as_version=4)


def codes(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_stored_without_outputs(path):
    for cell in codes(notebook(path.name)):
        assert cell.outputs == [] and cell.execution_count is None


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Runs a notebook with other parameters; gives its pictures and its text."""
    folders = [ROOT, ROOT / "tests", ROOT / "tests" / "halo"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    # Commands of one notebook run programs that others have compiled already.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

    def run(name, parameters):
        book = notebook(name)
        [cell] = [c for c in book.cells if "parameters" in c.metadata.get("tags", ())]
        cell.source = parameters.format(runs=str(tmp_path))
        resources = dict(metadata=dict(path=str(ROOT)))
        NotebookClient(book, timeout=600, kernel_name="python3", resources=resources).execute()
        outputs = [out for cell in codes(book) for out in cell.outputs]
        pictures = [out for out in outputs if "image/png" in out.get("data", {})]
        return pictures, "".join(out.text for out in outputs if "text" in out)

    return run


@pytest.mark.slow
def test_hypenet(tmp_path, execute):
    pictures, text = execute("hypenet.ipynb", HYPENET)
    assert len(pictures) == 3
    for line in ("?q", "LA -> 1 x LA", "LLLALLLALLLALLLALLLALLLALLLALLLALLLA -> 9 x LLLA"):
        assert line in text, text
    for name in ("hybrid", "LA"):
        assert (tmp_path / name / "evaluation.json").exists()


@pytest.mark.slow
def test_halo(tmp_path, execute):
    pictures, text = execute("halo.ipynb", HALO)
    assert len(pictures) == 1
    for line in ("layers kept: scores", "finetuned", "teacher, TT: 462 bytes ... ?q"):
        assert line in text, text
    assert "memory of a text of a million bytes: 128 MiB" in text  # 4 * 2^20 * 2 * 8 * 2 layers
    assert (tmp_path / "halo.json").exists()


@pytest.mark.slow
def test_hsa(tmp_path, execute):
    pictures, text = execute("hsa.ipynb", HSA)
    assert len(pictures) == 4
    for line in ("   2,560 bytes: ", "needle      256 layer 0: recall @1", "asked: '?", "score"):
        assert line in text, text
    assert text.count("chunk ") >= 4  # what is read for one question
    assert (tmp_path / "retrieval.json").exists()
