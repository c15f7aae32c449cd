"""Damaged shards and images: nothing crashes, nothing hangs, every sample is delivered or told.

Told is what raises BadSample where it is read, or lies in a range of bytes of `source.damage`.
"""

import collections
import contextlib
import gzip
import io
import json
import os
import struct
import sys
import tarfile
from typing import NamedTuple
import zlib

import numpy as np
from PIL import Image
import pytest

from configs import base
from t2i_jax.data import images
from t2i_jax.data.bad import BadSample, Cause
from t2i_jax.data.loader import Loader
from t2i_jax.data.prompts import Prompts
from t2i_jax.data.samples import Fault
from t2i_jax.data.sources import make_source
from t2i_jax.data.tokenizer import Tokenizer
from t2i_jax.data.webdataset import WebDataset
from t2i_jax.training.faults import FaultLog

SIZE, BLOCK = 32, 512
PLAIN = ("image.jpg", "txt")
SEEDS = 60  # of each of the ten kinds of damage
FIELDS = ("image.jpg", "txt,json:caption")
PICTURES = [
    ("JPEG", "RGB", {}),
    ("PNG", "RGB", {}),
    ("JPEG", "RGB", {"progressive": True}),
    ("WEBP", "RGB", {}),
    ("JPEG", "L", {}),
    ("JPEG", "L", {"progressive": True}),
]


