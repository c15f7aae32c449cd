"""Damage of every kind on checkpoints: noticed, told, and passed by; and disks that are full."""

import json
import os
import random
import resource
import shutil
import subprocess
import time

import pytest

from t2i_jax import checkpoint
from t2i_jax.damage import DamagedError, StorageError
from t2i_jax.errors import UserError
from tests import tiny
from tests.test_checkpoint import host_state, like, on_devices

LIMIT = 240  # seconds until a failed save is known, on a busy machine
SIZES = (1, 2, 1)
STEPS = (3, 5, 9)
# Files that say what is said elsewhere, too: nothing is lost with them.
SPARE = ("_sharding", "commit_success.txt", "_CHECKPOINT_METADATA")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good")
    with checkpoint.Checkpoints(path, keep=3) as saved:
        for step in STEPS:
            state = on_devices(host_state(step, width=256), SIZES)
            saved.save(step, state, tiny.config(seed=step))
    return path


@pytest.fixture
def workdir(good, tmp_path):
    shutil.copytree(good / "checkpoints", tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


def restored(workdir):
    """(step, state) of the newest good checkpoint; the state is checked."""
    with checkpoint.Checkpoints(workdir, keep=3) as saved:
        state = saved.restore_newest(like(host_state(width=256), SIZES))
        step = saved.steps()[-1]
    tiny.equal(state, host_state(step, width=256))
    return step


def files(workdir, step):
    found = sorted(p for p in (workdir / "checkpoints" / str(step)).rglob("*") if p.is_file())
    return [file for file in found if file.name not in SPARE]


def arrays(workdir, step):
    """The file with most of each item's arrays."""
    where = workdir / "checkpoints" / str(step)
    items = (list((where / item).glob("ocdbt.process_0/d/*")) for item in ("params", "ema"))
    return [max(item, key=lambda f: f.stat().st_size) for item in items]


def flip(file, rng):
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def cut(file, rng):
    os.truncate(file, rng.randrange(file.stat().st_size))


def overwrite(file, rng):
    file.write_bytes(rng.randbytes(file.stat().st_size))


def empty(file, rng):
    file.write_bytes(b"")


def remove(file, rng):
    file.unlink()


def test_the_newest_good_one_is_taken(workdir, capsys):
    assert restored(workdir) == 9
    assert capsys.readouterr().err == "" and not (workdir / "damaged_checkpoints").exists()


@pytest.mark.parametrize("hurt", [flip, cut, overwrite, empty, remove], ids=lambda f: f.__name__)
def test_damaged_arrays_are_noticed_wherever_they_are(workdir, hurt, capsys):
    for k, file in enumerate(arrays(workdir, 9)):
        data = file.read_bytes()
        hurt(file, random.Random(k))
        with checkpoint.Checkpoints(workdir) as saved, pytest.raises(DamagedError):
            saved.restore(9, like(host_state(width=256), SIZES))
        file.write_bytes(data)
    hurt(file, random.Random(7))
    assert restored(workdir) == 5
    said = capsys.readouterr().err
    aside = workdir / "damaged_checkpoints" / "9"
    assert f"WARNING: checkpoint 9 of {workdir}/checkpoints is damaged: ema" in said
    assert f"WARNING: checkpoint 9 is now {aside}; going on from checkpoint 5" in said
    assert (aside / "ema").exists()
    assert aside.with_name("9.txt").read_text().startswith("ema")
    assert sorted(os.listdir(workdir / "checkpoints")) == ["3", "5"]


def test_any_file_damaged_in_any_way_gives_what_was_saved_or_the_one_before(good, tmp_path):
    """What is read is right, whatever was hurt: the state is compared bit by bit."""
    rng = random.Random(0)
    names = [file.relative_to(good) for file in files(good, 9)]
    seen = set()
    for number in range(40):
        workdir = tmp_path / str(number)
        shutil.copytree(good / "checkpoints", workdir / "checkpoints")
        hurt = rng.choice([flip, cut, overwrite, empty, remove])
        hurt(workdir / rng.choice(names), rng)
        seen.add(restored(workdir))
    assert seen == {5, 9}


def test_a_wrong_bit_in_any_number_is_found_by_its_digest(workdir):
    """The format lets it pass: without digests, this test fails."""
    file, rng = arrays(workdir, 9)[1], random.Random(1)
    data, found = file.read_bytes(), []
    host = host_state(9, width=256)
    for _ in range(20):
        flip(file, rng)
        with checkpoint.Checkpoints(workdir) as saved:
            try:  # some bytes of the file belong to nothing
                tiny.equal(saved.weights(9, "ema", like(host, SIZES).params), host.ema)
            except DamagedError as error:
                found.append(str(error))
        file.write_bytes(data)
    assert sum("not the numbers that were saved" in text for text in found) > 10
    assert all("checkpoints/9 is damaged: ema: " in text.replace("ema/", "ema: ") for text in found)
    assert all("Give an older checkpoint" in text for text in found)


def test_damaged_json_is_found_by_its_checksum(workdir):
    file = workdir / "checkpoints" / "9" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    assert '"seed": 9' in meta["config"]
    for key, value in (
        ("config", meta["config"].replace('"seed": 9', '"seed": 8')),
        ("step", 8),
        ("digests", {}),
        ("crc32", None),
    ):
        file.write_text(json.dumps(meta | {key: value}))
        message = "9 is damaged: meta: the checksum"
        with checkpoint.Checkpoints(workdir) as saved, pytest.raises(DamagedError, match=message):
            saved.config(9)
    assert restored(workdir) == 5


def test_several_may_be_damaged_and_are_put_aside_beside_each_other(workdir, capsys):
    (workdir / "damaged_checkpoints" / "9").mkdir(parents=True)
    for step in (5, 9):
        empty(arrays(workdir, step)[0], None)
    assert restored(workdir) == 3
    aside = sorted(os.listdir(workdir / "damaged_checkpoints"))
    assert aside == ["5", "5.txt", "9", "9+", "9+.txt"]
    assert capsys.readouterr().err.count("going on from checkpoint 3") == 2
    with checkpoint.Checkpoints(workdir, keep=3) as saved:  # the same step can be saved again
        saved.save(9, on_devices(host_state(9, width=256), SIZES), tiny.config())
    assert restored(workdir) == 9


def test_where_none_is_good_nothing_is_touched_and_no_run_begins(workdir):
    for step in STEPS:
        empty(arrays(workdir, step)[0], None)
    with checkpoint.Checkpoints(workdir, keep=3) as saved, pytest.raises(UserError) as caught:
        saved.restore_newest(like(host_state(width=256), SIZES))
    said = str(caught.value)
    assert f"No checkpoint in {workdir}/checkpoints is good; nothing was changed" in said
    assert all(f"\n  {step}: params: " in said for step in STEPS)
    assert sorted(os.listdir(workdir / "checkpoints")) == ["3", "5", "9"]
    assert not (workdir / "damaged_checkpoints").exists()


def test_an_unfinished_one_is_told_and_deleted(workdir, capsys):
    unfinished = workdir / "checkpoints" / "12.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints" / "9", unfinished)
    assert restored(workdir) == 9
    assert f"{unfinished} was never finished, and is deleted" in capsys.readouterr().err
    assert not unfinished.exists()


