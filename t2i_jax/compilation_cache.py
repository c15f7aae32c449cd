"""Compiled programs kept on disk: a run that is started again need not compile again.

JAX has the cache (its key is the program, the devices, XLA's flags and versions); here it gets a
directory. JAX_COMPILATION_CACHE_DIR in the environment is left to JAX, and with an empty one there
is no cache. It is otherwise on by default, in $XDG_CACHE_HOME or ~/.cache, below t2i_jax/xla, of
this user alone: whoever can write there runs code here.

On CPU what is kept is machine code, so that every kind of CPU has a directory of its own: a home
may be seen by several. On Linux alone: on macOS loading large programs has crashed.

Of several processes of a run the first one writes. A program that was half written, or is being
written, does not decompress: JAX warns, and compiles.
"""

from collections.abc import Mapping
import hashlib
import os
from pathlib import Path
import re
import sys

from absl import logging
import jax

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def enable(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Sets the default directory where one is wanted; returns it.

    Asks for the devices: to be called after several processes have met.
    """
    if VARIABLE in environ or jax.config.jax_compilation_cache_dir:
        return None
    kind = _kind_of_cpu() if jax.default_backend() == "cpu" else "."
    if kind is None:
        return None
    try:
        base = environ.get("XDG_CACHE_HOME") or Path(environ["HOME"]) / ".cache"
        path = Path(base) / "t2i_jax" / "xla" / kind
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{path} cannot be written")
    except (OSError, KeyError) as error:
        logging.warning("Compiled programs are not kept (%s); set %s.", error, VARIABLE)
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    return path


def _kind_of_cpu(info: str = "/proc/cpuinfo") -> str | None:
    """A name for what this CPU can do; None where that is not known."""
    if sys.platform != "linux":
        return None
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", Path(info).read_text(), re.MULTILINE)
    except OSError:
        return None
    if found is None:
        return None
    features = " ".join(sorted(found[1].split()))
    return f"cpu-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
