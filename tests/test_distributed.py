"""Whether there are several processes, and which, as the environment and the flags say."""

import os

import jax
from jax._src import cloud_tpu_init
from jax._src.clusters import cloud_tpu_cluster
import pytest

from t2i_jax import distributed
from t2i_jax.distributed import Place
from t2i_jax.errors import ConfigError, UserError
from t2i_jax.rollcall import StartError

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
GKE = {"TPU_WORKER_HOSTNAMES": "localhost,worker-1", "TPU_WORKER_ID": "1"}


@pytest.fixture
def environment(monkeypatch):
    """Sets variables; none of a cluster's is set before."""
    for name in list(os.environ):
        if name.startswith(("JAX_COORD", "JAX_NUM_P", "JAX_PROC", "SLURM", "OMPI", "TPU", "MEGA")):
            monkeypatch.delenv(name)

    def change(values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return change


@pytest.fixture
def tpu_vm(monkeypatch):
    """A machine with TPU chips; a metadata server is asked for nothing."""
    monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    asked = []
    monkeypatch.setattr(distributed, "_answers", lambda: asked.append(1))
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "tpu,cpu")
    yield asked
    jax.config.update("jax_platforms", before)


def find(coordinator=None, count=None, index=None):
    return distributed.find(coordinator, count, index, 5)


def test_a_laptop_is_alone(environment, monkeypatch):
    monkeypatch.setattr(distributed, "_answers", lambda: pytest.fail("asked the network"))
    assert find() is None
    environment({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "TPU_SKIP_MDS_QUERY": "1"})
    assert find() is None
    assert distributed.start({}) is None


def test_flags_and_environment(environment):
    assert find("a:1", 4, 2) == Place("a:1", 4, 2)
    environment({"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "0"})
    assert find() == Place("b:2", 3, 0)
    assert find("a:1", index=2) == Place("a:1", 3, 2)
    assert find(count=1) is None


def test_what_is_given_must_be_whole(environment):
    with pytest.raises(ConfigError, match=r"--num_processes=\.\.\. and --process_id=\.\.\. must"):
        find("a:1")
    with pytest.raises(ConfigError, match=r"--coordinator=\.\.\. must"):
        find(None, 2, 0)
    with pytest.raises(ConfigError, match=r"--process_id=2 of --num_processes=2: .* 0 to 1"):
        find("a:1", 2, 2)
    with pytest.raises(ConfigError, match="HOST:PORT"):
        find("a", 2, 1)
    environment({"JAX_NUM_PROCESSES": "two"})
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES='two'"):
        find()


def test_slurm(environment):
    """A port of the job's own: 4097 % 4096 above 61440; one process a device of the host."""
    environment(SLURM)
    assert find() == Place("node003:61441", 8, 5, [1])
    assert find("a:1") == Place("a:1", 8, 5, [1])
    assert find(count=1) is None
    environment({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    assert find() is None


def test_gpus_that_no_task_of_slurm_uses_are_told_once_a_node(environment):
    one_each, two_each = ["a", "b"], ["a", "a", "b", "b"]
    for names, gpus, telling in ((one_each, "2", [0, 1]), (two_each, "8", [0, 2])):
        environment({"SLURM_GPUS_ON_NODE": gpus})
        hosts = dict(enumerate(names))
        said = [distributed.idle_gpus(Place("a:1", len(hosts), i, [0]), hosts) for i in hosts]
        assert [i for i in hosts if said[i]] == telling
        assert f"--ntasks-per-node={gpus}" in said[0] and f"has {gpus} GPUs" in said[0]
        assert not distributed.idle_gpus(Place("a:1", len(hosts), 0), hosts)  # has all of them
    environment({"SLURM_GPUS_ON_NODE": "2"})
    assert not distributed.idle_gpus(Place("a:1", 4, 0, [0]), dict(enumerate(two_each)))


def test_an_allocation_of_slurm_without_srun_is_one_process(environment):
    environment({name: value for name, value in SLURM.items() if "STEP" not in name})
    assert find() is None


def test_gke(environment, tpu_vm):
    one = {"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}
    environment({**GKE, **one, "MEGASCALE_COORDINATOR_ADDRESS": "localhost"})
    assert find() == Place("localhost:8482", 2, 1)
    slices = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"}
    environment({**slices, "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"})
    assert find() == Place("localhost:8482", 3, 2)
    assert not tpu_vm


@pytest.mark.parametrize(
    "values",
    [
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"TPU_PROCESS_ADDRESSES": "local"},
        {"TPU_SKIP_MDS_QUERY": "1"},
    ],
)
def test_one_tpu_host_is_alone_and_asks_no_network(environment, tpu_vm, values):
    environment(values)
    assert find() is None and not tpu_vm


def test_a_tpu_host_whose_metadata_server_does_not_answer_is_alone(environment, tpu_vm):
    assert find() is None and tpu_vm == [1]


@pytest.mark.parametrize("hosts, place", [(2, Place("localhost:8482", 2, 1)), (1, None)])
def test_cloud_tpu(environment, tpu_vm, monkeypatch, hosts, place):
    answers = {
        "agent-worker-number": str(hosts - 1),
        "worker-network-endpoints": ",".join(["localhost", "worker-1"][:hosts]),
        "tpu-env": "ZONE: 'z'",
    }
    monkeypatch.setattr(distributed, "_answers", lambda: True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (answers[key], 200))
    assert find() == place
    jax.config.update("jax_platforms", "cpu")  # a test on a TPU host
    assert find() is None


def test_a_cluster_that_does_not_say_which_process_this_is(environment):
    environment({**SLURM, "SLURM_PROCID": "?"})
    with pytest.raises(StartError, match=r"process of several \(slurm\).*--num_processes=1"):
        find()


def test_other_numbers_of_devices():
    hosts = {0: "a", 1: "b", 2: "c"}
    distributed.check_devices([0, 0, 1, 1, 2, 2], hosts)
    with pytest.raises(ConfigError, match=r"process 1 \(b\) has 3, the others 2 each"):
        distributed.check_devices([0, 0, 1, 1, 1, 2, 2], hosts)


def test_a_directory_that_is_not_shared(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    distributed.check_shared(file, "{}")  # alone, nobody else needs to see it
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "_SEEN", 1)
    with pytest.raises(UserError, match=f"--workdir={tmp_path} is not the directory"):
        distributed.check_shared(file, "{}")
    file.write_text("{}")
    distributed.check_shared(file, "{}")
