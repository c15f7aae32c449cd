"""The autoencoder of a config, timed: batches of images to latents, and back."""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from t2i_jax import build, flops, sharding
from t2i_jax.errors import ConfigError
from t2i_jax.speed import rates, synthetic, timing


def measure(config: ConfigDict, rounds: int = 5, batch_size: int | None = None) -> dict[str, Any]:
    """Seconds of `encode` and `decode` of a batch, by default of sampling.batch_size.

    Raises ConfigError where the config has no autoencoder, and for a batch that does not divide.
    """
    if config.autoencoder.kind == "identity":
        raise ConfigError(f"{config.name} works on pixels: it has no autoencoder to measure.")
    mesh = sharding.make_mesh(**config.mesh)
    size = batch_size or config.sampling.batch_size
    shards = sharding.batch_shards(mesh)
    if size % shards:
        raise ConfigError(f"--batch_size={size} must be a multiple of the {shards} shards.")
    autoencoder = build.make_autoencoder(config)
    side, shape = config.data.image_size, build.latent_shape(config)
    place = sharding.batch_sharding(mesh)
    arrays = {
        "params": build.abstract_frozen(config, mesh)["autoencoder"],
        "images": jax.ShapeDtypeStruct((size, side, side, 3), jnp.float32, sharding=place),
        "latents": jax.ShapeDtypeStruct((size, *shape), jnp.float32, sharding=place),
    }
    with jax.set_mesh(mesh):
        programs = {
            "encode": (jax.jit(lambda p, x: autoencoder.encode(p, x, None)), "images"),
            "decode": (jax.jit(autoencoder.decode), "latents"),
        }
        compiled = {
            way: function.lower(arrays["params"], arrays[of]).compile()
            for way, (function, of) in programs.items()
        }
        there = synthetic.like(arrays)
        times = timing.in_turns(
            {
                way: lambda way=way, of=of: compiled[way](there["params"], there[of])
                for way, (_, of) in programs.items()
            },
            rounds,
        )
    work = flops.forward(config)
    return {
        "what": "vae",
        "config": config.name,
        **rates.place(mesh),
        "image_size": side,
        "batch_size": size,
        "dtype": config.train.dtype,
        **{way: rates.of(times[way], size, size * work[way], mesh.size) for way in programs},
        **rates.memory(),
    }


def describe(found: dict[str, Any]) -> str:
    """The tree of `measure` in lines."""
    return "\n".join(
        [
            f"{found['config']}, the autoencoder, {found['batch_size']} images of "
            f"{found['image_size']} pixels, {found['dtype']}, on {rates.where(found)}",
            *(f"  {rates.line(way, found[way])}" for way in ("encode", "decode")),
        ]
    )
