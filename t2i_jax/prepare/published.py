"""The three data sets of the paper, as their publishers hand them out, into shards for training.

CC12M (pixparse/cc12m-wds) with captions by LLaVA-NeXT, SA-1B with captions by LLaVA (PixArt), and
JourneyDB with its prompts. docs/data.md says where they are and how they come.

All three go on where they were interrupted, and raise UserError where the published files are
missing, damaged, or others than they should be. `cache` is the folder for what is unpacked and
indexed ('.cache' in `out`); `workers` processes work (as many as there are cores).
"""

import functools
import io
import itertools
import os
import re

from PIL import Image

from t2i_jax.data import images as codec
from t2i_jax.data.bad import BadSample, Cause
from t2i_jax.errors import ConfigError, MissingError
from t2i_jax.prepare import archives, run, shards, sources
from t2i_jax.prepare.captions import Form, Lines, Texts, decoded, open_lines, open_texts

_CC12M_FIELDS = (shards.IMAGE, shards.ORIGINAL, shards.SYNTHETIC)
_CC12M_KEY_DIGITS = 9
_JOURNEYDB_PATH = re.compile(r"(?:\./)?(\d{3})/([^/]+)\.[^./]+")
_LARGEST_SIDE = 65535  # of a JPEG


def cc12m(
    images: str,
    captions: str,
    out: str,
    *,
    caption_field: str = "caption_llava",
    cache: str | None = None,
    workers: int | None = None,
) -> run.Report:
    """cc12m-train-NNNN.tar -> the same with the captions of LLaVA-NeXT, the images as they are.

    `images` is a pattern of the tar files, or their folder, `captions` train.jsonl(.gz). A sample
    that lacks its image, its own text or a caption, or whose image does not decode whole, is
    skipped.
    """
    found = sources.numbered_archives(images)
    jobs = [
        run.Job(f"cc12m-train-{number:04d}", path, os.path.basename(path))
        for number, path in found.items()
    ]
    sources.keep(list(found.values()), [os.path.join(out, f"{job.shard}.tar") for job in jobs])
    expected = f'{{"key": "000000000", "{caption_field}": "..."}}'
    form = Form(caption_field, _cc12m_key, expected)
    lines = open_lines(captions, sources.cache_folder(out, cache), form)
    return run.run(
        "cc12m",
        _with_captions(jobs, lines),
        functools.partial(_cc12m_samples, lines),
        out,
        fields=_CC12M_FIELDS,
        settings={"caption_field": caption_field},
        workers=workers,
    )


def _cc12m_key(record: dict) -> str | None:
    key = record.get("key")
    if isinstance(key, int):  # what has passed through a table
        return f"{key:0{_CC12M_KEY_DIGITS}d}"
    return key if isinstance(key, str) else None


def _cc12m_samples(captions: Lines, job: run.Job) -> run.Samples:
    if archives.is_compressed(job.parts):
        raise archives.Damaged(f"{job.parts} is compressed, but read in place: gunzip it first.")
    rows, count = [], 0  # rows: (key, entries by ending)
    current: dict[str, dict[str, archives.Entry]] = {}
    for entry in archives.entries(job.parts):
        is_image = archives.is_image(entry.name)
        count += is_image
        ending = ".jpg" if is_image else entry.ending
        row = current.get(entry.key)
        if row is None or ending in row:  # a key that comes again is another sample
            row = current[entry.key] = {}
            rows.append((entry.key, row))
        row[ending] = entry
    for key, row in rows:
        file = next(iter(row.values())).name
        yield run.attempt(key, file, functools.partial(_cc12m_values, captions, key, row))
    return count + sum(".jpg" not in row for _, row in rows)


def _cc12m_values(captions: Lines, key: str, row: dict[str, archives.Entry]) -> dict[str, bytes]:
    if ".jpg" not in row:
        raise BadSample(Cause.MISSING_IMAGE, f"there is only {', '.join(sorted(row))}")
    if ".txt" not in row:
        raise BadSample(Cause.MISSING_CAPTION, "it has no text of its own")
    caption = captions.get(key)
    original = row[".txt"].read()
    decoded(original)
    image = row[".jpg"].read()
    codec.decode(image)
    return {shards.IMAGE: image, shards.ORIGINAL: original, shards.SYNTHETIC: caption.encode()}


def sa1b(
    images: str,
    captions: str,
    out: str,
    *,
    samples_per_shard: int = 10_000,
    size: int = 512,
    quality: int = 95,
    cache: str | None = None,
    workers: int | None = None,
) -> run.Report:
    """sa_NNNNNN.tar, or folders of their images -> sa1b-train-NNNN.tar, scaled to `size`.

    `images` is a pattern of tar files, or a folder of tar files, of images, or of folders of
    images; `captions` SA1B_caption.tar.gz or the folder of its text files. A shard is made of
    `samples_per_shard` images, in order; the place of one that is skipped stays empty.
    """
    _check(size, quality)
    if samples_per_shard < 1:
        raise ConfigError(f"{samples_per_shard} samples in a shard; at least one is needed.")
    paths = sources.of_images(images)
    cache = sources.cache_folder(out, cache)
    names = {path: archives.images_of_folder(path) for path in paths if archives.is_folder(path)}
    counts = sources.count([path for path in paths if path not in names], cache, workers)
    counts |= {path: len(listed) for path, listed in names.items()}
    jobs = []
    for number, cut in enumerate(
        sources.cut([(path, counts[path]) for path in paths], samples_per_shard)
    ):
        parts = [(path, i, j, names[path][i:j] if path in names else None) for path, i, j in cut]
        made_of = [
            [os.path.basename(path.rstrip("/")), i, j, listed and run.digest(listed)]
            for path, i, j, listed in parts
        ]
        jobs.append(run.Job(f"sa1b-train-{number:04d}", parts, made_of))
    if not jobs:
        raise MissingError(f"There is not one image in {images!r}.")
    sources.keep(paths, [os.path.join(out, f"{job.shard}.tar") for job in jobs])
    found = open_texts(captions, cache)
    return run.run(
        "sa1b",
        _with_captions(jobs, found),
        functools.partial(_sa1b_samples, found, size, quality),
        out,
        settings={"samples_per_shard": samples_per_shard, "size": size, "quality": quality},
        workers=workers,
    )


