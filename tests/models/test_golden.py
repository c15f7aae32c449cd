"""The published PyTorch system's outputs, losses, gradients and samples, from its weights.

tests/goldens/NAME.npz are runs of tang-bd/fuse-dit at toy size, in float32 (two are kept here;
others, put beside them, are tested too).
"""

import json
import pathlib
from types import SimpleNamespace

from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.diffusion import sampling, time
from t2i_jax.models import fusion, memory, positions
from t2i_jax.training import step

FILES = sorted((pathlib.Path(__file__).parent.parent / "goldens").glob("*.npz"))
# Our fields -> theirs.
LLM = {
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
DIT = {
    "width": "dit_hidden_size",
    "num_layers": "dit_num_hidden_layers",
    "patch_size": "patch_size",
    "qk_norm": "qk_norm",
    "sandwich_norm": "sandwich_norm",
}
# Our parameters -> theirs; `blocks` are theirs layer by layer.
BLOCK = {
    "attention/q/weight": "self_attn.q_proj.weight",
    "attention/k/weight": "self_attn.k_proj.weight",
    "attention/v/weight": "self_attn.v_proj.weight",
    "attention_out/weight": "self_attn.o_proj.weight",
    "mlp_norm/weight": "post_attention_layernorm.weight",
    "mlp/gate/weight": "mlp.gate_proj.weight",
    "mlp/up/weight": "mlp.up_proj.weight",
    "mlp/down/weight": "mlp.down_proj.weight",
}
NAMES = {
    f"{part}/blocks/{k}": f"{part}.layers.#.{v}"
    for part in ("llm", "dit")
    for k, v in BLOCK.items()
}
NAMES |= {
    "llm/embed/weight": "llm.embed_tokens.weight",
    "llm/blocks/attention_norm/weight": "llm.layers.#.input_layernorm.weight",
    "llm/final_norm/weight": "llm.norm.weight",
    "dit/patch_embed/weight": "dit.patch_embed.proj.weight",
    "dit/patch_embed/bias": "dit.patch_embed.proj.bias",
    "dit/time_embed/hidden/weight": "dit.timestep_embedder.0.weight",
    "dit/time_embed/hidden/bias": "dit.timestep_embedder.0.bias",
    "dit/time_embed/out/weight": "dit.timestep_embedder.2.weight",
    "dit/time_embed/out/bias": "dit.timestep_embedder.2.bias",
    "dit/blocks/attention_norm/weight": "dit.layers.#.input_layernorm.norm.weight",
    "dit/blocks/q_norm/weight": "dit.layers.#.self_attn.q_norm.weight",
    "dit/blocks/k_norm/weight": "dit.layers.#.self_attn.k_norm.weight",
    "dit/blocks/modulation/linear/weight": "dit.layers.#.input_layernorm.linear.weight",
    "dit/blocks/modulation/linear/bias": "dit.layers.#.input_layernorm.linear.bias",
    "dit/final_norm/weight": "dit.norm_out.norm.weight",
    "dit/final_modulation/linear/weight": "dit.norm_out.linear.weight",
    "dit/final_modulation/linear/bias": "dit.norm_out.linear.bias",
    "dit/out/weight": "dit.proj_out.weight",
    "dit/out/bias": "dit.proj_out.bias",
}


TABLE = "dit.patch_embed.pos_embed"


def their_names(path, shape):
    """The parameters that one of ours holds; the stacked ones, layer by layer."""
    if "/blocks/" not in path:
        return [NAMES[path]]
    return [NAMES[path].replace("#", str(i)) for i in range(shape[0])]


def to_ours(path, weight):
    """One of their tensors with our order of axes, those that we split still merged."""
    if path == "dit/patch_embed/weight":
        return weight.transpose(2, 3, 1, 0)
    return weight if path == "llm/embed/weight" else weight.T


def load(file):
    arrays = np.load(file)
    theirs = json.loads(bytes(arrays["config.json"]))
    llm = {ours: theirs["base_config"][name] for ours, name in LLM.items()}
    dit = {ours: theirs[name] for ours, name in DIT.items()}
    dit |= {
        "mlp_width": llm["mlp_width"],
        "conditioning": theirs["timestep_conditioning"] or "none",
        "positions": theirs["pos_embed"],
    }
    if theirs["pos_embed"] == "ape":
        side, extent = theirs["pos_embed_max_size"], theirs["sample_size"] // theirs["patch_size"]
        dit |= {"positions": "none", "table_size": side, "table_range": float(extent)}
    model = fusion.build(llm, dit, channels=theirs["in_channels"])
    channels, height, width = arrays["in/latents"].shape[1:]
    shapes = jax.eval_shape(
        lambda key: meta.unbox(fusion.init(model, key, (height, width, channels))),
        jax.random.key(0),
    )
    read, params = set(), {}
    for path, leaf in flatten_dict(shapes, sep="/").items():
        names = their_names(path, leaf.shape)
        read.update(names)
        weights = [to_ours(path, arrays[f"transformer/{name}"]) for name in names]
        params[path] = jnp.asarray(np.stack(weights).reshape(leaf.shape))
    read.add(TABLE)  # computed, not read
    assert read >= {name[12:] for name in arrays.files if name.startswith("transformer/")}
    return SimpleNamespace(z=arrays, model=model, params=unflatten_dict(params, sep="/"))


@pytest.fixture(scope="module", params=FILES, ids=lambda file: file.stem)
def golden(request):
    return load(request.param)


def nhwc(x):
    return x.transpose(0, 2, 3, 1)


def text(golden, where):
    ids, mask = golden.z[f"{where}/input_ids"], golden.z[f"{where}/attention_mask"].astype(bool)
    return {"ids": ids, "mask": mask}


def relative(actual, expected):
    return np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected)


