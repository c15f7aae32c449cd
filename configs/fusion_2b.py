"""The flagship: `python launch/train.py --config=configs/fusion_2b.py`.

Gemma 2B and a 2.4-billion-parameter DiT, deeply fused: 2D-RoPE, AdaLN-Zero, 512 px, SD3 latents,
CC12M recaptioned; AdamW 1e-4, batch 512, 500k steps (FuseDiT, arXiv 2505.10046, section 4). The
base config is this recipe; weights and data are looked for in weights/ and data/ below the current
directory.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """The published recipe, unchanged."""
    config = base.get_config().unlock()
    config.name = "fusion_2b"
    return config.lock()
