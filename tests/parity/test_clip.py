"""CLIP's text encoder against transformers' own, from a directory that it wrote."""

import jax
import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from t2i_jax.interop.clip import CLIP_CONFIG, load_clip

SECTION = {
    "vocab_size": 99,
    "width": 48,
    "num_layers": 3,
    "num_heads": 4,
    "mlp_width": 80,
    "max_tokens": 16,
    "projection_width": 20,
    "norm_eps": 1e-5,
}
# Prompts of 0, 5 and 14 tokens between BOS 97 and EOS 98, padded with EOS as SD3's are; and one
# that is padded with 0.
BODY = np.random.default_rng(0).integers(3, 97, 14)
IDS = np.array(
    [[97, *BODY[:n], *[98] * (15 - n)] for n in (0, 5, 14)] + [[97, 7, 8, 98, *[0] * 12]]
)


@pytest.mark.parametrize(
    "activation, eos_id, projected",
    [*((a, i, True) for a in ("quick_gelu", "gelu") for i in (2, 98, 97)), ("gelu", 98, False)],
)
def test_clip(tmp_path, activation, eos_id, projected):
    """With SD3's projection, and without, as SD 1 and FLUX have it."""
    section = SECTION | {"activation": activation, "eos_id": eos_id}
    theirs = {CLIP_CONFIG[name]: value for name, value in section.items()}
    torch.manual_seed(0)
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    model = kind(CLIPTextConfig(**theirs, pad_token_id=0, bos_token_id=97)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases, too
            parameter.copy_(parameter + 0.2 * torch.randn_like(parameter))
        output = model(torch.from_numpy(IDS))
        expected = (output.text_embeds if projected else output.pooler_output).numpy()
    model.save_pretrained(tmp_path)
    section |= {} if projected else {"projection_width": 0}
    net, params = load_clip(tmp_path, section)
    pooled = np.asarray(jax.jit(net.apply)({"params": params}, IDS))
    error = np.linalg.norm(pooled - expected) / np.linalg.norm(expected)
    print(f"relative error {error:.2e}")
    assert error <= 1e-5
