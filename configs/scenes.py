"""The built-in world on a laptop: `python launch/train.py --config=configs/scenes.py`.

24 x 24 pixels in pixel space, procedural scenes with captions in GenEval's six categories; the
tokenizer and a small LLM are trained on the captions first. `make demo` runs it, samples from it
and scores it.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """A fused model of four layers that follows its prompts after minutes on two CPU cores."""
    config = base.get_config().unlock()
    config.name = "scenes"
    config.weights.update(llm="", tokenizer="", autoencoder="")
    config.llm.update(
        vocab_size=512,
        width=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_width=64,
        mlp_width=256,
        rope_theta=1e6,
        unroll=4,
    )
    config.pretrain.update(steps=500, batch_size=64, vocab_size=512)
    config.dit.update(
        width=128,
        num_layers=4,
        mlp_width=384,
        patch_size=6,
        table_size=4,
        table_range=4.0,
        conditioning="adaln-zero",
        prediction="data",
        unroll=4,
        remat="none",
    )
    config.autoencoder.update(kind="identity", channels=3, downsample=1, scale=1.0, shift=0.0)
    # What goes where is decided where there is most noise: most of the training is there, too.
    config.flow.update(shift=2.0, time_mean=-0.7)
    config.data.update(
        source="scenes",
        path="",
        image_size=24,
        max_text_tokens=16,
        validation_size=256,
        num_threads=1,
    )
    config.optimizer.update(
        name="muon",
        learning_rate=1.5e-3,
        muon_learning_rate=0.009,
        muon_steps=3,
        schedule="linear",
        warmup_steps=40,
        decay_steps=0,
        weight_decay=0.3,  # docs/architecture.md says why
    )
    config.ema.update(decay=0.995, every=1, warmup=True)
    config.train.update(
        steps=2800, batch_size=32, dtype="float32", frozen_dtype="float32", log_every=1
    )
    config.checkpoint.update(every=700, keep=2)
    config.validation.update(every=400)
    config.sampling.update(
        steps=25,
        guidance=4.0,
        batch_size=100,
        every=1400,
        prompts=(  # combinations that training never shows, one or two of each category
            "just a small cross on a brown background",
            "a large cross, black background",
            "a ring and a square against a black background",
            "a picture of three green squares",
            "a drawing of a large blue cross",
            "a red ring to the left of a purple cross",
            "a picture of a green cross over a green ring",
            "there is one blue square and a purple triangle",
        ),
    )
    return config.lock()
