"""t2i_jax/xla_flags.py: which flags, for whom, and whose word is last."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from t2i_jax import cli, xla_flags

GATHER = "xla_enable_async_all_gather"
FUSE = "xla_tpu_enable_async_collective_fusion_fuse_all_gather"


def machine(folder, *ids):
    """A folder like /sys/bus/pci/devices, of devices (vendor, device)."""
    for slot, (vendor, device) in enumerate(ids):
        (folder / f"0000:0{slot}.0").mkdir(parents=True)
        (folder / f"0000:0{slot}.0" / "vendor").write_text(f"{vendor}\n")
        (folder / f"0000:0{slot}.0" / "device").write_text(f"{device}\n")
    return str(folder)


def test_the_chip_is_read_from_its_pci_id(tmp_path):
    intel, network = ("0x8086", "0x0063"), ("0x1ae0", "0x0042")
    assert xla_flags.detect(str(tmp_path / "none")) is None
    assert xla_flags.detect(machine(tmp_path / "cpu", intel, network)) is None
    v6e = machine(tmp_path / "v6e", intel, network, ("0x1ae0", "0x006f"), ("0x1ae0", "0x006f"))
    assert xla_flags.detect(v6e) == "v6e"
    assert xla_flags.detect(machine(tmp_path / "v4", ("0x1ae0", "0x005e"))) == "v4"


def test_the_pci_ids_are_those_that_jax_knows():
    utils = pytest.importorskip("jax._src.hardware_utils")
    known = {key: chip.name for key, chip in utils._TPU_PCI_DEVICE_IDS.items()}
    assert xla_flags._VENDOR == utils._GOOGLE_PCI_VENDOR_ID
    assert {key: known[key] for key in xla_flags._CHIPS} == xla_flags._CHIPS


def test_chips_that_gather_synchronously_get_the_flags_and_others_none():
    for chip in ("v4", "v5p", "v6e"):
        assert {flag.name for flag in xla_flags.flags(chip)} == {GATHER, FUSE}
    assert xla_flags.flags("v5e") == xla_flags.flags("tpu7x") == []
    with pytest.raises(ValueError, match="'v9' is none of v4, v5e"):
        xla_flags.flags("v9")


def test_every_flag_has_a_form_and_a_reason():
    for flag in xla_flags.FLAGS:
        assert re.fullmatch("xla_[a-z_]+", flag.name) and " " not in flag.value
        assert len(flag.reason.split()) > 5 and set(flag.chips) <= set(xla_flags.CHIPS)


def test_the_users_flags_come_last_and_win():
    environ = {"OTHER": "x"}
    xla_flags.apply(environ, "v6e")
    words = f"--{GATHER}=true --{FUSE}=true"
    assert environ == {"OTHER": "x", "LIBTPU_INIT_ARGS": words, "T2I_JAX_TPU_FLAGS": words}
    xla_flags.apply(environ, "v6e")  # once is enough
    assert environ["LIBTPU_INIT_ARGS"].split() == [f"--{GATHER}=true", f"--{FUSE}=true"]

    environ = {"LIBTPU_INIT_ARGS": f"--xla_mine=3 --{GATHER}=false"}
    xla_flags.apply(environ, "v6e")
    assert environ["LIBTPU_INIT_ARGS"] == f"--{FUSE}=true --xla_mine=3 --{GATHER}=false"
    environ = {"LIBTPU_INIT_ARGS": f"--no{FUSE}"}
    xla_flags.apply(environ, "v6e")
    assert environ["LIBTPU_INIT_ARGS"] == f"--{GATHER}=true --no{FUSE}"


def test_on_one_chip_programs_for_another_are_compiled_with_its_own():
    environ = {"LIBTPU_INIT_ARGS": "--xla_mine=3"}
    xla_flags.apply(environ, "v6e")
    xla_flags.apply(environ, "v5e")
    assert environ["LIBTPU_INIT_ARGS"] == "--xla_mine=3"
    environ = {"LIBTPU_INIT_ARGS": f"--{GATHER}=true"}  # the user's: it stays
    xla_flags.apply(environ, "v6e")
    xla_flags.apply(environ, "v5e")
    assert environ["LIBTPU_INIT_ARGS"] == f"--{GATHER}=true"


def test_without_a_tpu_nothing_changes(monkeypatch):
    monkeypatch.setattr(xla_flags, "detect", lambda: None)
    environ = {}
    xla_flags.apply(environ)
    assert environ == {}


def test_every_launch_script_has_them(monkeypatch):
    monkeypatch.setattr(xla_flags, "detect", lambda: "v5p")
    for name in ("LIBTPU_INIT_ARGS", "T2I_JAX_TPU_FLAGS"):
        monkeypatch.setenv(name, "")  # as it was, afterwards
    monkeypatch.setattr(cli.app, "run", lambda *args, **kwargs: None)
    cli.run(lambda argv: None)
    assert f"--{GATHER}=true" in os.environ["LIBTPU_INIT_ARGS"]


def test_it_loads_without_jax():
    code = "import sys; from t2i_jax import xla_flags; print('jax' in sys.modules)"
    root = pathlib.Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
