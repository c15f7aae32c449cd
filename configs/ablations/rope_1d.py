"""Rotary positions of image tokens: 1D-RoPE."""

from ml_collections import ConfigDict

from configs.ablations import baseline


def get_config() -> ConfigDict:
    """Baseline with 1D-RoPE instead of the table."""
    config = baseline.get_config().unlock()
    config.name = "ablations/1d-rope"
    config.dit.update(positions="1d-rope", table_size=0)
    return config.lock()
