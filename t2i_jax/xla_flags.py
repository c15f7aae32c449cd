"""Flags of XLA's compiler for TPUs: the one place where they are, each with its reason.

libtpu reads them from LIBTPU_INIT_ARGS when jax first uses a TPU, or compiles for one; `apply` puts
them there before. Standard library only, so that nothing is loaded too early.

What is not here stays at libtpu's default. A flag is added when the compiled step, or a
measurement, shows what it is for (docs/tpu.md tells how to look).
"""

from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import NamedTuple

VARIABLE = "LIBTPU_INIT_ARGS"
_OURS = "T2I_JAX_TPU_FLAGS"  # the words of it that `apply` put there, for another chip to replace
# PCI ids of Google's devices, as in jax._src.hardware_utils.
_VENDOR = "0x1ae0"
_CHIPS = {"0x005e": "v4", "0x0063": "v5e", "0x0062": "v5p", "0x006f": "v6e", "0x0076": "tpu7x"}
CHIPS = tuple(_CHIPS.values())


class Flag(NamedTuple):
    """One flag: its name without dashes, its value, the chips that get it, and why."""

    name: str
    value: str
    chips: Iterable[str]
    reason: str


# v5e has both by default. On tpu7x they change nothing: there a product and the collective that
# brings its operand are one loop of permutations already.
_SYNCHRONOUS = ("v4", "v5p", "v6e")

FLAGS = (
    Flag(
        "xla_enable_async_all_gather",
        "true",
        _SYNCHRONOUS,
        "weights that are sharded over fsdp are gathered while what comes before computes",
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        "true",
        _SYNCHRONOUS,
        "the gather runs inside a matrix product; without this, v5p and v6e keep it synchronous",
    ),
)


def flags(chip: str) -> list[Flag]:
    """The flags of a kind of chip, one of CHIPS; raises ValueError for others."""
    if chip not in CHIPS:
        raise ValueError(f"chip {chip!r} is none of {', '.join(CHIPS)}.")
    return [flag for flag in FLAGS if chip in flag.chips]


def apply(environ: MutableMapping[str, str], chip: str | None = None) -> None:
    """Puts the flags of `chip`, by default of this machine's, into environ's LIBTPU_INIT_ARGS.

    What the variable holds already comes last and wins. Without a TPU nothing is changed.
    """
    chip = chip or detect()
    if chip is None:
        return
    before = environ.get(_OURS, "").split()
    given = [word for word in environ.get(VARIABLE, "").split() if word not in before]
    named = {word.lstrip("-").partition("=")[0] for word in given}
    ours = [
        f"--{flag.name}={flag.value}"
        for flag in flags(chip)
        if not named & {flag.name, f"no{flag.name}"}
    ]
    environ[VARIABLE], environ[_OURS] = " ".join([*ours, *given]), " ".join(ours)


# Where a program is compiled to be looked at and not to run: the compiler tries tiles for each
# convolution until one promises this share of what the chip can do. Half as long as libtpu's own
# choice for the autoencoder; memory and collectives are the same.
_SHORT = Flag("xla_jf_convolution_performance_target", "0.5", _CHIPS.values(), "compile time")


def shorten(environ: MutableMapping[str, str]) -> None:
    """Puts the flag for programs that will not run into environ's LIBTPU_INIT_ARGS, if unset."""
    given = environ.get(VARIABLE, "")
    if _SHORT.name not in given:
        environ[VARIABLE] = f"{given} --{_SHORT.name}={_SHORT.value}".strip()


def detect(devices: str = "/sys/bus/pci/devices") -> str | None:
    """The kind of TPU chip in this machine, one of CHIPS; None without one."""
    for vendor in sorted(Path(devices).glob("*/vendor")):
        if vendor.read_text().strip() == _VENDOR:
            chip = _CHIPS.get((vendor.parent / "device").read_text().strip())
            if chip:
                return chip
    return None
