"""WebDataset shards written by Python's tarfile, read by ours."""

from concurrent import futures
import io
import os
import pathlib
import tarfile

from etils import epath
import pytest

from t2i_jax.data import tar, webdataset

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
    expand = webdataset.expand_braces
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
    names = [os.path.basename(p) for p in webdataset.expand(pattern)]
    assert names == ["a-00.tar", "b-00.tar", "b-01.tar"]


def test_missing_shards_are_named(tmp_path):
    write(tmp_path / "x-0.tar", [])
    for pattern in (f"{tmp_path}/x-{{0..2}}.tar", f"{tmp_path}/y*.tar", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match="Expected are WebDataset shards") as error:
            webdataset.expand(pattern)
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
            "caption": f"näme {i} ✨",
            "original_caption": "old",
            "key": f"s.tar/{key}",
        }
        assert dataset.caption(i) == f"näme {i} ✨"
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
    keys = [dataset[i]["key"] for i in range(len(dataset))]
    assert keys == ["0.tar/b", "0.tar/a", "1.tar/b", "1.tar/a"]
    assert dataset[0]["original_caption"] is None


def test_links_are_not_followed_and_incomplete_samples_are_reported(tmp_path, caplog):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    members = [("a.jpg", b"x"), odd("a.txt", tarfile.SYMTYPE, str(secret))]
    members += [*sample("b"), ("c.txt", b"no image"), *sample("../../d")]
    with caplog.at_level("WARNING"):
        dataset = webdataset.WebDataset(write(tmp_path / "s.tar", members), "jpg", "txt")
    assert [dataset[i]["key"] for i in range(len(dataset))] == ["s.tar/b", "s.tar/../../d"]
    assert "2 of 4 samples are left out" in caplog.text
    assert "s.tar/a, s.tar/c" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.tar", "secret"]


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


def test_damaged_shards_name_the_shard_and_the_byte(tmp_path):
    whole = write(tmp_path / "s.tar", sample("a", b"x" * 600) + sample("b"))  # 2nd header: 1536
    content = pathlib.Path(whole).read_bytes()
    _damage(whole, 1536 + 5, b"!")
    with pytest.raises(ValueError, match=r"s\.tar: damaged at byte 1536: the checksum"):
        webdataset.WebDataset(whole, "jpg", "txt")
    for size, offset in ((700, 0), (1536 + 100, 1536), (1536 + 512 + 3, 1536), (0, 0)):
        pathlib.Path(whole).write_bytes(content[:size])
        with pytest.raises(ValueError, match=rf"s\.tar: damaged at byte {offset}: "):
            webdataset.WebDataset(whole, "jpg", "txt")


def test_a_body_larger_than_the_file_is_refused(tmp_path):
    path = write(tmp_path / "s.tar", sample("a"))
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 40  # needs the base-256 size of GNU tar
    _damage(path, 0, info.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(ValueError, match=f"byte 0: its body of {1 << 40} bytes"):
        webdataset.WebDataset(path, "jpg", "txt")


def test_compressed_shards_say_what_to_do(tmp_path):
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz"):
        pass
    with pytest.raises(ValueError, match="gunzip"):
        webdataset.WebDataset(str(tmp_path / "s.tar.gz"), "jpg", "txt")


def test_a_shard_that_shrinks_is_noticed(tmp_path):
    path = write(tmp_path / "s.tar", sample("a", b"x" * 5000))
    dataset = webdataset.WebDataset(path, "jpg", "txt")
    os.truncate(path, 1000)
    with pytest.raises(ValueError, match="changed after it was indexed"):
        dataset[0]


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
    monkeypatch.setattr(
        epath, "Path", lambda path: pathlib.Path(str(path).replace("gs://bucket", str(tmp_path)))
    )
    dataset = webdataset.WebDataset("gs://bucket/{0..1}.tar", "jpg", "txt")
    assert [dataset[i]["image"] for i in (0, 1, 0)] == [b"shard 0", b"shard 1", b"shard 0"]
    assert len(webdataset.WebDataset("gs://bucket/*.tar", "jpg", "txt")) == 2
    with pytest.raises(FileNotFoundError, match=r"gs://bucket/2\.tar"):
        webdataset.WebDataset("gs://bucket/{0..2}.tar", "jpg", "txt")
