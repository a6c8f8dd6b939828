"""`python -m notebooks.execute [NAME ...]`: runs notebooks from top to bottom and keeps their outputs."""

from __future__ import annotations

import os
import pathlib
import sys

import nbformat
from nbclient import NotebookClient

from zoo.files import atomic

FOLDER = pathlib.Path(__file__).parent
# Outputs are those of a CPU, without the CUDA plugin's complaint about a missing cuDNN.
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}


def execute(path: pathlib.Path) -> nbformat.NotebookNode:
    """The notebook with new outputs, run in the repository's root. Raises CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": FOLDER.parent}}
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # progress bars redraw themselves; the last word counts
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        cell.metadata.pop("execution", None)  # times of day, different in every run
    return notebook


def main() -> None:
    """Executes the notebooks named (default all) in place."""
    for path in [FOLDER / f"{name}.ipynb" for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        notebook = execute(path)
        with atomic(path) as temporary:
            nbformat.write(notebook, temporary)
        print(f"executed {path.name}")


if __name__ == "__main__":
    main()
