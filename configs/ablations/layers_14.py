"""Fewer shared layers: 14, layers 2 to 15 of the LLM."""

from ml_collections import ConfigDict

from configs.ablations import baseline


def get_config() -> ConfigDict:
    """Baseline with a shallower DiT; the LLM ends with the last shared layer."""
    config = baseline.get_config().unlock()
    config.name = "ablations/layers-14"
    config.llm.num_layers = 16
    config.dit.num_layers = 14
    return config.lock()
