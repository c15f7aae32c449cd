"""Tiny archives as strangers write them, and what is in those that we write."""

import io
import json
import tarfile

import numpy as np
from PIL import Image


def encoded(seed, size=(40, 30), kind="JPEG", mode="RGB", **options):
    """A picture without sharp edges, so that a JPEG of it is close to it."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, len(mode)), np.uint8)
    image = Image.fromarray(noise.squeeze(), mode).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))


def contents(path):
    """{member: bytes} of a shard, in its order, read by tarfile."""
    with tarfile.open(path) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive.getmembers()}


def keys(path):
    return list(dict.fromkeys(name.partition(".")[0] for name in contents(path)))


def skipped(path):
    return [(s["key"], s["cause"]) for s in map(json.loads, path.read_text().splitlines())]


def everything(folder):
    """{name: bytes} of the files of an output, without the cache."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}
