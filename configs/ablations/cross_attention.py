"""Deep fusion by cross attention: a second attention, to the LLM's keys before rotation."""

from ml_collections import ConfigDict

from configs.ablations import baseline


def get_config() -> ConfigDict:
    """Baseline with cross instead of joint attention."""
    config = baseline.get_config().unlock()
    config.name = "ablations/cross-attention"
    config.dit.attention = "cross"
    return config.lock()
