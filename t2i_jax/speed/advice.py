"""What to change in a config whose program does not fit a machine."""

from typing import Any

from ml_collections import ConfigDict

from t2i_jax.models.layers import REMAT_POLICIES

HELD = ("parameters", "EMA", "optimiser", "frozen")  # whatever the batch
_LARGE = 0.6  # of the memory: what is held leaves too little for activations
_SHARE = 0.2  # of the memory: what is frozen is worth halving
_TILE = 32  # latent pixels a side


def held(report: dict[str, Any]) -> float:
    """Bytes of a device that are there before any activation."""
    return sum(report["memory"].get(name, 0) for name in HELD)


def suggestions(report: dict[str, Any], config: ConfigDict) -> list[str]:
    """Of a report whose program does not fit, what to change; what costs least first. Never none.

    Of one that fits: [].
    """
    if report["fits"]:
        return []
    if report["bytes_needed"] is None:
        if config.train.attention != "xla":
            return ["train.attention = 'xla': without the kernel that needs too much of the VMEM"]
        return ["fewer rows or pixels at once: something needs more than the chip's VMEM"]
    fills = held(report) / report["bytes_there"]
    out = []
    if fills <= 1:  # else whatever is done with activations does not help
        out += _less_at_once(report, config)
    if fills > _LARGE:
        out += _held_less(report, config)
    return out or [_more_devices(report)]


def _less_at_once(report: dict[str, Any], config: ConfigDict) -> list[str]:
    """Where activations are what does not fit."""
    out, mesh = [], report["mesh"]
    shards = mesh["data"] * mesh["fsdp"]
    rows, parts = report["batch_size"] // shards, config.train.accumulation
    if report["what"] == "sample":
        if rows > 1:
            out.append(f"sampling.batch_size = {rows // 2 * shards}: half as much at once")
        if not config.autoencoder.tile and config.autoencoder.kind != "identity":
            out.append(f"autoencoder.tile = {_TILE}: images are decoded in parts")
    else:
        rows //= parts
        order, now = [name for name in REMAT_POLICIES if name != "offload"], config.dit.remat
        if report["peaks"]["train"] > report["bytes_there"] and now in order[:-1]:
            kept = order[order.index(now) + 1]
            out.append(f"dit.remat = {kept!r}: keep less for the backward pass")
        if rows > 1:
            out.append(f"train.accumulation = {2 * parts}: half as much at once")
        if report["peaks"].get("encoder", 0) > report["bytes_there"] and rows <= 1:
            out.append("data.source = 'latents': launch/prepare.py encodes the images before")
    tensor = 2 * mesh["tensor"]
    if rows <= 1 < shards and not config.llm.num_heads % tensor:
        more = f", train.accumulation = {2 * parts}" if report["what"] == "train" else ""
        out.append(f"mesh.tensor = {tensor}{more}: heads and MLPs of a row in parts")
    return out


def _held_less(report: dict[str, Any], config: ConfigDict) -> list[str]:
    """Where weights and state leave too little, or do not fit themselves."""
    out, there = [], report["bytes_there"]
    frozen = report["memory"].get("frozen", 0)
    if frozen > _SHARE * there and config.train.llm_quantization == "none":
        out.append("train.llm_quantization = 'int8': the frozen language model in half the bytes")
    if report["mesh"]["data"] > 1:
        out.append("mesh.fsdp larger, mesh.data smaller: parameters in more parts")
    else:
        out.append(_more_devices(report))
    if report["what"] == "train" and not config.lora.rank:
        out.append("lora.rank = 16, with weights.start: low-rank factors alone are trained")
    return out


def _more_devices(report: dict[str, Any]) -> str:
    size = held(report) / 1e9
    return f"more devices: what is held before any activation is {size:.1f} GB on each"
