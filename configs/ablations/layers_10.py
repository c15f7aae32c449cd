"""Fewer shared layers: 10, layers 4 to 13 of the LLM."""

from ml_collections import ConfigDict

from configs.ablations import baseline


def get_config() -> ConfigDict:
    """Baseline with a shallower DiT; the LLM ends with the last shared layer."""
    config = baseline.get_config().unlock()
    config.name = "ablations/layers-10"
    config.llm.num_layers = 14
    config.dit.num_layers = 10
    return config.lock()
