"""launch/convert.py: its four commands and what it says to a wrong one."""

import os
import subprocess
import sys

import pytest

from t2i_jax import cli
from t2i_jax import convert as library
from t2i_jax.errors import ConfigError
from tests import toys
from tests.test_launch import ROOT


@pytest.fixture(scope="module")
def convert(tmp_path_factory):
    """Runs the script in an empty directory: (status, out, err)."""
    directory = tmp_path_factory.mktemp("cwd")

    def run(*arguments):
        command = [sys.executable, ROOT / "launch" / "convert.py", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=directory, env=os.environ, capture_output=True, text=True, timeout=200
        )
        return done.returncode, done.stdout, done.stderr

    return run


def test_the_commands(convert, tmp_path, trained):
    status, out, err = convert(
        "export", f"--checkpoint={trained}", f"--out={tmp_path}/raw", "--weights=raw"
    )
    assert status == 0 and "exported to" in out and "weights raw" in out, err
    assert "writing 1/1" in err
    assert (tmp_path / "raw" / "fused_pipeline.py").exists()
    assert "the raw trained weights after 4 steps" in (tmp_path / "raw" / "README.md").read_text()

    model = toys.model("ablations/rope_2d", tmp_path / "toy")
    theirs = library.write(model, tmp_path / "theirs", "reference", "float32")
    status, out, err = convert("import", f"--source={theirs}", f"--out={tmp_path}/ours")
    assert status == 0 and "imported to" in out, err
    status, out, _ = convert("inspect", tmp_path / "ours")
    assert status == 0 and "step 7, weights EMA" in out and len(out.splitlines()) < 20
    for word in ("deep source, joint attention", "positions 2d-rope", "dit", "llm", "float32"):
        assert word in out
    status, out, _ = convert("check", theirs, tmp_path / "ours")
    assert (status, out) == (0, "The same model, tensor by tensor.\n")
    status, out, _ = convert("check", trained, tmp_path / "raw")
    assert status == 1 and "dit/blocks/mlp/up/weight differs by up to" in out


COMMANDS = {"import": [], "inspect": ["DIR"], "check": ["A", "B"]}


@pytest.mark.parametrize(
    "words, message",
    [
        ([], r"which command\? Known are import, inspect DIR, check A B \(--help\)"),
        (["convert"], r"what is 'convert'\? Known are"),
        (["check", "a"], "the command is 'check A B', not 'check a'"),
        (["import", "a"], "the command is 'import', not 'import a'"),
    ],
)
def test_commands_that_are_none(words, message):
    command, *rest = words or [""]
    with pytest.raises(ConfigError, match=message):
        cli.check_command(command, rest, COMMANDS)


def test_flags_that_are_needed():
    cli.require(source="a", out="b")
    with pytest.raises(ConfigError, match=r"--source=\.\.\. and --out=\.\.\. must be given"):
        cli.require(source=None, out="")


def test_what_cannot_work_is_said(convert):
    status, _, err = convert("inspect", "nowhere")
    assert status == 1 and err.endswith("nowhere: no such directory.\n") and "Traceback" not in err
    status, _, err = convert("export", "--out=x", "--format=onnx")
    assert status == 2 and "should be one of <reference|diffusers|safetensors>" in err
