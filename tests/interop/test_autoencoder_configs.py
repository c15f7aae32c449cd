"""What the config.json files of published autoencoders say, beside their sizes."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from t2i_jax.interop.autoencoder import load_autoencoder

BOTH = {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "act_fn": "silu"}
SIZES = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
SD1 = {"latent_channels": 4, "sample_size": 512}
SDXL = SD1 | {"force_upcast": True, "scaling_factor": 0.13025, "sample_size": 1024}
FLUX = {
    "force_upcast": True,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}


def write(folder, config):
    """A network of one width, the same for all but for what `config` says."""
    shapes, channels = {}, config["latent_channels"]

    def conv(name, i, o, kernel=3):
        shapes.update({f"{name}.weight": (o, i, kernel, kernel), f"{name}.bias": (o,)})

    def norm(name):
        shapes.update({f"{name}.weight": (8,), f"{name}.bias": (8,)})

    def resnet(name):
        for k in "12":
            norm(f"{name}.norm{k}"), conv(f"{name}.conv{k}", 8, 8)

    for side, first, last in (("encoder", 3, 2 * channels), ("decoder", channels, 3)):
        conv(f"{side}.conv_in", first, 8), conv(f"{side}.conv_out", 8, last)
        norm(f"{side}.conv_norm_out"), norm(f"{side}.mid_block.attentions.0.group_norm")
        resnet(f"{side}.mid_block.resnets.0"), resnet(f"{side}.mid_block.resnets.1")
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            name = f"{side}.mid_block.attentions.0.{name}"
            shapes.update({f"{name}.weight": (8, 8), f"{name}.bias": (8,)})
    for i in range(2):
        resnet(f"encoder.down_blocks.{i}.resnets.0")
        resnet(f"decoder.up_blocks.{i}.resnets.0"), resnet(f"decoder.up_blocks.{i}.resnets.1")
    conv("encoder.down_blocks.0.downsamplers.0.conv", 8, 8)
    conv("decoder.up_blocks.0.upsamplers.0.conv", 8, 8)
    if config.get("use_quant_conv", True):
        conv("quant_conv", 2 * channels, 2 * channels, 1)
        conv("post_quant_conv", channels, channels, 1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(BOTH | SIZES | config))
    tensors = {name: np.full(shape, 0.1, "f4") for name, shape in shapes.items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    "config, scale, shift", [(SD1, 0.18215, 0.0), (SDXL, 0.13025, 0.0), (FLUX, 0.3611, 0.1159)]
)
def test_published_fields_are_read(tmp_path, config, scale, shift):
    write(tmp_path, config)
    channels = config["latent_channels"]
    section = {"channels": channels, "downsample": 2, "scale": scale, "shift": shift}
    net, params = load_autoencoder(tmp_path, config=section)
    assert net.latent_channels == channels
    quant = channels == 4
    assert net.use_quant_conv == net.use_post_quant_conv == quant
    decoded = net.apply({"params": params}, np.ones((1, 2, 2, channels), "f4"), method="decode")
    assert decoded.shape == (1, 4, 4, 3) and np.isfinite(jax.device_get(decoded)).all()
    with pytest.raises(ValueError, match=r"autoencoder.shift is 0.5, shift_factor 0"):
        load_autoencoder(tmp_path, config=section | {"shift": 0.5})


def test_latents_that_are_scaled_by_channel_are_refused(tmp_path):
    write(tmp_path, SDXL | {"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4})
    with pytest.raises(ValueError, match=r"latents_mean is \[0.5, .* here has None"):
        load_autoencoder(tmp_path)
