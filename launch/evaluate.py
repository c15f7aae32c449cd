"""Scores a checkpoint: python launch/evaluate.py --benchmark=scenes --checkpoint=runs/scenes.

Draws the benchmark's held-out prompts, checks every image, prints a table and writes it as JSON.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from t2i_jax import cli

BENCHMARK = flags.DEFINE_string("benchmark", None, "Default: that of the data it was trained on.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A working directory, or a checkpoint in it.")
OUT = flags.DEFINE_string("out", "report.json", "The report, as JSON.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 300, "Images to score.", lower_bound=6)
SEED = flags.DEFINE_integer("seed", 0, "Of prompts and noise.", lower_bound=0)
WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "params"], "Averaged, or as trained.")
REQUIRE = flags.DEFINE_float(
    "require", None, "Exit with status 1 if the score is below this, or not above its controls."
)
flags.mark_flag_as_required("checkpoint")
cli.define_process_flags()


def main(_):
    import jax

    from t2i_jax.evaluation import benchmarks
    from t2i_jax.pipeline import Pipeline

    out = cli.output(OUT.value, ".json")
    how = [BENCHMARK, CHECKPOINT, NUM_IMAGES, SEED, WEIGHTS]
    cli.start_processes({flag.name: flag.value for flag in how})
    pipeline = Pipeline.load(CHECKPOINT.value, weights=WEIGHTS.value)
    name = BENCHMARK.value or pipeline.config.data.source
    report = benchmarks.run(name, pipeline, NUM_IMAGES.value, SEED.value)
    report = {"checkpoint": CHECKPOINT.value, "weights": WEIGHTS.value, **report}
    if jax.process_index() == 0:
        print(benchmarks.table(report))
        benchmarks.write(out, report)
        print(f"The report is in {OUT.value}")
    if REQUIRE.value is not None:
        if report["score"] < REQUIRE.value:
            sys.exit(f"score {report['score']:.3f} is below the required {REQUIRE.value}")
        for control, value in report.get("controls", {}).items():
            if report["interval"][0] <= value:
                sys.exit(f"score {report['score']:.3f} is not above {control} prompts: {value:.3f}")


if __name__ == "__main__":
    cli.run(main)
