"""Shallow fusion, the cross-attention DiT: a second attention, to learned text keys."""

from ml_collections import ConfigDict

from configs.ablations import baseline


def get_config() -> ConfigDict:
    """Baseline that sees the LLM's last hidden state alone."""
    config = baseline.get_config().unlock()
    config.name = "ablations/dit-cross-attention"
    config.memory.source = "shallow"
    config.dit.attention = "cross"
    return config.lock()
