"""A bucket that is not there: gs:// as it is, objects under names, without directories.

A name with a '/' makes no folder: a folder is there as long as there is an object in it, making
one does nothing, nothing can be appended to, and renaming copies. What is in it lies below `root`,
where a test may look, and take away what a killed process has not written.
"""

import os
import pathlib
import shutil

from etils.epath import backend, gpath
import fsspec
from orbax.checkpoint._src.path import gcs_utils
import tensorboardX.record_writer

from t2i_jax import stored_arrays

URL = "gs://bucket"


class FlatStorage(fsspec.AbstractFileSystem):
    """The bucket, in the folder `root`."""

    protocol = ("gs", "gcs")
    cachable = False

    def __init__(self, root: pathlib.Path):
        super().__init__()
        self.root = root

    def ls(self, path, detail=True, **kwargs):
        path = self._strip_protocol(path)
        info = self.info(path)
        if info["type"] == "file":
            found = [info]
        else:
            names = [f"{path}/{name}" for name in sorted(os.listdir(self._at(path)))]
            found = [self.info(name) for name in names if self.exists(name)]
        return found if detail else [entry["name"] for entry in found]

    def info(self, path, **kwargs):
        path = self._strip_protocol(path)
        at = self._at(path)
        if at.is_file():
            return {"name": path, "size": at.stat().st_size, "type": "file"}
        if any(p.is_file() for p in at.rglob("*")):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def rmdir(self, path):
        pass

    def rm_file(self, path):
        if self._at(path).is_file():
            self._at(path).unlink()

    def cp_file(self, path1, path2, **kwargs):
        if self._at(path1).is_file():
            self._at(path2).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._at(path1), self._at(path2))

    def _open(self, path, mode="rb", **kwargs):
        if mode not in ("rb", "wb"):
            raise NotImplementedError(f"{path}: nothing is opened with {mode!r} here")
        if mode == "wb":
            self._at(path).parent.mkdir(parents=True, exist_ok=True)
        return self._at(path).open(mode)

    def _at(self, path) -> pathlib.Path:
        return self.root / self._strip_protocol(path)


def local(path, root: pathlib.Path) -> pathlib.Path:
    """Where an object or a folder of the bucket lies."""
    return root / str(path).removeprefix("gs://")


def provide(root: pathlib.Path, monkeypatch) -> None:
    """Makes gs:// the bucket in `root`: for epath, orbax, TensorStore and TensorBoard."""
    storage = FlatStorage(root)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setattr(type(backend.fsspec_backend), "fs", lambda self, path: storage)
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)

    def kvstore(path):
        return {"driver": "file", "path": str(local(path, root))}

    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", kvstore)
    url = stored_arrays.url

    def local_url(path):
        return url(local(path, root)) if str(path).startswith("gs://") else url(path)

    monkeypatch.setattr(stored_arrays, "url", local_url)
    events = tensorboardX.record_writer.REGISTERED_FACTORIES
    monkeypatch.setitem(events, "gs", _Events(root))


class _Events:
    """Where TensorBoard's events go."""

    def __init__(self, root: pathlib.Path):
        self._root = root

    def open(self, path):
        at = local(path, self._root)
        at.parent.mkdir(parents=True, exist_ok=True)
        return at.open("wb")

    def directory_check(self, path):
        pass
