"""The benchmarks, on pipelines that draw perfectly, or without reading."""

from ml_collections import ConfigDict
import numpy as np
import pytest

from configs import digits as digits_config
from configs import scenes as scenes_config
from t2i_jax.data.digits import WORDS, Digits
from t2i_jax.data.scenes import Scenes
from t2i_jax.errors import ConfigError, UserError
from t2i_jax.evaluation import benchmarks, digits
from t2i_jax.evaluation.drawn import Way


class Oracle:
    """Draws what a caption says by looking the caption up in the true renders."""

    def __init__(self, config: ConfigDict, source, caption, reads: bool = True):
        self.config = config
        self.step = 7
        self._images = {}
        for i in range(len(source)):
            self._images.setdefault(caption(i), source[i]["image"])
        self._reads = reads

    def draw(self, prompts, *, seed):
        first = next(iter(self._images.values()))
        images = [self._images.get(p, first) if self._reads else first for p in prompts]
        return np.stack(images)


def run(name, oracle, num_images=None, seed=0):
    """The report, of images that are not kept."""
    setting = benchmarks.Setting(Way(oracle, seed, {}, {}), None, num_images)
    report, samples = benchmarks.BENCHMARKS[name](setting)
    return {"benchmark": name, **report}, samples


def scenes_oracle(**options) -> Oracle:
    config = scenes_config.get_config()
    source = Scenes(config.data.image_size, "heldout", seed=3, length=60)
    return Oracle(config, source, source.caption, **options)


def test_scenes_scores_a_perfect_model_high_and_its_controls_low():
    report, _ = run("scenes", scenes_oracle(), 60, 3)
    assert report["score"] >= 0.95
    # Some prompts are alike: perfect images pass now and then, and not by construction.
    assert 0 < report["controls"]["shuffled"] < 0.2
    assert report["controls"]["null"] < 0.2
    assert len(report["categories"]) == 6
    assert "control, shuffled" in benchmarks.table(report)


def test_scenes_scores_a_model_that_does_not_read_low():
    report, samples = run("scenes", scenes_oracle(reads=False), 60, 3)
    assert report["score"] < 0.2
    marks = [good for some in samples.values() for _, _, good in some]
    assert len(marks) == 60 and sum(marks) == sum(
        c["passed"] for c in report["categories"].values()
    )


def test_digits_scores_real_digits_as_the_classifier_does_and_wrong_ones_at_zero():
    size, held_out = 16, 297
    source = Digits(size, "validation", held_out)
    images = np.stack([source[i]["image"] for i in range(len(source))])
    labels = np.array([source.label(i) for i in range(len(source))])
    report = digits.score(images, labels, size, held_out)
    assert report["score"] == pytest.approx(report["classifier"])
    assert report["score"] > 0.9
    assert digits.score(images, (labels + 1) % 10, size, held_out)["score"] < 0.05
    assert sum(part["n"] for part in report["categories"].values()) == held_out


def test_digits_benchmark_asks_for_every_digit():
    config = digits_config.get_config()
    source = Digits(config.data.image_size, "train", config.data.validation_size)
    oracle = Oracle(config, source, lambda i: f"a handwritten {WORDS[source.label(i)]}")
    report, samples = run("digits", oracle, 20)
    assert report["score"] > 0.85
    assert set(report["categories"]) == set(samples) == set(WORDS)


def test_a_benchmark_is_for_models_of_its_world():
    with pytest.raises(ValueError, match=r"data\.source = 'digits'"):
        benchmarks.run("digits", benchmarks.Setting(Way(scenes_oracle(), 0, {}, {}), None))


def test_an_unknown_benchmark_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'scenes'"):
        benchmarks.run("scene", benchmarks.Setting(Way(scenes_oracle(), 0, {}, {}), None))


def test_the_prompts_of_the_demo_are_held_out():
    source = Scenes(24, "heldout", seed=0, length=6000)
    held_out = {source.caption(i) for i in range(len(source))}
    assert set(scenes_config.get_config().sampling.prompts) <= held_out


def scored(score, **more):
    return {"benchmark": "x", "score": score, "interval": (score - 0.1, score + 0.1)} | (
        {"better": "higher"} | more
    )


def test_a_score_can_be_required():
    benchmarks.require(scored(0.5, controls={"null": 0.1}), 0.5)
    with pytest.raises(UserError, match=r"below the required 0\.6"):
        benchmarks.require(scored(0.5), 0.6)
    with pytest.raises(UserError, match=r"not above null prompts: 0\.400"):
        benchmarks.require(scored(0.5, controls={"null": 0.4}), 0.3)
    with pytest.raises(ConfigError, match="--require is for scores"):
        benchmarks.require(scored(9.5, better="lower"), 0.3)
