"""Which family a directory holds, and what of it is read: names, shapes and config.json.

(The values that a family computes: tests/models/test_llm.py; against transformers: tests/parity.)
"""

import json

from flax.core import meta
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
import transformers

from configs import base
from t2i_jax import convert
from t2i_jax.interop import directory
from t2i_jax.interop.llm import FAMILIES, config_json, load_llm, rules, same_scale, section
from t2i_jax.models.llm import LLM

V, D, L, N, K, H, F = 40, 24, 3, 4, 2, 8, 48
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": H,
    "intermediate_size": F,
}
TIED = {"tie_word_embeddings": True}
JSON = {
    "gemma": SIZES | {"model_type": "gemma", "hidden_act": "gelu"},
    "gemma2": SIZES | {"model_type": "gemma2", "query_pre_attn_scalar": 16},
    "qwen3": SIZES | {"model_type": "qwen3", "rope_theta": 1e6} | TIED,
    "paligemma": {"model_type": "paligemma", "text_config": SIZES | {"model_type": "gemma"}},
}
BLOCK = {  # their names -> our parameters
    "input_layernorm.weight": "attention_norm/weight",
    "self_attn.q_proj.weight": "attention/q/weight",
    "self_attn.k_proj.weight": "attention/k/weight",
    "self_attn.v_proj.weight": "attention/v/weight",
    "self_attn.o_proj.weight": "attention_out/weight",
    "mlp.gate_proj.weight": "mlp/gate/weight",
    "mlp.up_proj.weight": "mlp/up/weight",
    "mlp.down_proj.weight": "mlp/down/weight",
}
SHAPES = {
    "self_attn.q_proj.weight": (N * H, D),
    "self_attn.k_proj.weight": (K * H, D),
    "self_attn.v_proj.weight": (K * H, D),
    "self_attn.o_proj.weight": (D, N * H),
    "mlp.gate_proj.weight": (F, D),
    "mlp.up_proj.weight": (F, D),
    "mlp.down_proj.weight": (D, F),
    "self_attn.q_norm.weight": (H,),
    "self_attn.k_norm.weight": (H,),
}
GEMMA = BLOCK | {"post_attention_layernorm.weight": "mlp_norm/weight"}
BLOCKS = {
    "gemma": GEMMA,
    "gemma2": BLOCK
    | {
        "post_attention_layernorm.weight": "attention_post_norm/weight",
        "pre_feedforward_layernorm.weight": "mlp_norm/weight",
        "post_feedforward_layernorm.weight": "mlp_post_norm/weight",
    },
    "qwen3": GEMMA
    | {"self_attn.q_norm.weight": "q_norm/weight", "self_attn.k_norm.weight": "k_norm/weight"},
    "paligemma": GEMMA,
}
VISION = {"vision_tower.vision_model.post_layernorm.bias": (5,)}
VISION |= {"multi_modal_projector.linear.weight": (D, 5)}


def tensors(kind, prefix="model.", dtype="f4"):
    shapes = {f"{prefix}embed_tokens.weight": (V, D), f"{prefix}norm.weight": (D,)}
    for i in range(L):
        for name in BLOCKS[kind]:
            shapes[f"{prefix}layers.{i}.{name}"] = SHAPES.get(name, (D,))
    if kind == "paligemma":
        start = "model." if prefix.startswith("model.") else ""
        shapes |= {start + name: shape for name, shape in VISION.items()}
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write(folder, config, stored):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(stored, folder / "model.safetensors")
    return folder


def refused(folder, fields, *texts):
    with pytest.raises(ValueError) as error:
        load_llm(folder, fields)
    assert all(text in str(error.value) for text in texts), error.value


