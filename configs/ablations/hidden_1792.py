"""A narrower DiT: width 1792."""

from ml_collections import ConfigDict

from configs.ablations import baseline


def get_config() -> ConfigDict:
    """Baseline with a DiT narrower than its LLM; heads and MLP are the same."""
    config = baseline.get_config().unlock()
    config.name = "ablations/hidden-size-1792"
    config.dit.width = 1792
    return config.lock()
