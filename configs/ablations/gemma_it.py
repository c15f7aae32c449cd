"""Another LLM: Gemma 2B, instruction-tuned."""

from ml_collections import ConfigDict

from configs import llms
from configs.ablations import baseline


def get_config() -> ConfigDict:
    """Baseline on Gemma 2B IT."""
    config = baseline.get_config().unlock()
    config.name = "ablations/gemma-it"
    llms.weights(config, "weights/gemma-2b-it")
    return config.lock()
