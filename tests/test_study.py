"""The configs of the study: each of them valid, of exactly the published size, a small diff."""

import pathlib

from flax.core import meta
import pytest

from t2i_jax import build, config

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
GEMMA, GEMMA_2 = 2_506_172_416, 2_614_341_888  # embeddings included, no head
BASELINE = 2_448_479_296
PUBLISHED = {  # trained and frozen parameters
    "ablations/baseline": (BASELINE, GEMMA),
    "ablations/rope_1d": (BASELINE, GEMMA),
    "ablations/rope_2d": (BASELINE, GEMMA),
    "ablations/m_rope": (BASELINE, GEMMA),
    "ablations/adaln_single": (2_012_283_968, GEMMA),
    "ablations/addition": (1_986_880_576, GEMMA),
    "ablations/no_temb": (1_982_157_888, GEMMA),
    "ablations/clip_mod": (2_454_251_328, GEMMA),
    "ablations/cross_attention": (2_599_478_848, GEMMA),
    "ablations/gemma_2": (2_869_825_088, GEMMA_2),
    "ablations/gemma_it": (BASELINE, GEMMA),
    "ablations/gemma_it_instruction": (BASELINE, GEMMA),
    "ablations/paligemma": (BASELINE, 2_508_662_784),
    "ablations/hidden_1280": (1_421_185_600, GEMMA),
    "ablations/hidden_1536": (1_749_067_840, GEMMA),
    "ablations/hidden_1792": (2_091_499_072, GEMMA),
    "ablations/layers_10": (1_366_213_696, 2_065_754_112),
    "ablations/layers_14": (1_907_346_496, 2_285_963_264),
    "ablations/dit_self_attention": (2_471_552_064, GEMMA),
    "ablations/dit_cross_attention": (2_622_556_224, GEMMA),
    "fusion_2b": (1_982_157_888, GEMMA),
    "fusion_2b_gemma2": (2_024_828_480, GEMMA_2),
}
OURS = {  # what the paper does not have
    "ablations/middle": (BASELINE, 2_065_754_112),  # the LLM ends with the last shared layer
    "ablations/mixture": (BASELINE + 18 * 18, GEMMA),
    "fusion_qwen3": (440_599_616, 596_049_920),
}
SIZES = PUBLISHED | OURS


def load(name):
    return config.load(str(FOLDER / f"{name}.py"))


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    trained, frozen = build.abstract_params(load(name))
    assert (build.count(meta.unbox(trained)), build.count(frozen["llm"])) == SIZES[name]


def test_every_config_of_the_study_is_in_the_table():
    files = {f"ablations/{f.stem}" for f in (FOLDER / "ablations").glob("*.py")}
    assert files == {name for name in SIZES if "/" in name}


GEMMA_2_2B = {
    **{"llm.width": 2304, "llm.num_layers": 26, "llm.num_kv_heads": 4, "llm.mlp_width": 9216},
    **{"llm.post_norms": True, "llm.query_scalar": 256.0, "llm.max_tokens": 4096},
    **{"llm.softcap": 50.0, "llm.logit_softcap": 30.0},
    **{"dit.width": 2304, "dit.num_layers": 26, "dit.mlp_width": 9216, "dit.sandwich_norm": True},
    **{"weights.llm": "weights/gemma-2-2b", "weights.tokenizer": "weights/gemma-2-2b"},
}
IT = {"weights.llm": "weights/gemma-2b-it", "weights.tokenizer": "weights/gemma-2b-it"}
PALIGEMMA = "weights/paligemma-3b-pt-448"
DIFFERENCES = {  # from the baseline, to the last key
    "rope_1d": {"dit.positions": "1d-rope", "dit.table_size": 0},
    "rope_2d": {"dit.positions": "2d-rope", "dit.table_size": 0},
    "m_rope": {"dit.positions": "m-rope", "dit.table_size": 0},
    "adaln_single": {"dit.conditioning": "adaln-single"},
    "addition": {"dit.conditioning": "addition"},
    "no_temb": {"dit.conditioning": "none"},
    "clip_mod": {"dit.pooled_width": 768},
    "cross_attention": {"dit.attention": "cross"},
    "gemma_2": GEMMA_2_2B,
    "gemma_it": IT,
    "gemma_it_instruction": IT | {"data.instruction": "Imagine: "},
    "paligemma": {
        **{"weights.llm": PALIGEMMA, "weights.tokenizer": PALIGEMMA},
        "llm.vocab_size": 257_216,
    },
    "hidden_1280": {"dit.width": 1280},
    "hidden_1536": {"dit.width": 1536},
    "hidden_1792": {"dit.width": 1792},
    "layers_10": {"llm.num_layers": 14, "dit.num_layers": 10},
    "layers_14": {"llm.num_layers": 16, "dit.num_layers": 14},
    "dit_self_attention": {"memory.source": "shallow"},
    "dit_cross_attention": {"memory.source": "shallow", "dit.attention": "cross"},
    "middle": {"memory.source": "middle", "memory.first_layer": 4, "llm.num_layers": 14},
    "mixture": {"memory.source": "mixture"},
}


def differences(name, base):
    here, there = config.flat(load(name)), config.flat(load(base))
    return {key: value for key, value in here.items() if value != there[key]}


def test_an_ablation_differs_from_the_baseline_in_one_thing():
    names = set()
    for name, expected in DIFFERENCES.items():
        found = differences(f"ablations/{name}", "ablations/baseline")
        names.add(found.pop("name"))
        assert found == expected, name
    assert DIFFERENCES.keys() | {"baseline"} == {n.split("/")[1] for n in SIZES if "/" in n}
    assert len(names) == len(DIFFERENCES)  # each its own working directory


def test_the_flagships_and_the_baseline():
    table = {"dit.positions": "none", "dit.table_size": 64, "name": "ablations/baseline"}
    assert differences("ablations/baseline", "base") == table
    assert load("ablations/baseline").dit.table_range == 16.0
    assert differences("fusion_2b", "base") == {"dit.conditioning": "none", "name": "fusion_2b"}
    large = differences("fusion_2b_gemma2", "fusion_2b")
    data = ("cc12m-recaptioned/cc12m-train-{0000..2175}", "sa1b/sa1b-train-{0000..1109}")
    data += ("journeydb/journeydb-train-{000..199}",)
    assert large == GEMMA_2_2B | {
        "name": "fusion_2b_gemma2",
        "train.steps": 1_000_000,
        "data.path": "::".join(f"data/{shards}.tar" for shards in data),
    }


def test_the_published_recipe():
    for name in ("ablations/baseline", "ablations/dit_cross_attention", "fusion_2b_gemma2"):
        c = load(name)
        o = c.optimizer
        assert (o.name, o.learning_rate, o.weight_decay, o.clip_norm) == ("adamw", 1e-4, 1e-4, 1.0)
        assert (o.b1, o.b2, o.eps, o.schedule, o.warmup_steps) == (0.9, 0.999, 1e-8, "constant", 0)
        assert (c.train.batch_size, c.ema.decay, c.ema.every, c.seed) == (512, 0.99, 100, 42)
        assert (c.flow.shift, c.flow.time_mean, c.flow.time_std) == (3.0, 0.0, 1.0)
        assert (c.sampling.steps, c.sampling.guidance) == (25, 6.0)
        assert (c.data.image_size, c.data.caption_dropout, c.data.max_text_tokens) == (
            512,
            0.1,
            256,
        )
        assert c.train.steps == (1_000_000 if name == "fusion_2b_gemma2" else 500_000)
        assert c.dit.qk_norm and c.dit.prediction == "velocity"
