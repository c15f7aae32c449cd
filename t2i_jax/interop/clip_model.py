"""Both encoders of CLIP from a directory of transformers' CLIPModel, and how its pictures are made.

config.json               text_config and vision_config
model.safetensors         both encoders and their projections
preprocessor_config.json  what becomes of a picture before it is encoded
and a tokenizer
"""

from collections.abc import Mapping
import os
from typing import Any, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp

from t2i_jax.interop import clip
from t2i_jax.interop.directory import find, read_json, shapes_of
from t2i_jax.interop.mapping import Rule, materialise, sources
from t2i_jax.interop.safetensors import open_tensors
from t2i_jax.models.clip import CLIPText, CLIPVision

VISION = (
    Rule("patches/weight", "vision_model.embeddings.patch_embedding.weight", "D C P Q -> P Q C D"),
    Rule("positions", "vision_model.embeddings.position_embedding.weight", "I D -> I D"),
    Rule("class_token", "vision_model.embeddings.class_embedding", "D -> D"),
    Rule("first_norm/weight", "vision_model.pre_layrnorm.weight", "D -> D"),  # so spelt
    Rule("first_norm/bias", "vision_model.pre_layrnorm.bias", "D -> D"),
    *clip.blocks("vision_model."),
    Rule("final_norm/weight", "vision_model.post_layernorm.weight", "D -> D"),
    Rule("final_norm/bias", "vision_model.post_layernorm.bias", "D -> D"),
    Rule("projection/weight", "visual_projection.weight", "P D -> D P"),
)
VISION_CONFIG = {  # our field -> theirs
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "projection_width": "projection_dim",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
}
VISION_DEFAULTS = {  # what transformers takes for a field that config.json lacks
    "image_size": 224,
    "patch_size": 32,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "num_channels": 3,
}
_PROJECTION = 512  # likewise
_PREPROCESSOR = "preprocessor_config.json"
_BICUBIC = 3  # as Pillow numbers its filters
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")  # of every CLIP
# Not weights: a temperature of training, and 0, 1, 2, ..., which older versions stored.
_UNUSED = {"logit_scale"} | {f"{n}_model.embeddings.position_ids" for n in ("text", "vision")}


class Pictures(NamedTuple):
    """What becomes of a picture before CLIP reads it."""

    shorter_side: int  # that it is resized to, by Pillow's bicubic filter
    crop: int  # pixels a side of the central square that is kept
    factor: float  # of its values, 0 to 255
    mean: tuple[float, ...]  # of each channel, taken off after that
    deviation: tuple[float, ...]  # what the rest is divided by


class CLIPModel(NamedTuple):
    """Both encoders, and how their inputs are made."""

    text: CLIPText
    vision: CLIPVision
    params: dict[str, Any]  # {'text', 'vision'}, unboxed
    pictures: Pictures
    directory: epath.Path  # where the tokenizer is


def load_clip_model(path: epath.PathLike, shardings: Any = None) -> CLIPModel:
    """Reads a directory of CLIPModel; parameters and computation in float32.

    Args:
      path: the directory.
      shardings: where all parameters go; default: the first device.

    Raises FileNotFoundError where files are missing, and ValueError where config.json describes
    another network or the tensors do, or where pictures are made in another way than CLIP's.
    """
    directory, files = find(path, "clip_model")
    text, vision = _networks(directory / "config.json")
    pictures = _pictures(directory / _PREPROCESSOR, vision.image_size)
    image = jax.ShapeDtypeStruct((1, vision.image_size, vision.image_size, 3), jnp.float32)
    parts = {
        "text": (clip.shapes(text), clip.CLIP),
        "vision": (shapes_of(vision.init, image), VISION),
    }
    shapes = {f"{n}/{path}": s for n, (part, _) in parts.items() for path, s in part.items()}
    rules = [r._replace(ours=f"{n}/{r.ours}") for n, (_, part) in parts.items() for r in part]
    found = sources(directory, open_tensors(files), shapes, rules, unused=_UNUSED)
    params = materialise(found, shardings, jnp.float32)
    return CLIPModel(text, vision, params, pictures, directory)


def _networks(file: epath.Path) -> tuple[CLIPText, CLIPVision]:
    """The networks of a config.json."""
    theirs = read_json(file)
    if theirs.get("model_type") != "clip":
        raise ValueError(
            f"{os.fspath(file)} has model_type {theirs.get('model_type')!r}; only 'clip', a model "
            "of both encoders, is read here."
        )
    # Both have the projection of the whole; what old files have in *_config_dict goes before.
    sections = []
    for name, defaults in (("text", clip.CLIP_DEFAULTS), ("vision", VISION_DEFAULTS)):
        given = theirs.get(f"{name}_config_dict") or theirs.get(f"{name}_config") or {}
        if not isinstance(given, dict):
            raise ValueError(f"{os.fspath(file)}: {name}_config is {given!r}, no object.")
        projection = {"projection_dim": theirs.get("projection_dim", _PROJECTION)}
        sections.append(defaults | given | projection)
    text, vision = sections
    if vision["num_channels"] != 3:
        raise ValueError(f"{os.fspath(file)}: num_channels is {vision['num_channels']}, not 3.")
    return (
        CLIPText(**{ours: text[name] for ours, name in clip.CLIP_CONFIG.items()}),
        CLIPVision(**{ours: vision[name] for ours, name in VISION_CONFIG.items()}),
    )


def _pictures(file: epath.Path, image_size: int) -> Pictures:
    """What a preprocessor_config.json says, checked; for a field that it lacks, CLIP's own."""
    if not file.exists():
        raise FileNotFoundError(f"There is no {os.fspath(file)}; fetch it, it is of the model.")
    theirs = read_json(file)
    size, crop = theirs.get("size", image_size), theirs.get("crop_size", image_size)
    shorter = size.get("shortest_edge") if isinstance(size, Mapping) else size
    square = [crop.get("height"), crop.get("width")] if isinstance(crop, Mapping) else [crop, crop]
    resample = theirs.get("resample", _BICUBIC)
    mean = theirs.get("image_mean", [0.48145466, 0.4578275, 0.40821073])
    deviation = theirs.get("image_std", [0.26862954, 0.26130258, 0.27577711])
    wrong = [f"{name} is {theirs[name]!r}" for name in _STEPS if not theirs.get(name, True)]
    if type(shorter) is not int or shorter < image_size:
        wrong.append(f"size is {size}, not a shortest_edge of {image_size} or more")
    if square != [image_size, image_size]:
        wrong.append(f"crop_size is {crop}, not {image_size}")
    if resample != _BICUBIC:
        wrong.append(f"resample is {resample!r}, not {_BICUBIC} (bicubic)")
    if len(mean) != 3 or len(deviation) != 3:
        wrong.append(f"image_mean is {mean} and image_std {deviation}, not three numbers each")
    if wrong:
        raise ValueError(f"{os.fspath(file)} makes other pictures than CLIP's: {'; '.join(wrong)}.")
    factor = theirs.get("rescale_factor", 1 / 255)
    return Pictures(shorter, image_size, factor, tuple(mean), tuple(deviation))
