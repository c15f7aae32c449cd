"""Pictures in a folder, their captions in one file, or each in a text file beside its picture.

Whatever a captions file says, nothing outside of the folder is read, and nothing that is not named
as an image.
"""

import array
from collections.abc import Iterator, Mapping
import errno
import hashlib
import logging
import os
import stat
from typing import Any

from etils import epath
import numpy as np

from t2i_jax.data import images, shared, tables, tar
from t2i_jax.data.bad import BadSample, Cause

EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # of images; nothing else is opened as one
CAPTIONS = tuple(f"{stem}.{kind}" for stem in ("metadata", "captions") for kind in tables.KINDS)
_MAX_TEXT, _MAX_IMAGE = 1 << 20, 1 << 28  # bytes of a file; larger ones are not read
_HEAD = 1 << 16  # bytes of an image that mostly have its size
# What goes wrong with the machine, the network or the file system, not with the file.
_PASSING = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)


class Folder:
    """Captioned images in the folder `path`.

    `path` is a captions file (tables.KINDS) or a folder that has one of CAPTIONS; `image_field` is
    its column of paths, relative to it, and `caption_field` a column of captions or several, with
    commas. Or it is a folder without one: all NAME.jpg (EXTENSIONS) below it, but hidden ones, in
    the order of their paths, each with the caption in NAME.txt; the fields have no meaning then.
    Raises FileNotFoundError or ValueError where there is no such thing.
    """

    def __init__(
        self,
        path: str,
        image_field: str,
        caption_field: str,
        original_caption_field: str = "",
    ):
        self._image, self._original = image_field, original_caption_field
        self._captions = [name.strip() for name in caption_field.split(",")]
        place = path if tar.is_remote(path) else os.path.expanduser(path)
        file = _captions_file(place)
        self._root = _Root(os.path.dirname(file) if file else place)
        if file:
            wanted = [name for name in (image_field, *self._captions, self._original) if name]
            self._table = tables.open_table(file, wanted)
        else:
            self._image, self._captions, self._original = "image", ["caption"], ""
            self._table = _Pairs(place, self._root)

    def __len__(self) -> int:
        return len(self._table)

    @property
    def fingerprint(self) -> str:
        """Changes with the fields, and where the rows of the captions file, or the names, do."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((len(self), self._image, self._captions)).encode())
        digest.update(self._table.digest())
        return digest.hexdigest()

    def _check(self, i: int) -> None:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")

    def name(self, i: int) -> str:
        """'captions.jsonl:17 img/0017.jpg', or the path of the image."""
        self._check(i)
        if isinstance(self._table, _Pairs):
            return _shown(self._table.image(i))
        where = f"{os.path.basename(self._table.path)}:{self._table.number(i)}"
        try:
            path = self._table.row(i).get(self._image)
        except (BadSample, OSError):
            path = None
        return f"{where} {_shown(path)}" if isinstance(path, str) else where

    def _path(self, row: Mapping[str, Any]) -> str:
        path = row.get(self._image)
        if not isinstance(path, str) or not path:
            raise BadSample(Cause.MISSING_IMAGE, f"{self._image} is {str(path)[:50]!r}, not a path")
        return path

    def _texts(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        found = tuple(text for name in self._captions for text in _texts(row, name))
        if not found:
            raise BadSample(Cause.MISSING_CAPTION, f"has no {', '.join(self._captions)}")
        return found

    def caption(self, i: int) -> str:
        self._check(i)
        return self._texts(self._table.row(i))[0]

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) of the upright image, from its header."""
        self._check(i)
        pairs = isinstance(self._table, _Pairs)  # their rows have the captions read
        path = self._table.image(i) if pairs else self._path(self._table.row(i))
        head = self._root.image(path, _HEAD)
        try:
            return images.upright_size(head)
        except BadSample:
            if len(head) < _HEAD:
                raise
            return images.upright_size(self._root.image(path))

    def __getitem__(self, i: int) -> dict[str, Any]:
        """The encoded image and its captions; what is wrong with it raises BadSample."""
        self._check(i)
        row = self._table.row(i)
        captions = self._texts(row)
        original = _texts(row, self._original)
        return {
            "image": self._root.image(self._path(row)),
            "captions": captions,
            "original_caption": original[0] if original else None,
        }


