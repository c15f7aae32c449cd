"""CLIP text encoders from transformers directories -> the parameters of `CLIPText`."""

from collections.abc import Mapping
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp

from t2i_jax.interop.directory import check_fields, find, read_json, shapes_of
from t2i_jax.interop.mapping import Mapped, Rule, materialise, sources
from t2i_jax.interop.safetensors import open_tensors
from t2i_jax.models.clip import CLIPText

_MODEL = "text_model."
_LAYER = "encoder.layers.{L}."
_BLOCKS = (  # of a layer of either encoder
    Rule("blocks/attention_norm/weight", "layer_norm1.weight", "D -> D"),
    Rule("blocks/attention_norm/bias", "layer_norm1.bias", "D -> D"),
    Rule("blocks/q/weight", "self_attn.q_proj.weight", "NH D -> D N H"),
    Rule("blocks/q/bias", "self_attn.q_proj.bias", "NH -> N H"),
    Rule("blocks/k/weight", "self_attn.k_proj.weight", "NH D -> D N H"),
    Rule("blocks/k/bias", "self_attn.k_proj.bias", "NH -> N H"),
    Rule("blocks/v/weight", "self_attn.v_proj.weight", "NH D -> D N H"),
    Rule("blocks/v/bias", "self_attn.v_proj.bias", "NH -> N H"),
    Rule("blocks/attention_out/weight", "self_attn.out_proj.weight", "D NH -> N H D"),
    Rule("blocks/attention_out/bias", "self_attn.out_proj.bias", "D -> D"),
    Rule("blocks/mlp_norm/weight", "layer_norm2.weight", "D -> D"),
    Rule("blocks/mlp_norm/bias", "layer_norm2.bias", "D -> D"),
    Rule("blocks/mlp_up/weight", "mlp.fc1.weight", "F D -> D F"),
    Rule("blocks/mlp_up/bias", "mlp.fc1.bias", "F -> F"),
    Rule("blocks/mlp_down/weight", "mlp.fc2.weight", "D F -> F D"),
    Rule("blocks/mlp_down/bias", "mlp.fc2.bias", "D -> D"),
)


def blocks(model: str) -> list[Rule]:
    """Where the parameters of all layers are; `model` is 'text_model.' or 'vision_model.'."""
    return [rule._replace(theirs=model + _LAYER + rule.theirs) for rule in _BLOCKS]


CLIP = (
    Rule("embed/weight", "text_model.embeddings.token_embedding.weight", "V D -> V D"),
    Rule("positions", "text_model.embeddings.position_embedding.weight", "T D -> T D"),
    *blocks(_MODEL),
    Rule("final_norm/weight", "text_model.final_layer_norm.weight", "D -> D"),
    Rule("final_norm/bias", "text_model.final_layer_norm.bias", "D -> D"),
    Rule("projection/weight", "text_projection.weight", "P D -> D P"),
)
CLIP_CONFIG = {  # our field -> theirs
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "max_tokens": "max_position_embeddings",
    "projection_width": "projection_dim",
    "activation": "hidden_act",
    "eos_id": "eos_token_id",
    "norm_eps": "layer_norm_eps",
}
CLIP_DEFAULTS = {  # what transformers takes for a field that config.json lacks
    "vocab_size": 49_408,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "max_position_embeddings": 77,
    "projection_dim": 512,
    "hidden_act": "quick_gelu",
    "eos_token_id": 49_407,
    "layer_norm_eps": 1e-5,
}


def load_clip(
    path: epath.PathLike,
    clip: Mapping[str, Any] | None = None,
    shardings: Any = None,
    dtype: Any = jnp.float32,
) -> tuple[CLIPText, dict[str, Any]]:
    """The network and unboxed parameters of a CLIP text encoder's directory.

    Args:
      path, clip: as of `open_clip`.
      shardings: a tree like the parameters of where each goes, or one for all; default: the first
        device.
      dtype: of the parameters, and of the computation (`net.clone(dtype=...)` changes the latter).

    Raises as `open_clip`.
    """
    net, found = open_clip(path, clip)
    return net.clone(dtype=jnp.dtype(dtype)), materialise(found, shardings, dtype)


def open_clip(
    path: epath.PathLike, clip: Mapping[str, Any] | None = None
) -> tuple[CLIPText, dict[str, Mapped]]:
    """The network, and path -> source of its parameters; nothing is read.

    Args:
      path: the directory with config.json and *.safetensors, or one whose folder text_encoder/
        is that.
      clip: the config's section `clip`, checked against config.json where given.

    Raises FileNotFoundError where weights are missing, and ValueError where config.json describes
    another network, or disagrees with `clip`, or the tensors with it.
    """
    directory, files = find(path, "clip")
    theirs = CLIP_DEFAULTS | read_json(directory / "config.json")
    if theirs.get("model_type") != "clip_text_model":
        raise ValueError(
            f"{directory / 'config.json'} has model_type {theirs.get('model_type')!r}; only "
            "'clip_text_model' is read here."
        )
    if theirs.get("architectures") == ["CLIPTextModel"]:  # SD 1's and FLUX's: no projection
        theirs["projection_dim"] = 0
    actual = {ours: theirs[name] for ours, name in CLIP_CONFIG.items()}
    if clip is not None:
        fields = [(f"clip.{o}", clip[o], t, theirs[t]) for o, t in CLIP_CONFIG.items()]
        check_fields(directory, fields)
    net = CLIPText(**actual)
    tensors, where = open_tensors(files), list(CLIP)
    unused = {f"{_MODEL}embeddings.position_ids"}  # 0, 1, 2, ..., which older versions stored
    if not any(name.startswith(_MODEL) for name in tensors):  # as transformers 5 saves it
        where = [rule._replace(theirs=rule.theirs.removeprefix(_MODEL)) for rule in CLIP]
    return net, sources(directory, tensors, shapes(net), where, unused=unused)


def shapes(net: CLIPText) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the parameters of a CLIP text encoder."""
    return shapes_of(net.init, jax.ShapeDtypeStruct((1, 1), jnp.int32))


def section(net: CLIPText) -> dict[str, Any]:
    """The config's section `clip` of a network."""
    return {ours: getattr(net, ours) for ours in CLIP_CONFIG}


def config_json(clip: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a section `clip`."""
    fixed = {"architectures": [model_class(clip)], "model_type": "clip_text_model"}
    return fixed | {theirs: clip[ours] for ours, theirs in CLIP_CONFIG.items()}


def model_class(clip: Mapping[str, Any]) -> str:
    """The class of transformers of a section `clip`."""
    return "CLIPTextModel" + ("WithProjection" if clip["projection_width"] else "")


def rules(clip: Mapping[str, Any]) -> list[Rule]:
    """Where each parameter is."""
    return [rule for rule in CLIP if clip["projection_width"] or "projection" not in rule.ours]
