"""The notebooks in docs/tutorials run, and what is committed of them is whole, small, and says nothing of a machine."""

import json
import os
import sys
from pathlib import Path

import pytest

from commands import ROOT, environment

NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
MAX_BYTES = 1_000_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_at_smoke_size(path, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    for folder in ("configs", "launch"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    variables = {
        "TARFLOW_TUTORIAL": "smoke",
        "TARFLOW_DATA_DIR": str(tmp_path / "data"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # of `python` in shell cells
    }
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment(**variables))
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_committed(path):
    text = path.read_text()
    assert len(text.encode()) < MAX_BYTES
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(output["output_type"] != "error" for output in outputs)
    for output in outputs:
        said = "".join(output.get("text", [])) + "".join(output.get("data", {}).get("text/plain", []))
        assert not any(word in said for word in ("Warning", "WARNING", "/home/", "/root/", "/tmp/", str(ROOT)))
