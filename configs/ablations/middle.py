"""A follow-up: attention is shared in the middle layers alone."""

from ml_collections import ConfigDict

from configs.ablations import baseline


def get_config() -> ConfigDict:
    """Baseline whose layers 4 to 13 see the text, the others the image alone."""
    config = baseline.get_config().unlock()
    config.name = "ablations/middle"
    config.memory.update(source="middle", first_layer=4)
    config.llm.num_layers = 14
    return config.lock()
