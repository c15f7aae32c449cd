"""Shallow fusion, the self-attention DiT: one softmax over learned text keys and the image's."""

from ml_collections import ConfigDict

from configs.ablations import baseline


def get_config() -> ConfigDict:
    """Baseline that sees the LLM's last hidden state alone."""
    config = baseline.get_config().unlock()
    config.name = "ablations/dit-self-attention"
    config.memory.source = "shallow"
    config.dit.attention = "joint"
    return config.lock()
