"""Tiny imitations of SA-1B and JourneyDB, as downloaded and as extracted, become scaled shards."""

import io
import json
import logging

import numpy as np
from PIL import Image
import pytest

from t2i_jax.data.bad import BadSample
from t2i_jax.errors import ConfigError, MissingError, UserError
from t2i_jax.prepare import published
from t2i_jax.prepare.archives import Damaged
from t2i_jax.prepare.shards import IMAGE, SYNTHETIC
from tests import archives


def write_sa1b(folder, kind):
    """Twelve images of 3:2, in two tars, or in folders; sa_5 is cut and sa_7 has no caption."""
    pictures = {f"sa_{i}": archives.encoded(i, (150, 100)) for i in range(1, 13)}
    pictures["sa_5"] = pictures["sa_5"][:-300]
    names = sorted(pictures)
    halves = {"sa_000000": names[:7], "sa_000001": names[7:]}
    captions = {name: f"a picture of {name}".encode() for name in pictures if name != "sa_7"}
    for half, inside in halves.items():
        members = [m for n in inside for m in ((f"./{n}.jpg", pictures[n]), (f"./{n}.json", b"{}"))]
        if kind == "downloaded":
            archives.write_tar(folder / f"raw/{half}.tar", members)
            continue
        for name, data in members:
            path = folder / "raw" / (half if kind == "folders" else "") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    if kind == "downloaded":
        members = [(f"./{name}.txt", text) for name, text in captions.items()]
        archives.write_tar(folder / "SA1B_caption.tar.gz", members, "w:gz")
        return str(folder / "raw/sa_{000000..000001}.tar"), str(folder / "SA1B_caption.tar.gz")
    (folder / "captions").mkdir()
    for name, text in captions.items():
        (folder / f"captions/{name}.txt").write_bytes(text)
    return str(folder / "raw"), str(folder / "captions")


@pytest.mark.parametrize("kind", ["downloaded", "folder", "folders"])
def test_sa1b_is_scaled_and_cut_into_shards_whatever_its_layout(tmp_path, kind):
    images, captions = write_sa1b(tmp_path, kind)
    out = tmp_path / "out"
    report = published.sa1b(images, captions, str(out), samples_per_shard=5, size=48, workers=1)
    names = sorted(f"sa_{i}" for i in range(1, 13))
    cut = [names[:5], names[5:10], names[10:]]
    for n, expected in enumerate(cut):
        shard = out / f"sa1b-train-{n:04d}.tar"
        assert archives.keys(shard) == [name for name in expected if name not in ("sa_5", "sa_7")]
        for name, data in archives.contents(shard).items():
            stem, _, field = name.partition(".")
            if field == SYNTHETIC:
                assert data == f"a picture of {stem}".encode()
                continue
            image = Image.open(io.BytesIO(data))
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (72, 48))
            source = Image.open(io.BytesIO(archives.encoded(int(stem[3:]), (150, 100))))
            wanted = np.asarray(source.resize((72, 48), Image.Resampling.BILINEAR), float)
            assert np.abs(np.asarray(image, float) - wanted).mean() < 3
    assert (report.shards, report.written) == (3, 10)
    assert report.skipped == {"missing_caption": 1, "truncated_image": 1}
    assert archives.skipped(out / "sa1b-train-0001.skipped.jsonl") == [
        ("sa_5", "truncated_image"),
        ("sa_7", "missing_caption"),
    ]
    assert archives.skipped(out / "sa1b-train-0002.skipped.jsonl") == []


def test_sa1b_in_a_folder_of_archives_and_with_more_of_them_later(tmp_path):
    _, captions = write_sa1b(tmp_path, "downloaded")
    options = {"samples_per_shard": 5, "size": 32, "workers": 1}
    first, folder = str(tmp_path / "raw/sa_000000.tar"), str(tmp_path / "raw")
    published.sa1b(first, captions, str(tmp_path / "out"), **options)
    assert len(archives.keys(tmp_path / "out/sa1b-train-0001.tar")) == 2
    report = published.sa1b(folder, captions, str(tmp_path / "out"), **options)
    assert (report.shards, report.reused, report.written) == (3, 1, 10)
    published.sa1b(folder, captions, str(tmp_path / "whole"), **options)
    assert archives.everything(tmp_path / "out") == archives.everything(tmp_path / "whole")


