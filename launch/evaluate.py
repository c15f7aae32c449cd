"""Scores checkpoints: python launch/evaluate.py --benchmark=scenes --checkpoint=runs/scenes.

Draws a benchmark's prompts, going on where a killed run ended, and scores the images, or lays them
out for the official scorer and reads what that found (docs/evaluation.md has a command for each
benchmark). Writes --out as JSON, and beside it a report as HTML, of all --checkpoint together.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from t2i_jax import cli

BENCHMARK = flags.DEFINE_string("benchmark", None, "Default: that of the data it was trained on.")
CHECKPOINT = flags.DEFINE_multi_string("checkpoint", None, "A run, checkpoint, import or export.")
OUT = flags.DEFINE_string("out", "report.json", "The report, as JSON; beside it one as HTML.")
IMAGES = flags.DEFINE_string("images", None, "A folder for the images; default: beside --out.")
NUM_IMAGES = flags.DEFINE_integer("num_images", None, "How many; default: all, or 300.", 1)
SEED = flags.DEFINE_integer("seed", 0, "Of prompts and noise.", 0, 2**32 - 1)
WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "params"], "Averaged, or as trained.")
flags.DEFINE_string("prompts", "", "Your copy of the benchmark's prompts.")
flags.DEFINE_string("reference", "", "FID: a folder of real images, or statistics (.npz).")
flags.DEFINE_string("inception", "", "FID: Inception's weights, .safetensors.")
flags.DEFINE_string("clip", "", "CLIP score: a directory of transformers.")
flags.DEFINE_string("scorer", "", "geneval, dpg: a checkout of the official scorer, to be run.")
flags.DEFINE_string("scorer_python", "python", "The Python that the scorer is installed for.")
flags.DEFINE_string("scorer_args", "", "Further words for the scorer.")
flags.DEFINE_string("results", "", "geneval, dpg: what the scorer wrote, if it was run elsewhere.")
FILES = ("prompts", "reference", "inception", "clip")
FILES += ("scorer", "scorer_python", "scorer_args", "results")
REQUIRE = flags.DEFINE_float(
    "require", None, "Exit with status 1 if the score is below this, or not above its controls."
)
flags.mark_flag_as_required("checkpoint")
cli.define_sampling_flags()
cli.define_process_flags()


def main(_):
    import jax

    from t2i_jax import distributed
    from t2i_jax.evaluation import benchmarks

    out, chosen = cli.output(OUT.value, ".json"), cli.sampling_options()
    how = [BENCHMARK, CHECKPOINT, IMAGES, NUM_IMAGES, SEED, WEIGHTS]
    given = {name: flags.FLAGS[name].value for name in FILES}
    cli.start_processes(chosen | given | {flag.name: flag.value for flag in how})
    reports, samples = [], []
    for report, shown in benchmarks.evaluate(
        BENCHMARK.value,
        CHECKPOINT.value,
        chosen,
        images=IMAGES.value,
        out=out,
        seed=SEED.value,
        weights=WEIGHTS.value,
        least=REQUIRE.value,
        num_images=NUM_IMAGES.value,
        **given,
    ):
        reports.append(report)
        samples.append(shown)
        with distributed.together():
            if jax.process_index() == 0:
                print(benchmarks.table(report))
                benchmarks.write(out, reports, samples)
                print(f"The report is in {out} and {out.with_suffix('.html')}")
    if REQUIRE.value is not None:
        for report in reports:
            benchmarks.require(report, REQUIRE.value)


if __name__ == "__main__":
    cli.run(main)
