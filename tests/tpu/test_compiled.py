"""What the TPU's own compiler makes of the flagship's step: `make tpu`. No TPU is needed."""

import json
import os
from pathlib import Path
import subprocess
import sys

import pytest

ROOT = Path(__file__).parent.parent.parent


def compiled(tmp_path, *flags):
    """The report of launch/compile.py."""
    out = tmp_path / "report.json"
    command = [sys.executable, "launch/compile.py", *flags, f"--out={out}"]
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def flagship(tmp_path_factory):
    """The paper's machine and batch."""
    where = tmp_path_factory.mktemp("flagship")
    return compiled(where, "--config=configs/fusion_2b.py", "--topology=v4-256", "--latents")


def received(report, **wanted):
    rows = [r for r in report["collectives"] if all(r[key] == v for key, v in wanted.items())]
    return sum(row["bytes"] for row in rows)


def test_it_fits_and_computes_what_the_model_needs(flagship):
    assert flagship["fits"] and flagship["devices"] == 128 and flagship["batch_size"] == 512
    assert flagship["bytes_needed"] < 0.4 * flagship["bytes_there"]
    assert abs(flagship["flops_ratio"] - 1) < 0.03


def test_weights_travel_in_bfloat16_and_activations_do_not(flagship):
    must, total = flagship["ideal_bytes"], flagship["collective_bytes"]
    assert 0.99 < flagship["collective_ratio"] < 1.15
    gathered = received(flagship, kind="all-gather")
    assert received(flagship, kind="all-gather", dtype="bf16") > 0.999 * gathered
    assert gathered == pytest.approx(must["all-gather"], rel=0.01)
    assert received(flagship, kind="all-to-all") == 0
    assert received(flagship, kind="collective-permute") < 0.01 * total


def test_gradients_leave_as_scattered_sums(flagship):
    must = flagship["ideal_bytes"]
    assert received(flagship, kind="reduce-scatter") == pytest.approx(
        must["reduce-scatter"], rel=0.01
    )
    assert received(flagship, kind="all-reduce") == pytest.approx(must["all-reduce"], rel=0.05)


def test_most_weights_come_while_something_else_is_computed(flagship):
    gathered = received(flagship, kind="all-gather")
    assert received(flagship, kind="all-gather", asynchronous=True) > 0.8 * gathered


def test_no_scores_in_memory(flagship):
    """No array of 1024 queries by 1280 keys, of whatever dtype: neither scores nor a mask."""
    assert flagship["scores"] == []
    assert flagship["largest"]
