"""CLIP's encoders against transformers' own, from directories that it wrote."""

import jax
import numpy as np
import pytest
import torch
import transformers
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from t2i_jax.evaluation.preprocess import for_clip
from t2i_jax.interop.clip import CLIP_CONFIG, load_clip
from t2i_jax.interop.clip_model import load_clip_model

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


def test_clip_model(tmp_path):
    """Both encoders, of a directory that it wrote, and the pictures on their way to them."""
    torch.manual_seed(0)
    text = {CLIP_CONFIG[name]: value for name, value in SECTION.items()}
    vision = {"hidden_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"intermediate_size": 72, "image_size": 30, "patch_size": 6, "hidden_act": "gelu"}
    text |= {"projection_dim": 33}  # not what counts
    tokens = {"pad_token_id": 0, "bos_token_id": 97, "eos_token_id": 98}
    config = CLIPConfig(text_config=text | tokens, vision_config=vision, projection_dim=20)
    model = transformers.CLIPModel(config).eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=30)
    rng = np.random.default_rng(0)
    shapes = [(30, 30), (32, 47), (61, 40), (200, 333), (17, 90), (512, 512)]
    images = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases, too
            parameter.copy_(parameter + 0.2 * torch.randn_like(parameter))
        expected = {
            "text": model.get_text_features(torch.from_numpy(IDS)).pooler_output.numpy(),
            "vision": model.get_image_features(pixels).pooler_output.numpy(),
        }
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    ours = load_clip_model(tmp_path)
    made = np.stack([for_clip(image, ours.pictures) for image in images])
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made, pixels.permute(0, 2, 3, 1))
    for part, net, inputs in (("text", ours.text, IDS), ("vision", ours.vision, made)):
        actual = np.asarray(jax.jit(net.apply)({"params": ours.params[part]}, inputs))
        error = np.linalg.norm(actual - expected[part]) / np.linalg.norm(expected[part])
        print(f"{part}: relative error {error:.2e}")
        assert actual.shape == expected[part].shape and error <= 1e-5