def parameters(fields):
    ids = jnp.zeros((1, 1), int)
    shapes = jax.eval_shape(LLM(**fields).init, jax.random.key(0), ids, ids)["params"]
    return flatten_dict(meta.unbox(shapes), sep="/")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "kind, prefix",
    [
        ("gemma", "model."),
        ("gemma2", "model."),
        ("gemma2", ""),
        ("qwen3", "model."),
        ("paligemma", "language_model.model."),
        ("paligemma", "model.language_model."),
    ],
)
def test_every_tensor_is_where_it_belongs(tmp_path, kind, prefix, dtype):
    stored = tensors(kind, prefix, dtype)
    head = "language_model.lm_head.weight" if kind == "paligemma" else "lm_head.weight"
    write(tmp_path, JSON[kind], stored | {head: stored[f"{prefix}embed_tokens.weight"]})
    fields = section(JSON[kind])
    read = flatten_dict(load_llm(tmp_path, fields, dtype="float32"), sep="/")
    assert {p: x.shape for p, x in read.items()} == {
        p: x.shape for p, x in parameters(fields).items()
    }
    np.testing.assert_array_equal(read["embed/weight"], stored[f"{prefix}embed_tokens.weight"])
    np.testing.assert_array_equal(read["final_norm/weight"], stored[f"{prefix}norm.weight"])
    assert {f"blocks/{name}" for name in BLOCKS[kind].values()} < read.keys()
    for theirs, ours in BLOCKS[kind].items():
        for i in range(L):
            x = np.asarray(read[f"blocks/{ours}"])[i]
            expected = stored[f"{prefix}layers.{i}.{theirs}"]
            x = x if expected.ndim == 1 else x.reshape(expected.shape[1], -1).T  # (out, in) there
            np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("kind", JSON)
def test_fewer_layers_are_the_first_ones(tmp_path, kind):
    prefix = "language_model.model." if kind == "paligemma" else "model."
    write(tmp_path, JSON[kind], tensors(kind, prefix))
    fields = section(JSON[kind])
    whole = load_llm(tmp_path, fields, dtype="float32")
    part = load_llm(tmp_path, fields | {"num_layers": 2}, dtype="float32")
    for name, x in flatten_dict(part, sep="/").items():
        y = flatten_dict(whole, sep="/")[name]
        np.testing.assert_array_equal(x, y[:2] if name.startswith("blocks") else y)
    refused(tmp_path, fields | {"num_layers": 4}, "llm.num_layers is 4, num_hidden_layers 3")


def test_a_layer_beyond_those_of_config_json_is_not_known(tmp_path):
    stored = tensors("gemma") | {"model.layers.3.input_layernorm.weight": np.zeros(D, "f4")}
    write(tmp_path, JSON["gemma"], stored)
    fields = section(JSON["gemma"]) | {"num_layers": 2}
    refused(tmp_path, fields, "1 tensors not known: model.layers.3.input_layernorm.weight")


def test_a_config_of_another_family_is_named_field_by_field(tmp_path):
    write(tmp_path, JSON["qwen3"], tensors("qwen3"))
    refused(
        tmp_path,
        section(JSON["gemma2"]) | {"max_tokens": 40_000},
        "llm.activation is 'gelu', qwen3 has 'silu'",
        "llm.norm_offset is 1.0, qwen3 has 0.0",
        "llm.scale_embedding is True, qwen3 has False",
        "llm.post_norms is True, qwen3 has False",
        "llm.qk_norm is False, qwen3 has True",
        "llm.softcap is 50.0, attn_logit_softcapping 0",
        "llm.query_scalar is 16.0, query_pre_attn_scalar 0",
        "llm.max_tokens is 40000, max_position_embeddings 32768",
        "llm.rope_theta is 10000.0, rope_theta 1000000.0",
    )


