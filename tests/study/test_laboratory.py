"""A whole suite, in real processes: killed and started again, it finds the same."""

import json
from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest

from t2i_jax.study import report, results
from t2i_jax.study import suite as suites

ROOT = Path(__file__).resolve().parents[2]
SUITE = Path(__file__).with_name("tiny_suite.py")
LIMIT = 600  # seconds, on a busy machine


def start(workdir, *flags):
    """The command, in another folder than the checkout, the directory relative to that."""
    words = [f"--suite={SUITE}", f"--workdir={workdir.name}", "--seeds=0,1", *flags]
    log = workdir.with_suffix(".log").open("a")
    command = [sys.executable, str(ROOT / "launch/study.py"), *words]
    return subprocess.Popen(command, cwd=workdir.parent, stdout=log, stderr=subprocess.STDOUT)


def read(workdir):
    return workdir.with_suffix(".log").read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The working directory of a suite that nothing happened to, speeds included."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "suite"
    assert start(workdir, "--speed_rounds=1").wait(LIMIT) == 0, read(workdir)
    return workdir


def runs(workdir):
    found = results.read(workdir / results.NAME)
    return {(e["row"], e["seed"]): e for e in found if e["kind"] == "run"}


def test_everything_is_found(undisturbed):
    entries = results.read(undisturbed / results.NAME)
    kinds = [entry["kind"] for entry in entries]
    assert kinds == ["suite"] + ["row"] * 3 + ["run"] * 6 + ["speed"] * 3 + ["machine"]
    for entry in entries:
        if entry["kind"] == "run":
            assert [step for step, _ in entry["curves"]["score"]] == [3, 6]
            assert [step for step, _ in entry["curves"]["validation_loss"]] == [3, 6]
            assert entry["curves"]["validation_loss"][-1][1] == entry["validation_loss"]
            assert len(entry["categories"]) == 6
        if entry["kind"] == "speed":
            assert all(entry[way]["median"] > 0 for way in ("train", "sample", "recompute"))
    first = next(entry for entry in entries if entry["kind"] == "speed")
    assert first["train"]["ratio"] == first["sample"]["ratio"] == 1
    text = (undisturbed / "study.md").read_text()
    for heading in ("Controls", "What was seen", "Claims", "Figures", "Speed", "Held-out loss"):
        assert f"## {heading}" in text
    assert (undisturbed / "study" / report.SHEET).is_file()
    told = read(undisturbed)
    assert "runs: 0 done before, 6 to do" in told and "no-temb, seed 1:" in told


def test_one_design_under_two_names_is_one_result(undisturbed):
    found = runs(undisturbed)
    for seed in (0, 1):
        one, other = found["baseline", seed], found["the-same", seed]
        assert one.pop("row") != other.pop("row")
        assert one == other
    assert found["baseline", 0]["curves"] != found["baseline", 1]["curves"]
    assert found["baseline", 0]["curves"] != found["no-temb", 0]["curves"]


def test_a_suite_that_is_killed_and_started_again_finds_the_same(undisturbed, tmp_path):
    """Killed while parts are made, while runs train, and asked to stop: the same in the end."""
    workdir = tmp_path / "suite"
    waits = [
        (lambda: list(workdir.glob("parts/*.making")), signal.SIGKILL),
        (lambda: list(workdir.glob("runs/*/*/checkpoints/4")), signal.SIGKILL),
        (lambda: "no-temb, seed 0:" in read(workdir), signal.SIGTERM),
        (lambda: "pictures:" in read(workdir), signal.SIGTERM),
    ]
    for until, how in waits:
        process, end = start(workdir, "--speed_rounds=0"), time.monotonic() + LIMIT
        while not until():
            assert process.poll() is None and time.monotonic() < end, read(workdir)
            time.sleep(0.02)
        process.send_signal(how)
        assert process.wait(LIMIT) == (75 if how == signal.SIGTERM else -how), read(workdir)
    assert start(workdir, "--speed_rounds=0").wait(LIMIT) == 0, read(workdir)
    assert runs(workdir) == runs(undisturbed)
    pages = []
    for folder in (workdir, undisturbed):  # but for the clock, all of both reports
        entries = results.read(folder / results.NAME)
        kept = [entry for entry in entries if entry["kind"] not in ("machine", "speed")]
        out = tmp_path / folder.parent.name / "page.md"
        out.parent.mkdir(exist_ok=True)
        report.write(kept, out)
        pages.append({f.name: f.read_bytes() for f in out.parent.rglob("*") if f.is_file()})
    assert pages[0] == pages[1]
    sheets = [(folder / "study" / report.SHEET).read_bytes() for folder in (workdir, undisturbed)]
    assert sheets[0] == sheets[1]


def test_what_is_done_is_not_done_again(undisturbed):
    files = [undisturbed / results.NAME, undisturbed / "study.md"]
    before = [file.read_bytes() for file in files]
    logs = {file: file.stat().st_mtime for file in undisturbed.glob("logs/*")}
    assert start(undisturbed, "--speed_rounds=1").wait(LIMIT) == 0
    assert {file: file.stat().st_mtime for file in undisturbed.glob("logs/*")} == logs
    assert [file.read_bytes() for file in files] == before


def test_two_processes_do_not_share_a_suite(undisturbed):
    import fcntl

    with (undisturbed / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert start(undisturbed).wait(LIMIT) == 2
    assert "another process runs a suite there" in read(undisturbed)


def test_a_run_that_diverges_is_a_finding(tmp_path):
    """And the others go on."""
    file = tmp_path / "odd.py"
    file.write_text(
        SUITE.read_text().split("ROWS")[0]
        + 'ROWS = [("baseline", {}), ("odd", {"optimizer.muon_learning_rate": 1e30})]\n'
    )
    workdir = tmp_path / "suite"
    assert start(workdir, f"--suite={file}", "--seeds=0", "--speed_rounds=0").wait(LIMIT) == 0
    found = runs(workdir)
    assert found["odd", 0]["failed"].startswith("Step 1: loss ") and "score" in found["baseline", 0]
    assert "`odd`, seed 0, diverged: Step" in (workdir / "study.md").read_text()
    assert "odd, seed 0: diverged" in read(workdir)


def test_configs_of_a_suite_travel(undisturbed):
    """Paths in a run's own config are relative to the suite's directory."""
    suite = suites.load(str(SUITE))
    run = suite.runs([0])[0]
    kept = json.loads((undisturbed / run.folder / "study.json").read_text())
    assert kept["weights"]["llm"] == kept["weights"]["tokenizer"]
    assert (undisturbed / kept["weights"]["llm"] / "model.safetensors").is_file()
