"""Data sets that tensorflow-datasets prepares here, without TensorFlow, read as a source."""

import io
import json
import pickle
import shutil
import socket
import subprocess
import sys

import cloudpickle
import numpy as np
from PIL import Image
import pytest

from t2i_jax.data import tfds as ours
from t2i_jax.data.bad import BadSample, Cause

tfds = pytest.importorskip("tensorflow_datasets")


def picture(width, height=8, kind="JPEG", mode="RGB"):
    """A file: what the package encodes itself, it encodes with TensorFlow."""
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, kind)
    return io.BytesIO(buffer.getvalue())


class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # the package would look for it in modules on disk, of which this is none

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "depth": tfds.features.Image(shape=(2, 2, 1), dtype=np.uint16, encoding_format="png"),
            "frames": tfds.features.Sequence(tfds.features.Image(shape=(2, 2, 3))),
            "caption": tfds.features.Text(),
            "captions": tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64}),
            "texts": tfds.features.Sequence(tfds.features.Text()),
            "meta": {"picture": tfds.features.Image(), "source": tfds.features.Text()},
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(20), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            yield (
                i,
                {
                    "image": picture(10 + i),
                    "depth": picture(2, 2, "PNG", "I;16"),
                    "frames": [],
                    "caption": f" cäption {i}",
                    "captions": [{"text": f"{i} {j}", "id": j} for j in range(i % 3)],
                    "texts": ["x"] * (i % 2),
                    "meta": {"picture": picture(5, 4, "PNG"), "source": f"s{i}"},
                    "label": i % 3,
                },
            )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data_dir with tiny/1.0.0, its train split in several files."""
    data_dir = tmp_path_factory.mktemp("tfds")
    config = tfds.download.DownloadConfig(num_shards=3)
    Tiny(data_dir=data_dir, file_format="array_record").download_and_prepare(download_config=config)
    return data_dir


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*args):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def copy(prepared, tmp_path):
    """A directory of the version that a test may change."""
    return shutil.copytree(prepared / "tiny" / "1.0.0", tmp_path / "copy")


def data_source(path, split):
    """The package's own, its images encoded."""
    skip = tfds.decode.SkipDecoding()
    decoders = {"image": skip, "depth": skip, "meta": {"picture": skip}}
    return tfds.builder_from_directory(path).as_data_source(split, decoders=decoders)


@pytest.mark.parametrize("split", ["", "train", "test", "train[5:12]", "train[:90%]", "test+train"])
def test_agrees_with_the_package(prepared, split):
    """Image for image, caption for caption, in the order of their data source."""
    path = f"{prepared}/tiny/1.0.0"
    source = ours.Tfds(f"{path}#{split}" if split else path, "image", "caption", "meta/source")
    theirs = data_source(path, split or "train")
    assert len(source) == len(theirs) > 0
    for i, sample in enumerate(theirs):
        assert source[i] == {
            "image": sample["image"],
            "captions": (sample["caption"].decode().strip(),),
            "original_caption": sample["meta"]["source"].decode(),
        }
        assert source.size(i) == Image.open(io.BytesIO(sample["image"])).size
        assert source.caption(i) == source[i]["captions"][0]


def test_sequences_and_nested_features(prepared):
    path = f"{prepared}/tiny/1.0.0"
    source = ours.Tfds(path, "meta/picture", "captions/text, texts")
    for i, sample in enumerate(data_source(path, "train")):
        assert source._encoded(source.features(i)) == sample["meta"]["picture"]
        expected = [*sample["captions"]["text"], *sample["texts"]]
        if expected:
            captions = source[i]["captions"]
            assert captions == tuple(text.decode() for text in expected)
        else:
            with pytest.raises(BadSample) as error:
                source.caption(i)
            assert error.value.cause == Cause.MISSING_CAPTION
        assert source.size(i) == (5, 4)
    names = [source.name(i) for i in range(20)]
    assert names[0] == "tiny-train.array_record-00000-of-00003:0" and len(set(names)) == 20