def _texts(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The text of a column, or the texts of its list; none where it is absent or null."""
    value = row.get(name)
    several = value if isinstance(value, list) else [value]
    found = []
    for text in several:
        if text is None:
            continue
        if not isinstance(text, str):
            kind = type(text).__name__
            raise BadSample(Cause.BROKEN_CAPTION, f"{name} is a {kind}, not text or a list of it")
        try:
            text.encode()  # what JSON escapes may be half a character
        except UnicodeEncodeError as error:
            raise BadSample(Cause.BROKEN_CAPTION, f"{name} is not Unicode: {error}") from error
        found.append(text.strip())
    return tuple(found)


def _shown(path: str) -> str:
    """A path that can be printed."""
    return path.encode("utf-8", "backslashreplace").decode()


def _kind(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def _is_image(name: str) -> bool:
    return _kind(name) in EXTENSIONS


def _captions_file(path: str) -> str:
    """The captions file that `path` is, or the one in it; '' for a folder without one."""
    place = epath.Path(path)
    if not place.exists():
        where = "" if tar.is_remote(path) else f" (looked for in {os.getcwd()})"
        raise FileNotFoundError(
            f"data.path {path!r} does not exist{where}. Expected is a folder of images, or the "
            "captions file in it: --config.data.path=DIR/captions.jsonl (or .csv, .parquet)."
        )
    if not place.is_dir():
        if _kind(path) not in tables.KINDS:
            raise ValueError(
                f"data.path {path!r} is no captions file: {', '.join(tables.KINDS)} are read. Set "
                "--config.data.source for other kinds of data."
            )
        return path
    found = [name for name in CAPTIONS if (place / name).exists()]
    if len(found) > 1:
        raise ValueError(
            f"data.path {path!r} has {' and '.join(found)}; name the one to use: "
            f"--config.data.path={path.rstrip('/')}/{found[0]}"
        )
    return f"{path.rstrip('/')}/{found[0]}" if found else ""


class _Root:
    """The folder that images and texts are read from, and nothing outside of it."""

    def __init__(self, path: str):
        self._remote = tar.is_remote(path)
        self.path = path if self._remote else os.path.realpath(path)

    def image(self, path: str, most: int = 0) -> bytes:
        """The file, or its first `most` bytes. Raises BadSample."""
        if not _is_image(path):
            detail = f"{_shown(path)} is no image: {', '.join(EXTENSIONS)} are read"
            raise BadSample(Cause.MISSING_IMAGE, detail)
        data = self._read(path, Cause.MISSING_IMAGE, most or _MAX_IMAGE + 1)
        if len(data) > _MAX_IMAGE:
            raise BadSample(Cause.TOO_LARGE_IMAGE, f"{_shown(path)} has over {_MAX_IMAGE} bytes")
        return data

    def text(self, path: str) -> str:
        """Raises BadSample."""
        data = self._read(path, Cause.MISSING_CAPTION, _MAX_TEXT + 1)
        if len(data) > _MAX_TEXT:
            raise BadSample(Cause.LONG_CAPTION, f"{_shown(path)} has over {_MAX_TEXT} bytes")
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            detail = f"{_shown(path)} is not UTF-8: {error}"
            raise BadSample(Cause.BROKEN_CAPTION, detail) from error

    def _read(self, path: str, missing: Cause, most: int) -> bytes:
        """At most `most` bytes of a file; BadSample where it is absent, or not in the folder."""
        if os.path.isabs(path) or "://" in path or ".." in path.split("/") or "\0" in path:
            raise BadSample(missing, f"{_shown(path)} leads out of the folder; it is not read")
        try:
            if self._remote:
                with (epath.Path(self.path) / path).open("rb") as file:
                    return file.read(most)
            with open(self._open(path, missing), "rb") as file:
                return file.read(most)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BadSample(missing, f"{_shown(path)} does not exist") from error
        except (OSError, UnicodeEncodeError) as error:
            if getattr(error, "errno", None) in _PASSING:
                raise  # no fault of the sample: another host, or another time, would read it
            raise BadSample(Cause.UNREADABLE, f"{_shown(path)}: {error}") from error

    def _open(self, path: str, missing: Cause) -> int:
        """The descriptor of a local file, once links are resolved."""
        real = os.path.realpath(f"{self.path}/{path}")
        if os.path.commonpath([self.path, real]) != self.path:
            detail = f"{_shown(path)} is a link to {_shown(real)}, out of the folder"
            raise BadSample(missing, f"{detail}; it is not read. Copy what it links to")
        if _kind(real) not in (*EXTENSIONS, "txt"):
            raise BadSample(missing, f"{_shown(path)} is a link to {_shown(real)}, of another kind")
        # Not blocking: to open a pipe would wait for its writer.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
        descriptor = os.open(real, flags)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise BadSample(missing, f"{_shown(path)} is not a regular file")
        return descriptor


class _Pairs(tables.Table):
    """Images with a text file of the same name beside each, as rows of 'image' and 'caption'."""

    def __init__(self, path: str, root: _Root):
        super().__init__(path)
        self._root = root
        names, ends, alone = bytearray(), array.array("q", [0]), []
        for image, captioned in _walk_remote(path) if tar.is_remote(path) else _walk(path):
            names += os.fsencode(image)
            ends.append(len(names))
            if not captioned:
                alone.append(image)
        # One buffer for all paths: as Python strings they would take three times the memory.
        self._names = np.frombuffer(bytes(names), np.uint8)
        self._ends = np.array(ends, np.int64)
        self._check(alone)

    def _check(self, alone: list[str]) -> None:
        if len(alone) == len(self):
            there = sorted(p.name for p in epath.Path(self.path).iterdir())
            listed = ", ".join(map(_shown, there[:20])) or "nothing"
            raise ValueError(
                f"data.path {self.path!r} has neither a captions file ({', '.join(CAPTIONS)}) nor "
                f"images with a .txt beside them ({len(self)} images have none). There is "
                f"{listed}. A captions file of another name can be named itself: "
                "--config.data.path=DIR/NAME.jsonl"
            )
        if alone:
            logging.warning(
                f"{self.path}: {len(alone)} of {len(self)} images have no .txt beside them. The "
                f"first: {', '.join(map(_shown, alone[:5]))}"
            )

    def __getstate__(self) -> dict[str, Any]:
        packed = {name: shared.pack(getattr(self, name)) for name in ("_names", "_ends")}
        return {**self.__dict__, **packed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = {name: shared.unpack(state[name]) for name in ("_names", "_ends")}
        self.__dict__.update(state, **arrays)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def image(self, i: int) -> str:
        """The path of the image in the folder."""
        return os.fsdecode(self._names[self._ends[i] : self._ends[i + 1]].tobytes())

    def row(self, i: int) -> Mapping[str, Any]:
        image = self.image(i)
        return {"image": image, "caption": self._root.text(f"{image.rpartition('.')[0]}.txt")}

    def digest(self) -> bytes:
        return hashlib.blake2b(self._names, digest_size=16).digest()


def _walk(path: str, below: str = "") -> Iterator[tuple[str, bool]]:
    """(image, whether it has a caption) below a local folder; links to folders are not followed."""
    with os.scandir(f"{path}/{below}") as entries:
        there = {e.name: e.is_dir(follow_symlinks=False) for e in entries if e.name[:1] != "."}
    for name in sorted(there):
        if there[name]:
            yield from _walk(path, f"{below}{name}/")
        elif _is_image(name):
            yield f"{below}{name}", f"{name.rpartition('.')[0]}.txt" in there


def _walk_remote(path: str) -> Iterator[tuple[str, bool]]:
    place = epath.Path(path)
    there = {os.fspath(p.relative_to(place)) for p in place.rglob("*")}
    for name in sorted(there, key=lambda name: name.split("/")):
        if _is_image(name) and not any(p[:1] == "." for p in name.split("/")):
            yield name, f"{name.rpartition('.')[0]}.txt" in there
