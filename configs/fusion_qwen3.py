"""Beyond the paper, a modern and smaller LLM: Qwen3 0.6B and a 0.4-billion-parameter DiT.

    python launch/train.py --config=configs/fusion_qwen3.py

The flagship's recipe otherwise. Qwen3 has no BOS token and normalises queries and keys.
"""

from ml_collections import ConfigDict

from configs import fusion_2b, llms


def get_config() -> ConfigDict:
    """The flagship on Qwen3 0.6B."""
    config = fusion_2b.get_config().unlock()
    config.name = "fusion_qwen3"
    llms.qwen3_0_6b(config)
    return config.lock()
