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


def test_an_ablation_differs_from_the_baseline_in_one_thing():
    base = config.flat(load("ablations/baseline"))
    llms = {"gemma_2", "gemma_it", "gemma_it_instruction", "paligemma"}
    names = set()
    for name in SIZES:
        if "/" not in name or name.endswith("baseline"):
            continue
        here = config.flat(load(name))
        changed = {key for key in here if here[key] != base[key]} - {"name"}
        sections = {key.split(".")[0] for key in changed}
        recipe = {"optimizer", "train", "ema", "flow", "sampling", "autoencoder", "mesh"}
        assert changed and not sections & recipe, (name, changed)
        assert name.split("/")[1] in llms or len(changed) <= 3, (name, changed)
        names.add(here["name"])
    assert len(names) == len([name for name in SIZES if "/" in name]) - 1  # each its own workdir


def test_the_published_recipe():
    c = load("fusion_2b_gemma2")
    assert c.train.steps == 1_000_000 and load("fusion_2b").train.steps == 500_000
    assert len(c.data.path.split("::")) == 3
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
        assert c.dit.qk_norm and c.dit.prediction == "velocity"
