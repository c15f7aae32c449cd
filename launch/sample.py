"""Draws images: python launch/sample.py --checkpoint=runs/scenes --prompt="a red ring".

Without --prompt or --prompts_file it draws the config's own prompts. Writes one captioned grid.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from t2i_jax import cli

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A working directory, or a checkpoint in it.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be given several times.")
PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "A text file, one prompt a line.")
OUT = flags.DEFINE_string("out", "samples.png", "The grid, a PNG.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 1, "Images a prompt.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", None, "Sampling steps; default: the config's.", lower_bound=1)
GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale; default: the config's.")
SEED = flags.DEFINE_integer("seed", 0, "Image i of a seed is the same in any batch.")
WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "params"], "Averaged, or as trained.")
flags.mark_flag_as_required("checkpoint")
cli.define_process_flags()


def main(_):
    from etils import epath
    import jax

    from t2i_jax.errors import MissingError
    from t2i_jax.evaluation import pictures
    from t2i_jax.pipeline import Pipeline
    from t2i_jax.progress import Progress

    out, prompts = cli.output(OUT.value, ".png"), list(PROMPT.value)
    if PROMPTS_FILE.value:
        file = epath.Path(PROMPTS_FILE.value)
        if not file.is_file():
            raise MissingError(f"--prompts_file={PROMPTS_FILE.value}: no such file.")
        lines = file.read_text(encoding="utf-8").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise MissingError(f"--prompts_file={PROMPTS_FILE.value} holds no prompt.")
    how = [CHECKPOINT, NUM_IMAGES, STEPS, GUIDANCE, SEED, WEIGHTS]
    cli.start_processes({"prompts": prompts} | {flag.name: flag.value for flag in how})
    pipeline = Pipeline.load(CHECKPOINT.value, weights=WEIGHTS.value)
    prompts = prompts or list(pipeline.config.sampling.prompts)
    columns = min(8, len(prompts))  # a prompt a column, where they fit
    prompts *= NUM_IMAGES.value
    with Progress(len(prompts), name="drawing", shown=jax.process_index() == 0) as bar:
        images = pipeline.draw(
            prompts,
            steps=STEPS.value,
            guidance=GUIDANCE.value,
            seed=SEED.value,
            progress=bar.update,
        )
    if jax.process_index() == 0:
        with out.open("wb") as file:
            pictures.grid(images, prompts, columns=columns).save(file, "PNG")
        print(f"{len(images)} images in {OUT.value}")


if __name__ == "__main__":
    cli.run(main)
