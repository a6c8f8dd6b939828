import nbformat
import pytest

from notebooks.execute import FOLDER, execute

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SLOW = {path.stem for path in NOTEBOOKS} - {"attention_cores"}  # trainings, compilations for TPUs, a real model


def runs():
    return [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in SLOW)) for path in NOTEBOOKS]


@pytest.mark.parametrize("path", runs())
def test_notebook_runs_from_top_to_bottom(path):
    execute(path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(output.get("data", {}).get("image/png") for cell in cells for output in cell.outputs)
