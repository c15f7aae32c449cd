"""Compiled programs kept on disk: a run that is started again need not compile again.

JAX has the cache (its key is the program, the devices, XLA's flags and versions); here it gets a
directory. JAX_COMPILATION_CACHE_DIR in the environment is left to JAX, and with an empty one there
is no cache. On TPU and GPU it is otherwise on by default, in $XDG_CACHE_HOME or ~/.cache, below
t2i_jax/xla, of this user alone: whoever can write there runs code here.

Not on CPU, where XLA loads machine code that it made earlier: on some CPUs it takes its own code
for that of another machine, says so for every program and compiles again, and on macOS loading has
crashed. Where it works it is worth setting the variable (docs/performance.md).

Of several processes of a run the first one writes. A program that was half written, or is being
written, does not decompress: JAX warns, and compiles.
"""

from collections.abc import Mapping
import os
from pathlib import Path

from absl import logging
import jax

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def enable(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Sets the default directory where one is wanted; returns it.

    Asks for the devices: to be called after several processes have met.
    """
    if (
        VARIABLE in environ
        or jax.config.jax_compilation_cache_dir
        or jax.default_backend() == "cpu"
    ):
        return None
    try:
        base = environ.get("XDG_CACHE_HOME") or Path(environ["HOME"]) / ".cache"
        path = Path(base) / "t2i_jax" / "xla"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{path} cannot be written")
    except (OSError, KeyError) as error:
        logging.warning("Compiled programs are not kept (%s); set %s.", error, VARIABLE)
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    return path
