"""A narrower DiT: width 1536."""

from ml_collections import ConfigDict

from configs.ablations import baseline


def get_config() -> ConfigDict:
    """Baseline with a DiT narrower than its LLM; heads and MLP are the same."""
    config = baseline.get_config().unlock()
    config.name = "ablations/hidden-size-1536"
    config.dit.width = 1536
    return config.lock()
