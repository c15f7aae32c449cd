"""Directories written here, tensor by tensor, are loaded and run against plain NumPy in float64."""

import json

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from t2i_jax import sharding
from t2i_jax.interop import directory, safetensors
from t2i_jax.interop.autoencoder import load_autoencoder
from t2i_jax.interop.llm import load_llm
from t2i_jax.models.autoencoder import AutoencoderKL
from t2i_jax.models.llm import LLM

OURS = "vocab_size width num_layers num_heads num_kv_heads head_width mlp_width rope_theta norm_eps"
THEIRS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "intermediate_size rope_theta rms_norm_eps"
)
VALUES = (40, 24, 3, 4, 2, 8, 48, 100.0, 1e-3)
LLM_CONFIG = dict(zip(OURS.split(), VALUES, strict=True))
GEMMA_JSON = dict(zip(THEIRS.split(), VALUES, strict=True)) | {"model_type": "gemma"}
VAE_JSON = {
    "latent_channels": 2,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 1.5,
    "shift_factor": 0.25,
}
SECTION = {"kind": "kl", "channels": 2, "downsample": 2, "scale": 1.5, "shift": 0.25}


def random(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {n: (rng.normal(size=s) / np.sqrt(s[-1])).astype("f4") for n, s in shapes.items()}


def gemma_tensors(prefix="model."):
    shapes = {"embed_tokens.weight": (40, 24), "norm.weight": (24,)}
    for i in range(3):
        shapes |= {
            f"layers.{i}.input_layernorm.weight": (24,),
            f"layers.{i}.post_attention_layernorm.weight": (24,),
            f"layers.{i}.self_attn.q_proj.weight": (32, 24),
            f"layers.{i}.self_attn.k_proj.weight": (16, 24),
            f"layers.{i}.self_attn.v_proj.weight": (16, 24),
            f"layers.{i}.self_attn.o_proj.weight": (24, 32),
            f"layers.{i}.mlp.gate_proj.weight": (48, 24),
            f"layers.{i}.mlp.up_proj.weight": (48, 24),
            f"layers.{i}.mlp.down_proj.weight": (24, 48),
        }
    return random({prefix + name: shape for name, shape in shapes.items()})


def vae_tensors(quant=True, qkvo=("to_q", "to_k", "to_v", "to_out.0")):
    shapes = {}

    def conv(name, i, o, k=3):
        shapes.update({f"{name}.weight": (o, i, k, k), f"{name}.bias": (o,)})

    def vector(name, c):
        shapes.update({f"{name}.weight": (c,), f"{name}.bias": (c,)})

    def resnet(name, i, o):
        vector(f"{name}.norm1", i), conv(f"{name}.conv1", i, o)
        vector(f"{name}.norm2", o), conv(f"{name}.conv2", o, o)
        if i != o:
            conv(f"{name}.conv_shortcut", i, o, 1)

    for side, first, last in (("encoder", (3, 8), (16, 4)), ("decoder", (2, 16), (8, 3))):
        conv(f"{side}.conv_in", *first), conv(f"{side}.conv_out", *last)
        vector(f"{side}.conv_norm_out", last[0])
        resnet(f"{side}.mid_block.resnets.0", 16, 16)
        resnet(f"{side}.mid_block.resnets.1", 16, 16)
        vector(f"{side}.mid_block.attentions.0.group_norm", 16)
        for name in qkvo:
            name = f"{side}.mid_block.attentions.0.{name}"
            shapes.update({f"{name}.weight": (16, 16), f"{name}.bias": (16,)})
    resnet("encoder.down_blocks.0.resnets.0", 8, 8)
    conv("encoder.down_blocks.0.downsamplers.0.conv", 8, 8)
    resnet("encoder.down_blocks.1.resnets.0", 8, 16)
    resnet("decoder.up_blocks.0.resnets.0", 16, 16)
    resnet("decoder.up_blocks.0.resnets.1", 16, 16)
    conv("decoder.up_blocks.0.upsamplers.0.conv", 16, 16)
    resnet("decoder.up_blocks.1.resnets.0", 16, 8)
    resnet("decoder.up_blocks.1.resnets.1", 8, 8)
    if quant:
        conv("quant_conv", 4, 4, 1), conv("post_quant_conv", 2, 2, 1)
    return random(shapes)


def write_bfloat16(tensors, file):
    """The format by hand: header length, header, data."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, x in tensors.items():
        raw = x.astype(jnp.bfloat16).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "BF16", "shape": list(x.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write(folder, config, tensors, stem="model", shards=1, writer=save_file):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        writer(tensors, folder / f"{stem}.safetensors")
        return folder
    weight_map = {}
    for k in range(shards):
        names = list(tensors)[k::shards]
        file = f"{stem}-{k + 1:05}-of-{shards:05}.safetensors"
        writer({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / f"{stem}.safetensors.index.json").write_text(index)
    return folder


def write_vae(folder, config=VAE_JSON, tensors=None):
    return write(folder, config, tensors or vae_tensors(), "diffusion_pytorch_model")


def gemma_forward(tensors, ids):
    """One prompt (T,) -> hidden (T, D), as transformers' modelling of Gemma has it."""
    w = {name.removeprefix("model."): np.float64(x) for name, x in tensors.items()}
    T = len(ids)

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * (1 + w[f"{name}.weight"])

    def heads(x, name, turned):
        x = (x @ w[f"{name}.weight"].T).reshape(T, -1, 8).swapaxes(0, 1)
        x = x.repeat(4 // len(x), axis=0)
        turn = np.exp(1j * np.arange(T)[:, None] * 100.0 ** (-np.arange(4) / 4))
        pairs = (x[..., :4] + 1j * x[..., 4:]) * turn
        return np.concatenate([pairs.real, pairs.imag], axis=-1) if turned else x

    x = w["embed_tokens.weight"][ids] * np.sqrt(24)
    for i in range(3):
        block = f"layers.{i}"
        h = norm(x, f"{block}.input_layernorm")
        q, k, v = (heads(h, f"{block}.self_attn.{n}_proj", n != "v") for n in "qkv")
        scores = q @ k.swapaxes(1, 2) / np.sqrt(8) + np.triu(np.full((T, T), -1e30), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        h = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(T, 32)
        x = x + h @ w[f"{block}.self_attn.o_proj.weight"].T
        h = norm(x, f"{block}.post_attention_layernorm")
        gate = h @ w[f"{block}.mlp.gate_proj.weight"].T
        gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        up = h @ w[f"{block}.mlp.up_proj.weight"].T
        x = x + (gate * up) @ w[f"{block}.mlp.down_proj.weight"].T
    return norm(x, "norm")


def refused(path, *texts):
    with pytest.raises(ValueError) as error:
        load_llm(path, LLM_CONFIG)
    assert all(text in str(error.value) for text in texts), error.value
    return str(error.value)


def relative(actual, expected):
    assert actual.shape == expected.shape
    return np.linalg.norm(np.float64(actual) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("shards, prefix", [(1, "model."), (3, "model."), (2, "")])
def test_gemma_is_numpys(tmp_path, shards, prefix):
    tensors = gemma_tensors(prefix)
    stored = tensors | {"lm_head.weight": np.ones((40, 24), "f4")}
    write(tmp_path, GEMMA_JSON, stored, shards=shards)
    assert directory.find_weights(tmp_path, "llm") == []
    params = load_llm(tmp_path, LLM_CONFIG, dtype="float32")
    ids = np.random.default_rng(1).integers(0, 40, (2, 9))
    mask = np.arange(9) < np.array([[9], [6]])
    features = jax.jit(LLM(**LLM_CONFIG).apply)({"params": params}, ids, mask)
    hidden = np.asarray(features.hidden_BTD)
    assert relative(hidden[0], gemma_forward(tensors, ids[0])) < 1e-5
    assert relative(hidden[1, :6], gemma_forward(tensors, ids[1, :6])) < 1e-5


@pytest.mark.parametrize("writer", [write_bfloat16, save_file])
def test_gemma_tensors_are_where_they_belong_in_bfloat16(tmp_path, writer):
    tensors = gemma_tensors()
    write(tmp_path, GEMMA_JSON, tensors, shards=2, writer=writer)
    params = flatten_dict(load_llm(tmp_path, LLM_CONFIG), sep="/")
    exact = {name: np.float32(x.astype(jnp.bfloat16)) for name, x in tensors.items()}
    assert all(x.dtype == jnp.bfloat16 for x in params.values())
    q = exact["model.layers.1.self_attn.q_proj.weight"]
    o = exact["model.layers.2.self_attn.o_proj.weight"]
    k = exact["model.layers.0.self_attn.k_proj.weight"]
    for n in range(4):
        rows = slice(8 * n, 8 * n + 8)
        np.testing.assert_array_equal(params["blocks/attention/q/weight"][1, :, n], q[rows].T)
        np.testing.assert_array_equal(params["blocks/attention_out/weight"][2, n], o[:, rows].T)
    np.testing.assert_array_equal(params["blocks/attention/k/weight"][0, :, 1], k[8:].T)
    np.testing.assert_array_equal(params["embed/weight"], exact["model.embed_tokens.weight"])
    assert sum(x.size for x in params.values()) == sum(x.size for x in tensors.values())


def test_gemma_goes_to_its_shardings(tmp_path, monkeypatch):
    write(tmp_path, GEMMA_JSON, gemma_tensors(), shards=2)
    ids = jnp.zeros((1, 1), int)
    boxed = jax.eval_shape(LLM(**LLM_CONFIG).init, jax.random.key(0), ids, ids)["params"]
    mesh = sharding.make_mesh(fsdp=-1)
    shardings = sharding.param_shardings(boxed, mesh)
    reads = []
    read = safetensors.Tensor.read
    monkeypatch.setattr(safetensors.Tensor, "read", lambda t: reads.append(t.start) or read(t))
    params = load_llm(tmp_path, LLM_CONFIG, shardings, "float32")
    assert len(reads) == 2 + 3 * 9  # each tensor once
    plain = load_llm(tmp_path, LLM_CONFIG, dtype="float32")
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, params, shardings))
    jax.tree.map(np.testing.assert_array_equal, params, plain)
    assert params["embed"]["weight"].addressable_shards[0].data.shape == (40 // mesh.size, 24)
    with pytest.raises(ValueError, match="is for parameters"):
        load_llm(tmp_path, LLM_CONFIG, {"embed": shardings["embed"]})


def test_config_disagreements_are_all_named(tmp_path):
    rope = {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}  # transformers 5
    theirs = {k: v for k, v in GEMMA_JSON.items() if k not in ("rope_theta", "head_dim")}
    write(tmp_path, theirs | rope | {"hidden_size": 32}, gemma_tensors())
    fields = ("width is 24, hidden_size 32", "rope_theta is 100.0, rope_theta 7.0")
    assert "num_heads" not in refused(tmp_path, *fields, "llm.head_width is 8, head_dim 256")


def test_other_tensors_are_refused(tmp_path):
    tensors = gemma_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.1.mlp.up_proj.bias"] = np.zeros(48, "f4")
    tensors["model.norm.weight"] = np.zeros(25, "f4")
    write(tmp_path, GEMMA_JSON, tensors)
    refused(
        tmp_path,
        "1 tensors missing: model.layers.1.mlp.up_proj.weight",
        "1 tensors not known: model.layers.1.mlp.up_proj.bias",
        "1 tensors of another shape: model.norm.weight is (25,), not (24,)",
    )


def test_missing_weights_say_what_to_fetch(tmp_path):
    def problem(path, kind="llm"):
        (text,) = directory.find_weights(path, kind)
        load = load_llm if kind == "llm" else load_autoencoder
        with pytest.raises(FileNotFoundError) as error:
            load(path, LLM_CONFIG if kind == "llm" else jnp.float32)
        assert str(error.value) == text
        return text

    path = tmp_path / "my files" / "gemma-2b"
    command = f"hf download google/gemma-2b --local-dir '{path}'"
    assert command in problem(path) and "no such directory" in problem(path)
    path.mkdir(parents=True)
    assert "no config.json" in problem(path)
    (path / "config.json").write_text("{}")
    assert "neither model.safetensors nor" in problem(path)
    (path / "pytorch_model.bin").write_bytes(b"pickle")
    assert "only pickles (pytorch_model.bin)" in problem(path) and command in problem(path)
    write(path, GEMMA_JSON, gemma_tensors(), shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    assert "its index names model-00002-of-00003.safetensors, not there" in problem(path)

    command = '--include "vae/*" --local-dir ' + str(tmp_path / "sd3")
    assert problem(tmp_path / "sd3" / "vae", "autoencoder").endswith(command)
    assert problem(tmp_path / "sd3", "autoencoder").endswith(command)
    with pytest.raises(ValueError, match="kind of weights 't5'"):
        directory.find_weights(path, "t5")


@pytest.mark.parametrize("name", ["../model.safetensors", "/x.safetensors", "a.bin", "a/", 7])
def test_an_index_names_files_beside_it_alone(tmp_path, name):
    write(tmp_path / "weights", GEMMA_JSON, {})
    (tmp_path / "weights" / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = tmp_path / "weights" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    refused(tmp_path / "weights", "beside it")
    assert "beside it" in directory.find_weights(tmp_path / "weights", "llm")[0]


def entry(**change):
    return {"norm.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change}


@pytest.mark.parametrize(
    "header, message",
    [
        (entry(data_offsets=[0, 16], shape=[4]), "at bytes 0 to 16"),  # beyond the file
        (entry(data_offsets=[-8, 0]), "at bytes -8 to 0"),
        (entry(shape=[3]), "at bytes 0 to 8"),
        (entry(shape=[-1, -2]), "at bytes"),
        (entry(shape=[2.0]), "at bytes"),
        (entry(data_offsets=[0]), "the entry of norm.weight"),
        (entry(dtype=["F32"]), "the entry of norm.weight"),
        (entry(dtype="I8"), "'I8'; weights are one of"),
        ("}{", "does not parse"),
        (None, "its header ends at byte"),
    ],
)
def test_damaged_files_are_refused(tmp_path, header, message):
    write(tmp_path, GEMMA_JSON, {})
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    length = 10**15 if header is None else len(text)
    content = length.to_bytes(8, "little") + text + bytes(8)
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path, message)


def test_truncated_and_doubled_files_are_refused(tmp_path):
    write(tmp_path, GEMMA_JSON, gemma_tensors(), shards=2)
    second = tmp_path / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    for size in (len(content) - 1, 100, 8, 3, 0):
        second.write_bytes(content[:size])
        refused(tmp_path, "00002-of-00002.safetensors is not a whole safetensors file")
    second.write_bytes((tmp_path / "model-00001-of-00002.safetensors").read_bytes())
    refused(tmp_path, "both hold model")


AUTOENCODER_NAMES = {  # one of each kind
    "encoder.conv_in.weight": "encoder/conv_in/weight",
    "encoder.down_blocks.0.resnets.0.norm1.weight": "encoder/down_0/resnet_0/norm1/weight",
    "encoder.down_blocks.1.resnets.0.conv2.weight": "encoder/down_1/resnet_0/conv2/weight",
    "encoder.down_blocks.1.resnets.0.conv_shortcut.bias": "encoder/down_1/resnet_0/shortcut/bias",
    "encoder.down_blocks.0.downsamplers.0.conv.weight": "encoder/down_0/downsample/weight",
    "encoder.mid_block.attentions.0.group_norm.bias": "encoder/mid/attention/norm/bias",
    "encoder.mid_block.resnets.1.norm2.bias": "encoder/mid/resnet_1/norm2/bias",
    "encoder.conv_norm_out.weight": "encoder/norm_out/weight",
    "decoder.up_blocks.1.resnets.0.conv1.weight": "decoder/up_1/resnet_0/conv1/weight",
    "decoder.up_blocks.0.upsamplers.0.conv.bias": "decoder/up_0/upsample/bias",
    "decoder.conv_out.weight": "decoder/conv_out/weight",
    "quant_conv.weight": "quant_conv/weight",
    "post_quant_conv.bias": "post_quant_conv/bias",
}


@pytest.mark.parametrize("old", [False, True])
def test_autoencoder_tensors_are_where_they_belong(tmp_path, old):
    qkvo = ("query", "key", "value", "proj_attn") if old else ("to_q", "to_k", "to_v", "to_out.0")
    tensors = vae_tensors(qkvo=qkvo)
    write_vae(tmp_path / "vae", tensors=tensors)
    assert directory.find_weights(tmp_path, "autoencoder") == []  # its vae/ is meant
    net, params = load_autoencoder(tmp_path, config=SECTION)
    assert net == AutoencoderKL(2, (8, 16), 1, 4, True, True, jnp.dtype("float32"))
    params = flatten_dict(params, sep="/")
    for theirs, ours in AUTOENCODER_NAMES.items():
        x = tensors[theirs]
        np.testing.assert_array_equal(params[ours], x.transpose(2, 3, 1, 0) if x.ndim == 4 else x)
    for theirs, ours in zip(qkvo, ("q", "k", "v", "out"), strict=True):
        x = tensors[f"decoder.mid_block.attentions.0.{theirs}.weight"]
        np.testing.assert_array_equal(params[f"decoder/mid/attention/{ours}/weight"], x.T)
    # Every tensor came to be one parameter, none of them twice.
    came, were = (
        [float(np.abs(np.float64(x)).sum()) for x in t.values()] for t in (params, tensors)
    )
    assert sorted(came) == pytest.approx(sorted(were), rel=1e-12)


def test_autoencoder_without_quant_convolutions(tmp_path):
    config = VAE_JSON | {"use_quant_conv": False, "use_post_quant_conv": False}
    write_vae(tmp_path / "vae", config, vae_tensors(quant=False))
    net, params = load_autoencoder(tmp_path / "vae", "bfloat16")
    assert params.keys() == {"encoder", "decoder"} and net.dtype == jnp.bfloat16
    assert not net.use_quant_conv and not net.use_post_quant_conv
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scaling_factor": 0.18}, "autoencoder.scale is 1.5, scaling_factor 0.18"),
        ({"shift_factor": None}, "autoencoder.shift is 0.25, shift_factor 0.0"),
        ({"act_fn": "relu"}, "act_fn is 'relu'; an AutoencoderKL here has 'silu'"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is False"),
        ({"norm_num_groups": 3}, "multiples of norm_groups 3"),
        ({"layers_per_block": "2"}, "layers_per_block '2', .* must be positive"),
        ({"block_out_channels": 8}, "block_out_channels 8"),
        ({"block_out_channels": []}, r"block_out_channels \[\]"),
        ({"layers_per_block": 2}, "holds another network.*tensors missing"),
        ({"use_quant_conv": False}, "2 tensors not known: quant_conv.bias, quant_conv.weight"),
    ],
)
def test_other_autoencoders_are_refused(tmp_path, change, message):
    write_vae(tmp_path, VAE_JSON | change)
    with pytest.raises(ValueError, match=message):
        load_autoencoder(tmp_path, config=SECTION)


@pytest.mark.parametrize("text, message", [("{", "not valid JSON"), ("[]", "be a JSON object")])
def test_config_json_must_be_an_object(tmp_path, text, message):
    write(tmp_path, GEMMA_JSON, {})
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, message)
