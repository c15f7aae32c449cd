"""Timestep conditioning: AdaLN-single."""

from ml_collections import ConfigDict

from configs.ablations import baseline


def get_config() -> ConfigDict:
    """Baseline with one modulation for all layers and a table for each."""
    config = baseline.get_config().unlock()
    config.name = "ablations/adaln-single"
    config.dit.conditioning = "adaln-single"
    return config.lock()
