"""Rotary positions of image tokens: M-RoPE."""

from ml_collections import ConfigDict

from configs.ablations import baseline


def get_config() -> ConfigDict:
    """Baseline with M-RoPE instead of the table."""
    config = baseline.get_config().unlock()
    config.name = "ablations/m-rope"
    config.dit.update(positions="m-rope", table_size=0)
    return config.lock()
