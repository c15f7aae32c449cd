"""The large-scale run: `python launch/train.py --config=configs/fusion_2b_gemma2.py`.

Gemma 2 2B and a 2.0-billion-parameter DiT of 26 layers: 2D-RoPE, no timestep conditioning, sandwich
norms; CC12M, SA-1B and JourneyDB, one million steps of 512 images (FuseDiT, arXiv 2505.10046,
section 5).
"""

from ml_collections import ConfigDict

from configs import fusion_2b, llms


def get_config() -> ConfigDict:
    """The flagship on Gemma 2, twice as long, on three data sets."""
    config = fusion_2b.get_config().unlock()
    config.name = "fusion_2b_gemma2"
    llms.gemma_2_2b(config)
    config.dit.sandwich_norm = True
    # dit.remat stays 'products': 9.1 GB of a device of v4-256 (docs/tpu.md).
    config.data.path = "::".join(
        (
            "data/cc12m-recaptioned/cc12m-train-{0000..2175}.tar",
            "data/sa1b/sa1b-train-{0000..1109}.tar",
            "data/journeydb/journeydb-train-{000..199}.tar",
        )
    )
    config.train.steps = 1_000_000
    return config.lock()
