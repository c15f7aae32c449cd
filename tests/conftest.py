"""Every test runs on eight simulated devices of the CPU; this file is read before jax is."""

from importlib import metadata
import os

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

    parent = tmp_path_factory.mktemp("runs")
    return Training(parent / "undisturbed", parent / "programs", fill=True).finish().workdir
