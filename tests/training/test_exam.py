"""Scores of a run while it trains are those that its checkpoints have afterwards."""

import json

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax import config as configs
from t2i_jax import sharding
from t2i_jax.errors import ConfigError
from t2i_jax.evaluation import benchmarks, features, realism
from t2i_jax.evaluation.drawn import Way
from t2i_jax.pipeline import Pipeline
from t2i_jax.training import loop
from t2i_jax.training.metrics import read_metrics
from tests import tiny

SCORED = {"evaluation__every": 2, "evaluation__num_images": 6, "checkpoint__every": 2}


def test_a_world_is_scored_as_by_the_command(tmp_path):
    config = tiny.config(**SCORED)
    loop.train(config, tmp_path / "run")
    scored = [m for m in read_metrics(epath.Path(tmp_path / "run")) if "score" in m]
    assert [m["step"] for m in scored] == [2, 4]
    for metrics in scored:
        pipeline = Pipeline.load(tmp_path / "run" / "checkpoints" / str(metrics["step"]))
        setting = benchmarks.Setting(Way(pipeline, config.seed, {}, {}), None, 6)
        report, _ = benchmarks.BENCHMARKS["scenes"](setting)
        assert metrics["score"] == report["score"]
        for name, part in report["categories"].items():
            assert metrics[f"score/{name}"] == part["fraction"]
        assert metrics["score/control_null"] == report["controls"]["null"]
    speed = [json.loads(line) for line in (tmp_path / "run" / "speed.jsonl").open()]
    assert any("pause_evaluation" in line for line in speed)


def test_other_data_are_compared_with_what_was_held_out(tmp_path, monkeypatch):
    """By stand-ins for the networks, which see mean colours and lengths of prompts."""
    mesh, reads = sharding.make_mesh(), jax.ShapeDtypeStruct((3,), np.float32)
    asked = []

    def load(cls, inception, clip):
        asked.append((inception, clip))

        def extractor(prepare):
            return features.Extractor(prepare, lambda params, x: x, {}, mesh, reads, batch_size=8)

        pictures = extractor(lambda x: features.pixels(x).astype(np.float32).mean((0, 1)))
        prompts = extractor(lambda text: np.array([len(text), 1, 2], np.float32))
        return cls(pictures, (pictures, prompts))

    monkeypatch.setattr(realism.Networks, "load", classmethod(load))
    monkeypatch.setattr(benchmarks, "WORLDS", ())  # the scenes as any other data
    named = {"evaluation__inception": "i.safetensors", "evaluation__clip": "clip"}
    loop.train(tiny.config(**SCORED, **named), tmp_path / "run")
    assert asked == [("i.safetensors", "clip")]
    scored = [m for m in read_metrics(epath.Path(tmp_path / "run")) if "fid" in m]
    assert [m["step"] for m in scored] == [2, 4]
    assert all(m["fid"] > 0 and 0 <= m["clip_score"] <= 100 and "cmmd" in m for m in scored)
    pipeline = Pipeline.load(tmp_path / "run")
    source = loop.open_data(pipeline.config)[1]
    chosen = range(6)
    images = pipeline.draw([source.caption(i) for i in chosen], seed=pipeline.config.seed)
    means = (
        jnp.asarray(images, jnp.float32).mean((1, 2)),
        jnp.array([source[i]["image"] for i in chosen], jnp.float32).mean((1, 2)),
    )
    found, real = (realism.Seen(realism.Statistics.of(x), np.asarray(x)) for x in means)
    expected = realism.compare(realism.Networks(None, None), found, real)["FID"]["value"]
    assert scored[-1]["fid"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "message, changes",
    {
        "has no score of its own": {"data__source": "folder", "data__path": "x"},
        "has no pictures": {
            "data__source": "latents",
            "data__path": "x",
            "evaluation__inception": "x",
        },
        "evaluation.num_images = 5 must be at least 6": {"evaluation__num_images": 5},
    }.items(),
)
def test_what_cannot_be_scored_is_refused_at_the_start(message, changes):
    config = tiny.config(**SCORED).copy_and_resolve_references().unlock()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    with pytest.raises(ConfigError, match=message):
        configs.validate(config)
