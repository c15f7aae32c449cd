"""What a run is going to do, before it does it."""

import math

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from t2i_jax import build, sharding
from t2i_jax.errors import ConfigError
from t2i_jax.rules import flat
from t2i_jax.training import program


def describe(config: ConfigDict, workdir, mesh: Mesh) -> str:
    """The plan of a run, as text: model, sizes, mesh, batch, memory, data. Reads no data.

    Raises ConfigError as `check`.
    """
    check(config, mesh)
    whole, _, _ = program.abstract_state(config, mesh)
    frozen = build.abstract_frozen(config, mesh)
    counts = {k: build.count(v) for k, v in build.abstract_params(config)[1].items()}
    per_device = {
        "parameters": sharding.bytes_per_device(whole.params),
        "EMA": sharding.bytes_per_device(whole.ema),
        "optimiser": sharding.bytes_per_device(whole.opt_state),
        "gradients": sharding.bytes_per_device(whole.params),
        "frozen": sharding.bytes_per_device(frozen),
    }
    c, batch = config, config.train.batch_size
    height, width, channels = build.latent_shape(config)
    tokens = height * width // c.dit.patch_size**2
    grid = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    kind = jax.devices()[0].device_kind
    mixed = ", ".join(f"({entry})" for entry in c.data.mixture)
    source = f"a mixture of {mixed}" if mixed else f"{c.data.source}, {c.data.path or 'built in'}"
    lines = [
        ("run", f"{c.name}, seed {c.seed}, in {workdir}"),
        *_networks(c, build.count(whole.params), counts),
        (
            "images",
            f"{c.data.image_size} px -> latents {height} x {width} x {channels} -> "
            f"{tokens} tokens, with up to {c.data.max_text_tokens} of text"
            + (" and the instruction's" if c.data.instruction or c.data.chat_template else "")
            + (f"; or {', '.join(c.data.buckets)} px" if c.data.buckets else ""),
        ),
        (
            "data",
            f"{source}; captions dropped {c.data.caption_dropout:.0%}"
            + (", and those of other samples: a control" if c.data.shuffle_captions else ""),
        ),
        ("mesh", f"{mesh.size} {kind}: {grid}"),
        (
            "batch",
            f"{batch} = {sharding.batch_shards(mesh)} shards"
            f" x {batch / sharding.batch_shards(mesh):g}, in {c.train.accumulation} microbatch(es)",
        ),
        (
            "steps",
            f"{c.train.steps:,} ({c.train.steps * batch:,} images); {c.optimizer.name}, "
            f"EMA {c.ema.decay} every {c.ema.every}; computing in {c.train.dtype}",
        ),
        (
            "a device",
            ", ".join(f"{k} {_size(v)}" for k, v in per_device.items())
            + f"; {_size(sum(per_device.values()))} before activations",
        ),
    ]
    return "\n".join(f"{name:>9}  {text}" for name, text in lines)


def _networks(config: ConfigDict, trained: int, frozen: dict[str, int]) -> list[tuple[str, str]]:
    """What is trained and what is not, with the numbers of parameters."""
    c = config
    positions = c.dit.positions + (" and a table" if c.dit.table_size else "")
    method = c.train.llm_quantization
    quantised = "" if method == "none" else f", its matrices in {method}"
    return [
        (
            "model",
            f"{c.memory.source} source, {c.dit.attention} attention; positions {positions}; "
            f"conditioning {c.dit.conditioning}",
        ),
        (
            "trained",
            f"{trained:,} parameters: {_trained(c)}"
            + (f", from {c.weights.start}" if c.weights.start else ""),
        ),
        (
            "frozen",
            f"{frozen['llm']:,} LLM {c.llm.num_layers} x {c.llm.width} "
            f"({c.weights.llm or 'pre-trained here'}{quantised}), "
            f"{frozen['autoencoder']:,} autoencoder ({c.autoencoder.kind})"
            + (f", {frozen['clip']:,} CLIP" if "clip" in frozen else "")
            + (f", {frozen['base']:,} base of the factors" if "base" in frozen else ""),
        ),
    ]


def _trained(config: ConfigDict) -> str:
    c, dit = config.lora, f"DiT {config.dit.num_layers} x {config.dit.width}"
    return f"factors of rank {c.rank} of the {dit}, {c.products} products" if c.rank else dit


def check(config: ConfigDict, mesh: Mesh) -> None:
    """Raises ConfigError where these devices have not the kernel that is asked for.

    And where the batch, the validation set, heads or MLPs do not divide over the mesh.
    """
    device = mesh.devices.flat[0]
    if config.train.attention == "cudnn" and device.platform != "gpu":
        raise ConfigError(
            "train.attention = 'cudnn' is a kernel of NVIDIA GPUs, and this is "
            f"{device.device_kind}; 'auto' takes what suits it."
        )
    _check_tensor(config, mesh)
    shards, parts = sharding.batch_shards(mesh), config.train.accumulation
    if config.train.batch_size % (shards * parts):
        raise ConfigError(
            f"train.batch_size = {config.train.batch_size} does not divide over {shards} shards of "
            f"the batch (mesh.data x mesh.fsdp) in {parts} microbatch(es); give a multiple of "
            f"{shards * parts}."
        )
    if config.validation.every and config.data.validation_size < shards:
        raise ConfigError(
            f"data.validation_size = {config.data.validation_size} is less than one sample for "
            f"each of {shards} shards of the batch; raise it, or set validation.every to 0."
        )


def _check_tensor(config: ConfigDict, mesh: Mesh) -> None:
    """Heads of keys and values are whole on every device, and may be fewer."""
    tensor, keys = mesh.shape["tensor"], ("llm.num_heads", "llm.mlp_width", "dit.mlp_width")
    sizes = {key: flat(config)[key] for key in keys}
    if wrong := [f"{key} = {size}" for key, size in sizes.items() if size % tensor]:
        common = math.gcd(*sizes.values())
        fit = [str(n) for n in range(1, min(common, mesh.size) + 1) if common % n == 0]
        raise ConfigError(
            f"mesh.tensor = {tensor} does not divide {', '.join(wrong)}: every device would hold "
            f"and compute all of it. What divides is {', '.join(fit)}."
        )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:,.4g} GB"
