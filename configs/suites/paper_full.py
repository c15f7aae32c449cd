"""The published runs: `python launch/study.py --suite=paper_full` prints steps, cost and commands.

With --launch, on every host of a pod, they are trained one after the other.
"""

CONFIGS = [
    "ablations/baseline",
    # Source and attention.
    "ablations/cross_attention",
    "ablations/dit_self_attention",
    "ablations/dit_cross_attention",
    # Timestep conditioning.
    "ablations/adaln_single",
    "ablations/addition",
    "ablations/no_temb",
    # Positions.
    "ablations/rope_1d",
    "ablations/rope_2d",
    "ablations/m_rope",
    # Text side.
    "ablations/gemma_2",
    "ablations/gemma_it",
    "ablations/gemma_it_instruction",
    "ablations/paligemma",
    "ablations/clip_mod",
    # Size.
    "ablations/hidden_1280",
    "ablations/hidden_1536",
    "ablations/hidden_1792",
    "ablations/layers_10",
    "ablations/layers_14",
    # All of it together, at scale.
    "fusion_2b_gemma2",
]
