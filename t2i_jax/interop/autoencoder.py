"""AutoencoderKL from diffusers directories."""

from collections.abc import Mapping
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp

from t2i_jax.interop.directory import check_fields, find, read_json, shapes_of
from t2i_jax.interop.mapping import Rule, load
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
      path: the directory with config.json, or one whose folder vae/ is that.
      dtype: of the parameters, and of the computation (`net.clone(dtype=...)` changes the latter).
      config: the config's section `autoencoder`, checked against config.json where given.
      shardings: a tree like the parameters of where each goes, or one for all; default: the first
        device.

    Raises FileNotFoundError where weights are missing, and ValueError where config.json describes
    another network, or disagrees with `config`, or the tensors with it.
    """
    directory, files = find(path, "autoencoder")
    theirs = AUTOENCODER_DEFAULTS | read_json(directory / "config.json")
    net = _autoencoder(directory, theirs, dtype)
    if config is not None:
        actual = {
            "channels": ("latent_channels", net.latent_channels),
            "downsample": ("2^(len(block_out_channels) - 1)", net.downsample),
            "scale": ("scaling_factor", theirs["scaling_factor"]),
            "shift": ("shift_factor", theirs["shift_factor"] or 0.0),
        }
        check_fields(directory, [(f"autoencoder.{o}", config[o], *t) for o, t in actual.items()])

    tensors = open_tensors(files)
    image = jax.ShapeDtypeStruct((1, net.downsample, net.downsample, PIXEL_CHANNELS), jnp.float32)
    shapes = shapes_of(net.init, image)
    old = any(".attentions.0.query." in name for name in tensors)
    parts = AUTOENCODER | (OLD_ATTENTION if old else {})
    rules = [
        Rule(ours, _rename(ours, parts), AUTOENCODER_LAYOUTS[len(shape)])
        for ours, shape in shapes.items()
    ]
    return net, load(directory, tensors, shapes, rules, shardings, dtype)


def _autoencoder(directory: epath.Path, theirs: Mapping[str, Any], dtype: Any) -> AutoencoderKL:
    # force_upcast (SDXL, FLUX) speaks of float16; bfloat16 and float32 have the range.
    fixed = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "mid_block_add_attention": True}
    fixed |= {"latents_mean": None, "latents_std": None}  # another scaling, by channel
    for name, value in fixed.items():
        if theirs[name] != value:
            raise ValueError(
                f"{directory / 'config.json'}: {name} is {theirs[name]!r}; an AutoencoderKL here "
                f"has {value!r}."
            )
    channels = theirs["block_out_channels"]
    numbers = ("latent_channels", "layers_per_block", "norm_num_groups")
    sizes = [*channels, *(theirs[name] for name in numbers)] if isinstance(channels, list) else []
    if not sizes[len(numbers) :] or not all(type(n) is int and n > 0 for n in sizes):
        raise ValueError(
            f"{directory / 'config.json'}: block_out_channels {channels!r} and "
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
        dtype=jnp.dtype(dtype),
    )


def _rename(path: str, parts: Mapping[str, str]) -> str:
    """Our path -> their name, part by part."""

    def one(part):
        stem, _, index = part.rpartition("_")
        if index.isdigit():
            return parts[f"{stem}_#"].replace("#", index)
        return parts.get(part, part)

    return ".".join(one(part) for part in path.split("/"))
