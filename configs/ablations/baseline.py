"""The centre of the study: deep fusion with Gemma 2B, AdaLN-Zero, absolute positions."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """FuseDiT, arXiv 2505.10046, section 4: every ablation differs from this in one thing."""
    config = base.get_config().unlock()
    config.name = "ablations/baseline"
    # Image tokens are not turned; a table of sines and cosines for 64 x 64 patches is added.
    config.dit.update(positions="none", table_size=64, table_range=16.0)
    return config.lock()
