"""Every test runs on eight simulated devices of the CPU; this file is read before jax is."""

import fcntl
from importlib import metadata
import os
import tempfile

_FLAGS = ["--xla_force_host_platform_device_count=8"]
# Compiling is most of the time here, so the code may be slow: a quarter of the seconds.
_FLAGS += ["--xla_backend_optimization_level=0"]
if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # unknown since
    _FLAGS += ["--xla_cpu_use_fusion_emitters=false"]

os.environ["JAX_PLATFORMS"] = "cpu"
# XLA's thread pool has this many threads, by default one a core. A collective blocks its thread
# until all devices take part: two devices on two threads, with two collectives each, wait for ever.
os.environ["NPROC"] = "16"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])

# What is compiled once, in a test or by a command that it starts, the whole session finds again.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="t2i_jax_programs_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The working directory of a finished run of `tiny.config`, which no test may change."""
    from t2i_jax.training import loop
    from tests import tiny

    workdir = tmp_path_factory.mktemp("trained") / "run"
    loop.train(tiny.config(**tiny.WATCHED), workdir)
    return workdir


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The working directory of a real process that nothing happened to (tests/processes.py).

    The programs that it compiled are beside it.
    """
    from tests.processes import Training

    parent = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        parent = parent.parent  # of all workers: the first to come runs it, another waits
    (parent := parent / "runs").mkdir(exist_ok=True)
    workdir, done = parent / "undisturbed", parent / "done"
    with (parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            Training(workdir, parent / "programs", fill=True).finish()
            done.touch()
    return workdir
