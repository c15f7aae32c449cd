"""The notebook, as Colab would run it, with the shortest settings."""

from pathlib import Path
import shutil

from nbclient import NotebookClient
import nbformat

ROOT = Path(__file__).parent.parent


def test_it_runs_from_the_first_cell_to_the_last(tmp_path, monkeypatch):
    """In a copy of the checkout, because it trains below its own directory."""
    for name in ("configs", "launch", "notebooks", "t2i_jax"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    monkeypatch.setenv("T2I_NOTEBOOK", "small")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # one device
    notebook = nbformat.read(tmp_path / "notebooks" / "colab_tpu.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # none are kept
    where = {"metadata": {"path": str(tmp_path / "notebooks")}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    (last,) = [cell for cell in notebook.cells if "Pipeline.load" in cell.source]
    pictures = [o for o in last.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 4
    text = "".join(o.get("text", "") for o in last.outputs)
    assert "GB of weights, images of (24, 24)" in text
    assert (tmp_path / "runs" / "colab" / "exported" / "model_index.json").is_file()
