"""From a config to its networks, their abstract parameters and where these live."""

import functools
from typing import Any

from flax.core import meta
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from t2i_jax import quantization, sharding
from t2i_jax.models import autoencoder, fusion, lora
from t2i_jax.models.clip import CLIPText
from t2i_jax.models.fusion import FROZEN, TextToImageModel


def model(config: ConfigDict) -> TextToImageModel:
    """The text-to-image model."""
    return fusion.build(
        config.llm,
        config.memory,
        config.dit,
        channels=config.autoencoder.channels,
        dtype=jnp.dtype(config.train.dtype),
        kernel=config.train.attention,
        lora_scale=lora_scale(config),
    )


def lora_scale(config: ConfigDict) -> float:
    """What the product of two factors is multiplied by; 0 where there are none."""
    return config.lora.alpha / config.lora.rank if config.lora.rank else 0.0


def clip(config: ConfigDict) -> CLIPText | None:
    """The CLIP text encoder, where the DiT is conditioned on its embedding."""
    if not config.dit.pooled_width:
        return None
    return CLIPText(**config.clip, dtype=jnp.dtype(config.train.dtype))


def make_autoencoder(config: ConfigDict, net: Any = None) -> autoencoder.Autoencoder:
    """The autoencoder; `net` is the network of loaded weights, if there are any."""
    # Its one head, 512 wide, is for no kernel but the TPU's.
    kernel = "xla" if config.train.attention == "xla" else "auto"
    how = {"dtype": jnp.dtype(config.train.dtype), "kernel": kernel}
    net = net.clone(**how) if net is not None else None
    return autoencoder.make(**config.autoencoder, net=net, **how)


def latent_shape(config: ConfigDict) -> tuple[int, int, int]:
    """(height, width, channels) of the latents of one training image."""
    side = config.data.image_size // config.autoencoder.downsample
    return (side, side, config.autoencoder.channels)


@functools.lru_cache(maxsize=4)
def _boxed(text_to_image: TextToImageModel, shape: tuple[int, int, int]) -> Any:
    return jax.eval_shape(lambda key: fusion.init(text_to_image, key, shape), jax.random.key(0))


@functools.lru_cache(maxsize=4)
def _abstract_autoencoder(net: autoencoder.Autoencoder) -> Any:
    return jax.eval_shape(net.init, jax.random.key(0))


def abstract_params(config: ConfigDict) -> tuple[Any, Any]:
    """(trained, frozen) parameters, abstract and boxed with their logical axes.

    Frozen ones have the dtype that they are stored in, but for what `quantised` makes of them. With
    low-rank factors these are what is trained, and the rest of the model is frozen, too: 'base'.
    """
    boxed = _boxed(model(config), latent_shape(config))
    trained = {name: part for name, part in boxed.items() if name not in FROZEN}
    frozen = {name: boxed[name] for name in FROZEN}
    frozen["autoencoder"] = _abstract_autoencoder(make_autoencoder(config))
    if encoder := clip(config):
        ids = jax.ShapeDtypeStruct((1, config.clip.max_tokens), jnp.int32)
        frozen["clip"] = jax.eval_shape(encoder.init, jax.random.key(0), ids)["params"]
    dtype = jnp.dtype(config.train.frozen_dtype)
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), frozen)
    if rank := config.lora.rank:
        frozen["base"] = as_used(trained)
        trained = lora.factors(trained, rank, config.lora.products)
    return trained, frozen


def as_used(boxed: Any) -> Any:
    """Boxed abstract parameters in the dtypes that they are used in.

    The network computes the same from them, bit for bit: a product casts its matrix first.
    """

    def one(x):
        return x.replace(value=jax.ShapeDtypeStruct(x.value.shape, x.used_in or x.value.dtype))

    return jax.tree.map(one, boxed, is_leaf=lambda x: isinstance(x, sharding.Named))


def quantised(config: ConfigDict, frozen: dict[str, Any]) -> dict[str, Any]:
    """The frozen ones of `abstract_params`, as devices hold them."""
    if config.train.llm_quantization == "none":
        return frozen
    return frozen | {"llm": quantization.abstract(frozen["llm"])}


def sharded(boxed: Any, mesh: Mesh) -> Any:
    """Boxed abstract parameters -> unboxed abstract ones that carry their shardings."""
    shardings = sharding.param_shardings(boxed, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        meta.unbox(boxed),
        shardings,
    )


def abstract_frozen(config: ConfigDict, mesh: Mesh) -> dict[str, Any]:
    """What is not trained, as `frozen.load` gives it: the autoencoder replicated."""
    boxed = quantised(config, abstract_params(config)[1])
    return {name: sharded(part, mesh) for name, part in boxed.items()}


def abstract_text(config: ConfigDict, rows: int, place: NamedSharding) -> dict[str, Any]:
    """Captions as tokens: 'ids' int32 and 'mask' (rows, T); with CLIP 'clip_ids' (rows, 77)."""
    length = config.data.max_text_tokens
    arrays = {"ids": (length, jnp.int32), "mask": (length, jnp.bool_)}
    if config.dit.pooled_width:
        arrays["clip_ids"] = (config.clip.max_tokens, jnp.int32)
    return {
        name: jax.ShapeDtypeStruct((rows, size), dtype, sharding=place)
        for name, (size, dtype) in arrays.items()
    }


def abstract_key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """A key, everywhere."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))


def count(tree: Any) -> int:
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(tree))
