"""Language models from Hugging Face directories -> the parameters of `LLM`.

config.json's model_type says which family it is: gemma, gemma2, qwen3, or paligemma, of which the
language half is read.
"""

from collections.abc import Mapping
import math
from typing import Any, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp

from t2i_jax.interop.directory import check_fields, find, read_json, shapes_of
from t2i_jax.interop.mapping import Mapped, Rule, materialise, sources
from t2i_jax.interop.safetensors import open_tensors
from t2i_jax.models.llm import LLM, from_config

_COMMON = (
    Rule("embed/weight", "embed_tokens.weight", "V D -> V D"),
    Rule("blocks/attention_norm/weight", "layers.{L}.input_layernorm.weight", "D -> D"),
    Rule("blocks/attention/q/weight", "layers.{L}.self_attn.q_proj.weight", "NH D -> D N H"),
    Rule("blocks/attention/k/weight", "layers.{L}.self_attn.k_proj.weight", "KH D -> D K H"),
    Rule("blocks/attention/v/weight", "layers.{L}.self_attn.v_proj.weight", "KH D -> D K H"),
    Rule("blocks/attention_out/weight", "layers.{L}.self_attn.o_proj.weight", "D NH -> N H D"),
    Rule("blocks/mlp/gate/weight", "layers.{L}.mlp.gate_proj.weight", "F D -> D F"),
    Rule("blocks/mlp/up/weight", "layers.{L}.mlp.up_proj.weight", "F D -> D F"),
    Rule("blocks/mlp/down/weight", "layers.{L}.mlp.down_proj.weight", "D F -> F D"),
    Rule("final_norm/weight", "norm.weight", "D -> D"),
)
GEMMA = (
    *_COMMON,
    Rule("blocks/mlp_norm/weight", "layers.{L}.post_attention_layernorm.weight", "D -> D"),
)
_AFTER = "layers.{L}.post_feedforward_layernorm.weight"
GEMMA2 = (
    *_COMMON,
    Rule(
        "blocks/attention_post_norm/weight", "layers.{L}.post_attention_layernorm.weight", "D -> D"
    ),
    Rule("blocks/mlp_norm/weight", "layers.{L}.pre_feedforward_layernorm.weight", "D -> D"),
    Rule("blocks/mlp_post_norm/weight", _AFTER, "D -> D"),
)
QWEN3 = (
    *GEMMA,
    Rule("blocks/q_norm/weight", "layers.{L}.self_attn.q_norm.weight", "H -> H"),
    Rule("blocks/k_norm/weight", "layers.{L}.self_attn.k_norm.weight", "H -> H"),
)
FIELDS = {  # our field -> theirs
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "mlp_width": "intermediate_size",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "query_scalar": "query_pre_attn_scalar",
    "softcap": "attn_logit_softcapping",
    "logit_softcap": "final_logit_softcapping",
}
_ABSENT = {  # what null means in their config.json, and the lack of what a family does not have
    "query_pre_attn_scalar": 0,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "sliding_window": math.inf,
}
_VISION = ("vision_tower.", "multi_modal_projector.")


class Family(NamedTuple):
    """What the directories of one model_type hold."""

    rules: tuple[Rule, ...]
    fixed: Mapping[str, Any]  # our fields that are in the family's code, not in its config.json
    defaults: Mapping[str, Any]  # their fields that config.json may lack, as transformers has them
    supported: Mapping[str, tuple[Any, ...]]  # values of their fields that mean what is done here
    limits: tuple[str, ...] = ("max_position_embeddings",)  # their fields that bound a text


