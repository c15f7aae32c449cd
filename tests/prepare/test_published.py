"""A tiny CC12M, as downloaded, becomes whole shards, whatever happens on the way."""

import gzip
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import types

from etils import epath
import fsspec
import pytest

from t2i_jax.data.webdataset import WebDataset
from t2i_jax.errors import ConfigError, MissingError, UserError
from t2i_jax.prepare import published, shards
from t2i_jax.prepare.shards import IMAGE, ORIGINAL, SYNTHETIC
from tests import archives


def key(i):
    return f"{i:09d}"


def cc12m_members(i, image=None):
    return [
        (f"{key(i)}.jpg", archives.encoded(i) if image is None else image),
        (f"{key(i)}.txt", f"alt text {i}".encode()),
        (f"{key(i)}.json", json.dumps({"key": key(i)}).encode()),
    ]


def write_cc12m(folder, shard_sizes=(3, 2, 2)):
    """Tars cc12m-train-NNNN.tar and train.jsonl; the number of a sample is its key."""
    numbers = iter(range(sum(shard_sizes)))
    for n, size in enumerate(shard_sizes):
        members = [m for _ in range(size) for m in cc12m_members(next(numbers))]
        archives.write_tar(folder / f"cc12m-train-{n:04d}.tar", members)
    lines = [
        {
            "caption_llava": f"a long caption {i}",
            "caption_llava_short": f"short {i}\n",
            "key": key(i),
        }
        for i in reversed(range(sum(shard_sizes)))
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / f"cc12m-train-{{0000..{len(shard_sizes) - 1:04d}}}.tar")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_cc12m_keeps_shards_images_and_texts_and_adds_captions(tmp_path, kind):
    pattern = write_cc12m(tmp_path)
    captions = tmp_path / "train.jsonl"
    if kind == "jsonl.gz":
        data = captions.read_bytes()
        captions.unlink()
        captions = tmp_path / "train.jsonl.gz"
        captions.write_bytes(gzip.compress(data))
    out = tmp_path / "out"
    report = published.cc12m(pattern, str(captions), str(out), workers=1)
    assert {p.name for p in out.glob("*.tar")} == {p.name for p in tmp_path.glob("*.tar")}
    assert archives.contents(out / "cc12m-train-0001.tar") == {
        f"{key(i)}.{field}": value
        for i in (3, 4)
        for field, value in [
            (IMAGE, archives.encoded(i)),
            (ORIGINAL, f"alt text {i}".encode()),
            (SYNTHETIC, f"a long caption {i}".encode()),
        ]
    }
    assert (report.shards, report.written, report.skipped) == (3, 7, {})
    assert "3 shards with 7 samples" in report.describe()


def test_training_reads_what_was_prepared(tmp_path):
    pattern = write_cc12m(tmp_path)
    published.cc12m(pattern, str(tmp_path / "train.jsonl"), str(tmp_path / "out"), workers=1)
    data = WebDataset(str(tmp_path / "out/*.tar"), IMAGE, SYNTHETIC, ORIGINAL)
    assert len(data) == 7
    assert (data.caption(5), data[5]["original_caption"]) == ("a long caption 5", "alt text 5")
    assert data[5]["image"] == archives.encoded(5)


def test_another_caption_may_be_chosen_but_not_in_the_same_place(tmp_path):
    pattern, lines = write_cc12m(tmp_path), str(tmp_path / "train.jsonl")
    out = tmp_path / "out"
    options = {"caption_field": "caption_llava_short", "workers": 1}
    published.cc12m(pattern, lines, str(out), **options)
    assert archives.contents(out / "cc12m-train-0000.tar")[f"{key(2)}.{SYNTHETIC}"] == b"short 2\n"
    with pytest.raises(ConfigError, match=r"caption_llava_short.*Choose another --out"):
        published.cc12m(pattern, lines, str(out), workers=1)
    with pytest.raises(ConfigError, match=r"no captions in 'text'.*'caption_llava'"):
        published.cc12m(pattern, lines, str(tmp_path / "b"), caption_field="text", workers=1)


