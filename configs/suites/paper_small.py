"""The paper's study on one machine: `python launch/study.py --suite=paper_small --workdir=DIR`.

Every configuration of "Exploring the Deep Fusion of LLMs and DiTs" (arXiv 2505.10046), drawn to the
scale of the built-in world: the same choices around the same centre, deep fusion by joint attention
with AdaLN-Zero and a table of absolute positions. Sizes are as they are there to one another: the
DiT has the LLM's width or 10, 12, 14 sixteenths of it, and shares all layers or fewer.
"""

from ml_collections import ConfigDict

from configs import scenes


def get_config() -> ConfigDict:
    """What all rows share."""
    config = scenes.get_config().unlock()
    config.name = "paper_small"
    config.weights.clip = ""  # made of the captioned pictures
    config.pretrain.steps = 150
    config.dit.positions = "none"  # the table alone, as in configs/ablations/baseline.py
    # The rate stays where it is, so that a run can be read at any of its steps.
    config.optimizer.schedule = "constant"
    config.ema.decay = 0.99
    config.train.steps = 1000
    config.checkpoint.update(every=500, keep=1)
    config.validation.update(every=125, timesteps=(0.1, 0.3, 0.5, 0.7, 0.9))
    config.evaluation.update(every=250, num_images=120)
    config.sampling.update(steps=10, solver="dpmpp_2m", every=1000)
    return config.lock()


CLIP = {  # of the row that has one: trained with a picture encoder on the same data
    "dit.pooled_width": 64,
    "clip.vocab_size": 512,
    "clip.width": 64,
    "clip.num_layers": 2,
    "clip.num_heads": 4,
    "clip.mlp_width": 256,
    "clip.max_tokens": 24,
    "clip.projection_width": 64,
    "clip.eos_id": 0,  # the first token of padding ends the text
}

ROWS = [
    ("baseline", {}),
    # Where the text comes from, and how it is attended to.
    ("cross-attention", {"dit.attention": "cross"}),
    ("dit-self-attention", {"memory.source": "shallow"}),
    ("dit-cross-attention", {"memory.source": "shallow", "dit.attention": "cross"}),
    # How the DiT is told the time.
    ("adaln-single", {"dit.conditioning": "adaln-single"}),
    ("addition", {"dit.conditioning": "addition"}),
    ("no-temb", {"dit.conditioning": "none"}),
    # How image tokens know where they are.
    ("1d-rope", {"dit.positions": "1d-rope", "dit.table_size": 0}),
    ("2d-rope", {"dit.positions": "2d-rope", "dit.table_size": 0}),
    ("m-rope", {"dit.positions": "m-rope", "dit.table_size": 0}),
    # Which language model.
    ("llm-longer", {"pretrain.steps": 1500}),
    ("llm-random", {"pretrain.steps": 0}),
    ("clip-mod", CLIP),
    # How large the DiT is.
    ("width-80", {"dit.width": 80}),
    ("width-96", {"dit.width": 96}),
    ("width-112", {"dit.width": 112}),
    ("layers-2", {"llm.num_layers": 3, "dit.num_layers": 2}),
    ("layers-3", {"dit.num_layers": 3}),
    # What was proposed since.
    (
        "middle",
        {"memory.source": "middle", "memory.first_layer": 1, "llm.num_layers": 3},
    ),
    ("mixture", {"memory.source": "mixture"}),
    # A control: pictures with the captions of others.
    ("shuffled-captions", {"data.shuffle_captions": True}),
]

GROUPS = {
    "Source and attention": [
        "baseline",
        "cross-attention",
        "dit-self-attention",
        "dit-cross-attention",
    ],
    "Timestep conditioning": ["baseline", "adaln-single", "addition", "no-temb"],
    "Positions": ["baseline", "1d-rope", "2d-rope", "m-rope"],
    "Text side": ["baseline", "llm-longer", "llm-random", "clip-mod", "shuffled-captions"],
    "Size of the DiT": ["baseline", "width-112", "width-96", "width-80", "layers-3", "layers-2"],
    "Follow-up sources": ["baseline", "middle", "mixture"],
}

_PAPER, _RECIPE = "the paper", "the paper's final recipe"
# Relative positions alone: docs/architecture.md, 'A table of absolute positions'.
_ROTARY = {
    "note": "over 4 x 4 patches the low frequencies, all that M-RoPE's columns have, hardly turn"
}


def _claim(words, where, row, expects, other, measure="score", **more):
    """That `row` has what is expected of a measure, compared with `other`."""
    head = {"claim": words, "where": where, "rows": (row, other)}
    return head | {"measure": measure, "expects": expects} | more


CLAIMS = [
    _claim(
        "Deep fusion follows prompts better than the self-attention DiT",
        _PAPER,
        "baseline",
        "more",
        "dit-self-attention",
    ),
    _claim(
        "Deep fusion follows prompts better than the cross-attention DiT",
        _PAPER,
        "baseline",
        "more",
        "dit-cross-attention",
    ),
    _claim(
        "With the text's keys kept, deep fusion draws as fast as the self-attention DiT",
        _PAPER,
        "baseline",
        "not more",
        "dit-self-attention",
        measure="sample",
    ),
    _claim(
        "Joint attention is no worse than a cross attention of its own",
        _RECIPE,
        "baseline",
        "not less",
        "cross-attention",
    ),
    _claim(
        "Timestep conditioning can go (at the published size 19% of the parameters)",
        _PAPER,
        "no-temb",
        "not less",
        "baseline",
    ),
    _claim("2D-RoPE beats absolute positions", _PAPER, "2d-rope", "more", "baseline", **_ROTARY),
    _claim("2D-RoPE beats 1D-RoPE", _PAPER, "2d-rope", "more", "1d-rope", **_ROTARY),
    _claim("2D-RoPE is no worse than M-RoPE", _RECIPE, "2d-rope", "not less", "m-rope", **_ROTARY),
    _claim(
        "A better language model gives better pictures (Gemma 2; here: trained longer)",
        _PAPER,
        "llm-longer",
        "more",
        "baseline",
    ),
    _claim(
        "CLIP's embedding in the modulation is not needed",
        _RECIPE,
        "clip-mod",
        "not more",
        "baseline",
    ),
    _claim("A DiT of 10/16 of the width is worse", _RECIPE, "width-80", "less", "baseline"),
    _claim(
        "Sharing half of the layers is worse than sharing all",
        _RECIPE,
        "layers-2",
        "less",
        "baseline",
    ),
    {
        "claim": "Shallow fusion has the better FID",
        "where": _PAPER,
        "why": "there is no FID of a world whose pictures are read exactly; held-out losses are in "
        "the table",
    },
    {
        "claim": "Instruction tuning of the language model does not help; multimodal tuning may",
        "where": _PAPER,
        "why": "the small language model is trained on captions alone",
    },
]
