"""The flagship's path, from published files to pictures, with files of its formats made here.

configs/base.py with small sizes: a Gemma directory, its tokenizer, a diffusers autoencoder and a
WebDataset shard; bfloat16, eight devices.
"""

import io
import json
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import save_file

from configs import base
from t2i_jax import config as configs
from t2i_jax.data.tokenizer import Tokenizer
from t2i_jax.pipeline import Pipeline
from t2i_jax.training import loop
from t2i_jax.training.metrics import read_metrics
from tests import tiny

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
CAPTIONS = [f"a plain {name} picture number {i}" for i in range(8) for name in COLOURS]


def random(shapes, scale=1.0):
    rng = np.random.default_rng(0)
    return {
        name: (scale * rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype("f4")
        for name, shape in shapes.items()
    }


def write_gemma(path):
    """Our tiny.LLM in the format of google/gemma-2b, two shards and an index."""
    width, hidden, heads, kv = 16, 40, 4 * 8, 2 * 8
    shapes = {"model.embed_tokens.weight": (300, width), "model.norm.weight": (width,)}
    for i in range(3):
        block = f"model.layers.{i}"
        shapes |= {f"{block}.{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
        for name, rows in (("q", heads), ("k", kv), ("v", kv)):
            shapes[f"{block}.self_attn.{name}_proj.weight"] = (rows, width)
        shapes[f"{block}.self_attn.o_proj.weight"] = (width, heads)
        shapes |= {f"{block}.mlp.{n}_proj.weight": (hidden, width) for n in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj.weight"] = (width, hidden)
    tensors = {name: x.astype(jnp.bfloat16) for name, x in random(shapes).items()}
    config = {"model_type": "gemma", "vocab_size": 300, "hidden_size": width}
    config |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"head_dim": 8, "intermediate_size": hidden}
    config |= {"rope_theta": 100.0, "rms_norm_eps": 1e-6}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    files = {}
    for k in range(2):
        file = f"model-{k + 1:05}-of-00002.safetensors"
        part = dict(list(tensors.items())[k::2])
        save_file(part, path / file)
        files |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    Tokenizer.train(CAPTIONS, 300).save(path / "tokenizer")
    for file in (path / "tokenizer").iterdir():
        file.rename(path / file.name)
    (path / "tokenizer").rmdir()


def vae_shapes(width=8, channels=16):
    """An AutoencoderKL of four stages, one ResNet each, all of one width."""
    shapes = {}

    def conv(name, i, o):
        shapes.update({f"{name}.weight": (o, i, 3, 3), f"{name}.bias": (o,)})

    def norm(name):
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def resnet(name):
        for k in "12":
            norm(f"{name}.norm{k}"), conv(f"{name}.conv{k}", width, width)

    for side, first, last in (("encoder", 3, 2 * channels), ("decoder", channels, 3)):
        conv(f"{side}.conv_in", first, width), conv(f"{side}.conv_out", width, last)
        norm(f"{side}.conv_norm_out")
        middle = f"{side}.mid_block"
        resnet(f"{middle}.resnets.0"), resnet(f"{middle}.resnets.1")
        norm(f"{middle}.attentions.0.group_norm")
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            name = f"{middle}.attentions.0.{name}"
            shapes.update({f"{name}.weight": (width, width), f"{name}.bias": (width,)})
    for i in range(4):
        resnet(f"encoder.down_blocks.{i}.resnets.0")
        resnet(f"decoder.up_blocks.{i}.resnets.0"), resnet(f"decoder.up_blocks.{i}.resnets.1")
    for i in range(3):
        conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", width, width)
        conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", width, width)
    return shapes


def write_vae(path):
    config = {"latent_channels": 16, "block_out_channels": [8] * 4, "layers_per_block": 1}
    config |= {"norm_num_groups": 4, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    config |= {"use_quant_conv": False, "use_post_quant_conv": False}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(random(vae_shapes()), path / "diffusion_pytorch_model.safetensors")


def write_shard(path):
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for i, caption in enumerate(CAPTIONS):
            picture = Image.new("RGB", (40, 32), COLOURS[caption.split()[2]])
            jpeg = io.BytesIO()
            picture.save(jpeg, "JPEG")
            fields = {"image.jpg": jpeg.getvalue(), "synthetic_caption.txt": caption.encode()}
            for field, body in fields.items():
                info = tarfile.TarInfo(f"{i:05}.{field}")
                info.size = len(body)
                archive.addfile(info, io.BytesIO(body))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    files = tmp_path_factory.mktemp("files")
    write_gemma(files / "gemma"), write_vae(files / "vae"), write_shard(files / "data" / "0.tar")
    c = base.get_config().unlock()
    c.weights.update(llm=str(files / "gemma"), tokenizer=str(files / "gemma"))
    c.weights.autoencoder = str(files / "vae")
    c.llm.update(tiny.LLM)
    c.dit.update(tiny.DIT, remat="products")
    c.data.update(path=str(files / "data" / "*.tar"), image_size=32, max_text_tokens=10)
    c.data.update(validation_size=8, num_threads=2)
    c.train.update(steps=2, batch_size=16, log_every=1)
    c.checkpoint.every = c.validation.every = 2
    c.sampling.update(steps=2, every=0, batch_size=8)
    configs.validate(c, base.get_config())
    return c.lock()


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    final = loop.train(config, path)
    assert final.step == 2
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((final.params, final.ema)))
    return path


def test_it_trains(workdir):
    """At first the velocity is zero, and the loss that of the target: E n^2 + E z^2."""
    entries = read_metrics(workdir)
    assert [entry["step"] for entry in entries] == [1, 2, 2]
    assert entries[1]["grad_norm"] > 0 and entries[1]["update_norm"] > 0
    pipeline = Pipeline.load(workdir)
    plain = jnp.array(list(COLOURS.values()))[:, None, None] / 127.5 - 1.0
    pictures = jnp.tile(plain, (10, 32, 32, 1))
    weights, key = pipeline.frozen["autoencoder"], jax.random.key(0)
    latents = jax.jit(pipeline.autoencoder.encode)(weights, pictures, key)
    expected = 1 + float(jnp.square(latents).mean())  # draws of the posterior
    assert entries[0]["loss"] == pytest.approx(expected, rel=0.15)
    assert entries[2]["validation_loss"] == pytest.approx(expected, rel=0.15)


def test_it_draws(workdir):
    pipeline = Pipeline.load(workdir, weights="params")
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(pipeline.frozen))
    images = pipeline.draw(CAPTIONS[:2], seed=1)
    assert images.shape == (2, 32, 32, 3) and images.dtype == np.uint8
    assert images.std() > 5 and (images[0] != images[1]).any()


def test_what_is_read_is_what_was_written(workdir, config):
    """The parameters that training read, by their names in the files."""
    pipeline = Pipeline.load(workdir)
    vae = pipeline.frozen["autoencoder"]
    stored = random(vae_shapes())["decoder.conv_in.weight"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(vae["decoder"]["conv_in"]["weight"], stored.transpose(2, 3, 1, 0))
    assert pipeline.frozen["llm"]["blocks"]["mlp"]["gate"]["weight"].shape == (3, 16, 40)
    ids, mask = pipeline.prompts.tokenizer.encode(["a plain red picture"], 10)
    assert ids[0, 0] == 2 and mask[0].sum() < 10
