"""The notebooks in examples/ run, and are committed as they were run: small, and in order.

`jupyter execute --inplace examples/*.ipynb` runs them anew where a result changes.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.support.pages import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def assert_drawn(notebook: Any, name: str) -> None:
    """Every cell that draws shows its picture."""
    drawing = [cell for cell in notebook.cells if cell.source.endswith((".plot();", "plt.show()"))]
    assert drawing, name
    for cell in drawing:
        assert any("image/png" in o.get("data", {}) for o in cell.outputs), f"{name}: {cell.source}"


def test_committed_notebooks_are_executed_and_small() -> None:
    assert [path.name for path in NOTEBOOKS] == ["compare_checkpoints.ipynb", "prune_digits.ipynb"]
    for path in NOTEBOOKS:
        assert path.stat().st_size < 100_000, path.name
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        counts = [cell.execution_count for cell in cells]
        assert counts == list(range(1, len(cells) + 1)), path.name
        outputs = [output for cell in cells for output in cell.outputs]
        assert outputs and all(output.output_type != "error" for output in outputs), path.name
        assert all(output.get("name") != "stderr" for output in outputs), path.name
        assert_drawn(notebook, path.name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(zmq|jupyter_client|nbclient).*")
def test_notebooks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one kernel, as its start costs more than both notebooks; each begins with nothing."""
    for needed in ("sklearn", "matplotlib", "ipykernel"):
        pytest.importorskip(needed)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    client = nbclient.NotebookClient(
        nbformat.v4.new_notebook(),
        timeout=120,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    clear = nbformat.v4.new_code_cell("%reset -f")
    with client.setup_kernel():
        # First the one whose first picture is fxpath's own, which must not turn others off.
        for path in reversed(NOTEBOOKS):
            client.nb = nbformat.read(path, as_version=4)
            client.reset_execution_trackers()
            client.nb.cells.insert(0, clear)
            for index, cell in enumerate(client.nb.cells):
                # An error in a cell is an exception that shows the cell and its traceback.
                client.execute_cell(cell, index)
            assert_drawn(client.nb, path.name)
