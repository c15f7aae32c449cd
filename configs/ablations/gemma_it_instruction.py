"""Another LLM: Gemma 2B, instruction-tuned and instructed."""

from ml_collections import ConfigDict

from configs.ablations import gemma_it


def get_config() -> ConfigDict:
    """Gemma 2B IT with "Imagine: " before every caption."""
    config = gemma_it.get_config().unlock()
    config.name = "ablations/gemma-it-instruction"
    config.data.instruction = "Imagine: "
    return config.lock()
