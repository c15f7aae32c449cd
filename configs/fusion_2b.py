"""The flagship: `python launch/train.py --config=configs/fusion_2b.py`.

Gemma 2B and a 2.0-billion-parameter DiT, deeply fused, by the recipe that the study ends with:
2D-RoPE, no timestep conditioning, 512 px, SD3 latents, CC12M recaptioned; AdamW 1e-4, batch 512,
500k steps (FuseDiT, arXiv 2505.10046, sections 4 and 5). Weights and data are looked for below
the current directory, in weights/ and data/. The study itself is in configs/ablations/.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """What the ablations found to be best, at the ablations' scale."""
    config = base.get_config().unlock()
    config.name = "fusion_2b"
    config.dit.update(positions="2d-rope", conditioning="none")
    # GB of a device of v4-256, batch 512 (docs/tpu.md), of the step: none 28.5, products 8.5,
    # outputs 3.1, full 2.8, offload 2.8 and 0.3 of the host; the last three compute a fifth more.
    # Encoding the images, before it, needs 3.8.
    config.dit.remat = "products"
    return config.lock()
