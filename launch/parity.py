"""Recomputes recordings of the published system: python launch/parity.py --goldens=tests/goldens.

Every DIR/*.npz is a model's weights, inputs, and what the published PyTorch code made of them in
float32. Prints how far each quantity is from ours; the status is 1 where one is over its tolerance.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from t2i_jax import cli

GOLDENS = flags.DEFINE_string("goldens", None, "A directory of .npz files, or one of them.")
CACHE = flags.DEFINE_bool(
    "published_cache", False, "Show how far the published sampling cache is from no cache instead."
)
flags.mark_flag_as_required("goldens")


def main(_):
    from etils import epath

    from t2i_jax import parity
    from t2i_jax.errors import UserError

    where = epath.Path(GOLDENS.value)
    files = [where] if where.is_file() else sorted(where.glob("*.npz"))
    if not files:
        raise UserError(f"There is no .npz file in {GOLDENS.value} (--goldens).")
    if CACHE.value:
        for file in files:
            print(f"{file.stem:<18} samples {parity.published_cache(file):.1e}", flush=True)
        return
    failed = []
    for file in files:
        try:
            report = parity.check(file)
        except ValueError as error:
            print(f"{file.stem:<18} cannot be read: {error}", flush=True)
            failed.append(file.stem)
            continue
        print(parity.row(file.stem, report), flush=True)
        if not all(error.good for error in report):
            failed.append(file.stem)
    if failed:
        sys.exit(f"Over tolerance, or not read: {', '.join(failed)}")
    print(f"All {len(files)} are within tolerance.")


if __name__ == "__main__":
    cli.run(main)