def test_table_of_positions(golden):
    """All of it, and its middle, as the model sees it."""
    net = golden.model.dit
    if not net.table_size:
        assert f"transformer/{TABLE}" not in golden.z
        return
    side, table = net.table_size, golden.z[f"transformer/{TABLE}"][0]
    whole = positions.absolute_table((side, side), net.width, side, net.table_range)
    np.testing.assert_allclose(whole, table, atol=1e-6)
    middle = positions.absolute_table((4, 3), net.width, side, net.table_range)
    top, left = (side - 4) // 2, (side - 3) // 2
    expected = table.reshape(side, side, -1)[top : top + 4, left : left + 3]
    np.testing.assert_allclose(middle, expected.reshape(12, -1), atol=1e-6)


def test_velocity(golden):
    latents, t = nhwc(golden.z["in/latents"]), golden.z["in/timestep"] / 1000
    velocity = jax.jit(golden.model.apply)(
        {"params": golden.params}, latents, t, *text(golden, "in").values()
    )
    assert relative(velocity, nhwc(golden.z["out/velocity"])) < 1e-5


def test_loss_and_gradients(golden):
    objective = step.Objective(golden.model, None, 1000, 3.0, 0.0, 1.0)

    @jax.jit
    def loss_and_gradient(params):
        inputs = {
            "latents": nhwc(golden.z["train/x0"]),
            "noise": nhwc(golden.z["train/noise"]),
            "t": golden.z["in/timestep"] / 1000,
            "features": objective.read_text({"llm": params["llm"]}, text(golden, "in")),
        }
        mean = lambda dit: jnp.mean(objective.loss_B({"dit": dit}, inputs))  # noqa: E731
        return jax.value_and_grad(mean)(params["dit"])

    loss, grads = loss_and_gradient(golden.params)
    assert loss == pytest.approx(golden.z["train/loss"], rel=1e-6)
    squares, expected = 0.0, dict.fromkeys(n for n in golden.z.files if "grad_norm_of" in n)
    for path, grad in flatten_dict({"dit": grads}, sep="/").items():
        names, grad = their_names(path, grad.shape), np.asarray(grad, np.float64)
        layers = grad if len(names) > 1 else grad[None]
        for name, layer in zip(names, layers, strict=True):
            key = f"train/grad_norm_of/{name}"
            assert np.linalg.norm(layer) == pytest.approx(golden.z[key], rel=1e-3), name
            del expected[key]
        squares += np.square(grad).sum()
    assert not expected
    assert np.sqrt(squares) == pytest.approx(golden.z["train/grad_norm"], rel=1e-5)


def test_schedules(golden):
    theirs = golden.z["sampler/train_sigmas"]
    np.testing.assert_allclose(time.training_sigmas(1000, 3.0), theirs[:1000], rtol=0, atol=1e-7)
    sigmas = time.sampling_sigmas(6, 1000, 3.0)
    np.testing.assert_allclose(sigmas, golden.z["sampler/sigmas"], rtol=0, atol=1e-7)


def test_guided_sampling_with_memories_made_once(golden):
    """The four rows of `sampler` are two null prompts, then the two prompts."""
    z, scale = golden.z, float(golden.z["sampler/guidance_scale"])

    @jax.jit
    def sample(params):
        def encode(rows):
            ids, mask = (x[rows] for x in text(golden, "sampler").values())
            return golden.model.apply({"params": params}, ids, mask, method="encode_text")

        def denoise(latents, t_B, texts):
            only = {"params": {"dit": params["dit"]}}
            return golden.model.apply(only, latents, t_B, texts, method="denoise")

        null = memory.repeat(encode(slice(1)), 2)
        velocity = sampling.guided(denoise, encode(slice(2, 4)), null, scale, memory.concatenate)
        return sampling.euler(
            velocity, nhwc(z["sampler/noise"]), time.sampling_sigmas(6, 1000, 3.0)
        )

    assert relative(sample(golden.params), nhwc(z["sampler/latents"])) < 1e-4