def test_names(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    expected = ours.Tfds(f"{prepared}/tiny/1.0.0", "image", "caption").fingerprint
    for path in ("tiny", "tiny:1.0.0", "tiny#train", "tiny:1.0.0#train"):
        assert ours.Tfds(path, "image", "caption").fingerprint == expected
    assert len(ours.Tfds("tiny#test[1:]", "image", "caption")) == 2

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for version in ("1.9.0", "1.10.0", "9.0.0.incomplete", "notes"):
        shutil.copytree(prepared / "tiny" / "1.0.0", tmp_path / "many" / "plain" / version)
    (tmp_path / "many" / "plain" / "11.0.0").mkdir()  # not prepared
    assert ours._directory("many/plain").endswith("many/plain/1.10.0")
    assert len(ours.Tfds("many/plain:1.10.0#test", "image", "caption")) == 3
    with pytest.raises(FileNotFoundError, match="with configs: name one, as many/plain"):
        ours.Tfds("many", "image", "caption")


def test_what_is_not_prepared_says_how_to_prepare_it(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    for path in ("nothing", "tiny/config", "tiny:3.0.0", "tiny/config:1.0.0#train"):
        with pytest.raises(FileNotFoundError, match="is not prepared") as error:
            ours.Tfds(path, "image", "caption")
        name = path.partition("#")[0]
        assert f"tfds.builder('{name}', file_format='array_record')" in str(error.value)
        assert str(prepared) in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"has only 1\.0\.0"):
        ours.Tfds("tiny:3.0.0", "image", "caption")


def test_directories_without_a_data_set(prepared, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tiny/1\.0\.0 does: name that"):
        ours.Tfds(f"{prepared}/tiny", "image", "caption")
    for path in (tmp_path, f"{tmp_path}/absent", "./absent", "a b"):
        with pytest.raises(FileNotFoundError, match=r"no dataset_info\.json.*Expected is"):
            ours.Tfds(str(path), "image", "caption")
    with pytest.raises(ValueError, match=r"gs://.*Mount"):
        ours.Tfds("s3://bucket/tiny/1.0.0", "image", "caption")


@pytest.mark.parametrize("split", ["valid", "train[", "train[:x%]"])
def test_splits_that_are_not_there(prepared, split):
    with pytest.raises(ValueError, match=r"is no split of .* train, test") as error:
        ours.Tfds(f"{prepared}/tiny/1.0.0#{split}", "image", "caption")
    assert repr(split) in str(error.value)


def test_an_empty_split(prepared):
    with pytest.raises(ValueError, match="no samples"):
        ours.Tfds(f"{prepared}/tiny/1.0.0#train[:0]", "image", "caption")


@pytest.mark.parametrize(
    ("image", "caption", "message"),
    [
        ("picture", "caption", "no image 'picture'"),
        ("caption", "caption", "no image 'caption'"),
        ("depth", "caption", "no image 'depth'"),  # 16 bits: read as 8 they are another picture
        ("frames", "caption", "no image 'frames'"),
        ("meta", "caption", "no image 'meta'"),
        ("image", "captions", "no text 'captions'"),
        ("image", "caption,label", "no text 'label'"),
        ("image", "image", "no text 'image'"),
    ],
)
def test_features_that_are_not_there(prepared, image, caption, message):
    with pytest.raises(ValueError, match=message) as error:
        ours.Tfds(f"{prepared}/tiny/1.0.0", image, caption)
    assert "images (of 8 bits): image, meta/picture; texts: caption, captions/text" in str(
        error.value
    )


def edit(path, change):
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))


