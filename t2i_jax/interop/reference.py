"""The published PyTorch system's models: config.json and tensor names <-> ours.

A directory `transformer/` of the published pipelines (tang-bd/fuse-dit) is a FuseDiT, whose tensors
are `llm.*` and `dit.*`, or a baseline DiT, whose tensors have no prefix and whose language model
lies elsewhere. config.json holds the language model's own config as `base_config`.

What their names for the choices of the study are here:

    model_type FuseDiT | DiT           memory.source deep | shallow
    attention self | cross             dit.attention joint | cross
    pos_embed ape                      dit.positions none, and a table (dit.table_size)
    initial_layers, shared_attention_layers    the LLM's layers before the first shared one
"""

from collections.abc import Mapping
from typing import Any

from etils import epath
import flax.linen as nn
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.interop import llm as language_models
from t2i_jax.interop.directory import find, read_json
from t2i_jax.interop.mapping import Readable, Rule
from t2i_jax.interop.mapping import load as load_tensors
from t2i_jax.interop.safetensors import open_tensors
from t2i_jax.models import fusion
from t2i_jax.models.positions import absolute_table

_ATTENTION = {"self": "joint", "cross": "cross"}
_POSITIONS = {"ape": "none", "1d-rope": "1d-rope", "2d-rope": "2d-rope", "m-rope": "m-rope"}
_CONDITIONING = {
    None: "none",
    "adaln-zero": "adaln-zero",
    "adaln-single": "adaln-single",
    "addition": "addition",
}
_DEFAULTS = {  # what the published code takes for a key that config.json lacks
    "attention": "self",
    "dit_num_hidden_layers": 18,
    "text_hidden_states_index": -1,
    "in_channels": 16,
    "initial_layers": 0,
    "out_channels": 16,
    "patch_size": 2,
    "pos_embed": "1d-rope",
    "pos_embed_max_size": 64,
    "qk_norm": False,
    "sample_size": 32,
    "sandwich_norm": False,
    "shared_attention_layers": "all",
    "text_hidden_size": None,
    "text_modulation_embeds_dim": None,
    "timestep_conditioning": "adaln-zero",
}
_TABLE = "patch_embed.pos_embed"  # computed here, compared where it is stored

# Ours -> theirs, of everything that any of the models has. Names with two values differ with the
# config: see _names.
_LINEAR, _SPLIT = "O I -> I O", "MD E -> E M D"
_BLOCK = {
    "attention/q/weight": ("self_attn.q_proj.weight", "NH D -> D N H"),
    "attention/k/weight": ("self_attn.k_proj.weight", "KH D -> D K H"),
    "attention/v/weight": ("self_attn.v_proj.weight", "KH D -> D K H"),
    "attention_out/weight": ("self_attn.o_proj.weight", "D NH -> N H D"),
    "q_norm/weight": ("self_attn.q_norm.weight", "H -> H"),
    "k_norm/weight": ("self_attn.k_norm.weight", "H -> H"),
    "cross_q/weight": ("cross_attn.q_proj.weight", "NH D -> D N H"),
    "cross_out/weight": ("cross_attn.o_proj.weight", "D NH -> N H D"),
    "cross_q_norm/weight": ("cross_attn.q_norm.weight", "H -> H"),
    "cross_k_norm/weight": ("cross_attn.k_norm.weight", "H -> H"),
    "mlp/gate/weight": ("mlp.gate_proj.weight", "F D -> D F"),
    "mlp/up/weight": ("mlp.up_proj.weight", "F D -> D F"),
    "mlp/down/weight": ("mlp.down_proj.weight", "D F -> F D"),
    "attention_post_norm/weight": ("post_attention_layernorm.weight", "D -> D"),
    "cross_post_norm/weight": ("post_cross_attention_layernorm.weight", "D -> D"),
    "mlp_post_norm/weight": ("post_feedforward_layernorm.weight", "D -> D"),
    "modulation/linear/weight": ("input_layernorm.linear.weight", _SPLIT),
    "modulation/linear/bias": ("input_layernorm.linear.bias", "MD -> M D"),
    "modulation/table": ("scale_shift_table", "MD -> M D"),
}
_WHOLE = {
    "patch_embed/weight": ("patch_embed.proj.weight", "D C p q -> p q C D"),
    "patch_embed/bias": ("patch_embed.proj.bias", "D -> D"),
    "time_embed/time/hidden/weight": ("timestep_embedder.0.weight", _LINEAR),
    "time_embed/time/hidden/bias": ("timestep_embedder.0.bias", "D -> D"),
    "time_embed/time/out/weight": ("timestep_embedder.2.weight", _LINEAR),
    "time_embed/time/out/bias": ("timestep_embedder.2.bias", "D -> D"),
    "time_embed/pooled_norm/weight": ("condition_embedder.0.weight", "D -> D"),
    "time_embed/pooled/hidden/weight": ("condition_embedder.1.weight", _LINEAR),
    "time_embed/pooled/hidden/bias": ("condition_embedder.1.bias", "D -> D"),
    "time_embed/pooled/out/weight": ("condition_embedder.3.weight", _LINEAR),
    "time_embed/pooled/out/bias": ("condition_embedder.3.bias", "D -> D"),
    "shared_modulation/linear/weight": ("t_block.1.weight", _SPLIT),
    "shared_modulation/linear/bias": ("t_block.1.bias", "MD -> M D"),
    "final_modulation/linear/weight": ("norm_out.linear.weight", _SPLIT),
    "final_modulation/linear/bias": ("norm_out.linear.bias", "MD -> M D"),
    "final_modulation/table": ("scale_shift_table", "MD -> M D"),
    "out/weight": ("proj_out.weight", "pqC D -> D p q C"),
    "out/bias": ("proj_out.bias", "pqC -> p q C"),
}


