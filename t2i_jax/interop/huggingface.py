"""Hugging Face weight directories (config.json and *.safetensors) -> our parameter trees.

Tables alone say what is where: `GEMMA` for the language model, `AUTOENCODER` for diffusers'
AutoencoderKL. Preflights ask `find_weights`, which loads nothing.
"""

from collections.abc import Callable, Iterable, Mapping
import json
import math
import shlex
from typing import Any

from etils import epath
import flax.linen as nn
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp

from t2i_jax.interop.safetensors import Rule, load, open_tensors
from t2i_jax.models.autoencoder import PIXEL_CHANNELS, AutoencoderKL
from t2i_jax.models.llm import LLM

GEMMA = (
    Rule("embed/weight", "embed_tokens.weight", "V D -> V D"),
    Rule("blocks/attention_norm/weight", "layers.{L}.input_layernorm.weight", "D -> D"),
    Rule("blocks/attention/q/weight", "layers.{L}.self_attn.q_proj.weight", "NH D -> D N H"),
    Rule("blocks/attention/k/weight", "layers.{L}.self_attn.k_proj.weight", "KH D -> D K H"),
    Rule("blocks/attention/v/weight", "layers.{L}.self_attn.v_proj.weight", "KH D -> D K H"),
    Rule("blocks/attention_out/weight", "layers.{L}.self_attn.o_proj.weight", "D NH -> N H D"),
    Rule("blocks/mlp_norm/weight", "layers.{L}.post_attention_layernorm.weight", "D -> D"),
    Rule("blocks/mlp/gate/weight", "layers.{L}.mlp.gate_proj.weight", "F D -> D F"),
    Rule("blocks/mlp/up/weight", "layers.{L}.mlp.up_proj.weight", "F D -> D F"),
    Rule("blocks/mlp/down/weight", "layers.{L}.mlp.down_proj.weight", "D F -> F D"),
    Rule("final_norm/weight", "norm.weight", "D -> D"),
)
GEMMA_CONFIG = {  # our field -> theirs
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "mlp_width": "intermediate_size",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
}

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
}

_FETCH = {
    "llm": "hf download google/gemma-2b --local-dir {}",
    "autoencoder": "hf download stabilityai/stable-diffusion-3-medium-diffusers "
    '--include "vae/*" --local-dir {}',
}
_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_INDEX = ".index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def find_weights(path: epath.PathLike, kind: str) -> list[str]:
    """What keeps the weights at `path` from being loaded; [] where they are all there.

    `kind` is 'llm' or 'autoencoder'. Looks at which files there are; opens an index at most.
    """
    if kind not in _FETCH:
        raise ValueError(f"Unknown kind of weights {kind!r}; known: {list(_FETCH)}.")
    try:
        _find(path, kind)
    except (FileNotFoundError, ValueError) as error:
        return [str(error)]
    return []


def load_gemma(
    path: epath.PathLike,
    llm: Mapping[str, Any],
    shardings: Any = None,
    dtype: Any = jnp.bfloat16,
) -> dict[str, Any]:
    """The parameters of `LLM(**llm)` from a Hugging Face directory of Gemma, unboxed.

    Args:
      path: directory with config.json and *.safetensors.
      llm: the config's section `llm`, the fields of LLM.
      shardings: a tree like the result of where each parameter goes; default: the first device.
      dtype: of the parameters; the files' are converted.

    Raises FileNotFoundError where weights are missing, and ValueError where the directory's
    config.json or tensors disagree with `llm`, naming all fields or tensors that do.
    """
    directory, files = _find(path, "llm")
    theirs = _read_json(directory / "config.json")
    rope = theirs.get("rope_parameters")  # where transformers 5 keeps rope_theta
    theirs = {**(rope if isinstance(rope, dict) else {}), **theirs}
    if theirs.get("model_type") != "gemma":
        raise ValueError(
            f"{directory / 'config.json'} has model_type {theirs.get('model_type')!r}; only "
            "'gemma' is read here."
        )
    fields = [(f"llm.{o}", llm[o], t, theirs.get(t)) for o, t in GEMMA_CONFIG.items()]
    _check_fields(directory, fields)

    tensors = open_tensors(files)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    prefix = "model." if "model.embed_tokens.weight" in tensors else ""
    rules = [rule._replace(theirs=prefix + rule.theirs) for rule in GEMMA]
    unused = {"lm_head.weight"}  # tied to the embedding
    shapes = _shapes(LLM(**llm).init, ids, ids)
    return load(directory, tensors, shapes, rules, shardings, dtype, unused=unused)


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
    directory, files = _find(path, "autoencoder")
    theirs = AUTOENCODER_DEFAULTS | _read_json(directory / "config.json")
    net = _autoencoder(directory, theirs, dtype)
    if config is not None:
        actual = {
            "channels": ("latent_channels", net.latent_channels),
            "downsample": ("2^(len(block_out_channels) - 1)", net.downsample),
            "scale": ("scaling_factor", theirs["scaling_factor"]),
            "shift": ("shift_factor", theirs["shift_factor"] or 0.0),
        }
        _check_fields(directory, [(f"autoencoder.{o}", config[o], *t) for o, t in actual.items()])

    tensors = open_tensors(files)
    image = jax.ShapeDtypeStruct((1, net.downsample, net.downsample, PIXEL_CHANNELS), jnp.float32)
    shapes = _shapes(net.init, image)
    old = any(".attentions.0.query." in name for name in tensors)
    parts = AUTOENCODER | (OLD_ATTENTION if old else {})
    rules = [
        Rule(ours, _rename(ours, parts), AUTOENCODER_LAYOUTS[len(shape)])
        for ours, shape in shapes.items()
    ]
    return net, load(directory, tensors, shapes, rules, shardings, dtype)


