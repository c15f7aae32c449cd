"""The Inception-v3 of FID from a file of its published weights, as safetensors.

They are published as a pickle (pt_inception-2015-12-05-6726825d.pth, of pytorch-fid and
torch-fidelity), which is not opened here: who has it converts it, once, by what the error says.
"""

import os
import shlex
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp

from t2i_jax.interop.directory import shapes_of
from t2i_jax.interop.mapping import Rule, materialise, sources
from t2i_jax.interop.safetensors import open_tensors
from t2i_jax.models.inception import SIZE, Inception

PUBLISHED = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
_CONVERSION = (
    "import sys, torch; from safetensors.torch import save_file; "
    "weights = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
    "save_file({k: v.contiguous() for k, v in weights.items()}, sys.argv[2])"
)
_PARTS = {  # of a convolution: their name, and the axes
    "weight": ("conv.weight", "O I H W -> H W I O"),
    "norm_weight": ("bn.weight", "C -> C"),
    "norm_bias": ("bn.bias", "C -> C"),
    "norm_mean": ("bn.running_mean", "C -> C"),
    "norm_variance": ("bn.running_var", "C -> C"),
}


def load_inception(path: epath.PathLike, shardings: Any = None) -> tuple[Inception, dict[str, Any]]:
    """The network and unboxed parameters, float32, of a safetensors file.

    Args:
      path: the file, with the published names; the classifier (fc, AuxLogits) and counts of batches
        in it are not read.
      shardings: a tree like the parameters of where each goes, or one for all; default: the first
        device.

    Raises FileNotFoundError where there is none, and ValueError for another format, and where
    tensors are missing, not known or of another shape.
    """
    file = epath.Path(path).expanduser()
    if file.suffix != ".safetensors":
        raise ValueError(
            f"{os.fspath(file)} is no .safetensors file. Pickles can run code and are never "
            f"opened here; convert it where PyTorch is installed:\n    {convert_command(file)}"
        )
    if not file.exists():
        raise FileNotFoundError(
            f"No Inception weights at {os.fspath(file)}. Fetch and convert them:\n"
            f"    curl -LO {PUBLISHED}\n"
            f"    {convert_command(epath.Path(PUBLISHED.rpartition('/')[2]), file)}"
        )
    net, tensors = Inception(), open_tensors([file])
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.uint8)
    shapes = shapes_of(net.init, image)
    unused = {
        name
        for name in tensors
        if name.startswith(("fc.", "AuxLogits.")) or name.endswith(".num_batches_tracked")
    }
    found = sources(os.fspath(file), tensors, shapes, map(_rule, shapes), unused=unused)
    return net, materialise(found, shardings, jnp.float32)


def convert_command(pickle: epath.Path, file: epath.Path | None = None) -> str:
    """What to type to make a safetensors file (default: beside it) of the published pickle."""
    file = pickle.with_suffix(".safetensors") if file is None else file
    paths = " ".join(shlex.quote(os.fspath(path)) for path in (pickle, file))
    return f'python -c "{_CONVERSION}" {paths}'


def _rule(ours: str) -> Rule:
    module, _, part = ours.rpartition("/")
    name, layout = _PARTS[part]
    return Rule(ours, f"{module.replace('/', '.')}.{name}", layout)