def test_what_follows_from_nothing_may_differ(tmp_path):
    write(tmp_path, JSON["gemma"], tensors("gemma"))
    fields = section(JSON["gemma"]) | {"max_tokens": 5, "unroll": 3, "softcap_shared": True}
    load_llm(tmp_path, fields | {"query_scalar": float(H)})  # 0 by its own name
    refused(tmp_path, fields | {"query_scalar": 2.0}, "llm.query_scalar is 2.0")


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("gemma", {"model_type": "llama"}, "model_type 'llama'; known here: gemma, gemma2, qwen3"),
        ("gemma", {"attention_bias": True}, "attention_bias True"),
        ("gemma", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("gemma", {"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ("gemma", {"hidden_size": None}, "hidden_size None"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
        ("gemma2", {"layer_types": ["full_attention", "chunked"]}, "layer_types"),
        ("gemma2", {"rope_parameters": {"full_attention": {}}}, "full_attention {}"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ("qwen3", {"tie_word_embeddings": False}, "tie_word_embeddings False"),
        ("paligemma", {"text_config": {"model_type": "llama"}}, "model_type 'llama'"),
        ("paligemma", {"text_config": None}, "vocab_size None"),
    ],
)
def test_what_is_not_computed_here_is_refused(tmp_path, kind, change, message):
    write(tmp_path, JSON[kind] | change, {})
    refused(tmp_path, section(JSON[kind]), str(tmp_path / "config.json"), message)


GEMMA_2B = {
    "model_type": "gemma",
    "vocab_size": 256_000,
    "hidden_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "intermediate_size": 16_384,
    "hidden_act": "gelu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10_000.0,
}
GEMMA_2_2B = GEMMA_2B | {
    "model_type": "gemma2",
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "intermediate_size": 9216,
    "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
PALIGEMMA_3B = {  # heads, rotation and norms are not said
    "model_type": "paligemma",
    "text_config": {
        "model_type": "gemma",
        "vocab_size": 257_216,
        "hidden_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "intermediate_size": 16_384,
    },
}
QWEN3_06B = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "hidden_act": "silu",
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1_000_000,
    "sliding_window": None,
    "use_sliding_window": False,
    "attention_bias": False,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    "theirs, size, limit",
    [
        (GEMMA_2B, 2_506_172_416, 8192),
        (GEMMA_2_2B, 2_614_341_888, 4096),
        (PALIGEMMA_3B, 2_508_662_784, 8192),
        (QWEN3_06B, 596_049_920, 40_960),
    ],
    ids=["gemma-2b", "gemma-2-2b", "paligemma-3b", "Qwen3-0.6B"],
)
def test_published_configs_become_models_of_the_published_size(theirs, size, limit):
    fields = section(theirs)
    shapes = parameters(fields)
    assert sum(x.size for x in shapes.values()) == size
    assert {rule.ours for rule in rules(theirs)} == shapes.keys()
    assert fields["max_tokens"] == limit
    schema = base.get_config().llm
    assert fields.keys() == set(schema) - {"unroll", "softcap_shared"}
    assert {name: type(value) for name, value in fields.items()} == {
        name: type(schema[name]) for name in fields
    }


def test_the_base_config_is_gemma_2b():
    schema = base.get_config().llm
    assert section(GEMMA_2B) == {name: schema[name] for name in section(GEMMA_2B)}


@pytest.mark.parametrize(
    "kind, config", [("gemma", "Gemma"), ("gemma2", "Gemma2"), ("qwen3", "Qwen3")]
)
def test_defaults_are_those_of_transformers(kind, config):
    theirs = getattr(transformers, f"{config}Config")()
    values = theirs.to_dict() | {"rope_theta": theirs.rope_parameters["rope_theta"]}
    defaults = FAMILIES[kind].defaults
    assert defaults == {name: values[name] for name in defaults}


@pytest.mark.parametrize(
    "name, repository",
    [
        ("gemma-2b", "google/gemma-2b"),
        ("gemma-2-2b-it", "google/gemma-2-2b-it"),
        ("paligemma-3b-pt-448", "google/paligemma-3b-pt-448"),
        ("Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("my-model", "OWNER/NAME"),
    ],
)
def test_the_repository_is_told_from_the_name_of_the_directory(tmp_path, name, repository):
    path = tmp_path / name
    (problem,) = directory.find_weights(path, "llm")
    assert problem.endswith(f"hf download {repository} --local-dir {path}")


@pytest.mark.parametrize("kind", JSON)
def test_a_family_is_imported(tmp_path, kind):
    prefix = "language_model.model." if kind == "paligemma" else "model."
    folder = write(tmp_path / "theirs", JSON[kind], tensors(kind, prefix))
    fields = section(JSON[kind])
    model = convert.open_model(folder)
    again = convert.open_model(convert.write(model, tmp_path / "ours", "safetensors", "float32"))
    assert again.parts == ["llm"] and again.config == {"llm": fields}
    expected = flatten_dict(load_llm(folder, fields, dtype="float32"), sep="/")
    assert {f"llm/{path}" for path in expected} == {*again.weights}
    for path, x in expected.items():
        np.testing.assert_array_equal(again.part("llm")[path].read(), x)
    assert section(config_json(fields)) | {"query_scalar": 0} == fields | {"query_scalar": 0}
    assert same_scale(section(config_json(fields)), fields)


def test_a_language_model_of_no_family():
    fields = section(JSON["gemma2"])
    with pytest.raises(ValueError, match=r"No gemma2 language model has qk_norm = True\."):
        config_json(fields | {"qk_norm": True})
