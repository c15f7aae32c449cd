"""CLIP modulation: the pooled embedding of CLIP-L joins the time embedding."""

from ml_collections import ConfigDict

from configs.ablations import baseline


def get_config() -> ConfigDict:
    """Baseline with the pooled text embedding of SD3's CLIP-L."""
    config = baseline.get_config().unlock()
    config.name = "ablations/clip-mod"
    config.dit.pooled_width = 768
    return config.lock()