_DEFAULTS = {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "attention_bias": False}
_SUPPORTED = {
    "rope_type": (None, "default"),
    "full_attention": (None,),  # a rotation of its own, in rope_parameters
    "sliding_attention": (None,),
    "layer_types": (None, "full_attention"),
    "attention_bias": (False,),
    "tie_word_embeddings": (True,),
    "use_bidirectional_attention": (None, False),
}
_GEMMA_FIXED = {
    "activation": "gelu",
    "norm_offset": 1.0,
    "scale_embedding": True,
    "post_norms": False,
    "qk_norm": False,
}
_GEMMA_DEFAULTS = _DEFAULTS | {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_TANH = "gelu_pytorch_tanh"
_GEMMA2_DEFAULTS = _GEMMA_DEFAULTS | {
    "hidden_activation": _TANH,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
}
_GEMMA2_LAYERS = (None, "full_attention", "sliding_attention")  # the same within the window
_QWEN3_FIXED = {
    "activation": "silu",
    "norm_offset": 0.0,
    "scale_embedding": False,
    "post_norms": False,
    "qk_norm": True,
}
_QWEN3_DEFAULTS = _DEFAULTS | {
    "head_dim": 128,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "use_sliding_window": False,
}
FAMILIES = {
    "gemma": Family(
        GEMMA,
        _GEMMA_FIXED,
        _GEMMA_DEFAULTS | {"hidden_act": _TANH},
        # Google's files say 'gelu', which transformers takes for the tanh form here alone.
        _SUPPORTED | {"hidden_act": ("gelu", _TANH), "hidden_activation": (None, _TANH)},
    ),
    "gemma2": Family(
        GEMMA2,
        _GEMMA_FIXED | {"post_norms": True},
        _GEMMA2_DEFAULTS,
        _SUPPORTED | {"hidden_activation": (_TANH,), "layer_types": _GEMMA2_LAYERS},
        ("max_position_embeddings", "sliding_window"),
    ),
    "qwen3": Family(
        QWEN3,
        _QWEN3_FIXED,
        _QWEN3_DEFAULTS,
        _SUPPORTED | {"hidden_act": ("silu",), "use_sliding_window": (False,)},
    ),
}


_GEMMA_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_WRITTEN = {  # what the config.json of a family says beside its numbers
    "gemma": {"architectures": ["GemmaModel"], "hidden_act": _TANH, "hidden_activation": _TANH}
    | _GEMMA_IDS,
    "gemma2": {"architectures": ["Gemma2Model"], "hidden_activation": _TANH} | _GEMMA_IDS,
    "qwen3": {"architectures": ["Qwen3Model"], "hidden_act": "silu", "tie_word_embeddings": True},
}


def load_llm(
    path: epath.PathLike,
    llm: Mapping[str, Any],
    shardings: Any = None,
    dtype: Any = jnp.bfloat16,
) -> dict[str, Any]:
    """The parameters of the config's language model from a Hugging Face directory, unboxed.

    Args:
      path: directory with config.json and *.safetensors.
      llm: the config's section `llm`.
      shardings: a tree like the result of where each parameter goes; default: the first device.
      dtype: of the parameters; the files' are converted.

    Raises as `open_llm`.
    """
    return materialise(open_llm(path, llm), shardings, dtype)


def open_llm(path: epath.PathLike, llm: Mapping[str, Any]) -> dict[str, Mapped]:
    """Path -> source of the parameters of the config's language model; nothing is read.

    A config of fewer layers than the directory's gets the first ones. Raises FileNotFoundError
    where weights are missing, and ValueError where the directory holds what is not computed here,
    or its config.json or tensors disagree with `llm`, naming all fields or tensors that do.
    """
    directory, files = find(path, "llm")
    net = from_config(llm)
    theirs = read_json(directory / "config.json")
    kind, fields, prefixes = _resolve(theirs, directory / "config.json")
    _check_config(directory, net, kind, fields)

    tensors = open_tensors(files)
    prefix = next((p for p in prefixes if f"{p}embed_tokens.weight" in tensors), prefixes[0])
    where = [rule._replace(theirs=prefix + rule.theirs) for rule in FAMILIES[kind].rules]
    unused = {"lm_head.weight", "language_model.lm_head.weight"}  # tied to the embedding
    unused.update(name for name in tensors if name.removeprefix("model.").startswith(_VISION))
    for layer in range(net.num_layers, fields["num_hidden_layers"]):
        unused.update(rule.theirs.format(L=layer) for rule in where if rule.stacked)
    return sources(directory, tensors, shapes(net), where, unused=unused)


def shapes(net: LLM) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the parameters of a language model."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return shapes_of(net.init, ids, ids)


def section(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Their config.json -> the keys of the config's section `llm` that follow from it.

    Raises ValueError where it is of what is not computed here.
    """
    kind, fields, _ = _resolve(theirs, "config.json")
    values = {ours: fields[name] for ours, name in FIELDS.items()} | FAMILIES[kind].fixed
    values["max_tokens"] = min(fields[name] for name in FAMILIES[kind].limits)
    return {name: LLM.__annotations__[name](value) for name, value in values.items()}


def config_json(llm: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a section `llm`: `section` undone.

    Raises ValueError where no family has the section's values.
    """
    other = {}
    for kind, family in FAMILIES.items():
        *longer, longest = family.limits
        theirs = {"model_type": kind} | _WRITTEN[kind] | {longest: llm["max_tokens"]}
        theirs |= {name: max(llm["max_tokens"], family.defaults[name]) for name in longer}
        for ours, name in FIELDS.items():
            if name in family.defaults or name not in _ABSENT:
                theirs[name] = llm[ours] or (None if name in _ABSENT else llm[ours])
        if theirs.get("query_pre_attn_scalar", 0) is None:
            theirs["query_pre_attn_scalar"] = llm["head_width"]
        made = section(theirs)
        other[kind] = [
            f"{key} = {llm[key]!r}"
            for key, value in made.items()
            if value != llm[key] and not (key == "query_scalar" and same_scale(made, llm))
        ]
        if not other[kind]:
            return theirs
    nearest = min(other, key=lambda kind: len(other[kind]))
    raise ValueError(f"No {nearest} language model has {', '.join(other[nearest])}.")


def same_scale(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether the scores of two sections `llm` are scaled alike; 0 is the head's width."""
    one, other = ((llm["query_scalar"] or llm["head_width"]) for llm in (a, b))
    return one == other


def rules(theirs: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Where each parameter of the language model of this config.json is, without a prefix."""
    return FAMILIES[_resolve(theirs, "config.json")[0]].rules


def _resolve(theirs: Mapping[str, Any], source: Any) -> tuple[str, dict, tuple[str, ...]]:
    """(Name of the family, their fields, what the names of their tensors may start with)."""
    kind, prefixes = theirs.get("model_type"), ("model.", "")
    if kind == "paligemma":
        # As published; as some versions of transformers save it.
        prefixes = ("language_model.model.", "model.language_model.")
        theirs = theirs.get("text_config")
        theirs = dict(theirs) if isinstance(theirs, dict) else {}
        theirs.pop("use_bidirectional_attention", None)  # of image and prompt; text alone is causal
        kind = theirs.get("model_type", "gemma")
    if kind not in FAMILIES:
        known = f"{', '.join(FAMILIES)}, and paligemma around one of these"
        raise ValueError(f"{source} has model_type {kind!r}; known here: {known}.")
    family = FAMILIES[kind]
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling")  # transformers 5; before
    rope = rope if isinstance(rope, dict) else {}
    fields = family.defaults | {"rope_type": rope.get("type")} | theirs | rope
    fields |= {name: value for name, value in _ABSENT.items() if fields.get(name) is None}

    def unsupported(name):
        value, known = fields.get(name), family.supported[name]
        return any(x not in known for x in (value if isinstance(value, list) else [value]))

    other = [f"{name} {fields.get(name)!r}" for name in family.supported if unsupported(name)]
    numbers = (*FIELDS.values(), *family.limits)
    other += [
        f"{name} {fields.get(name)!r}"
        for name in numbers
        if not isinstance(fields.get(name), int | float)
    ]
    if other:
        raise ValueError(f"{source}: a {kind} with {', '.join(other)} is not implemented here.")
    return kind, fields, prefixes


def _check_config(directory: epath.Path, net: LLM, kind: str, fields: Mapping[str, Any]) -> None:
    """Raises ValueError naming all fields in which the config is not theirs."""
    family = FAMILIES[kind]
    limit = min(family.limits, key=lambda name: fields[name])
    rows = [(ours, getattr(net, ours), name, fields[name]) for ours, name in FIELDS.items()]
    rows += [("max_tokens", net.max_tokens, limit, fields[limit])]
    rows += [(ours, getattr(net, ours), f"{kind} has", v) for ours, v in family.fixed.items()]

    def agrees(ours, value, theirs):
        if ours in ("num_layers", "max_tokens"):  # may be less
            return value <= theirs
        if ours == "query_scalar":  # 0 is the head's width
            return (value or net.head_width) == (theirs or net.head_width)
        return False  # that is for check_fields to say

    check_fields(directory, [(f"llm.{o}", a, t, b) for o, a, t, b in rows if not agrees(o, a, b)])
