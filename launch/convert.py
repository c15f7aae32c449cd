"""Models to and from PyTorch.

python launch/convert.py import --source=DIR --out=DIR
    A published pipeline, an export, or the directory of a language model, a VAE or a CLIP text
    encoder -> our weights, which sampling, training and `export` take. DIR may be the name of a
    repository of the Hugging Face Hub.
python launch/convert.py export --checkpoint=DIR --out=DIR --format=diffusers
    A checkpoint of a run, or what `import` made -> a directory for others.
python launch/convert.py inspect DIR
    What a directory is.
python launch/convert.py check A B
    Whether two directories are the same model; the status is 1 where they are not.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from t2i_jax import cli

SOURCE = flags.DEFINE_string("source", None, "import: a directory, or OWNER/NAME on the Hub.")
OUT = flags.DEFINE_string("out", None, "import, export: the directory to make.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "export: a run, or a checkpoint in it.")
WEIGHTS = flags.DEFINE_enum(
    "weights", "ema", ["ema", "raw"], "Of a checkpoint: the averaged, or those as trained."
)
FORMAT = flags.DEFINE_enum(
    "format",
    "diffusers",
    ["reference", "diffusers", "safetensors"],
    "export: the published layout, a pipeline for current diffusers, or our own names.",
)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the written weights.")
TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "A directory with tokenizer.json, where the source has none."
)
IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", None, "import: pixels a side that a published model was trained at; default 512."
)
_SHOWN = 20  # differences that `check` prints


def main(argv):
    from t2i_jax import convert

    command, *paths = argv[1:] or [""]
    wanted = {"import": [], "export": [], "inspect": ["DIR"], "check": ["A", "B"]}
    cli.check_command(command, paths, wanted)
    averaged = WEIGHTS.value == "ema"
    if command == "import":
        cli.require(source=SOURCE.value, out=OUT.value)
        model = convert.open_source(SOURCE.value, TOKENIZER.value, image_size=IMAGE_SIZE.value)
        out = convert.write(model, OUT.value, "safetensors", DTYPE.value)
        print(f"{convert.describe(model)}\nimported to {out}")
    elif command == "export":
        cli.require(checkpoint=CHECKPOINT.value, out=OUT.value)
        model = convert.open_source(CHECKPOINT.value, TOKENIZER.value, averaged=averaged)
        out = convert.write(model, OUT.value, FORMAT.value, DTYPE.value)
        print(f"{convert.describe(model)}\nexported to {out} ({FORMAT.value}, {DTYPE.value})")
    elif command == "inspect":
        print(convert.describe(convert.open_model(*paths, averaged=averaged)))
    else:
        found = convert.compare(*paths, averaged=averaged)
        more = [f"... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        print("\n".join([*found[:_SHOWN], *more]) or "The same model, tensor by tensor.")
        sys.exit(bool(found))


if __name__ == "__main__":
    cli.run(main, commands=True)
