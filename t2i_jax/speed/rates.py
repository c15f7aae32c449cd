"""From seconds to figures: images a second, TFLOP/s, the share of the peak, memory."""

from typing import Any

import jax
from jax.sharding import Mesh

from t2i_jax import machines
from t2i_jax.speed import tables
from t2i_jax.speed.timing import Times


def of(times: Times, images: int, flops: float, devices: int) -> dict[str, Any]:
    """What `images` a time, which need `flops` on all devices together, come to.

    TFLOP/s are of one device; 'mfu' is there where the kind of the device is known.
    """
    per_device = flops / devices / times.median
    chip = machines.chip_of(jax.devices()[0].device_kind)
    found: dict[str, Any] = {
        "seconds": times.tree(),
        "images_per_second": _round(images / times.median),
        "tflop": _round(flops / 1e12),
        "tflops_per_device": _round(per_device / 1e12),
    }
    if chip is not None:
        found["mfu"] = _round(per_device / chip.peak)
    return found


def place(mesh: Mesh) -> dict[str, Any]:
    """Where something was measured."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "jax": jax.__version__,
    }


def memory(compiled: Any = None) -> dict[str, int]:
    """Bytes: the most that a device of this host has held, where the backend tells; and what the
    compiler planned for a program on a device, arguments included.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    found = {}
    if "peak_bytes_in_use" in stats:
        found["peak_bytes"] = int(stats["peak_bytes_in_use"])
    planned = getattr(compiled.memory_analysis() if compiled else None, "peak_memory_in_bytes", 0)
    return found | ({"planned_bytes": int(planned)} if planned else {})


def line(name: str, found: dict[str, Any]) -> str:
    """One entry of `of` in words."""
    seconds = found["seconds"]
    text = (
        f"{name}: {seconds['median']:.4g} s ({seconds['least']:.4g} to {seconds['most']:.4g} in "
        f"{seconds['rounds']} rounds), {found['images_per_second']:.4g} images/s, "
        f"{found['tflops_per_device']:.4g} TFLOP/s a device"
    )
    return text + (f", MFU {found['mfu']:.1%}" if "mfu" in found else "")


def memory_line(found: dict[str, Any]) -> str:
    """`memory` in words; '' where nothing is known."""
    names = {"planned_bytes": "planned by the compiler", "peak_bytes": "held at most"}
    told = [f"{tables.size(found[key])} {name}" for key, name in names.items() if key in found]
    return "memory of a device: " + ", ".join(told) if told else ""


def where(found: dict[str, Any]) -> str:
    """`place` in words."""
    mesh = " x ".join(f"{name} {size}" for name, size in found["mesh"].items())
    return f"{found['devices']} x {found['device']}: {mesh}; jax {found['jax']}"


def _round(value: float) -> float:
    return float(f"{value:.4g}")
