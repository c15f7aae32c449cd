"""Language models beyond Gemma 2B, which configs/base.py has: sizes, weights, a DiT to match."""

from ml_collections import ConfigDict


def weights(config: ConfigDict, directory: str) -> None:
    """Language model and tokenizer are in this directory."""
    config.weights.update(llm=directory, tokenizer=directory)


def gemma_2_2b(config: ConfigDict) -> None:
    """Gemma 2 2B (arXiv 2408.00118, table 1), and a DiT as deep, as wide, with its MLP."""
    weights(config, "weights/gemma-2-2b")
    config.llm.update(
        vocab_size=256_000,
        width=2304,
        num_layers=26,
        num_heads=8,
        num_kv_heads=4,
        head_width=256,
        mlp_width=9216,
        post_norms=True,
        query_scalar=256.0,
        softcap=50.0,
        logit_softcap=30.0,
        max_tokens=4096,
    )
    config.dit.update(width=2304, num_layers=26, mlp_width=9216)


def qwen3_0_6b(config: ConfigDict) -> None:
    """Qwen3 0.6B Base (arXiv 2505.09388, table 1), and a DiT as deep, as wide, with its MLP."""
    weights(config, "weights/Qwen3-0.6B-Base")
    config.llm.update(
        vocab_size=151_936,
        width=1024,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_width=128,
        mlp_width=3072,
        rope_theta=1e6,
        norm_offset=0.0,
        activation="silu",
        scale_embedding=False,
        qk_norm=True,
        max_tokens=32_768,
    )
    config.dit.update(width=1024, num_layers=28, mlp_width=3072)
