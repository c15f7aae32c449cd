"""Timestep conditioning: added to the image tokens."""

from ml_collections import ConfigDict

from configs.ablations import baseline


def get_config() -> ConfigDict:
    """Baseline with the time embedding added once, before the first layer."""
    config = baseline.get_config().unlock()
    config.name = "ablations/addition"
    config.dit.conditioning = "addition"
    return config.lock()