def test_keys_that_became_numbers_are_nine_digits(tmp_path):
    pattern = write_cc12m(tmp_path, (2,))
    (tmp_path / "train.jsonl").write_text('{"key": 1, "caption_llava": "one"}\n')
    report = published.cc12m(pattern, str(tmp_path / "train.jsonl"), str(tmp_path / "out"))
    assert report.written == 1 and archives.keys(tmp_path / "out/cc12m-train-0000.tar") == [key(1)]


def bad_cc12m(folder):
    """One shard in which much is wrong; what of it is skipped, and why."""
    members = cc12m_members(0)
    members += cc12m_members(1, archives.encoded(1)[:-200]) + cc12m_members(2, b"<html>404</html>")
    members += [(f"{key(3)}.jpg", archives.encoded(3)), *cc12m_members(4)[1:]]
    members += cc12m_members(5) + cc12m_members(6) + cc12m_members(5) + cc12m_members(7)
    members += [("a.b.jpg", archives.encoded(8)), ("a.b.txt", b"two dots")]
    members += [("../../../etc/evil.jpg", archives.encoded(9)), ("/abs/./evil.txt", b"path")]
    members += [(f"{key(10)}.jpg", archives.encoded(10)), (f"{key(10)}.txt", b"\xff\xfe")]
    members += cc12m_members(11) + cc12m_members(12)
    archives.write_tar(folder / "cc12m-train-0042.tar", members)
    lines = [{"key": key(i), "caption_llava": f"caption {i}"} for i in range(12) if i != 6]
    lines[-1]["caption_llava"] = "\n"
    lines.append({"key": "evil", "caption_llava": "caption of evil"})
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        (key(1), "truncated_image"),
        (key(2), "broken_image"),
        (key(3), "missing_caption"),
        (key(4), "missing_image"),
        (key(5), "duplicate_key"),
        (key(6), "missing_caption"),
        ("a.b", "bad_name"),
        (key(10), "broken_caption"),
        (key(11), "empty_caption"),
        (key(12), "missing_caption"),
    }


def test_samples_that_cannot_be_used_are_skipped_by_name_and_cause(tmp_path):
    expected = bad_cc12m(tmp_path)
    out = tmp_path / "out"
    arguments = (str(tmp_path / "*.tar"), str(tmp_path / "train.jsonl"))
    report = published.cc12m(*arguments, str(out), workers=1)
    assert archives.keys(out / "cc12m-train-0042.tar") == [key(0), key(5), key(7), "evil"]
    found = archives.skipped(out / "cc12m-train-0042.skipped.jsonl")
    assert set(found) == expected and len(found) == len(expected) == 10
    assert report.written == 4 and sum(report.skipped.values()) == 10
    assert report.skipped["missing_caption"] == 3 and "3 missing_caption" in report.describe()
    assert " at 0x" not in (out / "cc12m-train-0042.skipped.jsonl").read_text()
    published.cc12m(*arguments, str(tmp_path / "again"), workers=1)
    assert archives.everything(out) == archives.everything(tmp_path / "again")


def test_two_processes_write_the_same_bytes_as_one(tmp_path):
    pattern, lines = write_cc12m(tmp_path), str(tmp_path / "train.jsonl")
    one = published.cc12m(pattern, lines, str(tmp_path / "1"), workers=1)
    two = published.cc12m(pattern, lines, str(tmp_path / "2"), workers=2)
    assert archives.everything(tmp_path / "1") == archives.everything(tmp_path / "2")
    assert len(archives.everything(tmp_path / "2")) == 9
    assert (one.written, one.skipped) == (two.written, two.skipped)


_KILLED = """
import os, signal, sys
from t2i_jax.prepare import published, shards
write, count = shards.ShardWriter.write, 0
def killed(*arguments):
    global count
    count += 1
    if count == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*arguments)
shards.ShardWriter.write = killed
published.cc12m(*sys.argv[1:], workers=1)
"""


