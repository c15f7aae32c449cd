"""Another LLM: Gemma 2 2B, with a DiT of its size and its norms."""

from ml_collections import ConfigDict

from configs import llms
from configs.ablations import baseline


def get_config() -> ConfigDict:
    """Baseline on Gemma 2: 26 layers, width 2304, sandwich norms."""
    config = baseline.get_config().unlock()
    config.name = "ablations/gemma-2"
    llms.gemma_2_2b(config)
    config.dit.sandwich_norm = True
    return config.lock()
