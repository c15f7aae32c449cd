"""Several processes, one run: who they are, whether all are there, and what they do together.

`start` comes before anything that touches a device. Where nothing says that there are several
processes it does nothing: it asks no network, and waits for nobody. They are, first rule first:

    given      --num_processes=1: this process alone, whatever the environment says
               --coordinator, --num_processes and --process_id, or the environment's
               JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
    Slurm      SLURM_NTASKS is more than 1, in a step that srun started
    Open MPI   OMPI_COMM_WORLD_SIZE is more than 1
    GKE        TPU chips, and TPU_WORKER_HOSTNAMES or TPU_PROCESS_ADDRESSES of several hosts, or
               MEGASCALE_NUM_SLICES of several slices: a JobSet sets them
    Cloud TPU  TPU chips, no TPU_SKIP_MDS_QUERY, and a metadata server that answers at once

The last four only decide which of JAX's own detectors is asked for the address, the number of
processes and that of this one (`jax._src.clusters`: the one use of a private interface here; what
JAX offers in public starts at once, without a preflight). On one TPU host, in Colab for instance,
the answer is one process, and nothing is started either.

The preflight is in rollcall.py. Collectives between processes are gloo's on CPU, JAX's default.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import socket
import sys
import time
from typing import Any, NamedTuple

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

import t2i_jax
from t2i_jax import rollcall
from t2i_jax.errors import ConfigError, UserError

_METADATA = "metadata.google.internal"
_METADATA_LIMIT = 2.0  # seconds; it is on the same machine
_START = 100  # seconds that JAX's own start has, once all have answered
_END = 60  # seconds that a process that has ended, or failed, waits for the others' end
_SEEN = 60  # seconds until a network file system shows a new file on every host
_TEXT = 8192  # bytes of a problem that the others hear of


class Place(NamedTuple):
    """Where a process stands among the others."""

    coordinator: str  # HOST:PORT
    count: int
    index: int
    devices: list[int] | None = None  # of the host, that are this process's; None: all


def start(
    same: Mapping[str, Any],
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = 300.0,
) -> None:
    """Starts JAX's distributed system where there are several processes.

    `same` is what must be equal on all of them; versions are added. Returns when all are there,
    alike, with as many devices each; raises UserError, on every one of them, that names those that
    are missing or differ, within `timeout` seconds (of those that are there).
    """
    place = find(coordinator, num_processes, process_id, timeout)
    if place is None:
        return
    hosts = rollcall.meet(
        place.coordinator,
        place.index,
        place.count,
        {**_versions(), **same},
        timeout,
        os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", ""),
    )
    # JAX's own notice of SIGTERM would take the place of whatever handles it here.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.coordinator,
        place.count,
        place.index,
        place.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=_START,
        shutdown_timeout_seconds=_END,
    )
    check_devices([device.process_index for device in jax.devices()], hosts)
    if jax.default_backend() == "gpu" and (idle := idle_gpus(place, hosts)):
        print(f"WARNING: {idle}", file=sys.stderr, flush=True)


def find(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: float
) -> Place | None:
    """This process among several, or None where it is alone.

    Raises ConfigError where what is given is not enough, StartError where the environment says that
    there are several processes, and then not which.
    """
    given: list[Any] = [
        coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None,
        _number(num_processes, "JAX_NUM_PROCESSES"),
        _number(process_id, "JAX_PROCESS_ID"),
    ]
    if given[1] == 1:
        return None
    cluster = _cluster()
    if cluster is None and given == [None] * 3:
        return None
    found = [*given, None]
    if cluster is not None:
        found = _detected(cluster, given, timeout)
        if found[1] == 1:
            return None
    names = "--coordinator", "--num_processes", "--process_id"
    absent = [f"{name}=..." for name, value in zip(names, found, strict=False) if value is None]
    if absent:
        raise ConfigError(
            f"{' and '.join(absent)} must be given, too: nothing in the environment says it."
        )
    place = Place(*found)
    rollcall.split(place.coordinator)
    if not 0 <= place.index < place.count:
        raise ConfigError(
            f"--process_id={place.index} of --num_processes={place.count}: they are numbered from "
            f"0 to {place.count - 1}."
        )
    return place


def _number(given: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if given is not None or not text:
        return given
    if not text.isdigit():
        raise ConfigError(f"{variable}={text!r} in the environment is not a number.")
    return int(text)


def _cluster() -> str | None:
    """JAX's name of the cluster whose environment this is, if it is one of several processes."""
    from jax._src import cloud_tpu_init

    env = os.environ
    if env.get("SLURM_NTASKS", "1") != "1" and "SLURM_STEP_NODELIST" in env:
        return "slurm"
    if env.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        return "ompi"
    platforms = jax.config.jax_platforms
    if not cloud_tpu_init.running_in_cloud_tpu_vm or "tpu" not in (platforms or "tpu"):
        return None
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or ""
    slices = env.get("MEGASCALE_NUM_SLICES") or "1"
    if "TPU_PROCESS_ADDRESSES_PATH" in env or "," in hosts or (hosts and slices != "1"):
        return "gketpu"
    if hosts or "TPU_SKIP_MDS_QUERY" in env or not _answers():
        return None
    return "gcetpu"