def test_a_run_that_was_killed_goes_on_and_ends_as_if_nothing_had_been(tmp_path, monkeypatch):
    pattern, lines = write_cc12m(tmp_path), str(tmp_path / "train.jsonl")
    out = tmp_path / "out"
    process = subprocess.run([sys.executable, "-c", _KILLED, pattern, lines, str(out)], check=False)
    assert process.returncode == -signal.SIGKILL
    assert [p.name for p in out.glob("*.tar")] == ["cc12m-train-0000.tar"]
    assert [p.name for p in out.glob(".*.partial")] == [".cc12m-train-0001.tar.partial"]
    before = (out / "cc12m-train-0000.tar").stat().st_mtime_ns
    report = published.cc12m(pattern, lines, str(out), workers=1)
    assert (out / "cc12m-train-0000.tar").stat().st_mtime_ns == before
    assert (report.shards, report.reused, report.written) == (3, 1, 7)
    published.cc12m(pattern, lines, str(tmp_path / "whole"), workers=1)
    assert archives.everything(out) == archives.everything(tmp_path / "whole")
    monkeypatch.setattr(shards, "ShardWriter", None)  # nothing is left to do
    assert published.cc12m(pattern, lines, str(out), workers=1).reused == 3


@pytest.mark.parametrize("change", ["cut", "captions", "nothing"])
def test_shards_that_are_not_what_they_should_be_are_made_again(tmp_path, change):
    pattern, lines = write_cc12m(tmp_path), tmp_path / "train.jsonl"
    out = tmp_path / "out"
    published.cc12m(pattern, str(lines), str(out), workers=1)
    whole = archives.everything(out)
    if change == "cut":
        with open(out / "cc12m-train-0001.tar", "r+b") as file:
            file.truncate(3000)
    elif change == "captions":
        lines.write_text(lines.read_text().replace("long caption 4", "longer caption 4"))
    report = published.cc12m(pattern, str(lines), str(out), workers=1)
    assert report.reused == {"cut": 2, "captions": 0, "nothing": 3}[change]
    assert (archives.everything(out) == whole) == (change != "captions")
    caption = archives.contents(out / "cc12m-train-0001.tar")[f"{key(4)}.{SYNTHETIC}"]
    assert (caption == b"a longer caption 4") == (change == "captions")


