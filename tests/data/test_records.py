"""ArrayRecord files written by their library, read as a source."""

from concurrent import futures
import io
import os
import pickle
import shutil
import subprocess
import sys

from array_record.python import array_record_module
import cloudpickle
from PIL import Image
import pytest

from t2i_jax.data import example, records
from t2i_jax.data.bad import BadSample, Cause

FIELDS = ("image", "caption", "old")


def picture(width=12, height=8, **options):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (9, 99, 199)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def write(path, rows, options="group_size:1"):
    """`rows`: features, or bytes as they are."""
    writer = array_record_module.ArrayRecordWriter(str(path), options)
    for row in rows:
        writer.write(row if isinstance(row, bytes) else example.encode(row))
    writer.close()
    return str(path)


def row(i, **features):
    return {"image": picture(10 + i), "caption": f" cäption {i}\n".encode(), **features}


def cause(call, *args):
    with pytest.raises(BadSample) as error:
        call(*args)
    return error.value.cause


def test_reads_what_was_written_in_the_order_of_files(tmp_path):
    rows = [row(i, old=b"old %d" % i) for i in range(7)]
    write(tmp_path / "b.array_record", rows[3:])
    write(tmp_path / "a.array_record", rows[:3])
    write(tmp_path / "aa.array_record", [])
    source = records.ArrayRecords(f"{tmp_path}/*.array_record", *FIELDS)
    assert len(source) == 7
    for i in range(7):
        assert source[i] == {
            "image": rows[i]["image"],
            "captions": (f"cäption {i}",),
            "original_caption": f"old {i}",
        }
        assert source.caption(i) == f"cäption {i}"
        assert source.size(i) == (10 + i, 8)
        assert source.name(i) == (f"a.array_record:{i}" if i < 3 else f"b.array_record:{i - 3}")
    for call in (source.__getitem__, source.caption, source.name, source.size):
        for i in (-1, 7):
            with pytest.raises(IndexError):
                call(i)


def test_several_captions(tmp_path):
    rows = [row(0, more=[b"x", b" y "]), row(1), row(2, more=[])]
    rows[2]["caption"] = b""
    source = records.ArrayRecords(
        write(tmp_path / "r.array_record", rows), "image", "caption, more", "more"
    )
    assert source[0]["captions"] == ("cäption 0", "x", "y")
    assert source[0]["original_caption"] == "x"
    assert source[1]["captions"] == ("cäption 1",)
    assert source[1]["original_caption"] is None
    assert source[2]["captions"] == ("",)


def test_bad_samples(tmp_path):
    rows = [
        row(0),
        {"caption": b"no image"},
        row(2, image=b""),
        row(3, image=[b"a", b"b"]),
        row(4, image=7),
        {"image": picture()},
        row(6, caption=[]),
        row(7, caption=b"\xff\xfe"),
        row(8, caption=[1, 2]),
        b"no example",
        b"",
        row(11, image=b"no picture"),
        row(12),
    ]
    source = records.ArrayRecords(write(tmp_path / "r.array_record", rows), "image", "caption")
    for i in (1, 2, 3, 4):
        assert cause(source.__getitem__, i) == Cause.MISSING_IMAGE
        assert cause(source.size, i) == Cause.MISSING_IMAGE
    assert source.caption(1) == "no image"
    for i, expected in (
        (5, Cause.MISSING_CAPTION),
        (6, Cause.MISSING_CAPTION),
        (7, Cause.BROKEN_CAPTION),
        (8, Cause.BROKEN_CAPTION),
        (9, Cause.UNREADABLE),
        (10, Cause.UNREADABLE),
    ):
        assert cause(source.__getitem__, i) == expected
        assert cause(source.caption, i) == expected
        assert source.name(i) == f"r.array_record:{i}"
    assert cause(source.size, 11) == Cause.BROKEN_IMAGE
    assert source[12]["captions"] == ("cäption 12",)


def test_size_is_that_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write(tmp_path / "r.array_record", [row(0, image=picture(30, 20, exif=exif))])
    assert records.ArrayRecords(path, "image", "caption").size(0) == (20, 30)


def test_missing_features_and_what_is_there(tmp_path):
    path = write(tmp_path / "r.array_record", [row(0, captions=[b"a", b"b"], n=3)])
    with pytest.raises(ValueError, match=r"no feature jpg, old; they hold") as error:
        records.ArrayRecords(path, "jpg", "caption", "old")
    for part in ("caption (bytes)", "captions (2 x bytes)", "n (int)", "--config.data.image_field"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"r\.array_record:0: 9 bytes that are no tf\.train\.Ex"):
        records.ArrayRecords(write(path, [b"something"]), "image", "caption")
    with pytest.raises(ValueError, match="without a record"):
        records.ArrayRecords(write(path, []), "image", "caption")


def test_a_first_record_may_lack_what_others_have(tmp_path):
    path = write(tmp_path / "r.array_record", [b"damaged", row(1), row(2, old=b"x")])
    assert records.ArrayRecords(path, *FIELDS)[2]["original_caption"] == "x"