def encoded(image, format="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def textured(seed, size=(64, 48), mode="RGB"):
    """A picture with something to see everywhere."""
    noise = np.random.default_rng(seed).integers(0, 256, (10, 10, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def tar(members, format=tarfile.GNU_FORMAT):
    """`members`: (name or TarInfo, body)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for info, body in members:
            info = info if isinstance(info, tarfile.TarInfo) else tarfile.TarInfo(info)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


# --- what is damaged, and what is read of it ---


class Member(NamedTuple):
    """Where a member lies: from `start` what names it, from `body` - 512 its own header."""

    key: str  # '' if it is not of a sample
    start: int
    body: int
    stop: int


class Shard(NamedTuple):
    name: str
    content: bytes
    members: list[Member]


def _key(name):
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _shard(k, format):
    """Twelve samples of all kinds; some names are long, not ASCII, or stored in two parts."""
    split = "y" * 90 + "/" + "z" * 40 + "/"
    before = {1: split if format == tarfile.USTAR_FORMAT else "x" * 120, 5: split}
    if format == tarfile.PAX_FORMAT:
        before[9] = "schön-"
    members = [("README.md", b"not a sample")]
    for i in range(12):
        key = f"{before.get(i, '')}{'abc'[k]}{i:02}"
        kind, mode, options = PICTURES[(i + k) % len(PICTURES)]
        picture = textured(12 * k + i, (48 + (7 * i + k) % 49, 48 + (11 * i + k) % 49), mode)
        members.append((f"{key}.image.jpg", encoded(picture, kind, **options)))
        if i % 3 != 1:
            members.append((f"{key}.txt", f"picture {key} ✨".encode()))
        if i % 3 != 0:
            members.append((f"{key}.json", json.dumps({"caption": f"drawn {key}"}).encode()))
        if i == 6:
            members.append((f"{key}.py", b"raise SystemExit"))
    content = tar(members, format)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        found = [
            Member(
                _key(m.name) if m.name.endswith((".jpg", ".txt", ".json")) else "",
                m.offset,
                m.offset_data,
                m.offset_data + -(-m.size // BLOCK) * BLOCK,
            )
            for m in archive
        ]
    return Shard(f"{'abc'[k]}.tar", content, found)


class Whole(NamedTuple):
    folder: str
    shards: list[Shard]
    samples: dict[str, tuple]  # key -> (pixels, captions)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    formats = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)
    shards = [_shard(k, format) for k, format in enumerate(formats)]
    for shard in shards:
        (folder / shard.name).write_bytes(shard.content)
    source = WebDataset(f"{folder}/*.tar", *FIELDS, index_dir=str(folder / "index"))
    samples = {key: rows[0] for key, rows in read(source).items()}
    assert len(samples) == len(source) == 36 and not source.damage
    assert not any(isinstance(sample, Cause) for sample in samples.values())
    assert samples.keys() == {m.key for s in shards for m in s.members} - {""}
    return Whole(str(folder), shards, samples)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train((f"picture {i} drawn" for i in range(50)), 300)


def read(source, shard=""):
    """key -> what its rows (in one shard) gave: (pixels, captions), or the Cause."""
    found = collections.defaultdict(list)
    for i in range(len(source)):
        name, _, key = source.name(i).partition("/")
        if shard and name != shard:
            continue
        try:
            sample = source[i]
            pixels = images.resize_and_crop(sample["image"], SIZE)
            found[key].append((pixels, sample["captions"]))
        except BadSample as error:
            found[key].append(error.cause)
    return dict(found)


def same(one, other):
    return not isinstance(one, Cause) and one[1] == other[1] and (one[0] == other[0]).all()


_WATCHED = ("open", "os.", "shutil.", "subprocess.", "socket.", "pickle.find_class", "ctypes.")
_QUIET = {"os.listdir", "os.scandir", "os.putenv", "os.unsetenv"}
_PYTHON = tuple({os.path.dirname(os.__file__) + "/", sys.prefix + "/"})  # modules imported late
_events = None  # those of the block that is watched: a hook cannot be taken away again


def _hook(event, args):
    if _events is not None and event.startswith(_WATCHED) and event not in _QUIET:
        _events.append((event, args))


@contextlib.contextmanager
def only_files(shards, index_dir):
    """Asserts that nothing else is read, or written, or run: not what a name or a body names."""
    global _events
    _events = events = []
    try:
        yield
    finally:
        _events = None
    for event, args in events:
        paths = [os.fspath(a) for a in args[: 2 if event == "os.rename" else 1]]
        inside = all(f"{path}/".startswith(f"{index_dir}/") for path in paths)
        if event == "open" and (paths[0] in shards or paths[0].startswith(_PYTHON)):
            assert args[1] in (None, "r", "rb") and not args[2] & (os.O_WRONLY | os.O_RDWR)
        else:
            assert inside and event in ("open", "os.mkdir", "os.rename"), (event, args)


sys.addaudithook(_hook)


# --- damage ---


class Edit(NamedTuple):
    """Bytes `start` to `stop` become `new`."""

    start: int
    stop: int
    new: bytes

    @property
    def longer(self):
        return len(self.new) - (self.stop - self.start)


def flips(count):
    def make(rng, content, _):
        """One a block: of two in a header one may undo the other in its sum."""
        blocks = rng.choice(len(content) // BLOCK, min(count, len(content) // BLOCK), False)
        at = np.sort(blocks * BLOCK + rng.integers(BLOCK, size=len(blocks))).tolist()
        return [Edit(p, p + 1, bytes([content[p] ^ 1 << int(rng.integers(8))])) for p in at]

    return make


def _range(rng, content):
    """Any range in front of the last byte that is not zero, short ones as likely as long ones."""
    last = len(content.rstrip(b"\0")) - 1
    length = int(np.exp(rng.uniform(0, np.log(last))))
    start = int(rng.integers(last - length + 1))
    return start, start + length


def cut(rng, content, _):
    return [Edit(int(rng.integers(len(content))), len(content), b"")]


def tail(rng, content, _):
    """What is left of a download into a file that had its size from the start."""
    start = int(rng.integers(len(content) - 25_000))
    return [Edit(start, len(content), bytes(len(content) - start))]


def zeroed(rng, content, _):
    start, stop = _range(rng, content)
    return [Edit(start, stop, bytes(stop - start))]


def noise(rng, content, _):
    start, stop = _range(rng, content)
    return [Edit(start, stop, rng.bytes(stop - start))]


def removed(rng, content, _):
    """Not whole blocks: without these, what is left may be a whole archive of fewer members."""
    start, stop = _range(rng, content)
    return [Edit(start, stop + ((stop - start) % BLOCK == 0), b"")]


def doubled(rng, content, _):
    start, stop = _range(rng, content)
    if rng.random() < 0.5:
        stop = start + max(1, (stop - start) // BLOCK) * BLOCK
    return [Edit(stop, stop, content[start:stop])]


def joined(rng, content, others):
    return [Edit(len(content), len(content), others[int(rng.integers(len(others)))])]


DAMAGES = {
    "1 bit": flips(1),
    "10 bits": flips(10),
    "100 bits": flips(100),
    "cut": cut,
    "tail": tail,
    "zeroed": zeroed,
    "noise": noise,
    "removed": removed,
    "doubled": doubled,
    "joined": joined,
}


def applied(content, edits):
    parts, at = [], 0
    for edit in edits:
        parts += [content[at : edit.start], edit.new]
        at = edit.stop
    return b"".join([*parts, content[at:]])


def _place(edit, shard, start, stop):
    """Where bytes are after an edit that moves them, or what stands in their place, ends included.

    A member in front of what was removed still claims its old size: it covers what follows.
    """
    start = start + edit.longer if start >= edit.stop else min(start, edit.start)
    if stop > edit.start:
        stop = stop + edit.longer if stop >= edit.stop else edit.start
    claimed = max((m.stop for m in shard.members if m.start <= edit.start < m.stop), default=0)
    if edit.longer < 0 and edit.start <= stop and start < claimed:
        stop = max(stop, claimed)
    return start, stop


def account(whole, shard, edits, found, regions):
    """Asserts that no sample of the damaged shard is lost without a word, and none is changed."""
    moving = edits[0].longer != 0
    renamed = set()
    for key in {m.key for m in shard.members} - {""}:
        members = [m for m in shard.members if m.key == key]
        rows = found.get(key, [])
        if moving:
            intact = all(m.stop <= edits[0].start for m in members)
        else:
            intact = not any(e.start < m.stop and m.start < e.stop for m in members for e in edits)
        if intact:  # damage elsewhere takes nothing away
            assert any(same(row, whole.samples[key]) for row in rows), key
            continue
        if rows:  # delivered, perhaps with other pixels, or told
            continue
        spans = [(m.start, m.stop) for m in members]
        if moving:
            spans = [_place(edits[0], shard, *span) for span in spans]
            if any(start <= r[1] and r[0] <= stop for start, stop in spans for r in regions):
                continue
        elif any(start < r[1] and r[0] < stop for start, stop in spans for r in regions):
            continue
        # Its long name was changed, of which there is no sum: it is told by another name.
        assert any(e.start < m.body - BLOCK and m.start < e.stop for m in members for e in edits)
        renamed.add(key)
    strange = [key for key in found if key not in whole.samples]
    assert len(renamed) <= len(strange)


def data_config(**options):
    data = base.get_config().data
    data.update(image_size=SIZE, max_text_tokens=16, caption_dropout=0.0, validation_size=0)
    data.update(image_field=FIELDS[0], caption_field=FIELDS[1], num_threads=2, prefetch=2)
    data.update(options)
    return data


def follow(loader, source, batches, size):
    """Asserts that every row is the sample that is meant, or told; the samples that were meant."""
    meant = []
    for step, batch in enumerate(batches):
        assert batch.arrays["image"].shape == (size, *loader.shape(step), 3)
        assert batch.arrays["bad"].sum() == len(batch.faults)
        first = {}
        for fault in batch.faults:
            assert fault.step == step and fault.detail
            first.setdefault(fault.position, fault.sample)
        for row, index in enumerate(loader.indices(step)):
            told = first.pop(step * size + row, None)
            if told is not None:
                assert told == source.name(index)
            else:
                pixels = images.resize_and_crop(source[index]["image"], loader.shape(step))
                np.testing.assert_array_equal(batch.arrays["image"][row], pixels)
            meant.append(index)
        assert not first
    return meant


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_sample_is_delivered_or_told(whole, tokenizer, tmp_path, kind):
    index_dir = str(tmp_path / "index")
    data = data_config()
    for seed in range(3 * SEEDS if "bit" in kind else SEEDS):
        rng = np.random.default_rng((seed, *kind.encode()))
        shard = whole.shards[seed % 3]
        others = [other for other in whole.shards if other is not shard]
        edits = DAMAGES[kind](rng, shard.content, [other.content for other in others])
        damaged = tmp_path / str(seed) / shard.name
        damaged.parent.mkdir()
        damaged.write_bytes(applied(shard.content, edits))
        paths = [f"{whole.folder}/{other.name}" for other in others] + [str(damaged)]
        with only_files(paths, index_dir):
            source = WebDataset("::".join(paths), *FIELDS, num_threads=1, index_dir=index_dir)
            found = read(source, shard.name if seed % 10 else "")
        assert os.listdir(damaged.parent) == [shard.name]
        assert {path for path, _ in source.damage} <= {str(damaged)}
        regions = [(d.start, d.stop) for _, d in source.damage]
        bounds = [0, *(at for region in regions for at in region), damaged.stat().st_size]
        assert bounds == sorted(bounds)
        account(whole, shard, edits, found, regions)
        if seed % 10 == 0:  # the other shards, read as well
            for key in {m.key for other in others for m in other.members} - {""}:
                assert same(found[key][0], whole.samples[key])
        if seed % 25 == 0:
            loader = Loader(source, Prompts(tokenizer, data), data, 6, seed)
            batches = [loader.batch(step) for step in range(-(-len(source) // 6))]
            assert set(follow(loader, source, batches, 6)) == set(range(len(source)))
        damaged.unlink()


def test_joined_archives_of_the_same_keys_keep_the_samples_of_both(tmp_path):
    parts = [
        tar([("a.image.jpg", b"%d" % k), ("a.txt", b"%d" % k), ("b.txt", b"")]) for k in range(3)
    ]
    (tmp_path / "s.tar").write_bytes(b"".join(parts))
    source = WebDataset(str(tmp_path / "s.tar"), *PLAIN)
    assert [source.name(i)[-1] for i in range(len(source))] == list("ababab")
    assert [source[i]["image"] for i in (0, 2, 4)] == [b"0", b"1", b"2"]
    assert [source[i]["captions"] for i in (0, 2, 4)] == [("0",), ("1",), ("2",)]
    assert len(source.damage) == 2


def test_an_archive_ends_with_few_zeros(tmp_path):
    """Up to a record of 10240 bytes is filled; more zeros are a tail that was lost."""
    content = tar([("a.image.jpg", b"x" * 600), ("a.txt", b"a")]).rstrip(b"\0")
    content += bytes(-len(content) % BLOCK)
    for zeros, damage in ((512, 0), (1024, 0), (11_264, 0), (11_776, 1), (10_000_000, 1)):
        path = tmp_path / f"{zeros}.tar"
        path.write_bytes(content + bytes(zeros))
        source = WebDataset(str(path), *PLAIN)
        assert len(source) == 1
        expected = [(len(content), len(content) + zeros)] * damage
        assert [(d.start, d.stop) for _, d in source.damage] == expected


def test_a_pattern_without_anything_to_read(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "noise.tar").write_bytes(rng.bytes(30_000))
    (tmp_path / "zeros.tar").write_bytes(bytes(30_000))
    (tmp_path / "html.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(ValueError, match=r"No sample of .* 4 of 4 are damaged"):
        WebDataset(f"{tmp_path}/*.tar", *FIELDS)
    whole = tar([("a.image.jpg", b"x"), ("a.txt", b"a")])
    (tmp_path / "whole.tar.gz").write_bytes(gzip.compress(whole))
    with pytest.raises(ValueError, match=r"whole\.tar\.gz: it is compressed.*gunzip"):
        WebDataset(f"{tmp_path}/whole.tar.gz", *FIELDS)


# --- bodies ---


def png(*chunks):
    """A PNG of 64 x 48 with `chunks`, (kind, data), in front of its pixels."""
    plain = encoded(textured(0), "PNG")
    added = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return plain[:33] + b"".join(added) + plain[33:]


def jpeg_of(width, height):
    """A JPEG whose header says that it is of another size."""
    data = encoded(textured(0))
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def many_scans():
    """Ten kilobytes that take an hour: empty scans of a large picture, again and again."""
    data = encoded(Image.new("L", (4000, 4000)), progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * 300 + data[-2:]


def bodies():
    """name -> (bytes that are called KEY.image.jpg, the cause, or None if it is to be read)."""
    fine, zeros = textured(0), zlib.compress(bytes(100_000_000), 9)
    vector = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(/etc/passwd) run\n"
    broken, large = Cause.BROKEN_IMAGE, Cause.TOO_LARGE_IMAGE
    return {
        "png called jpg": (encoded(fine, "PNG"), None),
        "webp called jpg": (encoded(fine, "WEBP"), None),
        "cmyk": (encoded(fine.convert("CMYK")), None),
        "transparent": (encoded(fine.convert("RGBA"), "PNG"), None),
        "more after it": (encoded(fine) + b"<html>", None),
        "two pictures": (encoded(fine, "MPO", save_all=True, append_images=[fine]), None),
        "gif": (encoded(fine, "GIF"), broken),
        "bmp": (encoded(fine, "BMP"), broken),
        "tiff": (encoded(fine, "TIFF"), broken),
        "pdf": (encoded(fine, "PDF"), broken),
        "eps": (encoded(fine, "EPS"), broken),
        "script": (script, broken),
        "svg": (vector, broken),
        "html": (b"<html>404</html>", broken),
        "pickle": (b"cos\nsystem\n(S'exit'\ntR.", broken),
        "empty": (b"", broken),
        "one byte": (b"\xff", broken),
        "start of a jpeg": (b"\xff\xd8\xff", broken),
        "pixels of a bomb": (encoded(Image.new("1", (8192, 8193)), "PNG"), large),
        "header of a bomb": (jpeg_of(60_000, 60_000), large),
        "header says less": (jpeg_of(32, 24), broken),
        "scans of a bomb": (many_scans(), large),
        "text of a bomb": (png((b"zTXt", b"k\0\0" + zeros)), broken),
        "texts of a bomb": (png(*[(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**6)))] * 80), broken),
        "profile of a bomb": (png((b"iCCP", b"k\0\0" + zeros)), broken),
        "tiny": (encoded(textured(0, (40, 31))), Cause.TINY_IMAGE),
        "narrow": (encoded(Image.new("L", (65_000, 1)), "PNG"), Cause.TINY_IMAGE),
    }


def test_bodies_that_are_not_pictures_or_are_bombs(tmp_path):
    strange = bodies()
    members = [("good-0.image.jpg", encoded(textured(0))), ("good-0.txt", b"good")]
    for name, (body, _) in strange.items():
        members += [(f"{name}.image.jpg", body), (f"{name}.txt", name.encode())]
    members += [("good-1.image.jpg", encoded(textured(1))), ("good-1.txt", b"good")]
    path = tmp_path / "s.tar"
    path.write_bytes(tar(members))
    with only_files([str(path)], str(tmp_path / "index")):
        source = WebDataset(str(path), *PLAIN, index_dir=str(tmp_path / "index"))
        for i in range(len(source)):
            name = source.name(i).removeprefix("s.tar/")
            cause = strange.get(name, (b"", None))[1]
            try:
                pixels = images.resize_and_crop(source[i]["image"], SIZE, least=32)
                assert cause is None and pixels.shape == (SIZE, SIZE, 3), name
            except BadSample as error:
                assert error.cause == cause, (name, str(error))
    assert len(source) == len(strange) + 2 and not source.damage


def test_no_picture_is_delivered_in_part():
    """JPEGs of all kinds, cut or with zeros for their tail.

    With an end mark put behind the cut, too; but a progressive one without its last scans is whole.
    """
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 2}):
        for mode in ("RGB", "L", "CMYK"):
            data = encoded(textured(1, (96, 80), mode), **options)
            assert images.resize_and_crop(data, SIZE).shape == (SIZE, SIZE, 3)
            for at in range(2, len(data) - 2, 7):
                damaged = [data[:at], data[:at] + bytes(len(data) - at), data[:at] + data[-2:]]
                for bad in damaged[: 2 if "progressive" in options else 3]:
                    with pytest.raises(BadSample):
                        images.resize_and_crop(bad, SIZE)
            for damaged in (data[:-1], data[:-2], data[:-1] + b"\0", data[:-2] + b"\0\0"):
                with pytest.raises(BadSample):
                    images.resize_and_crop(damaged, SIZE)


def test_a_png_is_delivered_only_as_it_was():
    """Of its pixels there are checksums: a bit that is flipped, or zeros, are noticed."""
    data = encoded(textured(1), "PNG")
    first, last = data.index(b"IDAT"), data.rindex(b"IEND") - 4
    for at in range(first, last, 13):
        flipped = bytearray(data)
        flipped[at] ^= 4
        for damaged in (data[:at], data[:at] + bytes(len(data) - at), bytes(flipped)):
            with pytest.raises(BadSample):
                images.resize_and_crop(damaged, SIZE)
    with pytest.raises(BadSample) as error:
        images.decode(data[: (first + last) // 2])
    assert error.value.cause == Cause.TRUNCATED_IMAGE


def test_captions_that_are_no_text(tokenizer, tmp_path):
    """Each is told, by the source or by the loader: none reaches the tokenizer."""
    picture, good = encoded(textured(0)), [b'{"caption": "x"}', b'{"caption": ["", "x"]}']
    broken = [
        b"",
        b"\0" * 20,
        b'{"caption": "half a character: \\ud83d"}',
        b'{"caption": "zero: \\u0000"}',
        b'{"caption": "caf\xe9"}',
        b'{"caption": "cut',
        b'{"caption": 5}',
        b'{"caption": null}',
        b'{"caption": {"x": "y"}}',
        b'{"caption": []}',
        b'{"caption": ["x", 5]}',
        b'{"caption": ""}',
        b'{"other": "x"}',
        b'"caption"',
        b"[1, 2]",
        b"[" * 100_000,
        b"9" * 10_000,
        b'{"caption": "' + b"x" * 20_000 + b'"}',
        b'{"caption": "' + b"x" * (1 << 20) + b'"}',
    ]
    members = [
        member
        for i, body in enumerate(good + broken)
        for member in ((f"{i}.image.jpg", picture), (f"{i}.json", body))
    ]
    (tmp_path / "s.tar").write_bytes(tar(members))
    source = WebDataset(str(tmp_path / "s.tar"), "image.jpg", "json:caption")
    data = data_config()
    loader = Loader(source, Prompts(tokenizer, data), data, 7, 0)
    told, meant = {}, []
    for step in range(len(source) // 7):
        batch = loader.batch(step)
        meant += loader.indices(step)
        assert {tokenizer.decode(row) for row in batch.arrays["ids"]} == {"x"}
        told |= {fault.sample: fault.cause for fault in batch.faults}
    assert sorted(meant) == list(range(len(good + broken)))
    assert told.keys() == {f"s.tar/{i}" for i in range(len(good), len(good + broken))}
    assert set(told.values()) == {Cause.BROKEN_CAPTION, Cause.EMPTY_CAPTION, Cause.LONG_CAPTION}


# --- names and kinds of members ---


def test_names_are_only_names(tmp_path):
    """Delivered under what they are called, which can be logged; no path is ever made of one."""
    picture, folder = encoded(textured(0)), tmp_path / "in"
    folder.mkdir()
    shown = {  # as they are stored -> as they are told
        "../../etc/passwd": "../../etc/passwd",
        "/etc/passwd": "/etc/passwd",
        "//server/share": "//server/share",
        "C:\\x": "C:\\x",
        "a b\nc\t{x,y}*?": "a b\nc\t{x,y}*?",
        "$(touch x);`touch y`": "$(touch x);`touch y`",
        "~/../x": "~/../x",
        "gs://bucket/x": "gs://bucket/x",
        "y" * 4000: "y" * 4000,
        "caf\udce9": "caf\\udce9",
    }
    members = []
    for key in shown:
        members += [(f"{key}.image.jpg", picture), (f"{key}.txt", b"x")]
    hidden = [("...", b""), (".image.jpg", picture), ("/.image.jpg", picture), ("x/", b"")]
    (folder / "gnu.tar").write_bytes(tar(members + hidden))
    strange = tarfile.TarInfo("z.image.jpg")
    strange.pax_headers = {"path": "in\0side.image.jpg", "size": str(len(picture))}
    text = tarfile.TarInfo("z.txt")
    text.pax_headers = {"path": "in\0side.txt"}
    pax = [(strange, picture), (text, b"x"), *members]
    (folder / "pax.tar").write_bytes(tar(pax, tarfile.PAX_FORMAT))
    paths = [f"{folder}/{name}.tar" for name in ("gnu", "pax")]
    with only_files(paths, str(tmp_path / "index")):
        source = WebDataset("::".join(paths), *PLAIN, index_dir=str(tmp_path / "index"))
        read(source)
    names = [source.name(i) for i in range(len(source))]
    assert names == [
        *(f"gnu.tar/{name}" for name in shown.values()),
        "pax.tar/in\0side",
        *(f"pax.tar/{name}" for name in shown.values()),
    ]
    assert not source.damage and all(source[i]["captions"] == ("x",) for i in range(len(source)))
    assert sorted(os.listdir(folder)) == ["gnu.tar", "pax.tar"]
    log = FaultLog(tmp_path / "run")
    log.add(1, [Fault(1, i, name, "broken_image", "x") for i, name in enumerate(names)])
    log.close()


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_without_end_is_damage(tmp_path, format):
    """One that long in a shard would have the keys of all others take its room."""
    picture = encoded(textured(0))
    members = [("a.image.jpg", picture), ("a.txt", b"x"), ("y" * 5000 + ".image.jpg", picture)]
    (tmp_path / "s.tar").write_bytes(tar([*members, ("b.txt", b"x")], format))
    source = WebDataset(str(tmp_path / "s.tar"), *PLAIN)
    assert [source.name(i) for i in range(len(source))] == ["s.tar/a", "s.tar/b"]
    assert [d.reason for _, d in source.damage] == ["a name of 5010 characters"]


def test_members_that_are_no_files_are_not_read(tmp_path):
    """Links, devices, sparse files and code: their samples lack a picture, and are told."""
    secret, picture = tmp_path / "secret", encoded(textured(0))
    secret.write_bytes(picture)
    kinds = {
        "symlink": (tarfile.SYMTYPE, {}),
        "hard link": (tarfile.LNKTYPE, {}),
        "character device": (tarfile.CHRTYPE, {}),
        "block device": (tarfile.BLKTYPE, {}),
        "folder": (tarfile.DIRTYPE, {}),
        "fifo": (tarfile.FIFOTYPE, {}),
        "sparse": (tarfile.GNUTYPE_SPARSE, {}),
        "new sparse": (tarfile.REGTYPE, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
        "unknown": (b"Q", {}),
    }
    members, code = [], ("pkl", "py", "pyc", "npy", "npz", "pt", "pth", "cbor", "tar")
    for name, (kind, headers) in kinds.items():
        info = tarfile.TarInfo(f"{name}.image.jpg")
        info.type, info.linkname, info.pax_headers = kind, str(secret), headers
        has_body = kind in (tarfile.GNUTYPE_SPARSE, tarfile.REGTYPE, b"Q")
        members += [(info, picture if has_body else b""), (f"{name}.txt", b"x")]
    for kind in code:
        members += [(f"{kind}.image.{kind}", b"cos\nsystem\n(S'exit'\ntR."), (f"{kind}.txt", b"x")]
    contiguous = tarfile.TarInfo("contiguous.image.jpg")
    contiguous.type = tarfile.CONTTYPE
    members += [(contiguous, picture), ("contiguous.txt", b"x")]
    path = tmp_path / "s.tar"
    path.write_bytes(tar(members, tarfile.PAX_FORMAT))
    with only_files([str(path)], str(tmp_path / "index")):
        source = WebDataset(str(path), *PLAIN, index_dir=str(tmp_path / "index"))
        found = read(source)
    assert not isinstance(found.pop("contiguous")[0], Cause)
    assert found == {name: [Cause.MISSING_IMAGE] for name in (*kinds, *code)}
    assert not source.damage


# --- the machinery of training ---


@pytest.fixture(scope="module")
def mixed(whole, tmp_path_factory):
    """A mixture of two sources, each with another damage in every shard: (config, where)."""
    folder = tmp_path_factory.mktemp("mixed")
    kinds = (("10 bits", "tail", "removed"), ("noise", "100 bits", "cut"))
    for name, damages in zip("ab", kinds, strict=True):
        (folder / name).mkdir()
        for seed, (shard, kind) in enumerate(zip(whole.shards, damages, strict=True)):
            edits = DAMAGES[kind](np.random.default_rng((5, seed)), shard.content, [])
            (folder / name / shard.name).write_bytes(applied(shard.content, edits))
    config = base.get_config()
    mixture = tuple(f"weight={w} path={folder}/{name}/*.tar" for w, name in ((2, "a"), (1, "b")))
    config.data = data_config(mixture=mixture, index_dir=str(folder / "index"))
    return config


def test_training_gets_full_batches_of_a_damaged_mixture(mixed, tokenizer):
    """An epoch of the lighter source, two of the other; what is told is the same for two hosts."""
    source = make_source(mixed, "train")
    assert len({path for path, _ in source.damage}) == 6 and source.files == 6
    steps = -(-3 * max(part.stop - part.start for part in source.parts) // 8)
    with Loader(source, Prompts(tokenizer, mixed.data), mixed.data, 8, 1) as loader:
        stream = loader.batches()
        batches = [next(stream) for _ in range(steps)]
    assert set(follow(loader, source, batches, 8)) == set(range(len(source)))
    faults = [fault for batch in batches for fault in batch.faults]
    bad = {source.name(i) for i in range(len(source)) if _cause(source, i)}
    assert bad and {fault.sample for fault in faults} == bad
    prompts = Prompts(tokenizer, mixed.data)
    hosts = [Loader(source, prompts, mixed.data, 8, 1, range(h * 4, h * 4 + 4)) for h in (0, 1)]
    for step, batch in enumerate(batches[:4]):
        parts = [host.batch(step) for host in hosts]
        assert sum((part.faults for part in parts), ()) == batch.faults
        pixels = np.concatenate([part.arrays["image"] for part in parts])
        np.testing.assert_array_equal(pixels, batch.arrays["image"])


def _cause(source, i):
    try:
        images.resize_and_crop(source[i]["image"], SIZE)
    except BadSample as error:
        return error.cause


def test_buckets_of_a_damaged_mixture_leave_out_only_what_they_tell(mixed, tokenizer, tmp_path):
    source = make_source(mixed, "train")
    data = data_config(buckets=("32x32", "40x24", "24x40"), index_dir=str(tmp_path))
    loader = Loader(source, Prompts(tokenizer, data), data, 6, 1)
    batches = [loader.batch(step) for step in range(40)]
    meant = {source.name(i) for i in follow(loader, source, batches, 6)}
    left_out = {fault.sample for fault in loader.left_out}
    assert left_out and meant | left_out == {source.name(i) for i in range(len(source))}
    assert len({loader.shape(step) for step in range(40)}) == 3
