"""Data sets that tensorflow-datasets prepared, as a source. Nothing is downloaded or prepared here.

The package reads the metadata of a data set when it is opened: its features, and which records of
which files a split is. The records are tf.train.Examples in ArrayRecord files, and records.py reads
them; neither TensorFlow nor the code that made the data set is needed.
"""

from collections.abc import Iterator, Mapping
import contextlib
import json
import os
import re
from typing import Any

from etils import epath
import numpy as np

from t2i_jax.data import records, tar

_INFO = "dataset_info.json"
_NAME = re.compile(r"(\w+)(?:/([^/:]+))?(?::(\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_CLASSES = "tensorflow_datasets."  # of features: the package imports whatever features.json names


class Tfds(records.Examples):
    """Captioned images of a prepared data set, encoded as they were stored.

    `path` is NAME[/CONFIG][:VERSION] below $TFDS_DATA_DIR (or ~/tensorflow_datasets), or the
    directory of a version; '#SPLIT' may follow, 'train' if not: '#train[:90%]'. Fields are
    features, nested ones as 'captions/text'; a sequence is several captions.
    Raises FileNotFoundError where nothing is prepared, ValueError where it cannot be used.
    """

    def __init__(
        self,
        path: str,
        image_field: str,
        caption_field: str,
        original_caption_field: str = "",
    ):
        records.refuse_remote(path)
        place, split = _split(path)
        directory = _directory(place)
        info = _builder(directory).info
        try:
            files = info.splits[split].file_instructions
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"data.path {path!r}: {split!r} is no split of {directory}, which has "
                f"{', '.join(info.splits)}, and parts of these as 'train[:90%]': {error}"
            ) from error
        spans = [records.Span(os.fspath(f.filename), f.skip, f.take) for f in files]
        _check_files(directory, spans)
        super().__init__(spans, image_field, caption_field, original_caption_field)
        if not len(self):
            raise ValueError(f"data.path {path!r}: the split {split!r} has no samples.")
        _check_features(directory, info.features, self.fields)


def _split(path: str) -> tuple[str, str]:
    """'PLACE#SPLIT' in two."""
    if not tar.is_remote(path) and os.path.isdir(os.path.expanduser(path)):
        return path, "train"  # whatever its name
    place, _, split = path.partition("#")
    return place, split or "train"


def _is_prepared(directory: str) -> bool:
    return (epath.Path(directory) / _INFO).exists()


def _versions(directory: str) -> list[str]:
    """The prepared versions in it, the newest last."""
    place = epath.Path(directory)
    if not place.is_dir():
        return []
    found = [p.name for p in place.iterdir() if _VERSION.fullmatch(p.name)]
    found = [name for name in found if _is_prepared(f"{directory}/{name}")]
    return sorted(found, key=lambda name: tuple(map(int, name.split("."))))


def _directory(place: str) -> str:
    """Where the data set lies that `place` is, or names."""
    given = os.path.expanduser(place)
    if _is_prepared(given):
        return given
    match = _NAME.fullmatch(place)
    if match is None or os.path.isdir(given):
        below = [f"{given}/{name}" for name in _versions(given)]
        hint = f" {below[-1]} does: name that." if below else ""
        raise FileNotFoundError(
            f"data.path {place!r} has no {_INFO}: it is no data set that tensorflow-datasets "
            f"prepared.{hint} Expected is the directory of a version, as DIR/coco_captions/1.1.0, "
            f"or NAME[/CONFIG][:VERSION] of a data set in {_data_dir()}."
        )
    name, config, version = match.groups()
    base = os.path.join(_data_dir(), *filter(None, (name, config)))
    versions = _versions(base)
    if version in versions or (versions and not version):
        return f"{base}/{version or versions[-1]}"
    raise FileNotFoundError(_not_prepared(base, name, config, version, versions))


def _data_dir() -> str:
    return os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def _not_prepared(base: str, name: str, config: str | None, version: str | None, versions) -> str:
    there = f"only {', '.join(versions)}" if versions else "nothing"
    if not versions and not config and epath.Path(base).is_dir():
        configs = sorted(p.name for p in epath.Path(base).iterdir() if _versions(os.fspath(p)))
        if configs:
            return f"{name} is prepared in {base} with configs: name one, as {name}/{configs[0]}."
    full = "/".join(filter(None, (name, config))) + (f":{version}" if version else "")
    return (
        f"{full} is not prepared: {base} has {there} ($TFDS_DATA_DIR says where to look). "
        'This prepares it, and may download much: python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{full}', file_format='array_record').download_and_prepare()\""
    )


