"""The notebook, as Colab would run it, with the shortest settings."""

import json
import os
from pathlib import Path
import shutil

from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
PATH = ROOT / "notebooks" / "colab_tpu.ipynb"
INSTALL, LOOK = "## Install", "## Which chip"


def section(title):
    """The code under a heading."""
    cells = nbformat.read(PATH, as_version=4).cells
    (start,) = [i for i, cell in enumerate(cells) if cell.source.startswith(title)]
    return cells[start + 1].source


def run(where, *code):
    """Runs cells in a folder; returns what they print. Raises CellExecutionError."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(x) for x in code])
    resources = {"metadata": {"path": str(where)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """Colab with a checkout: (the code that makes it that, its folder); pip is written down."""
    checkout = tmp_path / "t2i_jax"
    checkout.mkdir()
    for name in ("setup.cfg", "requirements.txt"):
        shutil.copy(ROOT / name, checkout)
    pip = tmp_path / "bin" / "pip"
    pip.parent.mkdir()
    pip.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/pip_arguments\n')
    pip.chmod(0o755)
    monkeypatch.setenv("PATH", f"{pip.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return 'import sys, types\nsys.modules["google.colab"] = types.ModuleType("colab")', tmp_path


def test_without_a_checkout_it_says_what_to_do(tmp_path):
    with pytest.raises(CellExecutionError, match=r"There is no checkout .*REPOSITORY.*unzip"):
        run(tmp_path, section(INSTALL))


def test_colab_gets_the_pinned_versions_and_stops_without_a_tpu(colab):
    begin, folder = colab
    with pytest.raises(CellExecutionError, match=r"No TPU is here\. Runtime > Change runtime type"):
        run(folder, begin, section(INSTALL), section(LOOK))
    assert (folder / "pip_arguments").read_text().split()[-2:] == ["-c", "requirements.txt"]
    assert (folder / "t2i_jax" / "requirements.txt").is_file()


def test_colab_asks_for_a_restart_only_where_what_is_in_use_was_replaced(colab):
    begin, folder = colab
    assert str(folder) in run(folder, begin, "import numpy", section(INSTALL))
    with pytest.raises(CellExecutionError, match=r"numpy was in use .*Restart session"):
        run(folder, begin, 'import numpy\nnumpy.__version__ = "1.0"', section(INSTALL))


def test_it_runs_from_the_first_cell_to_the_last(tmp_path, monkeypatch):
    """In a copy of the checkout, because it trains below its own directory."""
    for name in ("configs", "launch", "notebooks", "t2i_jax"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    monkeypatch.setenv("T2I_NOTEBOOK", "small")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # one device
    notebook = nbformat.read(PATH, as_version=4)
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
    report = json.loads((tmp_path / "runs" / "colab" / "report.json").read_text())
    assert report["num_images"] == 6
