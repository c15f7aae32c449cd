"""The published PyTorch system's tensors <-> our parameters.

The tensors of a FuseDiT's directory `transformer/` are `llm.*` and `dit.*`; those of a baseline DiT
have no prefix, and its language model lies elsewhere. What config.json says is reference_config.py.
"""

from collections.abc import Mapping
import functools
from typing import Any

import flax.linen as nn
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.interop import llm as language_models
from t2i_jax.interop.mapping import Mapped, Readable, Rule, materialise, sources
from t2i_jax.interop.reference_config import sections, with_defaults
from t2i_jax.interop.safetensors import Entry
from t2i_jax.models import fusion

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


_SHALLOW = {
    "memory/norm/weight": ("context_embedder.0.weight", "D -> D"),
    "memory/context/weight": ("context_embedder.1.weight", _LINEAR),
    "memory/context/bias": ("context_embedder.1.bias", "D -> D"),
    "memory/layers/k/weight": ("layers.{L}.{reader}.text_k_proj.weight", "KH D -> D K H"),
    "memory/layers/v/weight": ("layers.{L}.{reader}.text_v_proj.weight", "KH D -> D K H"),
}


def layouts() -> dict[str, str]:
    """Path in {'memory', 'dit'} -> layout, of all that any of the models has."""
    every = {f"dit/{ours}": layout for ours, (_, layout) in _WHOLE.items()}
    every |= {f"dit/blocks/{ours}": layout for ours, (_, layout) in _BLOCK.items()}
    norms = ("dit/blocks/attention_norm", "dit/blocks/mlp_norm", "dit/final_norm")
    every |= {f"{name}/weight": "D -> D" for name in norms}
    return every | {ours: layout for ours, (_, layout) in _SHALLOW.items()}


def _names(theirs: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Path in {'memory', 'dit'} -> (their name, layout), for this config."""
    theirs = with_defaults(theirs)
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
    shallow = {
        ours: (name.replace("{reader}", reader), layout)
        for ours, (name, layout) in _SHALLOW.items()
    }
    return names | shallow


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
    return {p: s for p, s in _shapes(model).items() if llm or not p.startswith("llm/")}


@functools.lru_cache(maxsize=4)
def _shapes(model: fusion.TextToImageModel) -> dict[str, tuple[int, ...]]:
    patch = model.dit.patch_size
    boxed = jax.eval_shape(
        lambda key: fusion.init(model, key, (patch, patch, model.dit.channels)), jax.random.key(0)
    )
    return {p: x.shape for p, x in flatten_dict(nn.meta.unbox(boxed), sep="/").items()}


def open_transformer(
    where: Any, theirs: Mapping[str, Any], tensors: Mapping[str, Readable]
) -> dict[str, Mapped]:
    """Path -> source of the parameters that a `transformer/` holds; only its table is read.

    These are 'llm/' and 'dit/', or for a baseline 'memory/' and 'dit/'.

    Args:
      where: what errors call the place that the tensors come from.
      theirs: its config.json.
      tensors: its tensors by name.

    Raises ValueError where tensors are missing, left over or of another shape, or the stored table
    of positions is not the one that the config describes.
    """
    model = fusion.build(**sections(theirs))  # which checks what it is
    fused = theirs["model_type"] == "FuseDiT"
    paths = shapes(model, llm=fused)
    table = ("dit." if fused else "") + _TABLE
    found = sources(where, tensors, paths, rules(theirs, paths), unused={table})
    if table in tensors:
        _check_table(where, tensors[table].read(), model)
    return found


def load_transformer(
    where: Any, theirs: Mapping[str, Any], tensors: Mapping[str, Readable]
) -> dict[str, Any]:
    """The parameters of `open_transformer`, float32, on the first device."""
    return materialise(open_transformer(where, theirs, tensors), None, jnp.float32)


def load_language_model(
    where: Any, theirs: Mapping[str, Any], tensors: Mapping[str, Readable]
) -> dict[str, Any]:
    """The parameters of a baseline's language model, which its `transformer/` does not hold.

    Arguments and errors as of `open_transformer`; float32, on the first device.
    """
    net = fusion.build(**sections(theirs)).llm
    found = sources(
        where,
        tensors,
        language_models.shapes(net),
        language_models.rules(theirs["base_config"]),
    )
    return materialise(found, None, jnp.float32)


def table_entry(theirs: Mapping[str, Any]) -> list[Entry]:
    """The table of positions, which they store: [] where the model has none."""
    if theirs["pos_embed"] != "ape":
        return []
    prefix = "dit." if theirs["model_type"] == "FuseDiT" else ""
    side, extent = theirs["pos_embed_max_size"], theirs["sample_size"] // theirs["patch_size"]
    shape = (1, side**2, theirs["dit_hidden_size"])
    return [Entry(prefix + _TABLE, shape, lambda: _table(side, shape[-1], extent)[None])]


def _table(side: int, width: int, extent: float) -> np.ndarray:
    """`absolute_table` of the whole square as they compute it, in float64: (side^2, D)."""
    frequency = 1.0 / 10_000.0 ** (np.arange(width // 4) / (width // 4))
    place = np.arange(side) / (side / extent)
    column, row = (x.reshape(-1, 1) * frequency for x in np.meshgrid(place, place))
    parts = [f(x) for x in (column, row) for f in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1, dtype=np.float32)


def _check_table(where: Any, stored: np.ndarray, model: fusion.TextToImageModel) -> None:
    side, width = model.dit.table_size, model.dit.width
    if side:
        expected = _table(side, width, model.dit.table_range)
        rounding = 1e-5 if stored.dtype.itemsize >= 4 else 4e-3
        if stored.size == expected.size and np.allclose(
            np.float32(stored).reshape(expected.shape), expected, rtol=0, atol=rounding
        ):
            return
    raise ValueError(f"{where}: {_TABLE} is not the table of positions that its config describes.")
