"""Language models from Hugging Face directories -> the parameters of `LLM`."""

from collections.abc import Mapping
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp

from t2i_jax.interop.directory import check_fields, find, read_json, shapes_of
from t2i_jax.interop.safetensors import Rule, load, open_tensors
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


def load_llm(
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
    directory, files = find(path, "llm")
    theirs = read_json(directory / "config.json")
    rope = theirs.get("rope_parameters")  # where transformers 5 keeps rope_theta
    theirs = {**(rope if isinstance(rope, dict) else {}), **theirs}
    if theirs.get("model_type") != "gemma":
        raise ValueError(
            f"{directory / 'config.json'} has model_type {theirs.get('model_type')!r}; only "
            "'gemma' is read here."
        )
    fields = [(f"llm.{o}", llm[o], t, theirs.get(t)) for o, t in GEMMA_CONFIG.items()]
    check_fields(directory, fields)

    tensors = open_tensors(files)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    prefix = "model." if "model.embed_tokens.weight" in tensors else ""
    rules = [rule._replace(theirs=prefix + rule.theirs) for rule in GEMMA]
    unused = {"lm_head.weight"}  # tied to the embedding
    shapes = shapes_of(LLM(**llm).init, ids, ids)
    return load(directory, tensors, shapes, rules, shardings, dtype, unused=unused)


def section(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Their config.json -> the config's section `llm`."""
    return {ours: theirs[name] for ours, name in GEMMA_CONFIG.items()}


def rules(theirs: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Where each parameter of the language model of this config.json is."""
    return GEMMA