def test_a_kill_between_description_and_shard_is_noticed(tmp_path, monkeypatch):
    pattern, lines = write_cc12m(tmp_path), tmp_path / "train.jsonl"
    out = tmp_path / "out"
    published.cc12m(str(tmp_path), str(lines), str(out), workers=1)
    lines.write_text("".join(sorted(lines.read_text().replace("long", "tall").splitlines(True))))
    replace = os.replace

    def killed(source, target):
        if str(target).endswith(".tar"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        published.cc12m(pattern, str(lines), str(out), workers=1)
    published.cc12m(pattern, str(lines), str(out), workers=1)  # shards of the same size as before
    published.cc12m(pattern, str(lines), str(tmp_path / "whole"), workers=1)
    assert archives.everything(out) == archives.everything(tmp_path / "whole")


def test_a_damaged_archive_is_told_and_the_others_are_made(tmp_path):
    pattern, lines = write_cc12m(tmp_path), str(tmp_path / "train.jsonl")
    whole = (tmp_path / "cc12m-train-0001.tar").read_bytes()
    out = tmp_path / "out"
    for data in (whole[:2500], b"<html>Access denied</html>" * 100, gzip.compress(whole)):
        (tmp_path / "cc12m-train-0001.tar").write_bytes(data)
        with pytest.raises(UserError, match=r"1 of 3 shards[^\n]*\n[^\n]*cc12m-train-0001\.tar"):
            published.cc12m(pattern, lines, str(out), workers=1)
        names = ["cc12m-train-0000.tar", "cc12m-train-0002.tar"]
        assert [p.name for p in sorted(out.glob("*.tar"))] == names
        assert not list(out.glob("*partial*")) and not list(out.glob("cc12m-train-0001*"))
    (tmp_path / "cc12m-train-0001.tar").write_bytes(whole)
    assert published.cc12m(pattern, lines, str(out), workers=1).written == 7


def test_sources_and_what_others_wrote_are_never_overwritten(tmp_path):
    pattern, lines = write_cc12m(tmp_path), str(tmp_path / "train.jsonl")
    before = archives.everything(tmp_path)
    with pytest.raises(ConfigError, match="over its source"):
        published.cc12m(pattern, lines, str(tmp_path), workers=1)
    os.symlink(tmp_path, tmp_path / "link")
    with pytest.raises(ConfigError, match="over its source"):
        published.cc12m(pattern, lines, str(tmp_path / "link"), workers=1)
    assert archives.everything(tmp_path) == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out/cc12m-train-0001.tar").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"cc12m-train-0001\.tar is there, but was not made"):
        published.cc12m(pattern, lines, str(tmp_path / "out"), workers=1)
    assert (tmp_path / "out/cc12m-train-0001.tar").read_bytes() == b"mine"


class _Bucket(type(pathlib.Path())):
    """A remote folder: what epath adds to a path."""

    def copy(self, target, overwrite=False):
        shutil.copyfile(self, epath.Path(target))

    def stat(self, **options):
        status = super().stat(**options)
        return types.SimpleNamespace(
            length=status.st_size, mtime=status.st_mtime, st_mode=status.st_mode
        )


def test_all_may_be_remote_but_the_cache(tmp_path, monkeypatch):
    write_cc12m(tmp_path)
    monkeypatch.setattr(
        epath, "Path", lambda path: _Bucket(str(path).replace("gs://bucket", str(tmp_path)))
    )
    system = fsspec.filesystem("file")
    monkeypatch.setattr(
        fsspec.core, "url_to_fs", lambda path: (system, path.replace("gs://bucket", str(tmp_path)))
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    pattern, lines = "gs://bucket/cc12m-train-{0000..0002}.tar", "gs://bucket/train.jsonl"
    for reused in (0, 3):
        report = published.cc12m(pattern, lines, "gs://bucket/out", workers=1)
        assert (report.written, report.reused) == (7, reused)
    published.cc12m(str(tmp_path), str(tmp_path / "train.jsonl"), str(tmp_path / "b"), workers=1)
    assert archives.everything(tmp_path / "out") == archives.everything(tmp_path / "b")
    assert list(tmp_path.glob("home/t2i_jax/prepare/*/lines.jsonl"))
    assert not (tmp_path / "out/.cache").exists()


def test_arguments_that_cannot_be_meant_are_refused(tmp_path):
    pattern, lines, out = write_cc12m(tmp_path), str(tmp_path / "train.jsonl"), str(tmp_path / "o")
    with pytest.raises(MissingError, match=r"cc12m-train-0003\.tar \(and 6 more"):
        published.cc12m(str(tmp_path / "cc12m-train-{0000..0009}.tar"), lines, out)
    with pytest.raises(MissingError, match=r"none\.jsonl"):
        published.cc12m(pattern, str(tmp_path / "none.jsonl"), out)
    with pytest.raises(ConfigError, match="at least one"):
        published.cc12m(pattern, lines, out, workers=0)
    archives.write_tar(tmp_path / "b/cc12m-train-0001.tar", cc12m_members(0))
    with pytest.raises(ConfigError, match="same number"):
        published.cc12m(f"{pattern}::{tmp_path}/b/*.tar", lines, out)
    archives.write_tar(tmp_path / "b/other.tar", cc12m_members(0))
    with pytest.raises(ConfigError, match="no numbered archive"):
        published.cc12m(str(tmp_path / "b/other.tar"), lines, out)
    with pytest.raises(ConfigError, match="quality 0"):
        published.sa1b(pattern, lines, out, quality=0)
    with pytest.raises(ConfigError, match="0 samples"):
        published.sa1b(pattern, lines, out, samples_per_shard=0)


def test_captions_of_other_images_are_noticed_and_block_nothing(tmp_path):
    pattern = write_cc12m(tmp_path)
    (tmp_path / "other.jsonl").write_text('{"key": "x", "caption_llava": "of another set"}\n')
    with pytest.raises(UserError, match=r"Not one sample(.|\n)*7 missing_caption"):
        published.cc12m(pattern, str(tmp_path / "other.jsonl"), str(tmp_path / "out"), workers=1)
    report = published.cc12m(pattern, str(tmp_path / "train.jsonl"), str(tmp_path / "out"))
    assert report.written == 7
