"""AutoencoderKL against diffusers' own, from a directory that it wrote."""

import diffusers
import jax
import numpy as np
import pytest
import torch

from t2i_jax.interop.autoencoder import load_autoencoder
from t2i_jax.models import autoencoder

STAGES = {
    "block_out_channels": (16, 32, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 8,
}
QUANT = {"use_quant_conv": True, "use_post_quant_conv": True}
NONE = {"use_quant_conv": False, "use_post_quant_conv": False}
KINDS = {  # what their config.json files say, beside the sizes
    "sd1": {"latent_channels": 4, "scaling_factor": 0.18215, **QUANT},
    "sdxl": {"latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": True, **QUANT},
    "sd3": {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, **NONE},
    "flux": {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, **NONE},
}


def relative(actual, expected):
    """Both channels last."""
    expected = expected.permute(0, 2, 3, 1).numpy()
    assert actual.shape == expected.shape
    error = np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected)
    print(f"relative error {error:.2e}")
    return error


@pytest.mark.parametrize("kind", KINDS)
def test_autoencoder(tmp_path, kind):
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(**STAGES, **KINDS[kind]).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms and biases, too
            parameter.copy_(parameter + 0.02 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    config = {
        "channels": KINDS[kind]["latent_channels"],
        "downsample": 8,
        "scale": KINDS[kind]["scaling_factor"],
        "shift": KINDS[kind].get("shift_factor", 0.0),
    }
    net, params = load_autoencoder(tmp_path, config=config)

    def run(method, x):
        x = x.permute(0, 2, 3, 1).numpy()
        return jax.jit(lambda p: net.apply({"params": p}, x, method=method))(params)

    images = torch.rand(2, 3, 48, 32) * 2 - 1
    latents = torch.randn(2, net.latent_channels, 6, 4)
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        decoded = theirs.decode(latents).sample
    moments = run("encode", images)
    assert relative(moments.mean, posterior.mean) <= 1e-5
    assert relative(moments.logvar, posterior.logvar) <= 1e-5
    assert relative(run("decode", latents), decoded) <= 1e-5


def test_tiles(tmp_path):
    """A column of tiles, down to where diffusers cuts its last one."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(**STAGES, **KINDS["sd3"]).eval()
    theirs.save_pretrained(tmp_path)
    theirs.enable_tiling()
    theirs.tile_latent_min_size, theirs.tile_sample_min_size = 8, 64
    assert theirs.tile_overlap_factor == 0.25
    net, params = load_autoencoder(tmp_path)
    latents = torch.randn(1, 16, 20, 6)
    with torch.no_grad():
        expected = theirs.decode(latents).sample
    ae = autoencoder.Autoencoder(net, tile=8)
    decoded = jax.jit(ae.decode)(params, latents.permute(0, 2, 3, 1).numpy())
    assert decoded.shape == (1, 160, 48, 3)
    whole = 18 * 8  # rows before the tile that starts at 18 of 20
    assert relative(decoded[:, :whole], expected[:, :, :whole]) <= 1e-5
