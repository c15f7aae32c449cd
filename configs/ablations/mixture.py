"""A follow-up: every layer sees a learned mixture over the LLM's layers."""

from ml_collections import ConfigDict

from configs.ablations import baseline


def get_config() -> ConfigDict:
    """Baseline that starts as it is and learns which layers of the LLM to read."""
    config = baseline.get_config().unlock()
    config.name = "ablations/mixture"
    config.memory.source = "mixture"
    return config.lock()
