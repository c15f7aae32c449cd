"""Timestep conditioning: none."""

from ml_collections import ConfigDict

from configs.ablations import baseline


def get_config() -> ConfigDict:
    """Baseline that is not told the time."""
    config = baseline.get_config().unlock()
    config.name = "ablations/no-temb"
    config.dit.conditioning = "none"
    return config.lock()
