"""WebDataset shards written by Python's tarfile, read by ours."""

from concurrent import futures
import io
import json
import os
import pathlib
import tarfile
import types

import cloudpickle
from etils import epath
import fsspec
import numpy as np
from PIL import Image
import pytest

from t2i_jax.data import patterns, shard_index, shared, tar, webdataset
from t2i_jax.data.bad import BadSample, Cause

FIELDS = ("jpg", "txt", "old.txt")


def write(path, members, format=tarfile.GNU_FORMAT):
    """`members`: (name, body) pairs, or TarInfo for what is not a file."""
    with tarfile.open(path, "w", format=format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return str(path)


def sample(key, image=b"pixels", caption=b"a caption"):
    return [(f"{key}.jpg", image), (f"{key}.txt", caption)]


def odd(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_braces():
    expand = patterns.expand_braces
    assert expand("a-{0008..0011}.tar") == [f"a-{i}.tar" for i in ("0008", "0009", "0010", "0011")]
    assert expand("{8..11}") == ["8", "9", "10", "11"]
    assert expand("{x,y}/{1..2}") == ["x/1", "x/2", "y/1", "y/2"]
    assert set(expand("{a,b{0..1}}")) == {"a", "b0", "b1"}
    assert expand("plain{}.tar") == ["plain{}.tar"]
    assert len(expand("cc12m-train-{0000..2175}.tar")) == 2176


def test_expand_sorts_and_takes_each_shard_once(tmp_path):
    for name in ("b-01", "b-00", "a-00", "c-00"):
        write(tmp_path / f"{name}.tar", [])
    pattern = f"{tmp_path}/b-{{00..01}}.tar::{tmp_path}/b*.tar::{tmp_path}/a-00.tar"
    names = [os.path.basename(p) for p in patterns.expand(pattern)]
    assert names == ["a-00.tar", "b-00.tar", "b-01.tar"]


def test_missing_shards_are_named(tmp_path):
    write(tmp_path / "x-0.tar", [])
    for pattern in (f"{tmp_path}/x-{{0..2}}.tar", f"{tmp_path}/y*.tar", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match="Expected are WebDataset shards") as error:
            patterns.expand(pattern)
        assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_was_written(tmp_path, format):
    """Prefixes (ustar), long names (GNU) and pax headers; bodies around the block size."""
    folder = "f" * 90 + "/" + "g" * 40 + ".d"
    keys = ["000", "sub.dir/001", f"{folder}/002"]
    if format != tarfile.USTAR_FORMAT:
        keys += ["k" * 300, "schlüssel-日本"]
    bodies = [os.urandom(n) for n in (0, 1, 511, 512, 513)]
    members = [("README.md", b"not a sample"), (".hidden.jpg", b"")]
    for i, key in enumerate(keys):
        members += sample(key, bodies[i], f" näme {i} ✨\n".encode())
        members += [(f"{key}.old.txt", b"old"), (f"{key}.json", b"{}")]
    dataset = webdataset.WebDataset(write(tmp_path / "s.tar", members, format), *FIELDS)
    assert len(dataset) == len(keys)
    for i, key in enumerate(keys):
        assert dataset[i] == {
            "image": bodies[i],
            "captions": (f"näme {i} ✨",),
            "original_caption": "old",
        }
        assert dataset.caption(i) == f"näme {i} ✨"
        assert dataset.name(i) == f"s.tar/{key}"
    with pytest.raises(IndexError):
        dataset[len(keys)]
    with pytest.raises(IndexError):
        dataset[-1]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_agree_with_tarfile(tmp_path, format):
    sized = odd("e", tarfile.DIRTYPE)
    sized.size = 5000  # what some writers store for a folder: there is no body
    members = [odd("d", tarfile.DIRTYPE), sized, odd("l.jpg", tarfile.SYMTYPE, "/etc/passwd")]
    for i in range(20):
        members += sample(f"{i:03}" + "x" * (i * 13), os.urandom(i * 97))
    members += [odd("h.jpg", tarfile.LNKTYPE, "000.jpg"), odd("n.jpg", tarfile.CHRTYPE)]
    path = write(tmp_path / "s.tar", members, format)
    with tarfile.open(path) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
    assert [tuple(m) for m in tar.members(tar.FilePool().open(path))] == expected


def test_samples_follow_the_order_of_shards(tmp_path):
    for shard in (1, 0):
        write(tmp_path / f"{shard}.tar", sample("b") + sample("a"))
    dataset = webdataset.WebDataset(f"{tmp_path}/*.tar", "jpg", "txt")
    names = [dataset.name(i) for i in range(len(dataset))]
    assert names == ["0.tar/b", "0.tar/a", "1.tar/b", "1.tar/a"]
    assert dataset[0]["original_caption"] is None


def test_links_are_not_followed_and_incomplete_samples_are_told(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    members = [("a.jpg", b"x"), odd("a.txt", tarfile.SYMTYPE, str(secret))]
    members += [*sample("b"), ("c.txt", b"no image"), *sample("../../d")]
    dataset = webdataset.WebDataset(write(tmp_path / "s.tar", members), "jpg", "txt")
    names = [dataset.name(i) for i in range(len(dataset))]
    assert names == ["s.tar/a", "s.tar/b", "s.tar/c", "s.tar/../../d"]
    for i, cause in ((0, Cause.MISSING_CAPTION), (2, Cause.MISSING_IMAGE)):
        with pytest.raises(BadSample) as error:
            dataset[i]
        assert error.value.cause == cause
    assert dataset[1]["captions"] == dataset[3]["captions"] == ("a caption",)
    found = sorted(p.name for p in tmp_path.iterdir())
    assert found == ["s.tar", "s.tar.index.npz", "secret"]


def test_several_captions_and_values_of_json(tmp_path):
    text = {"caption": " one ", "more": {"en": ["two", "three"], "n": 3}}
    members = [*sample("a", caption=b"first"), ("a.json", json.dumps(text).encode())]
    members += [("b.jpg", b"x"), ("b.json", b"{"), *sample("c", caption=b"\xef\xbb\xbfbom")]
    members += [("d.jpg", b"x"), ("d.txt", b"\xff\xfe"), ("d.json", json.dumps(text).encode())]
    path = write(tmp_path / "s.tar", members)

    def read(field, i):
        return webdataset.WebDataset(path, "jpg", field)[i]["captions"]

    assert read("txt,json:caption,json:more.en", 0) == ("first", "one", "two", "three")
    assert read("txt,json:caption", 2) == ("bom",)  # c has no JSON
    for field, i in (("json:caption", 1), ("json:more.n", 0), ("json:none", 0), ("txt", 3)):
        with pytest.raises(BadSample) as error:
            read(field, i)
        assert error.value.cause == Cause.BROKEN_CAPTION


def test_members_of_other_kinds_are_never_read(tmp_path):
    members = [*sample("a"), ("a.pkl", b"x"), ("a.py", b"x"), ("a.jpg.exe", b"x"), ("README", b"x")]
    path = write(tmp_path / "s.tar", members)
    assert shard_index.build(path).fields == ("jpg", "txt")
    assert shard_index.build(path).ignored == 4
    for field in ("pkl", "cls", "txt:caption"):
        with pytest.raises(ValueError, match=f"field '{field}': members that end in jpg"):
            webdataset.WebDataset(path, "jpg", field)


def test_a_key_that_comes_again_is_another_sample(tmp_path):
    members = sample("a", b"1") + sample("b", b"2") + sample("a", b"3")
    dataset = webdataset.WebDataset(write(tmp_path / "s.tar", members), "jpg", "txt")
    assert [dataset[i]["image"] for i in range(3)] == [b"1", b"2", b"3"]


def test_the_size_comes_from_the_head(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    Image.effect_noise((60, 40), 90).save(buffer, "PNG")
    late = io.BytesIO()  # the size of a JPEG may come after other things
    Image.effect_noise((60, 40), 90).save(late, "JPEG", comment=b"x" * 9000)
    members = sample("a", buffer.getvalue() + b"tail" * 5000) + sample("b", late.getvalue())
    dataset = webdataset.WebDataset(write(tmp_path / "s.tar", members), "jpg", "txt")
    read = []
    whole = dataset._pool.read
    monkeypatch.setattr(
        dataset._pool, "read", lambda path, at, size: read.append(size) or whole(path, at, size)
    )
    assert dataset.size(0) == (60, 40) and read == [4096]
    assert dataset.size(1) == (60, 40)


def test_pickles_share_large_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "_LEAST", 1)
    members = [m for k in range(50) for m in sample(str(k), b"%d" % k)]
    dataset = webdataset.WebDataset(write(tmp_path / "s.tar", members), "jpg", "txt")
    data = cloudpickle.dumps(dataset)
    assert len(data) < 2000
    copy = cloudpickle.loads(data)
    assert [copy[i] for i in range(50)] == [dataset[i] for i in range(50)]
    assert copy.fingerprint == dataset.fingerprint


def test_a_sample_may_lack_its_original_caption(tmp_path):
    members = [*sample("a"), ("a.old.txt", b"old"), *sample("b")]
    dataset = webdataset.WebDataset(write(tmp_path / "s.tar", members), *FIELDS)
    assert [dataset[i]["original_caption"] for i in (0, 1)] == ["old", None]


def test_fields_that_no_sample_has(tmp_path):
    path = write(tmp_path / "s.tar", sample("a"))
    with pytest.raises(ValueError, match=r"has 'png'.*fields \['jpg', 'txt'\].*data.image_field"):
        webdataset.WebDataset(path, "png", "txt")


def _damage(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def _strict(path):
    return list(tar.members(tar.FilePool().open(path)))


def test_damage_names_the_byte(tmp_path):
    whole = write(tmp_path / "s.tar", sample("a", b"x" * 600) + sample("b"))  # 2nd header: 1536
    content = pathlib.Path(whole).read_bytes()
    _damage(whole, 1536 + 5, b"!")
    with pytest.raises(ValueError, match=r"damaged at byte 1536: the checksum"):
        _strict(whole)
    for size, offset in ((700, 0), (1536 + 100, 1536), (1536 + 512 + 3, 1536), (0, 0)):
        pathlib.Path(whole).write_bytes(content[:size])
        with pytest.raises(ValueError, match=rf"damaged at byte {offset}: "):
            _strict(whole)


def test_what_is_whole_around_damage_is_found(tmp_path):
    members = [m for k in range(6) for m in sample(str(k), b"%d" % k * 600)]
    path = write(tmp_path / "s.tar", members)
    headers = [m.offset - 512 for m in _strict(path)]
    content = pathlib.Path(path).read_bytes()
    for name, damaged, start, stop in (
        ("flip", lambda: _damage(path, headers[4] + 3, b"!"), headers[4], headers[5]),
        ("zeros", lambda: _damage(path, headers[4], bytes(512)), headers[4], headers[5]),
        ("cut", lambda: os.truncate(path, headers[10] + 700), headers[10], headers[10] + 700),
        ("at a member", lambda: os.truncate(path, headers[10]), headers[10], headers[10]),
    ):
        pathlib.Path(path).write_bytes(content)
        damaged()
        index = shard_index.build(path)
        assert [(d.start, d.stop) for d in index.damage] == [(start, stop)], name
        dataset = webdataset.WebDataset(path, "jpg", "txt", index_dir=str(tmp_path / name))
        read = {}
        for i in range(len(dataset)):
            try:
                read[dataset.name(i)] = dataset[i]["image"]
            except BadSample as error:
                read[dataset.name(i)] = error.cause
        expected = {f"s.tar/{k}": b"%d" % k * 600 for k in range(6)}
        if name in ("flip", "zeros"):
            expected["s.tar/2"] = Cause.MISSING_IMAGE
        else:
            del expected["s.tar/5"]
        assert read == expected
        assert [d.start for _, d in dataset.damage] == [start]


def test_a_body_larger_than_the_file_is_refused(tmp_path):
    path = write(tmp_path / "s.tar", sample("a"))
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 40  # needs the base-256 size of GNU tar
    _damage(path, 0, info.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(ValueError, match=f"byte 0: its body of {1 << 40} bytes"):
        _strict(path)


def test_indexes_are_kept_and_made_anew_for_other_shards(tmp_path, monkeypatch):
    path = write(tmp_path / "s.tar", sample("a"))
    built = []
    build = shard_index.build
    monkeypatch.setattr(shard_index, "build", lambda path: built.append(path) or build(path))

    def names():
        dataset = webdataset.WebDataset(path, "jpg", "txt")
        return [dataset.name(i) for i in range(len(dataset))]

    assert names() == names() == ["s.tar/a"] and len(built) == 1
    write(tmp_path / "s.tar", sample("a") + sample("b"))
    assert names() == names() == ["s.tar/a", "s.tar/b"] and len(built) == 2
    index = tmp_path / "s.tar.index.npz"
    index.write_bytes(index.read_bytes()[:-50])  # cut
    assert names() == ["s.tar/a", "s.tar/b"] and len(built) == 3
    np.savez(index, stamp=np.array([object()], object))  # a pickle in it is never loaded
    assert names() == ["s.tar/a", "s.tar/b"] and len(built) == 4


def test_indexes_of_shards_that_cannot_be_written_beside(tmp_path, monkeypatch):
    path = write(tmp_path / "s.tar", sample("a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    replace = type(epath.Path(path)).replace

    def refused(self, target):
        if os.path.dirname(target) == str(tmp_path):
            raise PermissionError(target)
        return replace(self, target)

    monkeypatch.setattr(type(epath.Path(path)), "replace", refused)
    webdataset.WebDataset(path, "jpg", "txt")
    (kept,) = (tmp_path / "cache/t2i_jax/indexes").glob("*-s.tar.index.npz")
    webdataset.WebDataset(path, "jpg", "txt", index_dir=str(tmp_path / "elsewhere"))
    assert [p.name for p in (tmp_path / "elsewhere").iterdir()] == [kept.name]


def test_a_damaged_index_is_made_anew(tmp_path):
    """Every byte of it counts: whatever NumPy and zipfile raise, or do not notice."""
    path = write(tmp_path / "s.tar", [m for k in range(20) for m in sample(str(k), b"%d" % k)])
    (expected,) = shard_index.open_all([path])
    index = tmp_path / "s.tar.index.npz"
    whole, rng = index.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        index.write_bytes(damaged)
        (found,) = shard_index.open_all([path])
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_compressed_shard_among_others_is_damage(tmp_path):
    write(tmp_path / "a.tar", sample("a"))
    with tarfile.open(tmp_path / "b.tar", "w:gz"):
        pass
    dataset = webdataset.WebDataset(f"{tmp_path}/*.tar", "jpg", "txt")
    assert len(dataset) == 1
    ((shard, damage),) = dataset.damage
    assert shard.endswith("b.tar") and "gunzip" in damage.reason


@pytest.mark.parametrize("factor", [1, 20, 512, 2048])
def test_archives_with_larger_records_are_whole(tmp_path, factor):
    """tar --blocking-factor: the last record is filled with zeros."""
    path = pathlib.Path(write(tmp_path / "s.tar", sample("a")))
    content = path.read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % 512 + 1024)
    path.write_bytes(content + bytes(-len(content) % (512 * factor)))
    assert shard_index.build(str(path)).damage == ()


def test_processes_build_the_same_indexes(tmp_path):
    shards = [write(tmp_path / f"{k}.tar", sample(str(k))) for k in range(3)]
    by_processes = shard_index.open_all(shards, str(tmp_path / "a"), processes=2)
    by_threads = shard_index.open_all(shards, str(tmp_path / "b"))
    assert [i.keys.tolist() for i in by_processes] == [[b"0"], [b"1"], [b"2"]]
    for one, other in zip(by_processes, by_threads, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_compressed_shards_say_what_to_do(tmp_path):
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz"):
        pass
    with pytest.raises(ValueError, match="gunzip"):
        webdataset.WebDataset(str(tmp_path / "s.tar.gz"), "jpg", "txt")


def test_a_shard_that_shrinks_is_noticed(tmp_path):
    path = write(tmp_path / "s.tar", sample("a", b"x" * 5000))
    dataset = webdataset.WebDataset(path, "jpg", "txt")
    os.truncate(path, 1000)
    with pytest.raises(BadSample, match="changed after it was indexed") as error:
        dataset[0]
    assert error.value.cause == Cause.UNREADABLE


def test_threads_share_few_descriptors(tmp_path):
    for shard in range(40):
        members = [m for k in range(5) for m in sample(str(k), b"%d/%d" % (shard, k) * 100)]
        write(tmp_path / f"{shard:02}.tar", members)
    before = len(os.listdir("/dev/fd"))
    dataset = webdataset.WebDataset(f"{tmp_path}/{{00..39}}.tar", "jpg", "txt")
    dataset._pool = tar.FilePool(capacity=3)

    def read(i):
        return dataset[i % 200]["image"] == b"%d/%d" % (i % 200 // 5, i % 5) * 100

    with futures.ThreadPoolExecutor(8) as executor:
        assert all(executor.map(read, range(0, 8000, 7)))
    assert len(os.listdir("/dev/fd")) <= before + 3


def test_remote_paths_go_through_epath(tmp_path, monkeypatch):
    for shard in range(2):
        write(tmp_path / f"{shard}.tar", sample("a", b"shard %d" % shard))

    class Bucket(type(pathlib.Path())):
        def stat(self, **_):
            s = super().stat()  # and what epath's have
            return types.SimpleNamespace(st_mode=s.st_mode, length=s.st_size, mtime=s.st_mtime)

    monkeypatch.setattr(
        epath, "Path", lambda path: Bucket(str(path).replace("gs://bucket", str(tmp_path)))
    )
    asked = []

    class Counted(type(fsspec.filesystem("file"))):
        def cat_file(self, path, start=None, end=None, **_):
            asked.append(end - start)
            return super().cat_file(path, start, end)

    monkeypatch.setattr(
        fsspec.core,
        "url_to_fs",
        lambda path: (Counted(), path.replace("gs://bucket", str(tmp_path))),
    )
    dataset = webdataset.WebDataset("gs://bucket/{0..1}.tar", "jpg", "txt")
    asked.clear()
    dataset[0]
    assert sorted(asked) == [len(b"shard 0"), len(b"a caption")]
    assert [dataset[i]["image"] for i in (0, 1, 0)] == [b"shard 0", b"shard 1", b"shard 0"]
    assert len(webdataset.WebDataset("gs://bucket/*.tar", "jpg", "txt")) == 2
    with pytest.raises(FileNotFoundError, match=r"gs://bucket/2\.tar"):
        webdataset.WebDataset("gs://bucket/{0..2}.tar", "jpg", "txt")