def test_files_that_cannot_be_opened_are_named(tmp_path):
    whole = write(tmp_path / "a.array_record", [row(i) for i in range(20)])
    with open(whole, "rb") as file:
        content = file.read()
    bad = tmp_path / "b.array_record"
    for damaged in (b"", b"text", content[:-1], content[: len(content) // 2]):
        bad.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"b\.array_record is no whole ArrayRecord file: "):
            records.ArrayRecords(f"{tmp_path}/?.array_record", "image", "caption")
    bad.unlink()
    bad.mkdir()
    with pytest.raises(ValueError, match=r"b\.array_record is no whole"):
        records.ArrayRecords(f"{tmp_path}/?.array_record", "image", "caption")
    with pytest.raises(FileNotFoundError, match=r"c\.array_record"):
        records.ArrayRecords(f"{tmp_path}/c.array_record", "image", "caption")


def test_a_damaged_record_is_one_bad_sample(tmp_path):
    rows = [row(i, noise=os.urandom(5000) + b"%03d" % i) for i in range(10)]
    path = write(tmp_path / "r.array_record", rows)
    source = records.ArrayRecords(path, "image", "caption")
    with open(path, "r+b") as file:
        file.seek(file.read().index(rows[6]["noise"][:64]))
        file.write(bytes(64))
    with pytest.raises(BadSample, match="hash mismatch") as error:
        source[6]
    assert error.value.cause == Cause.UNREADABLE
    assert [source.caption(i) for i in (5, 7, 9)] == [f"cäption {i}" for i in (5, 7, 9)]
    assert len(records.ArrayRecords(path, "image", "caption")) == 10


def test_a_file_that_shrinks_or_goes(tmp_path):
    """The library gives an empty record for what is no longer there."""
    rows = [row(i, noise=os.urandom(200_000)) for i in range(10)]
    path = write(tmp_path / "r.array_record", rows)
    source = records.ArrayRecords(path, "image", "caption")
    os.truncate(path, os.path.getsize(path) // 2)
    assert source.caption(0) == "cäption 0"
    assert cause(source.__getitem__, 9) == Cause.UNREADABLE
    assert cause(source.size, 9) == Cause.UNREADABLE
    again = pickle.loads(cloudpickle.dumps(source))
    assert cause(again.__getitem__, 0) == Cause.UNREADABLE
    os.remove(path)
    assert cause(pickle.loads(cloudpickle.dumps(source)).__getitem__, 0) == Cause.UNREADABLE


def test_a_file_that_comes_back_is_read_again(tmp_path):
    path = write(tmp_path / "r.array_record", [row(i) for i in range(5)])
    source = pickle.loads(cloudpickle.dumps(records.ArrayRecords(path, "image", "caption")))
    shutil.move(path, f"{path}.away")
    assert cause(source.caption, 2) == Cause.UNREADABLE
    shutil.move(f"{path}.away", path)
    assert source.caption(2) == "cäption 2"


def test_groups_are_read_and_warned_of(tmp_path, caplog):
    path = write(tmp_path / "r.array_record", [row(i) for i in range(10)], "group_size:4")
    with caplog.at_level("WARNING"):
        source = records.ArrayRecords(path, "image", "caption")
    assert "groups of 4" in caplog.text
    assert [source.caption(i) for i in range(10)] == [f"cäption {i}" for i in range(10)]


@pytest.mark.parametrize("path", ["s3://bucket/*.array_record", "a.array_record::https://x/b"])
def test_other_file_systems_are_refused(path):
    with pytest.raises(ValueError, match=r"gs://.*Mount"):
        records.ArrayRecords(path, "image", "caption")


def test_fingerprint(tmp_path):
    def opened(folder, fields=("image", "caption")):
        return records.ArrayRecords(f"{tmp_path}/{folder}/*", *fields).fingerprint

    (tmp_path / "x").mkdir()
    write(tmp_path / "x" / "a", [row(i) for i in range(5)])
    write(tmp_path / "x" / "b", [row(i) for i in range(5)])
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    assert opened("x") == opened("y")
    assert opened("x") != opened("y", ("image", "image"))
    shutil.move(tmp_path / "y" / "b", tmp_path / "y" / "c")
    assert opened("x") != opened("y")
    before = opened("x")
    write(tmp_path / "x" / "b", [row(i) for i in range(6)])
    assert opened("x") != before


def test_threads_share_few_readers(tmp_path):
    for shard in range(12):
        write(tmp_path / f"{shard:02}", [row(i, caption=b"%d/%d" % (shard, i)) for i in range(5)])
    source = records.ArrayRecords(f"{tmp_path}/*", "image", "caption")
    source._readers._capacity = 3
    before = len(os.listdir("/dev/fd"))

    def read(i):
        return source[i % 60]["captions"] == (f"{i % 60 // 5}/{i % 5}",)

    with futures.ThreadPoolExecutor(8) as executor:
        assert all(executor.map(read, range(0, 3000, 7)))
    assert len(source._readers._readers) <= 3
    assert len(os.listdir("/dev/fd")) <= before + 3


def test_other_processes(tmp_path):
    """A pickled source is small, and opens its files where it is used, without JAX."""
    path = write(tmp_path / "r.array_record", [row(i) for i in range(3)])
    source = records.ArrayRecords(path, "image", "caption")
    assert source[1]["captions"] == ("cäption 1",)
    data = cloudpickle.dumps(source)
    assert len(data) < 2000
    code = (
        "import pickle, sys; s = pickle.load(sys.stdin.buffer); "
        "assert s[2]['captions'] == ('c\\u00e4ption 2',) and 'jax' not in sys.modules; "
        "print(s.fingerprint, len(s))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert done.stdout.decode().split() == [source.fingerprint, "3"]