def _sa1b_samples(captions: Lines | Texts, size: int, quality: int, job: run.Job) -> run.Samples:
    for path, start, stop, names in job.parts:
        if names is None:
            entries = itertools.islice(archives.images(path), start, stop)
        else:
            entries = (archives.folder_entry(path, name) for name in names)
        for entry in entries:
            make = functools.partial(_scaled_values, captions, entry.key, entry, size, quality)
            yield run.attempt(entry.key, entry.name, make)
    return sum(stop - start for _, start, stop, _ in job.parts)


def journeydb(
    images: str,
    annotations: str,
    out: str,
    *,
    caption_field: str = "prompt",
    num_shards: int = 200,
    size: int = 512,
    quality: int = 95,
    cache: str | None = None,
    workers: int | None = None,
) -> run.Report:
    """NNN.tgz, or folders NNN of their images -> journeydb-train-NNN.tar, scaled to `size`.

    `images` is the folder that has them, or a pattern of archives; of the numbers below
    `num_shards`, those that are not there are left out. `annotations` is
    train_anno_realease_repath.jsonl(.tgz), of which `caption_field` may also be 'Task2.Caption'.
    """
    _check(size, quality)
    found = sources.numbered(images, num_shards)
    jobs = [
        run.Job(f"journeydb-train-{number:03d}", (number, path), f"{number:03d}")
        for number, path in found.items()
    ]
    sources.keep(list(found.values()), [os.path.join(out, f"{job.shard}.tar") for job in jobs])
    expected = f'{{"img_path": "./000/NAME.jpg", "{caption_field}": "..."}}'
    form = Form(caption_field, _journeydb_key, expected, _journeydb_number)
    lines = open_lines(annotations, sources.cache_folder(out, cache), form)
    return run.run(
        "journeydb",
        _with_captions(jobs, lines),
        functools.partial(_journeydb_samples, lines, size, quality),
        out,
        settings={"caption_field": caption_field, "size": size, "quality": quality},
        workers=workers,
    )


def _journeydb_key(record: dict) -> str | None:
    path = record.get("img_path")
    match = _JOURNEYDB_PATH.fullmatch(path) if isinstance(path, str) else None
    return f"{match[1]}/{match[2]}" if match else None


def _journeydb_number(key: str) -> int:
    return int(key[:3])


def _journeydb_samples(captions: Lines, size: int, quality: int, job: run.Job) -> run.Samples:
    number, path = job.parts
    seen, count = set(), 0
    for entry in archives.images(path):
        key = f"{number:03d}/{entry.key}"
        count += 1
        seen.add(key)
        make = functools.partial(_scaled_values, captions, key, entry, size, quality)
        yield run.attempt(entry.key, entry.name, make)
    missing = [key for key in captions.keys(number) if key not in seen]
    for key in missing:
        where = f"not in {os.path.basename(path)}"
        yield run.Skip(key.partition("/")[2], key, str(Cause.MISSING_IMAGE), where)
    return count + len(missing)


def _scaled_values(
    captions: Lines | Texts, key: str, entry: archives.Entry, size: int, quality: int
) -> dict[str, bytes]:
    caption = captions.get(key)  # first: without one the image need not be read
    image = scaled(entry.read(), size, quality)
    return {shards.IMAGE: image, shards.SYNTHETIC: caption.encode()}


def scaled(data: bytes, size: int, quality: int) -> bytes:
    """The image as a JPEG with a shorter side of `size`; smaller ones grow. Raises BadSample.

    Bilinear with antialiasing, the longer side rounded down: torchvision's resize of a PIL image.
    """
    image = codec.open_image(data)
    shorter, longer = sorted(image.size)
    length = int(size * longer / shorter)
    if length > _LARGEST_SIDE or length * size > codec.MAX_PIXELS:
        what = f"{image.width} x {image.height} pixels are too narrow to scale to {size}"
        raise BadSample(Cause.TOO_LARGE_IMAGE, what)
    shape = (size, length) if image.width <= image.height else (length, size)
    if shape != image.size:
        image = image.resize(shape, Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _check(size: int, quality: int) -> None:
    if size < 1 or not 1 <= quality <= 100:
        raise ConfigError(f"size {size}, quality {quality}; wanted are 1 or more, and 1 to 100.")


def _with_captions(jobs: list[run.Job], captions: Lines | Texts) -> list[run.Job]:
    """Shards made with other captions are made again."""
    made_of = [{"images": job.made_of, "captions": captions.identity} for job in jobs]
    return [run.Job(job.shard, job.parts, m) for job, m in zip(jobs, made_of, strict=True)]