def _autoencoder(directory: epath.Path, theirs: Mapping[str, Any], dtype: Any) -> AutoencoderKL:
    fixed = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "mid_block_add_attention": True}
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


def _find(path: epath.PathLike, kind: str) -> tuple[epath.Path, list[epath.Path]]:
    """The directory of the weights and the safetensors files in it; all exist."""
    directory = target = epath.Path(path).expanduser()
    if kind == "autoencoder":  # downloaded as the folder vae/ of a pipeline
        target = directory.parent if directory.name == "vae" else directory
        if (directory / "vae" / "config.json").exists():
            directory = directory / "vae"

    def missing(what):
        command = _FETCH[kind].format(shlex.quote(str(target)))
        return FileNotFoundError(
            f"No {kind} weights in {directory}: {what}. Fetch them (their licence is to be "
            f"accepted on the Hub first, then `hf auth login`):\n    {command}"
        )

    if not directory.is_dir():
        raise missing("there is no such directory")
    if not (directory / "config.json").exists():
        raise missing("it has no config.json")
    for name in _NAMES:
        if (directory / name).exists():
            return directory, [directory / name]
    for name in _NAMES:
        if (directory / (name + _INDEX)).exists():
            names = sorted(set(_weight_map(directory / (name + _INDEX)).values()))
            absent = [name for name in names if not (directory / name).exists()]
            if absent:
                raise missing(f"its index names {', '.join(absent)}, not there")
            return directory, [directory / name for name in names]
    pickles = sorted(file.name for file in directory.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise missing(
            f"it has only pickles ({', '.join(pickles)}), which can run code and are never "
            "opened; safetensors are read"
        )
    raise missing(f"it has neither {' nor '.join(_NAMES)} (nor their {_INDEX})")


def _weight_map(index: epath.Path) -> dict[str, str]:
    """Tensor name -> file name of a sharded model."""
    files = _read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index} has no weight_map.")
    for name in files.values():
        plain = isinstance(name, str) and not set("/\\\0") & set(name)
        if not plain or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} names the file {name!r}; only *.safetensors beside it are read."
            )
    return files


def _read_json(file: epath.Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must be a JSON object.")
    return content


def _shapes(init: Callable[..., Any], *inputs: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape of what a module's `init` makes."""
    variables = jax.eval_shape(init, jax.random.key(0), *inputs)
    params = nn.meta.unbox(variables["params"])
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


def _check_fields(directory: epath.Path, fields: Iterable[tuple[str, Any, str, Any]]) -> None:
    """Raises ValueError naming every (our field, value, their field, value) that disagrees."""

    def same(a, b):
        return isinstance(b, int | float) and math.isclose(a, b, rel_tol=1e-6)

    wrong = [f"{o} is {a!r}, {t} {b!r}" for o, a, t, b in fields if not same(a, b)]
    if wrong:
        raise ValueError(
            f"The config and {directory / 'config.json'} disagree: {'; '.join(wrong)}. Set the "
            "config to what the weights are, or name the directory of others."
        )
