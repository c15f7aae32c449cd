"""CLIP directories written here, tensor by tensor, are run against plain NumPy in float64."""

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from t2i_jax import convert, sharding
from t2i_jax.data.tokenizer import Tokenizer
from t2i_jax.interop.clip import load_clip
from t2i_jax.interop.directory import find_weights
from t2i_jax.models.clip import CLIPText
from tests import files

ACTIVATIONS = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: x / 2 * (1 + erf(x / np.sqrt(2))),
}
IDS = np.array([[37, 5, 8, 39, 39, 39, 39], [37, 7, 20, 6, 3, 9, 39]])  # 39 ends, and pads


def clip_forward(tensors, ids, end, activation="quick_gelu"):
    """One prompt (T,) that ends at position `end` -> (P,)."""
    w = {name.removeprefix("text_model."): np.float64(x) for name, x in tensors.items()}
    T = len(ids)

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    table = w["embeddings.position_embedding.weight"]
    x = w["embeddings.token_embedding.weight"][ids] + table[:T]
    for layer in (f"encoder.layers.{i}" for i in range(3)):
        h = norm(x, f"{layer}.layer_norm1")
        q, k, v = (
            linear(h, f"{layer}.self_attn.{n}_proj").reshape(T, 4, 6).swapaxes(0, 1) for n in "qkv"
        )
        scores = q @ k.swapaxes(1, 2) / np.sqrt(6) + np.triu(np.full((T, T), -1e30), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        h = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(T, 24)
        x = x + linear(h, f"{layer}.self_attn.out_proj")
        h = linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")
        x = x + linear(ACTIVATIONS[activation](h), f"{layer}.mlp.fc2")
    return norm(x, "final_layer_norm")[end] @ w["text_projection.weight"].T


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_is_numpys(tmp_path, activation):
    tensors = files.clip_tensors()
    stored = tensors | {"text_model.embeddings.position_ids": np.arange(9)[None]}  # int64
    files.write_clip_weights(
        tmp_path / "text_encoder", files.CLIP_JSON | {"hidden_act": activation}, stored
    )
    assert find_weights(tmp_path, "clip") == find_weights(tmp_path / "text_encoder", "clip") == []
    net, params = load_clip(tmp_path, files.CLIP | {"activation": activation})
    assert net == CLIPText(**files.CLIP | {"activation": activation})
    pooled = np.asarray(jax.jit(net.apply)({"params": params}, IDS))
    ends = [3, 6]
    expected = [clip_forward(tensors, *row, activation) for row in zip(IDS, ends, strict=True)]
    assert pooled.dtype == np.float32
    assert np.linalg.norm(pooled - expected) < 1e-5 * np.linalg.norm(expected)


def test_parameters_go_where_they_are_told_to(tmp_path):
    files.write_clip_weights(tmp_path)
    place = sharding.replicated(sharding.make_mesh())
    net, params = load_clip(tmp_path, files.CLIP, place, "bfloat16")
    assert net.dtype == jnp.bfloat16
    leaves = jax.tree.leaves(params)
    assert all(x.dtype == jnp.bfloat16 and x.sharding == place for x in leaves)


def test_other_clips_are_refused(tmp_path):
    def refused(change, *texts, tensors=None):
        files.write_clip_weights(tmp_path, files.CLIP_JSON | change, tensors)
        with pytest.raises(ValueError) as error:
            load_clip(tmp_path, files.CLIP)
        assert all(text in str(error.value) for text in texts), error.value

    refused({"hidden_size": 32, "hidden_act": "gelu"}, "clip.width is 24, hidden_size 32",
            "clip.activation is 'quick_gelu', hidden_act 'gelu'")  # fmt: skip
    refused({"eos_token_id": 39}, "clip.eos_id is 2, eos_token_id 39")
    refused({"model_type": "clip"}, "model_type 'clip'; only 'clip_text_model'")
    tensors = files.clip_tensors()
    tensors["text_projection.bias"] = tensors.pop("text_projection.weight")[:, 0].copy()
    refused({}, "missing: text_projection.weight", "not known: text_projection.bias",
            tensors=tensors)  # fmt: skip
    tensors = files.clip_tensors()
    tensors["text_model.final_layer_norm.bias"] = np.zeros(24, np.int64)
    refused({}, "a weight is of int64", tensors=tensors)


def test_missing_weights_say_what_to_fetch(tmp_path):
    command = (
        "hf download stabilityai/stable-diffusion-3-medium-diffusers --include "
        f'"text_encoder/*" "tokenizer/*" --local-dir {tmp_path / "sd3"}'
    )
    for path in (tmp_path / "sd3", tmp_path / "sd3" / "text_encoder"):
        (problem,) = find_weights(path, "clip")
        assert problem.startswith(f"No clip weights in {path}") and problem.endswith(command)


def test_an_encoder_is_imported_with_its_tokenizer(tmp_path):
    files.write_clip_weights(tmp_path / "text_encoder")
    files.write_clip(tmp_path / "tokenizer")
    model = convert.open_model(tmp_path / "text_encoder")
    again = convert.open_model(convert.write(model, tmp_path / "ours", "safetensors", "float32"))
    assert again.parts == ["clip"] and again.config == {"clip": files.CLIP}
    _, params = load_clip(tmp_path / "text_encoder", files.CLIP)
    for path, x in flatten_dict(params, sep="/").items():
        np.testing.assert_array_equal(again.part("clip")[path].read(), x)
    folders = tmp_path / "tokenizer", again.clip_tokenizer
    theirs, ours = map(Tokenizer.load, folders)
    for text in ("a red cat", "", "<|endoftext|> red"):
        assert ours.rows([text], 77) == theirs.rows([text], 77)
    assert (ours.pad_id, ours.bos_id) == (theirs.pad_id, theirs.bos_id)
