"""Converts the largest published model, with random weights, and measures what that takes.

    python tests/full_size.py --dir=DIR

Makes a checkpoint of configs/fusion_2b_gemma2.py (2.0 billion trained parameters) with a language
model of Gemma 2's size (2.6 billion) and SD3's VAE in their publishers' formats, exports, imports
and compares it with launch/convert.py, and prints for each command the time, the bytes written and
the most memory that was resident, above that of an interpreter that has imported the same modules.
Needs about 45 GB of disk and, to make the checkpoint, 20 GB of memory. Run again, it takes what is
there.
"""

import dataclasses
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import time
import zlib

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402
from etils import epath  # noqa: E402
from flax.traverse_util import unflatten_dict  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

DIR = flags.DEFINE_string("dir", None, "Where everything is made.", required=True)
CONFIG = "configs/fusion_2b_gemma2.py"
STEP = 1000


@dataclasses.dataclass(frozen=True)
class Random:
    """A parameter of random numbers, made when they are asked for."""

    path: str
    shape: tuple[int, ...]
    dtype = np.dtype(np.float32)

    def read(self, layer=None):
        shape = self.shape if layer is None else self.shape[1:]
        seed = (zlib.crc32(self.path.encode()), 0 if layer is None else layer)
        x = np.random.default_rng(seed).standard_normal(shape, np.float32)
        return np.multiply(x, np.float32(0.02), out=x)


def prepare(folder: epath.Path) -> None:
    """The run with its checkpoint, and the frozen parts that its config names."""
    from t2i_jax import checkpoint
    from t2i_jax import config as configs
    from t2i_jax.interop import autoencoder, llm, mapping
    from t2i_jax.interop.stored import Files, Weights, expected_shapes, write
    from t2i_jax.models.autoencoder import AutoencoderKL
    from t2i_jax.training.state import TrainState
    from tests import toys

    config = configs.load(str(ROOT / CONFIG)).unlock()
    parts = {name: folder / name for name in ("llm", "autoencoder", "tokenizer")}
    config.weights.update({name: str(path) for name, path in parts.items()})
    net = AutoencoderKL()
    shapes = expected_shapes(config, net, ("dit", "autoencoder"))
    found = {path: Random(path, shape) for path, shape in shapes.items()}

    def of(part):
        return {p.removeprefix(f"{part}/"): s for p, s in found.items() if p.startswith(f"{part}/")}

    def publish(part, stem, theirs, rules):
        weights = Weights("", stem, mapping.entries(of(part), rules))
        write(Files([weights], {"config.json": json.dumps(theirs)}), parts[part], "bfloat16")

    theirs = llm.config_json(config.llm)
    rules = [rule._replace(theirs=f"model.{rule.theirs}") for rule in llm.rules(theirs)]
    publish("llm", "model", theirs, rules)
    kept = {path: source.shape for path, source in of("autoencoder").items()}
    theirs = autoencoder.config_json(net, config.autoencoder)
    publish("autoencoder", "diffusion_pytorch_model", theirs, autoencoder.rules(kept))
    toys.write_tokenizer(parts["tokenizer"])

    trained = [path for path in shapes if path.split("/")[0] in ("dit", "memory")]
    ema = unflatten_dict({path: jnp.asarray(found[path].read()) for path in trained}, sep="/")
    dummy = {"none": jnp.zeros(1)}  # half of the disk is enough
    with checkpoint.Checkpoints(folder / "run", keep=1) as saved:
        saved.save(STEP, TrainState(jnp.int32(STEP), dummy, ema, dummy), config.lock())


def measured(*arguments: str) -> tuple[float, float]:
    """(Seconds, gigabytes of most resident memory) of a command of its own."""
    start = time.monotonic()
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(arguments)} failed.")
    return time.monotonic() - start, usage.ru_maxrss * 1024 / 1e9


def main(_):
    folder = epath.Path(DIR.value).absolute()
    if not (folder / "run" / "checkpoints" / str(STEP)).exists():
        folder.mkdir(parents=True, exist_ok=True)
        code = (
            f"from tests import full_size; full_size.prepare(full_size.epath.Path({str(folder)!r}))"
        )
        measured("-c", code)
    _, baseline = measured("-c", "import t2i_jax.convert, jax; jax.devices()")
    print(f"an interpreter with the same imports: {baseline:.2f} GB")

    def convert(name, *arguments, out=None):
        if out is not None:
            shutil.rmtree(folder / out, ignore_errors=True)
        seconds, most = measured("launch/convert.py", *arguments)
        size = (
            sum(f.stat().st_size for f in Path(folder / out).rglob("*.safetensors")) if out else 0
        )
        rate = f", {size / 1e9:.1f} GB at {size / 1e6 / seconds:.0f} MB/s" if out else ""
        print(f"{name:<28} {seconds:5.0f} s, {most - baseline:.2f} GB above it{rate}", flush=True)

    def export(layout):
        arguments = (f"--checkpoint={folder}/run", f"--out={folder}/{layout}", f"--format={layout}")
        convert(f"export {layout}", "export", *arguments, "--dtype=bfloat16", out=layout)

    export("reference")
    export("diffusers")
    arguments = (f"--source={folder}/reference", f"--out={folder}/imported", "--dtype=bfloat16")
    convert("import of the former", "import", *arguments, out="imported")
    convert("check of the two", "check", f"{folder}/diffusers", f"{folder}/imported")


if __name__ == "__main__":
    app.run(main)