def _builder(directory: str) -> Any:
    """What the package makes of the metadata in `directory`, set to ArrayRecord files."""
    try:
        import tensorflow_datasets as tfds  # slow, and needed nowhere else
    except ImportError as error:
        raise ImportError(
            "data.source 'tfds' needs tensorflow-datasets: pip install -e '.[tfds]'"
        ) from error
    try:
        _check_classes(directory)
        builder = tfds.builder_from_directory(directory)
        formats = sorted(f.value for f in builder.info.available_file_formats())
        if "array_record" in formats:  # perhaps beside another, which the metadata prefers
            builder.info.set_file_format(
                "array_record", override=True, override_if_initialized=True
            )
    except Exception as error:  # whatever the package raises at metadata that it cannot read
        raise ValueError(
            f"{directory}: its {_INFO} and features.json cannot be used: {error} Prepare the data "
            "set again, with tensorflow-datasets 4 or newer."
        ) from error
    if "array_record" not in formats:
        raise ValueError(
            f"{directory} is stored as {', '.join(formats)}, which is not read at random; "
            "array_record is. Convert it (needs TensorFlow): tfds convert_format "
            f"--dataset_version_dir={directory} --out_file_format=array_record, or prepare it in "
            "another directory: tfds.builder(NAME, file_format='array_record', data_dir=DIR)"
            ".download_and_prepare()"
        )
    return builder


def _check_classes(directory: str) -> None:
    """Refuses metadata that would have a module of somebody else's imported."""
    for file in (_INFO, "features.json"):
        place = epath.Path(directory) / file
        for name in _class_names(json.loads(place.read_text()) if place.exists() else {}):
            if not str(name).startswith(_CLASSES):
                raise ValueError(
                    f"{file} asks for the class {name!r}; only the package's own are imported."
                )


def _class_names(tree: Any) -> Iterator[Any]:
    """What is named as a class anywhere in a JSON, also in JSON that is a string of it."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            old = key == "type" and isinstance(value, str) and "." in value
            if old or key in ("pythonClassName", "python_class_name"):
                yield value
            yield from _class_names(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _class_names(value)
    elif isinstance(tree, str) and tree.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            yield from _class_names(json.loads(tree))


def _check_files(directory: str, spans: list[records.Span]) -> None:
    missing = [s.path for s in spans if not tar.is_remote(s.path) and not os.path.isfile(s.path)]
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {len(missing)} of the {len(spans)} files of the split, the first "
            f"{os.path.basename(missing[0])}: copy them, too, or prepare the data set again."
        )


def _check_features(directory: str, features: Any, fields: list[str]) -> None:
    """The first field is one image of 8 bits, the others are texts or sequences of texts."""
    info = dict(_flat(features.get_tensor_info()))
    images = {name for name in info if _is_image(features, name)}
    texts = {n for n, i in info.items() if i.np_dtype == np.object_ and len(i.shape) < 2}
    wrong = {name: "image" for name in fields[:1] if name not in images}
    wrong.update({name: "text" for name in fields[1:] if name not in texts})
    if wrong:
        others = sorted(info.keys() - images - texts)
        raise ValueError(
            f"{directory} has no {' and no '.join(f'{k} {n!r}' for n, k in wrong.items())}. Its "
            f"images (of 8 bits): {', '.join(sorted(images)) or 'none'}; texts: "
            f"{', '.join(sorted(texts)) or 'none'}; others: {', '.join(others[:20]) or 'none'}. "
            "Set --config.data.image_field, --config.data.caption_field (several with commas) and "
            "--config.data.original_caption_field to what is there."
        )


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """('a/b', leaf) of nested mappings: the names that features have in an Example."""
    if not isinstance(tree, Mapping):
        yield prefix, tree
        return
    for name, value in tree.items():
        yield from _flat(value, f"{prefix}/{name}" if prefix else name)


def _is_image(features: Any, name: str) -> bool:
    """Whether it is stored as one encoded image; in a sequence there are several."""
    import tensorflow_datasets as tfds

    for part in name.split("/"):
        if not isinstance(features, tfds.features.FeaturesDict) or part not in features:
            return False
        features = features[part]
    return isinstance(features, tfds.features.Image) and features.np_dtype == np.uint8
