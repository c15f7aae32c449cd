"""Shards are written whole or not at all, byte for byte the same, and what is wrong is found."""

import io
import pathlib
import shutil
import tarfile

from etils import epath
import fsspec
from PIL import Image
import pytest

from t2i_jax.prepare import shards
from t2i_jax.prepare.shards import IMAGE, ORIGINAL, SYNTHETIC, ShardError, ShardWriter, check
from tests import archives


def jpeg(colour=(200, 30, 90), size=(24, 16)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG")
    return buffer.getvalue()


def sample(colour=(1, 2, 3), text="a red ring"):
    return {IMAGE: jpeg(colour), SYNTHETIC: text.encode()}


def test_a_shard_holds_what_was_written_in_order_without_times_and_owners(tmp_path):
    path = tmp_path / "0.tar"
    values = {IMAGE: jpeg(), ORIGINAL: b"ring", SYNTHETIC: "a ring, ünïcode".encode()}
    with ShardWriter(path, (IMAGE, ORIGINAL, SYNTHETIC)) as shard:
        shard.write("000000001", values)
        shard.write("k" * 150, values)  # longer than a plain header takes
        shard.write("é", values)
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        assert [m.name for m in members] == [
            f"{key}.{field}" for key in ("000000001", "k" * 150, "é") for field in values
        ]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
            (0, 0, 0, "", "", 0o644)
        }
        assert [archive.extractfile(m).read() for m in members] == 3 * list(values.values())
    assert check(path, (IMAGE, ORIGINAL, SYNTHETIC), 3) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["0.tar"]


def test_the_same_samples_are_the_same_bytes(tmp_path):
    for name in ("a.tar", "b.tar"):
        with ShardWriter(tmp_path / name) as shard:
            for i in range(3):
                shard.write(f"{i:05}", sample((i, 0, 0)))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_finish_gives_the_size_before_the_shard_has_its_name(tmp_path):
    path = tmp_path / "0.tar"
    with ShardWriter(path) as shard:
        shard.write("a", sample())
        size = shard.finish()
        assert not path.exists()
    assert path.stat().st_size == size


@pytest.mark.parametrize("there", [False, True])
def test_an_exception_leaves_nothing_and_keeps_what_was_there(tmp_path, there):
    path = tmp_path / "0.tar"
    if there:
        path.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt), ShardWriter(path) as shard:
        shard.write("a", sample())
        raise KeyboardInterrupt
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"before"] * there


def test_a_shard_that_fails_its_check_gets_no_name(tmp_path):
    for values in ({**sample(), IMAGE: b"no image"}, {**sample(), SYNTHETIC: b" \n"}):
        shard = ShardWriter(tmp_path / "0.tar")
        with pytest.raises(ShardError, match=r"a\.(image|synthetic)"), shard:
            shard.write("a", values)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "key", ["", "a.b", "../a", "a/b", "a\\b", "a\0", "a\n", "\udc80", "k" * 201]
)
def test_keys_that_are_no_file_names_are_refused(tmp_path, key):
    assert not shards.is_key(key)
    with pytest.raises(ValueError, match="keys are"), ShardWriter(tmp_path / "0.tar") as shard:
        shard.write(key, sample())


def test_a_key_is_written_once_and_with_the_fields_of_the_shard(tmp_path):
    with pytest.raises(ValueError, match="'a'"), ShardWriter(tmp_path / "0.tar") as shard:
        shard.write("a", sample())
        shard.write("a", sample())
    with pytest.raises(ValueError, match="'a'"), ShardWriter(tmp_path / "0.tar") as shard:
        shard.write("a", {IMAGE: jpeg()})


GOOD = [("a.image.jpg", jpeg()), ("a.synthetic_caption.txt", b"ring")]
OTHER = [("b.image.jpg", jpeg()), ("b.synthetic_caption.txt", b"ring")]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (GOOD + OTHER, "2 samples, not 1"),
        (GOOD + GOOD, "'a' comes twice"),
        (GOOD[:1], "lacks"),
        (GOOD[:1] + OTHER, "lacks"),
        ([GOOD[0], GOOD[0]], "lacks"),
        ([("a.jpg", jpeg()), GOOD[1]], r"a\.jpg"),
        ([("x/a.image.jpg", jpeg()), GOOD[1]], "x/a"),
        ([("a.image.jpg", jpeg()[:-20]), GOOD[1]], r"a\.image\.jpg"),
        ([GOOD[0], ("a.synthetic_caption.txt", b"")], "empty caption"),
        ([GOOD[0], ("a.synthetic_caption.txt", b"\xff\xfe")], "utf-8"),
    ],
)
def test_check_finds_what_is_wrong(tmp_path, members, message):
    path = tmp_path / "0.tar"
    archives.write_tar(path, members)
    with pytest.raises(ShardError, match=message) as caught:
        check(path, samples=1)
    assert str(path) in str(caught.value)


def test_check_finds_a_shard_that_was_cut(tmp_path):
    path = tmp_path / "0.tar"
    archives.write_tar(path, GOOD + OTHER)
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        second = archive.getmember("b.image.jpg").offset
    for size in (second, second + 700):  # between two members, and inside of one
        path.write_bytes(whole[:size])
        with pytest.raises(ShardError, match="damaged"):
            check(path)


class _Bucket(type(pathlib.Path())):
    """A remote folder: what epath adds to a path."""

    def copy(self, target, overwrite=False):
        assert overwrite
        shutil.copyfile(self, epath.Path(target))


def test_remote_shards_are_written_through_epath(tmp_path, monkeypatch):
    monkeypatch.setattr(
        epath, "Path", lambda path: _Bucket(str(path).replace("gs://bucket", str(tmp_path)))
    )
    system = fsspec.filesystem("file")
    monkeypatch.setattr(
        fsspec.core, "url_to_fs", lambda path: (system, path.replace("gs://bucket", str(tmp_path)))
    )
    with ShardWriter("gs://bucket/0.tar") as shard:
        shard.write("a", sample())
        local = pathlib.Path(shard._partial)
        assert local.exists() and not list(tmp_path.iterdir())
    assert not local.parent.exists() and [p.name for p in tmp_path.iterdir()] == ["0.tar"]
    assert check("gs://bucket/0.tar", samples=1) == 1