def sections(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Their config.json -> {'llm', 'memory', 'dit', 'channels'}, as `fusion.build` takes them.

    Raises ValueError naming what no model here can have.
    """
    theirs = _with_defaults(theirs)
    fused = theirs["model_type"] == "FuseDiT"
    llm = language_models.section(theirs["base_config"])
    first = theirs["initial_layers"] if fused else 0
    layers, shared = theirs["dit_num_hidden_layers"], theirs["shared_attention_layers"]
    everything = list(range(first, llm["num_layers"]))
    wanted = {
        "model_type": theirs["model_type"] in ("FuseDiT", "DiT"),
        "attention": theirs["attention"] in _ATTENTION,
        "pos_embed": theirs["pos_embed"] in _POSITIONS,
        "timestep_conditioning": theirs["timestep_conditioning"] in _CONDITIONING,
        "out_channels": theirs["out_channels"] == theirs["in_channels"],
        "shared_attention_layers": not fused or shared == "all" or shared == everything,
        "dit_num_hidden_layers": not fused or layers == len(everything),
        "text_hidden_states_index": fused or theirs["text_hidden_states_index"] == -1,
        "text_modulation_embeds_dim": fused or theirs["text_modulation_embeds_dim"] is None,
        "text_hidden_size": theirs["text_hidden_size"] in (None, llm["width"]),
    }
    wrong = [f"{name} = {theirs[name]!r}" for name, good in wanted.items() if not good]
    if wrong:
        raise ValueError(f"No model here is that of {', '.join(wrong)}.")
    dit = {
        "width": theirs.get("dit_hidden_size") or llm["width"],
        "num_layers": layers,
        "mlp_width": llm["mlp_width"],
        "patch_size": theirs["patch_size"],
        "attention": _ATTENTION[theirs["attention"]],
        "positions": _POSITIONS[theirs["pos_embed"]],
        "conditioning": _CONDITIONING[theirs["timestep_conditioning"]],
        "pooled_width": theirs["text_modulation_embeds_dim"] or 0,
        "qk_norm": theirs["qk_norm"],
        "sandwich_norm": theirs["sandwich_norm"],
    }
    if theirs["pos_embed"] == "ape":
        extent = float(theirs["sample_size"] // theirs["patch_size"])
        side = theirs["pos_embed_max_size"]
        dit |= {"table_size": side, "table_range": extent}
    memory = {"source": "deep" if fused else "shallow"}
    return {"llm": llm, "memory": memory, "dit": dit, "channels": theirs["in_channels"]}


def _with_defaults(theirs: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(theirs.get("base_config"), dict) or "model_type" not in theirs:
        raise ValueError("This config.json has no base_config or no model_type: of another system?")
    return _DEFAULTS | dict(theirs)


def _names(theirs: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Path in {'memory', 'dit'} -> (their name, layout), for this config."""
    theirs = _with_defaults(theirs)
    modulated = theirs["timestep_conditioning"] == "adaln-zero"
    norm = ".norm" if modulated else ""
    before_mlp = "pre_feedforward" if theirs["sandwich_norm"] else "post_attention"
    block = _BLOCK | {
        "attention_norm/weight": (f"input_layernorm{norm}.weight", "D -> D"),
        "mlp_norm/weight": (f"{before_mlp}_layernorm.weight", "D -> D"),
    }
    whole = _WHOLE | {"final_norm/weight": (f"norm_out{norm}.weight", "D -> D")}
    names = {f"dit/{ours}": name for ours, name in whole.items()}
    for ours, (name, layout) in block.items():
        names[f"dit/blocks/{ours}"] = (f"layers.{{L}}.{name}", layout)
    reader = "self_attn" if theirs["attention"] == "self" else "cross_attn"
    return names | {
        "memory/norm/weight": ("context_embedder.0.weight", "D -> D"),
        "memory/context/weight": ("context_embedder.1.weight", _LINEAR),
        "memory/context/bias": ("context_embedder.1.bias", "D -> D"),
        "memory/layers/k/weight": (f"layers.{{L}}.{reader}.text_k_proj.weight", "KH D -> D K H"),
        "memory/layers/v/weight": (f"layers.{{L}}.{reader}.text_v_proj.weight", "KH D -> D K H"),
    }


def rules(theirs: Mapping[str, Any], paths: Mapping[str, Any]) -> list[Rule]:
    """Where in their files each of our parameters is; `paths` as 'dit/blocks/mlp/up/weight'."""
    prefix = "dit." if theirs["model_type"] == "FuseDiT" else ""
    names = _names(theirs)
    out = [Rule(p, prefix + names[p][0], names[p][1]) for p in paths if not p.startswith("llm/")]
    family = language_models.rules(theirs["base_config"])
    return out + [
        Rule(f"llm/{r.ours}", f"llm.{r.theirs}", r.layout)
        for r in family
        if f"llm/{r.ours}" in paths
    ]


def shapes(model: fusion.TextToImageModel, *, llm: bool) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the model's parameters, with or without those of its language model."""
    patch = model.dit.patch_size
    boxed = jax.eval_shape(
        lambda key: fusion.init(model, key, (patch, patch, model.dit.channels)), jax.random.key(0)
    )
    flat = flatten_dict(nn.meta.unbox(boxed), sep="/")
    return {p: x.shape for p, x in flat.items() if llm or not p.startswith("llm/")}


def load(
    path: epath.PathLike, shardings: Any = None, dtype: Any = jnp.float32
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(Sections of its config, parameters) of a published model.

    Args:
      path: a pipeline's directory, or the `transformer/` in it.
      shardings: a tree like the parameters; default: the first device.
      dtype: of the parameters.

    Raises FileNotFoundError where something is missing, and ValueError as `load_transformer`.
    """
    directory, files = find(path, "transformer")
    theirs = read_json(directory / "config.json")
    tensors = open_tensors(files)
    return sections(theirs), load_transformer(directory, theirs, tensors, shardings, dtype)


def load_transformer(
    source: Any,
    theirs: Mapping[str, Any],
    tensors: Mapping[str, Readable],
    shardings: Any = None,
    dtype: Any = jnp.float32,
) -> dict[str, Any]:
    """The parameters {'llm', 'dit'}, or for a baseline {'memory', 'dit'}, of a `transformer/`.

    Args:
      source: what errors call the place that the tensors come from.
      theirs: its config.json.
      tensors: its tensors by name.
      shardings: a tree like the result; default: the first device.
      dtype: of the result.

    Raises ValueError where tensors are missing, left over or of another shape, or the stored table
    of positions is not the one that the config describes.
    """
    model = fusion.build(**sections(theirs))  # which checks what it is
    fused = theirs["model_type"] == "FuseDiT"
    paths = shapes(model, llm=fused)
    table = ("dit." if fused else "") + _TABLE
    if table in tensors:
        _check_table(source, tensors[table].read(), model)
    return load_tensors(
        source, tensors, paths, rules(theirs, paths), shardings, dtype, unused={table}
    )


def load_language_model(
    source: Any, theirs: Mapping[str, Any], tensors: Mapping[str, Readable]
) -> dict[str, Any]:
    """The parameters of a baseline's language model, which its `transformer/` does not hold.

    Arguments and errors as of `load_transformer`; float32, on the first device.
    """
    model = fusion.build(**sections(theirs))
    prefix = "llm/"
    paths = {p: s for p, s in shapes(model, llm=True).items() if p.startswith(prefix)}
    paths = {p.removeprefix(prefix): s for p, s in paths.items()}
    where = language_models.rules(theirs["base_config"])
    return load_tensors(source, tensors, paths, where, None, jnp.float32)


def _check_table(source: Any, stored: np.ndarray, model: fusion.TextToImageModel) -> None:
    side, width = model.dit.table_size, model.dit.width
    if side:
        expected = absolute_table((side, side), width, side, model.dit.table_range)
        if stored.size == expected.size and np.allclose(
            np.float32(stored).reshape(expected.shape), expected, rtol=0, atol=1e-5
        ):
            return
    raise ValueError(f"{source}: {_TABLE} is not the table of positions that its config describes.")
