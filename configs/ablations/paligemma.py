"""Another LLM: the language half of PaliGemma 3B."""

from ml_collections import ConfigDict

from configs import llms
from configs.ablations import baseline


def get_config() -> ConfigDict:
    """Baseline on the language model that was tuned with images."""
    config = baseline.get_config().unlock()
    config.name = "ablations/paligemma"
    llms.weights(config, "weights/paligemma-3b-pt-448")
    config.llm.vocab_size = 257_216
    return config.lock()
