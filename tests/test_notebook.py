"""The Colab notebook runs from its first cell to its last, on small models."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.fast_compilation import FAST_COMPILATION


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_cell_of_the_notebook_runs(
    project_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = project_root / "ivl_jax" / "assets" / "family"
    # One device, as on Colab.
    monkeypatch.setenv("XLA_FLAGS", FAST_COMPILATION)
    monkeypatch.setenv("IVL_NOTEBOOK_STEPS", "3")
    monkeypatch.setenv("IVL_NOTEBOOK_SMALL", str(family / "S"))
    monkeypatch.setenv("IVL_NOTEBOOK_LARGE", str(family / "L"))
    monkeypatch.setenv("IVL_NOTEBOOK_RUNS", str(tmp_path))
    notebook = nbformat.read(project_root / "examples" / "colab.ipynb", as_version=4)
    client = NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(project_root)}}
    )
    client.execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "base_nll" in printed
    assert "L  " in printed
    assert "α = -1.0" in printed
    assert (tmp_path / "colab" / "smollm2" / "value" / "ivl.json").is_file()
