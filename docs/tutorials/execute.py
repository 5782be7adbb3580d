"""Runs notebooks at full size and keeps their outputs: python docs/tutorials/execute.py [NAME.ipynb …]."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path) -> None:
    """Runs one where it is and writes it, without its progress bars."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, record_timing=False, coalesce_streams=True, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for notebook_path in sys.argv[1:] or sorted(Path(__file__).parent.glob("*.ipynb")):
        execute(Path(notebook_path).resolve())