def test_sa1b_counts_its_archives_once(tmp_path, monkeypatch):
    images, captions = write_sa1b(tmp_path, "downloaded")
    published.sa1b(images, captions, str(tmp_path / "out"), size=32, workers=1)
    monkeypatch.setattr(published.sources, "_count", None)
    report = published.sa1b(images, captions, str(tmp_path / "out"), size=32, workers=1)
    assert report.reused == report.shards == 1
    with open(tmp_path / "raw/sa_000001.tar", "r+b") as file:
        file.truncate(1000)
    monkeypatch.undo()
    with pytest.raises(Damaged, match=r"sa_000001\.tar"):
        published.sa1b(images, captions, str(tmp_path / "out"), size=32, workers=1)


def test_captions_of_other_images_are_noticed_and_block_nothing(tmp_path):
    images, captions = write_sa1b(tmp_path, "folders")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x.txt").write_text("of another image")
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match=r"Not one sample(.|\n)*12 missing_caption"):
        published.sa1b(images, str(tmp_path / "other"), out, size=32, workers=1)
    assert published.sa1b(images, captions, out, size=32, workers=1).written == 10


def test_sa1b_without_images_is_refused(tmp_path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(MissingError, match="not one image"):
        published.sa1b(str(tmp_path / "raw"), str(tmp_path), str(tmp_path / "out"), workers=1)


@pytest.mark.parametrize(
    ("size", "scaled"),
    [((150, 100), (96, 64)), ((100, 150), (64, 96)), ((30, 20), (96, 64)), ((64, 64), (64, 64)),
     ((101, 64), (101, 64)), ((100, 33), (193, 64)), ((1500, 2250), (64, 96))],
)  # fmt: skip
def test_the_shorter_side_is_scaled_and_small_images_grow_as_in_torchvision(size, scaled):
    found = Image.open(io.BytesIO(published.scaled(archives.encoded(0, size), 64, 95)))
    assert found.size == scaled


def test_the_filter_is_the_bilinear_one_of_pillow():
    pixels = np.random.default_rng(0).integers(0, 256, (90, 150, 3), np.uint8)
    source, wanted = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(source, "PNG")
    small = Image.fromarray(pixels).resize((53, 32), Image.Resampling.BILINEAR)
    small.save(wanted, "JPEG", quality=95)
    assert published.scaled(source.getvalue(), 32, 95) == wanted.getvalue()


def test_scaled_images_are_upright_opaque_rgb():
    turned = Image.Exif()
    turned[0x0112] = 6
    data = archives.encoded(0, (60, 30), exif=turned)
    assert Image.open(io.BytesIO(published.scaled(data, 20, 95))).size == (20, 40)
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    buffer = io.BytesIO()
    clear.save(buffer, "PNG")
    image = Image.open(io.BytesIO(published.scaled(buffer.getvalue(), 20, 95)))
    assert image.mode == "RGB" and np.asarray(image).min() > 250
    for mode in ("L", "RGBA"):
        kind = "PNG" if mode == "RGBA" else "JPEG"
        image = Image.open(
            io.BytesIO(published.scaled(archives.encoded(1, mode=mode, kind=kind), 20, 95))
        )
        assert image.mode == "RGB"


def test_quality_is_that_of_the_jpeg():
    plain = Image.open(io.BytesIO(archives.encoded(3, (64, 64))))
    for quality in (60, 95):
        buffer = io.BytesIO()
        plain.save(buffer, "JPEG", quality=quality)
        found = Image.open(io.BytesIO(published.scaled(archives.encoded(3, (64, 64)), 64, quality)))
        assert found.quantization == Image.open(buffer).quantization


def test_an_image_like_a_thread_is_refused_not_blown_up():
    buffer = io.BytesIO()
    Image.new("RGB", (3000, 2)).save(buffer, "PNG")
    with pytest.raises(BadSample, match="narrow"):
        published.scaled(buffer.getvalue(), 512, 95)


def write_journeydb(folder, kind, count=4):
    """Folders 000 and 001 of `count` images; their annotations, one of an image that lacks."""
    lines = []
    for number in range(2):
        names = [f"{number}{i}-uuid" for i in range(count)]
        members = [
            (f"./{number:03d}/{n}.jpg", archives.encoded(number * 10 + i, (60, 90)))
            for i, n in enumerate(names)
        ]
        if kind == "downloaded":
            archives.write_tar(folder / f"imgs/{number:03d}.tgz", members, "w:gz")
        elif kind == "tar":
            archives.write_tar(folder / f"imgs/{number:03d}.tar", members)
        else:
            for name, data in members:
                (folder / "imgs" / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / "imgs" / name).write_bytes(data)
        for name in [*names[1:], f"{number}-gone"]:
            lines.append(
                {"img_path": f"./{number:03d}/{name}.jpg", "prompt": f"{name} --ar 2:3 --v 5",
                 "Task2": {"Caption": f"A caption of {name}."}}
            )  # fmt: skip
    lines.append({"img_path": "./150/other.jpg", "prompt": "of a folder that is not there"})
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    if kind == "downloaded":
        path = folder / "train_anno_realease_repath.jsonl.tgz"
        archives.write_tar(path, [("./train_anno_realease_repath.jsonl", text)], "w:gz")
        return str(folder / "imgs"), str(path)
    (folder / "train_anno_realease_repath.jsonl").write_bytes(text)
    return str(folder / "imgs"), str(folder / "train_anno_realease_repath.jsonl")


@pytest.mark.parametrize("kind", ["downloaded", "tar", "extracted"])
def test_journeydb_has_a_shard_for_a_folder_whatever_its_layout(tmp_path, kind, caplog):
    images, annotations = write_journeydb(tmp_path, kind)
    out = tmp_path / "out"
    with caplog.at_level(logging.WARNING):
        report = published.journeydb(images, annotations, str(out), size=32, workers=1)
    assert "198 of 200" in caplog.text and "002, 003" in caplog.text
    assert [p.name for p in sorted(out.glob("*.tar"))] == [
        "journeydb-train-000.tar",
        "journeydb-train-001.tar",
    ]
    found = archives.contents(out / "journeydb-train-001.tar")
    assert archives.keys(out / "journeydb-train-001.tar") == ["11-uuid", "12-uuid", "13-uuid"]
    assert found[f"12-uuid.{SYNTHETIC}"] == b"12-uuid --ar 2:3 --v 5"
    assert Image.open(io.BytesIO(found[f"12-uuid.{IMAGE}"])).size == (32, 48)
    assert archives.skipped(out / "journeydb-train-001.skipped.jsonl") == [
        ("10-uuid", "missing_caption"),
        ("1-gone", "missing_image"),
    ]
    assert (report.written, report.skipped) == (6, {"missing_caption": 2, "missing_image": 2})


def test_all_layouts_of_journeydb_give_the_same_shards(tmp_path):
    for kind in ("downloaded", "extracted"):
        images, annotations = write_journeydb(tmp_path / kind, kind)
        out = str(tmp_path / kind / "out")
        published.journeydb(images, annotations, out, num_shards=2, size=32, workers=1)
    found = [
        {
            n: d
            for n, d in archives.everything(tmp_path / kind / "out").items()
            if n.endswith(".tar")
        }
        for kind in ("downloaded", "extracted")
    ]
    assert found[0] == found[1] and len(found[0]) == 2


def test_journeydb_from_a_pattern_with_other_captions(tmp_path):
    images, annotations = write_journeydb(tmp_path, "downloaded")
    options = {"caption_field": "Task2.Caption", "num_shards": 1, "size": 32, "workers": 1}
    report = published.journeydb(f"{images}/*.tgz", annotations, str(tmp_path / "out"), **options)
    assert report.shards == 1
    shard = archives.contents(tmp_path / "out/journeydb-train-000.tar")
    assert shard[f"03-uuid.{SYNTHETIC}"] == b"A caption of 03-uuid."


def test_a_cut_archive_of_journeydb_is_told(tmp_path):
    images, annotations = write_journeydb(tmp_path, "downloaded")
    path = tmp_path / "imgs/001.tgz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"1 of 2 shards(.|\n)*001\.tgz.*Download it again"):
        published.journeydb(images, annotations, str(tmp_path / "out"), size=32, workers=1)
    assert [p.name for p in tmp_path.glob("out/*.tar")] == ["journeydb-train-000.tar"]


def test_the_other_annotations_of_journeydb_and_other_folders_are_refused(tmp_path):
    images, _ = write_journeydb(tmp_path, "downloaded")
    other = tmp_path / "train_anno.jsonl"
    other.write_text('{"img_path": "MidjourneyDB_03_latest/./imgs/Upscaled.jpg", "prompt": "x"}\n')
    with pytest.raises(ConfigError, match=r"No line of .*train_anno\.jsonl.*\./000/NAME\.jpg"):
        published.journeydb(images, str(other), str(tmp_path / "out"))
    with pytest.raises(MissingError, match="data/train/imgs"):
        published.journeydb(str(tmp_path), str(other), str(tmp_path / "out"))
