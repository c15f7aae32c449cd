"""Fine-tuning the flagship on one chip of 16 GB, by low-rank factors:

    python launch/train.py --config=configs/lora_2b.py --config.weights.start=DIR \
        --config.data.path='DATA/*.tar'

DIR is a model of configs/fusion_2b.py: a run of it, an import or an export. It stays as it is, its
matrices held in bfloat16; 20 million numbers are trained beside its 2.0 billion (arXiv 2106.09685).
"""

from ml_collections import ConfigDict

from configs import fusion_2b


def get_config() -> ConfigDict:
    """The flagship's model, its factors trained."""
    config = factors(fusion_2b.get_config())
    config.name = "lora_2b"
    config.weights.start = "weights/fusion_2b"
    return config.lock()


def factors(config: ConfigDict) -> ConfigDict:
    """Rank 16 on every product of the blocks, 2,000 steps of 16 images, two at once."""
    config = config.unlock()
    config.lora.update(rank=16, alpha=16.0)
    config.optimizer.update(learning_rate=2e-4, warmup_steps=50)
    config.ema.update(decay=0.99, every=1, warmup=True)  # of a run of 2,000 steps, not of 500,000
    config.train.update(steps=2_000, batch_size=16, accumulation=8)
    # dit.remat stays 'products': of 16.9 GB of a v5e chip (docs/tpu.md) it needs 12.9; none 22.8,
    # outputs 10.3, full 10.2, offload 10.1 and 0.2 of the host, these three for more FLOPs.
    config.checkpoint.update(every=250)
    config.validation.update(every=250)
    config.sampling.update(every=250, batch_size=4)
    return config
