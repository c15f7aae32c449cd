"""Your own images on one machine, at 64 pixels:

    python launch/train.py --config=configs/small_64.py --config.data.path='DIR/*.tar'

WebDataset shards (KEY.image.jpg, KEY.synthetic_caption.txt; the names are config.data.*_field). The
tokenizer and a small LLM are trained on the captions first; pixels are the latents. About 20 images
a second on two CPU cores, so that all 6000 steps take two and a half hours there.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Six layers of width 256 on 64 tokens of 8 x 8 pixels."""
    config = base.get_config().unlock()
    config.name = "small_64"
    config.weights.update(llm="", tokenizer="", autoencoder="")
    config.llm.update(
        vocab_size=2048,
        width=256,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        head_width=64,
        mlp_width=512,
        rope_theta=1e6,
        unroll=6,
    )
    config.pretrain.update(steps=300, batch_size=64, learning_rate=2e-3, vocab_size=2048)
    config.dit.update(
        width=256,
        num_layers=6,
        mlp_width=768,
        patch_size=8,
        table_size=8,
        table_range=8.0,
        conditioning="adaln-zero",
        prediction="data",
        unroll=6,
        remat="none",
    )
    config.autoencoder.update(kind="identity", channels=3, downsample=1, scale=1.0, shift=0.0)
    config.flow.update(shift=2.0)
    config.data.update(
        path="data/*.tar",
        image_size=64,
        max_text_tokens=32,
        validation_size=128,
        num_threads=2,
    )
    config.optimizer.update(
        name="muon",
        learning_rate=1.5e-3,
        muon_learning_rate=0.01,
        muon_steps=3,
        schedule="linear",
        warmup_steps=50,
        decay_steps=0,
    )
    config.ema.update(decay=0.998, every=1, warmup=True)
    config.train.update(
        steps=6000, batch_size=32, dtype="float32", frozen_dtype="float32", log_every=10
    )
    config.checkpoint.update(every=500, keep=2)
    config.validation.update(every=500)
    config.sampling.update(
        steps=30,
        guidance=3.0,
        batch_size=32,
        every=500,
        prompts=(
            "an emoji of red apple",
            "an emoji of a smiling face",
            "an emoji of a dog",
            "an emoji of a blue heart",
        ),
    )
    return config.lock()
