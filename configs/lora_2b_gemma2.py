"""Fine-tuning the published large-scale model, imported, on one chip of 16 GB:

    python launch/convert.py import --source=ooutlierr/fuse-dit --out=weights/fuse-dit-jax \
        --dtype=bfloat16
    python launch/train.py --config=configs/lora_2b_gemma2.py --config.data.path='DATA/*.tar'

What is imported holds all that this needs: the DiT, the language model, tokenizer, autoencoder.
"""

from ml_collections import ConfigDict

from configs import fusion_2b_gemma2, lora_2b


def get_config() -> ConfigDict:
    """configs/lora_2b.py on Gemma 2's model."""
    config = lora_2b.factors(fusion_2b_gemma2.get_config())
    config.name = "lora_2b_gemma2"
    parts = ("start", "llm", "tokenizer", "autoencoder")
    config.weights.update({part: "weights/fuse-dit-jax" for part in parts})
    return config.lock()