def test_what_is_no_damage_puts_nothing_aside(workdir, monkeypatch):
    """Memory that ran out, rights, a network that is away: the checkpoint may be good."""
    for error in (MemoryError(), PermissionError(13, "no"), ValueError("UNAVAILABLE: no network")):

        def fails(*args, error=error, **kwargs):
            raise error

        with checkpoint.Checkpoints(workdir, keep=3) as saved:
            monkeypatch.setattr(saved._arrays["ema"], "restore", fails)
            with pytest.raises(type(error)):
                saved.restore_newest(like(host_state(width=256), SIZES))
    assert sorted(os.listdir(workdir / "checkpoints")) == ["3", "5", "9"]


def test_a_checkpoint_of_before_there_were_digests_is_read(workdir):
    file = workdir / "checkpoints" / "9" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["digests"], meta["crc32"]
    file.write_text(json.dumps(meta | {"format_version": 1}))
    assert restored(workdir) == 9


def test_the_newest_and_every_tenth_are_kept(tmp_path):
    host = host_state()
    with checkpoint.Checkpoints(tmp_path, keep=2, keep_every=10) as saved:
        for step in (5, 10, 15, 17, 20, 25, 30, 35):
            saved.save(step, on_devices(host, SIZES), tiny.config())
    assert sorted(map(int, os.listdir(tmp_path / "checkpoints"))) == [10, 20, 30, 35]
    with checkpoint.Checkpoints(tmp_path, keep=2, keep_every=10) as saved:  # also another time
        saved.save(40, on_devices(host, SIZES), tiny.config())
        saved.save(45, on_devices(host, SIZES), tiny.config())
        saved.save(50, on_devices(host, SIZES), tiny.config())
    assert sorted(map(int, os.listdir(tmp_path / "checkpoints"))) == [10, 20, 30, 40, 45, 50]


def large(workdir, saved):
    """Saves a step that is larger than the disk; asks until it is told so."""
    saved.save(11, on_devices(host_state(width=2**17), SIZES), tiny.config())
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        saved.check()


def test_what_cannot_be_written_is_told_once(workdir):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = rf"Checkpoint 11 could not be written to {workdir}/checkpoints: .*9 is intact"
    with checkpoint.Checkpoints(workdir, keep=3) as saved:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
        try:
            with pytest.raises(StorageError, match=said):
                large(workdir, saved)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert saved.steps() == [3, 5, 9]
        saved.check()
    assert restored(workdir) == 9  # and what may be left of 11 goes
    assert sorted(os.listdir(workdir / "checkpoints")) == ["3", "5", "9"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of two megabytes, where this user may make one."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a disk")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_disk_that_is_full(good, small_disk):
    shutil.copytree(good / "checkpoints", small_disk / "checkpoints")
    message = r"could not be written to .* 9 is intact"
    with (
        checkpoint.Checkpoints(small_disk, keep=3) as saved,
        pytest.raises(StorageError, match=message),
    ):
        large(small_disk, saved)
    assert restored(small_disk) == 9  # and what may be left of 11 goes
    assert sorted(os.listdir(small_disk / "checkpoints")) == ["3", "5", "9"]
