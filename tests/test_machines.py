"""Chips and topologies by name; what the TPU compiler makes of them needs it, and is not tested."""

import pytest

from t2i_jax import machines, xla_flags
from t2i_jax.errors import ConfigError
from t2i_jax.machines import Topology


def test_names_and_what_is_spelled_out():
    assert machines.parse("v4-256") == Topology("v4", "4x4x8")
    assert machines.parse("v5e-256*2") == Topology("v5e", "16x16", 2)
    assert machines.parse("v5p:2x2x4") == Topology("v5p", "2x2x4")
    assert machines.parse("colab-v6e") == Topology("v6e", "1x1")
    assert machines.parse("v4-128") == Topology("v4", "4x4x4")
    assert machines.parse("v5litepod-256") == Topology("v5e", "16x16")
    for name in machines.NAMES:
        chip, grid, _ = machines.parse(name)
        chips = 1
        for side in grid.split("x"):
            chips *= int(side)
        if "-" in name and "colab" not in name:  # v4, v5p and tpu7x count cores, two a chip
            assert int(name.split("-")[1]) == chips * (2 if chip in ("v4", "v5p", "tpu7x") else 1)


@pytest.mark.parametrize(
    "name", ["", "v4", "v4-255", "v5e:", "v9:2x2", "v5e:2x2*0", "v5e:axb", "v5litepod-3"]
)
def test_other_names_are_refused_with_those_that_are(name):
    with pytest.raises(ConfigError, match=r"is no TPU topology\. Known are v4-8, .*v5e-256\*2"):
        machines.parse(name)


def test_chips_by_the_kind_of_their_devices():
    kinds = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
    kinds |= {"TPU7x": "tpu7x", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200"}
    for kind, name in kinds.items():
        assert machines.chip_of(kind) is machines.CHIPS[name]
    assert machines.chip_of("cpu") is None
    assert set(xla_flags.CHIPS) <= set(machines.CHIPS)
