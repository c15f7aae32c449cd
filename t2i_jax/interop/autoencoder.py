"""AutoencoderKL from diffusers directories."""

from collections.abc import Mapping
import functools
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp

from t2i_jax.interop.directory import check_fields, find, read_json, shapes_of
from t2i_jax.interop.mapping import Mapped, Rule, materialise, sources
from t2i_jax.interop.safetensors import open_tensors
from t2i_jax.models.autoencoder import PIXEL_CHANNELS, AutoencoderKL

# Parts of a parameter's path, where diffusers calls them otherwise; # is a number.
AUTOENCODER = {
    "down_#": "down_blocks.#",
    "up_#": "up_blocks.#",
    "mid": "mid_block",
    "resnet_#": "resnets.#",
    "attention": "attentions.0",
    "downsample": "downsamplers.0.conv",
    "upsample": "upsamplers.0.conv",
    "shortcut": "conv_shortcut",
    "norm_out": "conv_norm_out",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "out": "to_out.0",
}
OLD_ATTENTION = {"q": "query", "k": "key", "v": "value", "out": "proj_attn"}  # diffusers < 0.17
AUTOENCODER_LAYOUTS = {1: "C -> C", 2: "O I -> I O", 4: "O I H W -> H W I O"}  # by rank
AUTOENCODER_DEFAULTS = {  # what diffusers takes for a field that config.json lacks
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [64],
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}


def load_autoencoder(
    path: epath.PathLike,
    dtype: Any = jnp.float32,
    *,
    config: Mapping[str, Any] | None = None,
    shardings: Any = None,
) -> tuple[AutoencoderKL, dict[str, Any]]:
    """The network and unboxed parameters of a diffusers AutoencoderKL directory.

    Args:
      path, config: as of `open_autoencoder`.
      dtype: of the parameters, and of the computation (`net.clone(dtype=...)` changes the latter).
      shardings: a tree like the parameters of where each goes, or one for all; default: the first
        device.

    Raises as `open_autoencoder`.
    """
    net, _, found = open_autoencoder(path, config)
    return net.clone(dtype=jnp.dtype(dtype)), materialise(found, shardings, dtype)


def open_autoencoder(
    path: epath.PathLike, config: Mapping[str, Any] | None = None
) -> tuple[AutoencoderKL, dict[str, Any], dict[str, Mapped]]:
    """The network, its config section, and path -> source of its parameters; nothing is read.

    Args:
      path: the directory with config.json, or one whose folder vae/ is that.
      config: the config's section `autoencoder`, checked against config.json where given.

    Raises FileNotFoundError where weights are missing, and ValueError where config.json describes
    another network, or disagrees with `config`, or the tensors with it.
    """
    directory, files = find(path, "autoencoder")
    theirs = AUTOENCODER_DEFAULTS | read_json(directory / "config.json")
    net = network(directory / "config.json", theirs)
    actual = {
        "channels": ("latent_channels", net.latent_channels),
        "downsample": ("2^(len(block_out_channels) - 1)", net.downsample),
        "scale": ("scaling_factor", theirs["scaling_factor"]),
        "shift": ("shift_factor", theirs["shift_factor"] or 0.0),
    }
    if config is not None:
        check_fields(directory, [(f"autoencoder.{o}", config[o], *t) for o, t in actual.items()])
    section = {"kind": "kl"} | {ours: value for ours, (_, value) in actual.items()}
    tensors = open_tensors(files)
    old = any(".attentions.0.query." in name for name in tensors)
    ours = shapes(net)
    return net, section, sources(directory, tensors, ours, rules(ours, old=old))


@functools.lru_cache(maxsize=4)
def shapes(net: AutoencoderKL) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the parameters of an autoencoder."""
    image = jax.ShapeDtypeStruct((1, net.downsample, net.downsample, PIXEL_CHANNELS), jnp.float32)
    return shapes_of(net.init, image)


def rules(ours: Mapping[str, tuple[int, ...]], *, old: bool = False) -> list[Rule]:
    """Where each parameter is; `old` where the attention has the names of diffusers < 0.17."""
    parts = AUTOENCODER | (OLD_ATTENTION if old else {})
    return [
        Rule(path, _rename(path, parts), AUTOENCODER_LAYOUTS[len(shape)])
        for path, shape in ours.items()
    ]


def config_json(net: AutoencoderKL, autoencoder: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a network and the config's section `autoencoder`."""
    levels = len(net.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(net.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": PIXEL_CHANNELS,
        "out_channels": PIXEL_CHANNELS,
        "latent_channels": net.latent_channels,
        "layers_per_block": net.layers_per_block,
        "mid_block_add_attention": True,
        "norm_num_groups": net.norm_groups,
        "scaling_factor": autoencoder["scale"],
        "shift_factor": autoencoder["shift"],
        "use_quant_conv": net.use_quant_conv,
        "use_post_quant_conv": net.use_post_quant_conv,
    }


def network(source: Any, theirs: Mapping[str, Any] | None) -> AutoencoderKL:
    """The network of a config.json, which errors call `source`. Raises ValueError for another."""
    theirs = AUTOENCODER_DEFAULTS | (theirs if isinstance(theirs, dict) else {})
    # force_upcast (SDXL, FLUX) speaks of float16; bfloat16 and float32 have the range.
    fixed = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "mid_block_add_attention": True}
    fixed |= {"latents_mean": None, "latents_std": None}  # another scaling, by channel
    for name, value in fixed.items():
        if theirs[name] != value:
            raise ValueError(
                f"{source}: {name} is {theirs[name]!r}; an AutoencoderKL here has {value!r}."
            )
    channels = theirs["block_out_channels"]
    numbers = ("latent_channels", "layers_per_block", "norm_num_groups")
    sizes = [*channels, *(theirs[name] for name in numbers)] if isinstance(channels, list) else []
    if not sizes[len(numbers) :] or not all(type(n) is int and n > 0 for n in sizes):
        raise ValueError(
            f"{source}: block_out_channels {channels!r} and "
            f"{', '.join(f'{name} {theirs[name]!r}' for name in numbers)} must be positive whole "
            "numbers."
        )
    return AutoencoderKL(
        latent_channels=theirs["latent_channels"],
        block_out_channels=tuple(channels),
        layers_per_block=theirs["layers_per_block"],
        norm_groups=theirs["norm_num_groups"],
        use_quant_conv=bool(theirs["use_quant_conv"]),
        use_post_quant_conv=bool(theirs["use_post_quant_conv"]),
    )


def _rename(path: str, parts: Mapping[str, str]) -> str:
    """Our path -> their name, part by part."""

    def one(part):
        stem, _, index = part.rpartition("_")
        if index.isdigit():
            return parts[f"{stem}_#"].replace("#", index)
        return parts.get(part, part)

    return ".".join(one(part) for part in path.split("/"))
