"""Scores of a run while it trains: of the averaged weights, where they are.

Nothing is saved or loaded for it: pictures are drawn by the arrays that training holds, and judged
in memory. A model of a built-in world is scored as `launch/evaluate.py` scores it; any other by
FID to held-out pictures, drawn from their captions, and by the CLIP score, where it is told the
networks for them. Of a few hundred pictures FID is far above that of many: it is for comparing
steps of a run, not runs of others.
"""

import functools

from t2i_jax.evaluation import benchmarks, realism
from t2i_jax.evaluation.drawn import Way
from t2i_jax.pipeline import Pipeline
from t2i_jax.training import held_out
from t2i_jax.training.parts import Parts


class Exam:
    """To be called with a pipeline of the weights that are to be scored."""

    def __init__(self, parts: Parts):
        self._parts, self._config = parts, parts.config

    def __call__(self, pipeline: Pipeline) -> dict[str, float]:
        """Numbers for metrics.jsonl; the same pictures are asked for every time."""
        if self._config.data.source in benchmarks.WORLDS:
            return self._world(pipeline)
        return self._held_out(pipeline)

    def _world(self, pipeline: Pipeline) -> dict[str, float]:
        config = self._config
        way, name = Way(pipeline, config.seed, {}, {}), config.data.source
        setting = benchmarks.Setting(way, None, config.evaluation.num_images)
        report, _ = benchmarks.BENCHMARKS[name](setting)
        parts = {f"score/{k}": part["fraction"] for k, part in report["categories"].items()}
        controls = {f"score/control_{k}": x for k, x in report.get("controls", {}).items()}
        return {"score": report["score"], **parts, **controls}

    def _held_out(self, pipeline: Pipeline) -> dict[str, float]:
        captions, real = self._real
        images = pipeline.draw(captions, seed=self._config.seed)
        seen = realism.see(self._networks, list(images), "drawn")
        found = realism.compare(self._networks, seen, real, captions)
        names = {"FID": "fid", "CMMD": "cmmd", "CLIP score": "clip_score"}
        return {names[k]: found[k]["value"] for k in names if k in found}

    @functools.cached_property
    def _networks(self) -> realism.Networks:
        c = self._config.evaluation
        return realism.Networks.load(c.inception, c.clip)

    @functools.cached_property
    def _real(self) -> tuple[list[str], realism.Seen]:
        """Captions of held-out samples, and what the networks see of their pictures."""
        config = self._config
        rows = held_out.rows(self._parts, config.evaluation.num_images)
        pictures = [row.arrays["image"] for row in rows]
        return [row.caption for row in rows], realism.see(self._networks, pictures, "held-out")
