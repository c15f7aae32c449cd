"""launch/gke/: the manifest, for one slice and for several."""

import pathlib

import pytest
import yaml

from tests.cloud import Cloud

GKE = pathlib.Path(__file__).resolve().parent.parent / "launch" / "gke"
FLAGS = ("--name=big", "--type=v6e", "--topology=16x16", "--image=us-docker.pkg.dev/p/r/t2i:1.0")
TRAIN = ("--config=configs/fusion_2b.py", "--workdir=gs://b/run")
ODD = '--config.data.path=gs://b/it\'s "a" \\ @NAME@ & $HOME: # *.tar'


def manifest(tmp_path, *flags):
    done = Cloud(tmp_path, clouds=()).run(GKE / "jobset.sh", *FLAGS, *TRAIN, *flags, "--dry_run")
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def pod(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_slices_are_jobs_and_machines_are_pods(tmp_path):
    more = (ODD, "--config.mesh.data=4", "--config.mesh.fsdp=-1")
    jobset = manifest(tmp_path, "--slices=2", *more)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "big"
    assert jobset["spec"]["network"]["enableDNSHostnames"] is True
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert slices["replicas"] == 2
    assert job["parallelism"] == job["completions"] == 256 // 4 and job["backoffLimit"] == 0
    assert pod(jobset)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    (container,) = pod(jobset)["containers"]
    assert container["image"] == "us-docker.pkg.dev/p/r/t2i:1.0"
    assert container["args"] == [*TRAIN, *more]
    resources = container["resources"]
    assert resources["limits"] == resources["requests"] == {"google.com/tpu": 4}


def test_saved_and_preempted_is_a_restart_and_not_a_failure(tmp_path):
    jobset = manifest(tmp_path, "--slices=2", "--retries=5", "--grace=120")
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 5
    assert policy["rules"] == [
        {
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": ["PodFailurePolicy"],
        }
    ]
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    saved, gone = job["podFailurePolicy"]["rules"]
    assert saved["action"] == gone["action"] == "FailJob"
    (container,) = pod(jobset)["containers"]
    assert saved["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [75],
    }
    assert [c["type"] for c in gone["onPodConditions"]] == ["DisruptionTarget"]
    assert pod(jobset)["restartPolicy"] == "Never"
    assert pod(jobset)["terminationGracePeriodSeconds"] == 120


SHAPES = {
    ("v4", "4x4x8"): ("tpu-v4-podslice", 32, 4),
    ("v5p", "2x2x1"): ("tpu-v5p-slice", 1, 4),
    ("v5e", "1x1"): ("tpu-v5-lite-podslice", 1, 1),
    ("v5e", "16x16"): ("tpu-v5-lite-podslice", 64, 4),
    ("tpu7x", "4x4x4"): ("tpu7x", 16, 4),
}


@pytest.mark.parametrize(("kind", "topology"), SHAPES)
def test_each_type_has_its_nodes(tmp_path, kind, topology):
    more = (f"--type={kind}", f"--topology={topology}", "--slices=1", "--spot")
    jobset = manifest(tmp_path, *more)
    selector, (container,) = pod(jobset)["nodeSelector"], pod(jobset)["containers"]
    label = selector["cloud.google.com/gke-tpu-accelerator"]
    nodes = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"]
    assert (label, nodes, container["resources"]["limits"]["google.com/tpu"]) == SHAPES[
        kind, topology
    ]
    assert selector["cloud.google.com/gke-spot"] == "true"


def test_what_is_applied_is_what_a_dry_run_prints(tmp_path):
    cloud = Cloud(tmp_path)
    flags = (*FLAGS, *TRAIN, "--slices=2", "--namespace=team", ODD)
    printed = cloud.run(GKE / "jobset.sh", *flags, "--dry_run").stdout
    assert cloud.calls() == []
    assert cloud.run(GKE / "jobset.sh", *flags).returncode == 0
    (call,) = cloud.calls()
    assert call[:2] == ["kubectl", "apply"]
    applied = (tmp_path / "applied.yaml").read_text()
    assert applied.rstrip() == printed.rstrip()
    assert yaml.safe_load(applied)["metadata"]["namespace"] == "team"


BAD = {
    "--slices=0": "at least one",
    "--slices=2 --name=Big": "--name=Big",
    "--slices=2 --type=v5p": "3 axes, as in 2x2x4",
    "--slices=2 --topology=16": "2 axes, as in 4x4",
    "--slices=2 --chips_per_node=5": "does not divide the 256 chips",
    "--slices=2 --config.mesh.data=1": "--config.mesh.data=1 is no multiple of --slices=2",
    "--slices=4 --config.mesh.data=6": "--config.mesh.data=6 is no multiple of --slices=4",
    "--slices=2 --type=h100": "is none of v4, v5e, v5p, v6e, tpu7x",
    "--slices=2 --workdir=/data": "gs://BUCKET/DIR",
    "": "--slices=... is required",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags_get_one_line(tmp_path, flags):
    cloud = Cloud(tmp_path, clouds=())
    done = cloud.run(GKE / "jobset.sh", *FLAGS, *TRAIN, *flags.split(), "--dry_run")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and BAD[flags] in done.stderr


def test_the_image_starts_training_with_what_the_repository_pins():
    lines = (GKE / "Dockerfile").read_text().splitlines()
    assert 'ENTRYPOINT ["python", "launch/train.py"]' in lines
    installs = [line for line in lines if "pip install" in line]
    assert installs[0].endswith("-r requirements.txt")
    assert "'.[tpu,gcs]' -c requirements.txt" in installs[1]
