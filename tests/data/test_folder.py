"""Folders of pictures: captions files written by json, csv and pyarrow, and hostile paths."""

from concurrent import futures
import csv
import io
import json
import os
import pathlib
import pickle
import random
import shutil
import subprocess
import sys

import cloudpickle
from etils import epath
import fsspec
from PIL import Image
import pytest

from t2i_jax.data import folder, tables
from t2i_jax.data.bad import BadSample, Cause
from t2i_jax.data.folder import Folder

FIELDS = ("file_name", "text", "old")
CAPTIONS = ["plain", ' "quoted", with\ncommas ', "", "日本 ✨", 'a "b', "x\r\ny", "last"]


def picture(width=12, height=8, kind="JPEG", **options):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (9, 99, 199)).save(buffer, kind, **options)
    return buffer.getvalue()


def write(path, rows):
    """A captions file of the kind that its name says."""
    kind = pathlib.Path(path).suffix
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=max(3, len(rows) // 2))
    return str(path)


def make(path, captions=CAPTIONS):
    """A folder with img/0.jpg, ... and rows for them."""
    (path / "img").mkdir(parents=True)
    for i in range(len(captions)):
        (path / "img" / f"{i}.jpg").write_bytes(picture(10 + i))
    return [
        {"file_name": f"img/{i}.jpg", "id": i, "text": text, "old": f"old {i}"}
        for i, text in enumerate(captions)
    ]


def cause(call, *args):
    with pytest.raises(BadSample) as error:
        call(*args)
    return error.value.cause


@pytest.mark.parametrize("kind", tables.KINDS)
@pytest.mark.parametrize("stem", ["metadata", "captions"])
def test_reads_what_was_written(tmp_path, kind, stem):
    rows = make(tmp_path)
    path = write(tmp_path / f"{stem}.{kind}", rows)
    source = Folder(str(tmp_path), *FIELDS)
    assert len(source) == len(CAPTIONS)
    for i, text in enumerate(CAPTIONS):
        assert source[i] == {
            "image": (tmp_path / "img" / f"{i}.jpg").read_bytes(),
            "captions": (text.strip(),),
            "original_caption": f"old {i}",
        }
        assert source.size(i) == (10 + i, 8)
        assert source.name(i).startswith(f"{stem}.{kind}:")
        assert source.name(i).endswith(f" img/{i}.jpg")
    for call in (source.__getitem__, source.caption, source.name, source.size):
        for i in (-1, len(CAPTIONS)):
            with pytest.raises(IndexError):
                call(i)
    assert Folder(path, *FIELDS).fingerprint == source.fingerprint
    assert Folder(path, *FIELDS[:2])[0]["original_caption"] is None
    shutil.rmtree(tmp_path / "img")
    assert [source.caption(i) for i in range(len(CAPTIONS))] == [t.strip() for t in CAPTIONS]


def test_names_have_the_lines_of_an_editor(tmp_path):
    rows = make(tmp_path)
    source = Folder(write(tmp_path / "c.csv", rows), *FIELDS)
    with open(tmp_path / "c.csv", newline="") as file:
        lines = file.read().replace("\r\n", "\n").split("\n")
    for i in range(len(rows)):
        line = int(source.name(i).split()[0].partition(":")[2])
        assert lines[line - 1].startswith(f"img/{i}.jpg,")
    source = Folder(write(tmp_path / "c.jsonl", rows), *FIELDS)
    assert source.name(3) == "c.jsonl:4 img/3.jpg"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_lists_and_several_columns_are_several_captions(tmp_path, kind):
    make(tmp_path)
    rows = [
        {"image": "img/0.jpg", "texts": ["a", " b "], "more": "c"},
        {"image": "img/1.jpg", "texts": [], "more": "c"},
        {"image": "img/2.jpg", "texts": ["", None], "more": None},
        {"image": "img/3.jpg", "texts": None, "more": None},
    ]
    source = Folder(write(tmp_path / f"x.{kind}", rows), "image", "more, texts", "texts")
    assert source[0]["captions"] == ("c", "a", "b")
    assert source[0]["original_caption"] == "a"
    assert source[1]["captions"] == ("c",) and source[1]["original_caption"] is None
    assert source[2]["captions"] == ("",)
    assert cause(source.caption, 3) == cause(source.__getitem__, 3) == Cause.MISSING_CAPTION


def test_which_captions_file(tmp_path):
    rows = make(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent' does not exist"):
        Folder(f"{tmp_path}/absent", *FIELDS)
    (tmp_path / "notes.json").write_text("[]")
    with pytest.raises(ValueError, match=r"notes\.json' is no captions file: jsonl, csv, parquet"):
        Folder(f"{tmp_path}/notes.json", *FIELDS)
    write(tmp_path / "train.jsonl", rows)
    with pytest.raises(ValueError, match=r"neither .* There is img, notes\.json, train\.jsonl"):
        Folder(str(tmp_path), *FIELDS)
    assert len(Folder(f"{tmp_path}/train.jsonl", *FIELDS)) == len(rows)
    write(tmp_path / "captions.csv", rows)
    write(tmp_path / "metadata.jsonl", rows)
    with pytest.raises(ValueError, match=r"metadata\.jsonl and captions\.csv; name the one"):
        Folder(str(tmp_path), *FIELDS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="There is nothing"):
        Folder(f"{tmp_path}/empty", *FIELDS)


@pytest.mark.parametrize("kind", tables.KINDS)
def test_unknown_columns(tmp_path, kind):
    path = write(tmp_path / f"captions.{kind}", make(tmp_path))
    with pytest.raises(ValueError, match="has no column 'jpg', 'caption'; it has") as error:
        Folder(path, "jpg", "caption,text", "old")
    for part in ("'file_name', 'id', 'text', 'old'", "--config.data.caption_field", path):
        assert part in str(error.value)


def _link_out(path):
    outside = path.parent / "outside"
    outside.mkdir()
    (outside / "secret.jpg").write_bytes(b"secret")
    (path / "link.jpg").symlink_to(outside / "secret.jpg")
    (path / "dir").symlink_to(outside)
    (path / "relative.jpg").symlink_to("../outside/secret.jpg")
    (path / "twice.jpg").symlink_to("link.jpg")
    (path / "loop.jpg").symlink_to("loop.jpg")
    (path / "passwd.jpg").symlink_to("notes.md")
    (path / "notes.md").write_text("secret")
    (path / "notes.txt").write_text("secret")
    (path / "folder.jpg").mkdir()
    os.mkfifo(path / "pipe.jpg")


@pytest.mark.parametrize(
    "path",
    [
        "{outside}/secret.jpg",
        "../outside/secret.jpg",
        "img/../../outside/secret.jpg",
        "img/../img/0.jpg",
        "link.jpg",
        "dir/secret.jpg",
        "relative.jpg",
        "twice.jpg",
        "passwd.jpg",
        "notes.md",
        "notes.txt",
        "jpg",
        ".jpg",
        "folder.jpg",
        "pipe.jpg",
        "absent.jpg",
        "img/0.jpg/x.jpg",
        "img",
        "",
        "\0.jpg",
        "img/0.jpg\0",
        "http://localhost/0.jpg",
        "file:///etc/passwd.jpg",
        None,
        7,
        ["img/0.jpg"],
        {"path": "img/0.jpg"},
    ],
)
def test_nothing_but_images_in_the_folder_is_read(tmp_path, path):
    root = tmp_path / "root"
    make(root)
    _link_out(root)
    if isinstance(path, str):
        path = path.replace("{outside}", str(tmp_path / "outside"))
    (root / "c.jsonl").write_text(json.dumps({"file_name": path, "text": "x"}))
    source = Folder(f"{root}/c.jsonl", "file_name", "text")
    assert cause(source.__getitem__, 0) == Cause.MISSING_IMAGE
    assert cause(source.size, 0) == Cause.MISSING_IMAGE
    assert source.caption(0) == "x"
    assert source.name(0).startswith("c.jsonl:1")


def test_paths_that_cannot_be_read(tmp_path):
    make(tmp_path)
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    paths = ["loop.jpg", "\ud800.jpg", "x" * 300 + ".jpg"]
    rows = [{"file_name": path, "text": "x"} for path in paths]
    source = Folder(write(tmp_path / "c.jsonl", rows), "file_name", "text")
    for i in range(len(rows)):
        assert cause(source.__getitem__, i) in (Cause.UNREADABLE, Cause.MISSING_IMAGE)
        source.name(i).encode()


def test_links_inside_and_extensions_of_any_case_are_read(tmp_path):
    make(tmp_path)
    (tmp_path / "a.JPG").symlink_to("img/0.jpg")
    (tmp_path / "b.jpeg").write_bytes(picture())
    (tmp_path / "c.d.PnG").write_bytes(picture(kind="PNG"))
    (tmp_path / "e.webp").write_bytes(picture(kind="WEBP"))
    paths = ["a.JPG", "b.jpeg", "c.d.PnG", "./e.webp", "img//0.jpg"]
    rows = [{"file_name": path, "text": "x"} for path in paths]
    (tmp_path.parent / "alias").unlink(missing_ok=True)
    (tmp_path.parent / "alias").symlink_to(tmp_path)
    write(tmp_path / "c.jsonl", rows)
    for place in (tmp_path, tmp_path.parent / "alias"):
        source = Folder(f"{place}/c.jsonl", "file_name", "text")
        for i, path in enumerate(paths):
            assert source[i]["image"] == (tmp_path / path).read_bytes()


def test_captions_that_are_none(tmp_path):
    make(tmp_path)
    texts = [None, [], [None], 7, float("nan"), {"en": "x"}, ["x", 7], "\ud800", True]
    rows = [{"file_name": "img/0.jpg", "text": text} for text in texts]
    rows += [{"file_name": "img/0.jpg"}, {}, {"file_name": "img/0.jpg", "text": ""}]
    source = Folder(write(tmp_path / "c.jsonl", rows), "file_name", "text")
    missing, broken = Cause.MISSING_CAPTION, Cause.BROKEN_CAPTION
    for i, expected in enumerate([missing] * 3 + [broken] * 6 + [missing] * 2):
        assert cause(source.caption, i) == cause(source.__getitem__, i) == expected, i
    assert source[11]["captions"] == ("",)
    originals = Folder(f"{tmp_path}/c.jsonl", "file_name", "file_name", "text")
    assert originals[0]["original_caption"] is None
    assert cause(originals.__getitem__, 3) == broken


def test_lines_that_are_not_json(tmp_path):
    make(tmp_path)
    good = b'{"file_name": "img/0.jpg", "text": "x"}'
    bad = [b"{", b"[]", b'"text"', b"null", good + b",", b"[" * 50_000, b'{"a": ' * 50_000]
    bad += [b'{"text": ' + b"9" * 5000 + b"}", b'{"text": "\xff"}', good.decode().encode("utf-16")]
    (tmp_path / "c.jsonl").write_bytes(b"\n".join([b"\n", good, *bad, good]))
    source = Folder(f"{tmp_path}/c.jsonl", "file_name", "text")
    assert source.caption(0) == source.caption(len(source) - 1) == "x"
    for i in range(1, len(source) - 1):
        assert cause(source.caption, i) == cause(source.size, i) == Cause.BROKEN_CAPTION
        assert source.name(i) == f"c.jsonl:{i + 3}"
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(bad))
    with pytest.raises(ValueError, match=r"none of its first rows is a JSON object; line 1: not J"):
        Folder(f"{tmp_path}/c.jsonl", "file_name", "text")
    for nothing in (b"", b"\n\r\n\n"):
        (tmp_path / "c.jsonl").write_bytes(nothing)
        with pytest.raises(ValueError, match=r"c\.jsonl has no rows"):
            Folder(f"{tmp_path}/c.jsonl", "file_name", "text")


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50, 1 << 20])
def test_lines_wherever_chunks_end(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(tables, "_CHUNK", chunk)
    rng = random.Random(chunk)
    for trial in range(20):
        kinds = ["", "", "{}", '{"t": "é"}', '{"t": "longer"}', '{"t": null}']
        lines = [*rng.choices(kinds, k=rng.randrange(1, 30)), '{"t": "end"}']
        ends = [rng.choice(["\n", "\r\n"]) for _ in lines]
        ends[-1] = rng.choice(["", "\n", "\r\n", "\n\n"])
        text = rng.choice(["", "\ufeff"]) + "".join(map("".join, zip(lines, ends, strict=True)))
        path = tmp_path / f"{trial}.jsonl"
        path.write_bytes(text.encode())
        table = tables.open_table(str(path), ["t"])
        expected = [(n, json.loads(line)) for n, line in enumerate(lines, 1) if line]
        if text.startswith("\ufeff") and not lines[0]:
            expected = None  # a line of nothing but a mark is no JSON
        found = []
        for i in range(len(table)):
            try:
                found.append((table.number(i), table.row(i)))
            except BadSample:
                assert expected is None and i == 0
        if expected is not None:
            assert found == expected


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_agrees_with_the_module_that_reads_all_of_it(tmp_path, end):
    rng = random.Random(0)
    parts = ["a", '"', ",", "\n", "\r\n", " ", "ü", "日", "\x85", "\u2028", "'", "\t"]
    for trial in range(30):
        path = tmp_path / f"{trial}.csv"
        with open(path, "w", newline="", encoding=rng.choice(["utf-8", "utf-8-sig"])) as file:
            writer = csv.writer(file, lineterminator=end)
            writer.writerow(["id", "t", 'na"me', "x,y"])
            for i in range(rng.randrange(1, 20)):
                texts = ["".join(rng.choices(parts, k=rng.randrange(6))) for _ in range(3)]
                writer.writerow([i, *texts])
                file.write(end * rng.randrange(2))
        with open(path, newline="", encoding="utf-8-sig") as file:
            expected = list(csv.DictReader(file))
        table = tables.open_table(str(path), ["t", "x,y"])
        assert [table.row(i) for i in range(len(table))] == expected


def test_broken_csv(tmp_path):
    make(tmp_path)
    head = b"file_name,text\n"
    good = b"img/0.jpg,x\n"
    rows = [good, b"img/0.jpg,a cat, a dog\n", b"img/0.jpg\n", b"img/0.jpg,\xff\n", b",x\n", good]
    (tmp_path / "c.csv").write_bytes(head + b"".join(rows))
    source = Folder(f"{tmp_path}/c.csv", "file_name", "text")
    assert source[0]["captions"] == source[5]["captions"] == ("x",)
    assert cause(source.caption, 1) == Cause.BROKEN_CAPTION
    assert cause(source.caption, 2) == Cause.MISSING_CAPTION
    assert cause(source.caption, 3) == Cause.BROKEN_CAPTION
    assert cause(source.__getitem__, 4) == Cause.MISSING_IMAGE
    assert source.name(3) == "c.csv:5"

    for rows, message in (
        ([good, b'img/1.jpg,"open\n', good], r"c\.csv, line 3: a quote is opened and not closed"),
        ([good, b'img/1.jpg,"open\n', good * 20_000], r"c\.csv, line 3: field larger"),
        ([good, b"img/1.jpg,a\rb\n", good], r"c\.csv, line 3: new-line character"),
    ):
        (tmp_path / "c.csv").write_bytes(head + b"".join(rows))
        with pytest.raises(ValueError, match=message):
            Folder(f"{tmp_path}/c.csv", "file_name", "text")
    (tmp_path / "c.csv").write_bytes(head + good + b'img/0.jpg,"closed"\n\n')
    assert Folder(f"{tmp_path}/c.csv", "file_name", "text").caption(1) == "closed"
    (tmp_path / "c.csv").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        Folder(f"{tmp_path}/c.csv", "file_name", "text")
    (tmp_path / "c.csv").write_bytes(head)
    with pytest.raises(ValueError, match="has no rows"):
        Folder(f"{tmp_path}/c.csv", "file_name", "text")


def test_parquet(tmp_path):
    """Columns of other kinds, categories, text that is not UTF-8, damaged files."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    make(tmp_path)
    path = str(tmp_path / "c.parquet")
    texts = pa.array([b"x", b"\xff", None], pa.binary()).cast(pa.string(), safe=False)
    columns = {
        "image": pa.array(["img/0.jpg", "img/1.jpg", None], pa.large_string()),
        "text": texts,
        "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
        "n": pa.array([1, 2, 3]),
        "picture": pa.array([{"bytes": b"", "path": "img/0.jpg"}] * 3),
        "turns": pa.array([[{"text": "x"}]] * 3),
    }
    parquet.write_table(pa.table(columns), path, row_group_size=1)
    source = Folder(path, "image", "text", "kind")
    assert source[0]["captions"] == ("x",) and source[0]["original_caption"] == "a"
    assert cause(source.caption, 1) == Cause.BROKEN_CAPTION
    assert cause(source.caption, 2) == Cause.MISSING_CAPTION
    assert cause(Folder(path, "image", "kind").__getitem__, 2) == Cause.MISSING_IMAGE
    for fields in (("n", "text"), ("image", "n"), ("picture", "text"), ("image", "turns")):
        with pytest.raises(ValueError, match=r"c\.parquet: the column '\w+' is of "):
            Folder(path, *fields)
    content = pathlib.Path(path).read_bytes()
    for damaged in (b"", b"PAR1", content[: len(content) // 2], content[:4] + content[-300:]):
        pathlib.Path(path).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"c\.parquet is no whole Parquet file"):
            Folder(path, "image", "text")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install pyarrow.*\[parquet\]"):
        Folder(f"{tmp_path}/c.parquet", "image", "text")


def pairs(path):
    """Pictures with text files; what is in the order of the paths, and their captions."""
    files = {
        "b.jpg": "b",
        "a/2.PNG": "two",
        "a/10.webp": "ten",
        "a/z/deep.er.jpeg": "deep",
        "a-b/1.jpg": "dash",
    }
    for name, text in files.items():
        image = path / name
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(picture(10 + len(text)))
        image.with_suffix(".txt").write_text(f" {text}\n")
    order = ["a/10.webp", "a/2.PNG", "a/z/deep.er.jpeg", "a-b/1.jpg", "b.jpg"]
    return {name: files[name] for name in order}


def test_pictures_with_text_files(tmp_path):
    expected = pairs(tmp_path)
    for name in (".hidden/x", "a/.x", "a/._2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jpg").write_bytes(picture())
        (tmp_path / f"{name}.txt").write_text("hidden")
    for name in ("README.md", "jpg", "a/alone.txt", "movie.gif"):
        (tmp_path / name).write_text("not a sample")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    source = Folder(str(tmp_path), "", "")
    assert [source.name(i) for i in range(len(source))] == list(expected)
    for i, (name, text) in enumerate(expected.items()):
        assert source[i] == {
            "image": (tmp_path / name).read_bytes(),
            "captions": (text,),
            "original_caption": None,
        }
        assert source.size(i) == (10 + len(text), 8)
    for call in (source.__getitem__, source.caption, source.name, source.size):
        for i in (-1, len(expected)):
            with pytest.raises(IndexError):
                call(i)


def test_text_files_that_are_bad(tmp_path, caplog):
    names = ["0ok", "1none", "2latin", "3bom", "4empty", "5link", "6big", "7folder"]
    for name in names:
        (tmp_path / f"{name}.jpg").write_bytes(picture())
    (tmp_path / "0ok.txt").write_text("ok")
    (tmp_path / "2latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "3bom.txt").write_bytes("é".encode("utf-8-sig"))
    (tmp_path / "4empty.txt").write_text("\n")
    (tmp_path / "5link.txt").symlink_to("/etc/passwd")
    (tmp_path / "6big.txt").write_text("x" * (1 << 20) + "y")
    (tmp_path / "7folder.txt").mkdir()
    with caplog.at_level("WARNING"):
        source = Folder(str(tmp_path), "", "")
    assert "1 of 8 images have no .txt" in caplog.text and "1none.jpg" in caplog.text
    assert [source.caption(i) for i in (0, 3, 4)] == ["ok", "é", ""]
    for i, expected in (
        (1, Cause.MISSING_CAPTION),
        (2, Cause.BROKEN_CAPTION),
        (5, Cause.MISSING_CAPTION),
        (6, Cause.LONG_CAPTION),
        (7, Cause.MISSING_CAPTION),
    ):
        assert cause(source.caption, i) == cause(source.__getitem__, i) == expected
        assert source.size(i) == (12, 8)
        assert source.name(i) == f"{names[i]}.jpg"
    (tmp_path / "0ok.jpg").unlink()
    assert cause(source.__getitem__, 0) == Cause.MISSING_IMAGE


def test_large_images_are_not_read(tmp_path, monkeypatch):
    path = write(tmp_path / "c.jsonl", make(tmp_path))
    monkeypatch.setattr(folder, "_MAX_IMAGE", len(picture(10)))
    source = Folder(path, *FIELDS)
    assert source[0]["image"]
    (tmp_path / "img" / "1.jpg").write_bytes(picture(11) + b"more" * 100)
    assert cause(source.__getitem__, 1) == Cause.TOO_LARGE_IMAGE


def test_size_is_read_from_the_header(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = os.urandom(3 * 400 * 300)
    full = io.BytesIO()
    Image.frombytes("RGB", (400, 300), noise).save(full, "JPEG", quality=95, exif=exif)
    wide = picture(40, 30, exif=exif, icc_profile=os.urandom(200_000))  # the size comes after it
    webp = picture(40, 30, "WEBP", exif=exif)
    bodies = [full.getvalue(), full.getvalue()[:70_000], wide, webp, b"no picture", b"no" * 50_000]
    rows = make(tmp_path, ["x"] * len(bodies))
    for body, row in zip(bodies, rows, strict=True):
        (tmp_path / row["file_name"]).write_bytes(body)
    source = Folder(write(tmp_path / "c.jsonl", rows), *FIELDS)
    assert [source.size(i) for i in range(4)] == [(300, 400)] * 2 + [(30, 40)] * 2
    for i in (4, 5):
        assert cause(source.size, i) == Cause.BROKEN_IMAGE


@pytest.mark.parametrize("kind", [*tables.KINDS, "pairs"])
def test_fingerprint(tmp_path, kind):
    def written(name, rows):
        place = tmp_path / name
        if kind == "pairs":
            place.mkdir()
            for row in rows:
                stem = place / pathlib.Path(row["file_name"]).stem
                stem.with_suffix(".jpg").write_bytes(picture())
                stem.with_suffix(".txt").write_text("x")
        else:
            place.mkdir()
            write(place / f"captions.{kind}", rows)
        return Folder(str(place), *FIELDS)

    rows = [{"file_name": f"{i}.jpg", "text": "x" * i, "old": "y"} for i in range(5)]
    first = written("first", rows).fingerprint
    assert int(first, 16) >= 0
    assert written("second", rows).fingerprint == first
    assert written("third", rows[1:]).fingerprint != first
    assert (
        written("fourth", [*rows[:4], {**rows[4], "file_name": "other.jpg"}]).fingerprint != first
    )
    if kind != "pairs":
        assert Folder(f"{tmp_path}/first", "file_name", "old").fingerprint != first
        (tmp_path / "first" / f"captions.{kind}").rename(tmp_path / "first" / f"metadata.{kind}")
        assert Folder(f"{tmp_path}/first", *FIELDS).fingerprint != first


@pytest.mark.parametrize("kind", [*tables.KINDS, "pairs"])
def test_threads_and_other_processes(tmp_path, kind):
    if kind == "pairs":
        pairs(tmp_path)
        source = Folder(str(tmp_path), "", "")
    else:
        source = Folder(write(tmp_path / f"c.{kind}", make(tmp_path)), *FIELDS)
    samples = [source[i] for i in range(len(source))]
    with futures.ThreadPoolExecutor(8) as executor:
        numbers = [i % len(source) for i in range(2000)]
        assert all(executor.map(lambda i: source[i] == samples[i], numbers))
    data = cloudpickle.dumps(source)
    assert [pickle.loads(data)[i] for i in range(len(source))] == samples
    code = (
        "import pickle, sys; s = pickle.load(sys.stdin.buffer); "
        "sys.stdout.buffer.write(pickle.dumps([s[i] for i in range(len(s))])); "
        "assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert pickle.loads(done.stdout) == samples


@pytest.mark.parametrize("kind", tables.KINDS)
def test_large_tables_are_not_copied_to_workers(tmp_path, kind):
    """Arrays of a megabyte or more go by a file that is mapped."""
    rows = [{"file_name": f"{i}.jpg", "text": f"caption {i}"} for i in range(150_000)]
    source = Folder(write(tmp_path / f"c.{kind}", rows), "file_name", "text")
    data = cloudpickle.dumps(source)
    assert len(data) < 10_000
    again = pickle.loads(data)
    assert [again.caption(i) for i in (0, 77_777, 149_999)] == [
        "caption 0",
        "caption 77777",
        "caption 149999",
    ]
    assert again.fingerprint == source.fingerprint


def test_a_captions_file_that_shrinks(tmp_path):
    path = write(tmp_path / "c.jsonl", make(tmp_path))
    source = Folder(path, *FIELDS)
    os.truncate(path, 100)
    assert cause(source.__getitem__, 5) == Cause.UNREADABLE
    assert source.name(5) == "c.jsonl:6"


@pytest.mark.parametrize("kind", ["jsonl", "csv", "pairs"])
def test_remote_paths_go_through_epath(tmp_path, monkeypatch, kind):
    real = tmp_path / "real"
    if kind == "pairs":
        pairs(real)
        local = Folder(str(real), "", "")
    else:
        local = Folder(write(real / f"captions.{kind}", [*make(real)]), *FIELDS)
    monkeypatch.setattr(
        epath, "Path", lambda path: pathlib.Path(str(path).replace("gs://bucket", str(real)))
    )
    system = fsspec.filesystem("file")
    monkeypatch.setattr(
        fsspec.core, "url_to_fs", lambda path: (system, path.replace("gs://bucket", str(real)))
    )
    remote = Folder("gs://bucket", *FIELDS)
    assert [remote[i] for i in range(len(local))] == [local[i] for i in range(len(local))]
    assert [remote.name(i) for i in range(len(local))] == [local.name(i) for i in range(len(local))]
    assert remote.fingerprint == local.fingerprint
    if kind == "jsonl":
        (real / "captions.jsonl").unlink()
        (tmp_path / "secret.jpg").write_bytes(b"secret")
        paths = ["../secret.jpg", str(tmp_path / "secret.jpg"), "gs://other/a.jpg", "absent.jpg"]
        write(real / "c.jsonl", [{"file_name": path, "text": "x"} for path in paths])
        remote = Folder("gs://bucket/c.jsonl", *FIELDS[:2])
        for i in range(len(paths)):
            assert cause(remote.__getitem__, i) == Cause.MISSING_IMAGE
