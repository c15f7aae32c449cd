"""Draws images: python launch/sample.py --checkpoint=runs/scenes --prompt="a red ring".

Prompts come from --prompt, from --prompts_file (one a line; '-' reads standard input), or else are
the config's own. Writes one captioned grid and, with --files=DIR, single images. All of them hold
the prompt, seed, config and step that made them; DIR/images.jsonl has the same.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from t2i_jax import cli

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A run, a checkpoint, an import or export.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be given several times.")
PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "A text file, one prompt a line; '-'.")
NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", "", "What guidance leads away from.")
OUT = flags.DEFINE_string("out", "samples.png", "The grid, a PNG.")
FILES = flags.DEFINE_string("files", None, "A folder for single images and images.jsonl.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 1, "Images a prompt.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Image i of a seed is the same in any batch.", 0, 2**32 - 1)
WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "params"], "Averaged, or as trained.")
IMAGE = flags.DEFINE_string("image", None, "A picture to start from, instead of noise alone.")
STRENGTH = flags.DEFINE_float("strength", None, "With --image: the share of steps; 0.8.", 0, 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Images at once; rounding may change.", 1)
cli.define_sampling_flags()
flags.mark_flag_as_required("checkpoint")
cli.define_process_flags()


def main(_):
    from etils import epath
    import jax

    from t2i_jax import distributed, options
    from t2i_jax.evaluation import gallery, pictures
    from t2i_jax.pipeline import Pipeline
    from t2i_jax.progress import Progress

    out, prompts = cli.output(OUT.value, ".png"), list(PROMPT.value)
    if PROMPTS_FILE.value:
        prompts += gallery.read_prompts(PROMPTS_FILE.value)
    chosen, how = cli.sampling_options(), [CHECKPOINT, NUM_IMAGES, SEED, WEIGHTS, NEGATIVE_PROMPT]
    how += [IMAGE, STRENGTH, BATCH_SIZE]
    cli.start_processes({"prompts": prompts} | chosen | {flag.name: flag.value for flag in how})
    start = {} if IMAGE.value is None else {"image": pictures.read(IMAGE.value)}
    if STRENGTH.value is not None or start:
        start["strength"] = 0.8 if STRENGTH.value is None else STRENGTH.value
    pipeline = Pipeline.load(CHECKPOINT.value, weights=WEIGHTS.value)
    how = {k: v for k, v in start.items() if k == "strength"}
    resolved = options.resolve(pipeline.config, **chosen, **how)
    prompts = prompts or list(pipeline.config.sampling.prompts)
    prompts = [prompt for prompt in prompts for _ in range(NUM_IMAGES.value)]
    with Progress(len(prompts), name="drawing", shown=jax.process_index() == 0) as bar:
        images = pipeline.draw(
            prompts,
            negative_prompt=NEGATIVE_PROMPT.value,
            seed=SEED.value,
            batch_size=BATCH_SIZE.value,
            progress=bar.update,
            **chosen,
            **start,
        )
    flags_told = (CHECKPOINT, WEIGHTS, SEED, NEGATIVE_PROMPT, IMAGE)
    told = {flag.name: flag.value for flag in flags_told} | gallery.how_drawn(pipeline, resolved)
    with distributed.together():
        if jax.process_index() == 0:
            gallery.save_grid(out, images, prompts, NUM_IMAGES.value, told, pipeline)
            if FILES.value:
                gallery.save_files(epath.Path(FILES.value), images, prompts, told, pipeline)
            print(f"{len(images)} images in {' and '.join(filter(None, (OUT.value, FILES.value)))}")


if __name__ == "__main__":
    cli.run(main)
