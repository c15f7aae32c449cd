"""The machines that this runs on: chips, and the TPU topologies that a step is compiled for.

A device is what JAX counts: a chip, on tpu7x one of the two cores of a chip. The memory that
programs may use is what libtpu's compiler says; peaks are the vendors' for dense bfloat16.
"""

import functools
import math
import os
import re
from typing import Any, NamedTuple

from t2i_jax import xla_flags
from t2i_jax.errors import ConfigError, MissingError

_GIB = 2**30


class Chip(NamedTuple):
    """A kind of device."""

    kind: str  # JAX's `device_kind`, or how it begins
    memory: float  # bytes that programs may use
    peak: float  # FLOP/s, dense, bfloat16


CHIPS = {
    "v4": Chip("TPU v4", 30.75 * _GIB, 275e12),
    "v5e": Chip("TPU v5 lite", 15.75 * _GIB, 197e12),
    "v5p": Chip("TPU v5", 95.74 * _GIB, 459e12),
    "v6e": Chip("TPU v6 lite", 31.25 * _GIB, 918e12),
    "tpu7x": Chip("TPU7x", 94.75 * _GIB, 1153.5e12),
    "a100": Chip("NVIDIA A100", 79e9, 312e12),
    "h100": Chip("NVIDIA H100", 79e9, 989e12),
    "h200": Chip("NVIDIA H200", 140e9, 989e12),
}

_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")
_CUBES += ("4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")


def _named(chip: str, grids: tuple[str, ...], cores: int) -> dict[str, tuple[str, str]]:
    """'v4-256' -> ('v4', '4x4x8'): the number is of chips times `cores`, as Google counts."""
    return {
        f"{chip}-{cores * math.prod(map(int, grid.split('x')))}": (chip, grid) for grid in grids
    }


_TOPOLOGIES = {
    **_named("v4", _CUBES, 2),
    **_named("v5e", _SQUARES, 1),  # v5litepod-256 is the same as v5e-256
    **_named("v5p", _CUBES, 2),
    **_named("v6e", _SQUARES, 1),
    "tpu7x-8": ("tpu7x", "2x2x1"),
    "tpu7x": ("tpu7x", "2x2x2"),
    "colab-v5e": ("v5e", "1x1"),
    "colab-v6e": ("v6e", "1x1"),
}
NAMES = tuple(_TOPOLOGIES)


def chip_of(kind: str) -> Chip | None:
    """The chip of a `device_kind`; None where it is not known."""
    found = [chip for chip in CHIPS.values() if kind.startswith(chip.kind)]
    return max(found, key=lambda chip: len(chip.kind), default=None)


class Topology(NamedTuple):
    """TPU slices: `slices` times chips in a grid."""

    chip: str
    grid: str
    slices: int = 1


def parse(name: str) -> Topology:
    """Of `NAMES`, or spelled out, 'v5p:2x2x4'; of several slices 'v5e-256*2' or 'v5p:2x2x4*2'.

    Cloud TPU's accelerator types are among the names; there v5e is v5litepod, too.

    Raises ConfigError for another name.
    """
    base, _, slices = name.partition("*")
    base = base.replace("v5litepod-", "v5e-")
    if base in _TOPOLOGIES:
        chip, grid = _TOPOLOGIES[base]
    else:
        chip, _, grid = base.partition(":")
    known = chip in xla_flags.CHIPS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", grid)
    if not known or not re.fullmatch(r"([1-9]\d*)?", slices):
        raise ConfigError(
            f"{name!r} is no TPU topology. Known are {', '.join(NAMES)}; others are spelled out, "
            "as v5e:4x8 or v5p:2x2x4; several slices are v5e-256*2."
        )
    return Topology(chip, grid, int(slices or 1))


@functools.lru_cache
def devices(topology: Topology) -> tuple[Any, ...]:
    """Devices to compile for, none of which is there; of one topology always the same.

    The TPU compiler is in libtpu, which comes with jax[tpu]; it needs no TPU. To be called before
    anything else asks JAX for devices. Raises MissingError without libtpu, ConfigError for a grid
    that the chip has not.
    """
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v4-8",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # several compilers may run on one machine
    )
    xla_flags.apply(os.environ, topology.chip)
    xla_flags.shorten(os.environ)
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    options: dict[str, Any] = {}
    if topology.chip == "v4":
        options["chip_config_name"] = "megacore"
    if set(topology.grid.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    name = f"{topology.chip}:{topology.grid}"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:
        if "support not installed" in str(error):
            raise MissingError(
                "The TPU compiler is not installed: pip install -e '.[tpu]' (libtpu, 700 MB; no "
                "TPU is needed)."
            ) from error
        raise ConfigError(f"libtpu knows no topology {name}: {error}") from error
    return tuple(found.devices)