def test_sequences_of_sequences_are_refused(copy):
    """Without TensorFlow the package cannot write them, but it can describe them."""

    def nest(stored):
        features = stored["featuresDict"]["features"]
        outer = {**features["texts"], "sequence": {"feature": features["texts"], "length": "-1"}}
        features["texts"] = outer

    assert len(ours.Tfds(str(copy), "image", "texts")) == 20
    edit(copy / "features.json", nest)
    with pytest.raises(ValueError, match="no text 'texts'"):
        ours.Tfds(str(copy), "image", "texts")


def test_other_file_formats_say_how_to_convert(copy):
    edit(copy / "dataset_info.json", lambda info: info.update(fileFormat="tfrecord"))
    with pytest.raises(ValueError, match=r"stored as tfrecord.*tfds convert_format.*array_record"):
        ours.Tfds(str(copy), "image", "caption")


def test_a_data_set_in_several_formats(copy):
    formats = {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    edit(copy / "dataset_info.json", lambda info: info.update(formats))
    assert len(ours.Tfds(str(copy), "image", "caption")) == 20


def test_damaged_metadata(copy):
    for file in ("features.json", "dataset_info.json"):
        content = (copy / file).read_text()
        for damaged in ("", content[: len(content) // 2], "[" * 100_000, "[]", "{}"):
            (copy / file).write_text(damaged)
            with pytest.raises(ValueError, match=r"cannot be used: ") as error:
                ours.Tfds(str(copy), "image", "caption")
            assert str(copy) in str(error.value)
        (copy / file).write_text(content)
    assert len(ours.Tfds(str(copy), "image", "caption")) == 20


def _hidden(stored):
    inner = {"a": {"type": "evil_module.Feature", "content": {}}}
    stored.pop("featuresDict")
    stored["jsonFeature"] = {"json": json.dumps(inner)}


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("features.json", lambda s: s.update(pythonClassName="evil_module.Feature")),
        ("features.json", lambda s: s.update(type="evil_module.Feature", content={})),
        ("features.json", _hidden),
        (
            "dataset_info.json",
            lambda s: s.update(features={"pythonClassName": "evil_module.Feature", "text": {}}),
        ),
    ],
)
def test_metadata_imports_nothing(copy, tmp_path, monkeypatch, file, change):
    """The package imports the classes that the files name, whatever they are."""
    trace = tmp_path / "trace"
    (tmp_path / "evil_module.py").write_text(f"open({str(trace)!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    edit(copy / file, change)
    with pytest.raises(ValueError, match=r"asks for the class 'evil_module\.Feature'"):
        ours.Tfds(str(copy), "image", "caption")
    assert not trace.exists() and "evil_module" not in sys.modules


def test_files_that_are_gone_or_shorter_than_the_metadata_says(copy):
    edit(copy / "dataset_info.json", lambda i: i["splits"][1].update(shardLengths=["3", "1", "0"]))
    source = ours.Tfds(f"{copy}#test", "image", "caption")
    bad = []
    for i in range(len(source)):
        try:
            source.caption(i)
        except BadSample as error:
            bad.append(error.cause)
    assert bad and set(bad) == {Cause.UNREADABLE}
    next(copy.glob("tiny-train.array_record-00001*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of the 3 files of the split.*00001"):
        ours.Tfds(str(copy), "image", "caption")


def test_without_the_package(prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[tfds\]'"):
        ours.Tfds(f"{prepared}/tiny/1.0.0", "image", "caption")


def test_other_processes_do_not_import_the_package(prepared):
    source = ours.Tfds(f"{prepared}/tiny/1.0.0", "image", "caption")
    again = pickle.loads(cloudpickle.dumps(source))
    assert [again[i] for i in range(20)] == [source[i] for i in range(20)]
    code = (
        "import pickle, sys; s = pickle.load(sys.stdin.buffer); "
        "print(s.caption(7), s.fingerprint); "
        "print([m for m in ('jax', 'tensorflow', 'tensorflow_datasets') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code],
        input=cloudpickle.dumps(source),
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode() == f"{source.caption(7)} {source.fingerprint}\n[]\n"