def _answers() -> bool:
    """Whether there is a metadata server: a machine of one's own with TPU chips has none."""
    address = os.environ.get("GCE_METADATA_IP", _METADATA), 80
    try:
        socket.create_connection(address, _METADATA_LIMIT).close()
    except OSError:
        return False
    return True


def _detected(cluster: str, given: list[Any], timeout: float) -> list[Any]:
    """[coordinator, count, index, devices] as of `Place`: what is given, and JAX's for the rest."""
    from jax._src import clusters

    try:
        return list(
            clusters.ClusterEnv.auto_detect_unset_distributed_params(
                *given, None, cluster, int(timeout)
            )
        )
    except (RuntimeError, OSError, ImportError, LookupError, ValueError) as error:
        raise rollcall.StartError(
            f"This is a process of several ({cluster}), and which was not found out: {error}. Give "
            "--coordinator=HOST:PORT, --num_processes=N and --process_id=I, or --num_processes=1 "
            "to run this one alone."
        ) from error


def _versions() -> dict[str, str]:
    """What decides how a step is computed; our own code by its bytes, which no number follows."""
    root, code = pathlib.Path(t2i_jax.__file__).parent, hashlib.blake2b(digest_size=6)
    for file in sorted(root.rglob("*.py")):
        code.update(f"{file.relative_to(root).as_posix()}\n".encode() + file.read_bytes())
    names = "jax", "jaxlib", "flax", "optax"
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"version of t2i_jax": f"{t2i_jax.__version__}, code {code.hexdigest()}"} | {
        f"version of {name}": version for name, version in versions.items()
    }


def check_devices(process_of_device: list[int], hosts: Mapping[int, str]) -> None:
    """Raises ConfigError that names the processes with another number of devices than most."""
    counts = Counter(process_of_device)
    usual = Counter(counts.values()).most_common(1)[0][0]
    odd = [f"{i} ({hosts[i]}) has {counts[i]}" for i in sorted(hosts) if counts[i] != usual]
    if odd:
        raise ConfigError(
            f"Every process must have as many devices: process {', '.join(odd)}, the others "
            f"{usual} each."
        )


def idle_gpus(place: Place, hosts: Mapping[int, str]) -> str:
    """What to say of a node of Slurm that has GPUs which none of its tasks uses; '' if none has.

    JAX gives each task the one GPU of its number on the node. The first task of a node tells.
    """
    tasks = [i for i, host in sorted(hosts.items()) if host == hosts[place.index]]
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if place.devices is None or tasks[0] != place.index or not gpus.isdigit():
        return ""
    used = len(tasks) * len(place.devices)
    return (
        f"{hosts[place.index]} has {gpus} GPUs, of which {used} are used: under Slurm every task "
        f"has one. Start {gpus} tasks on it: --ntasks-per-node={gpus}."
        if used < int(gpus)
        else ""
    )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What fails on one process fails on all, instead of leaving the others waiting.

    An error that is raised inside is raised by the process itself, and, as a UserError that names
    it, by all others. All of them must come here. Of one process this does nothing.
    """
    if jax.process_count() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as problem:
        error = problem
    text = "" if error is None else f"({socket.gethostname()}): {error or type(error).__name__}"
    row = np.zeros(_TEXT, np.uint8)
    row[: len(text.encode())] = np.frombuffer(text.encode()[:_TEXT], np.uint8)
    rows = multihost_utils.process_allgather(row).reshape(-1, _TEXT)
    if error is not None:
        raise error
    texts = [bytes(r).rstrip(b"\0").decode(errors="replace") for r in rows]
    problems = [f"process {i} {text}" for i, text in enumerate(texts) if text]
    if problems:
        raise UserError("Stopped, as others cannot go on:\n" + "\n".join(problems))


def check_shared(file: epath.Path, text: str) -> None:
    """Raises UserError where this process does not see `file`, which process 0 has written.

    On disks of their own, hosts would find each other's part of a checkpoint missing when they need
    it.
    """
    if jax.process_count() == 1:
        return
    for _ in range(_SEEN):
        if file.exists() and file.read_text() == text:
            return
        time.sleep(1)
    raise UserError(
        f"--workdir={file.parent} is not the directory that process 0 writes to. All processes "
        "must see one: on a network file system, or gs://..."
    )
