"""A run on data of which some is bad: it goes on, tells which, and stops at the limit."""

import io
import json
import shutil
import tarfile

import numpy as np
from PIL import Image
import pytest

from t2i_jax import jsonlines
from t2i_jax.errors import ConfigError
from t2i_jax.training import loop
from t2i_jax.training.faults import DataError
from t2i_jax.training.metrics import read_metrics
from tests import tiny


def write(path, keys, broken):
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:
        for key in keys:
            image = io.BytesIO()
            pixels = rng.integers(0, 256, (20, 16 if key % 2 else 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(image, "JPEG")
            data = image.getvalue()[: -100 if key in broken else None]
            caption = f"{'a b ' * (key % 3)}c".encode()
            for name, body in ((f"{key}.jpg", data), (f"{key}.txt", caption)):
                info = tarfile.TarInfo(name)
                info.size = len(body)
                archive.addfile(info, io.BytesIO(body))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder / "a.tar", range(40), {3, 20, 21})
    write(folder / "b.tar", range(40, 60), set())
    with open(folder / "b.tar", "r+b") as shard:  # a header in the middle
        shard.seek(512 * 6)
        shard.write(b"?" * 512)
    return folder


def config(data, **changes):
    mixture = tuple(f"weight={w} path={data / name}" for w, name in ((3, "a.tar"), (1, "b.tar")))
    fields = {"source": "webdataset", "image_field": "jpg", "caption_field": "txt"}
    rules = {"mixture": mixture, "validation_size": 8, "min_image_size": 8, "max_bad_rate": 0.5}
    shapes = {"buckets": ("16x16", "32x16"), "max_text_tokens": 12}
    settings = fields | rules | shapes | {"original_caption_field": "", "index_dir": str(data)}
    settings = {f"data__{key}": value for key, value in settings.items()}
    mesh = {"mesh__fsdp": 2, "mesh__data": 4, "train__batch_size": 8}
    return tiny.config(**settings | mesh | {"train__steps": 8, "checkpoint__every": 4} | changes)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    loop.train(config(data), workdir)
    return workdir


def faults(workdir):
    return jsonlines.read(workdir / "bad_samples" / "host_0000.jsonl")


def test_bad_samples_are_on_the_list_and_in_the_metrics(data, run):
    entries = faults(run)
    met = [entry for entry in entries if entry["position"] is not None]
    assert {"a.tar/3", "a.tar/20", "a.tar/21"} >= {entry["sample"] for entry in met}
    assert all(entry["cause"] == "truncated_image" for entry in met)
    damaged = [entry for entry in entries if entry["cause"] == "unreadable"]
    assert [entry["sample"] for entry in damaged] == [f"{data / 'b.tar'}, bytes 3072 to 4608"]
    last = read_metrics(run)[-1]
    assert last["bad_samples"] == last["bad_samples/truncated_image"] == len(met) > 0
    steps = {entry["step"] for entry in met}
    assert steps <= set(range(1, 9))


def test_a_run_that_is_resumed_tells_the_same(data, run, tmp_path):
    parts = tmp_path / "parts"
    loop.train(config(data, train__steps=4), parts)
    loop.train(config(data), parts)
    assert faults(parts) == faults(run)
    assert (parts / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()


def test_training_stops_at_the_limit_and_names_what_is_bad(data, run, tmp_path):
    workdir = tmp_path / "limited"
    with pytest.raises(DataError) as error:
        alone = {"data__mixture": (), "data__path": str(data / "a.tar"), "data__buckets": ()}
        loop.train(config(data, data__max_bad_rate=0.0, train__steps=40, **alone), workdir)
    text = str(error.value)
    assert "more than data.max_bad_rate = 0 of the newest 2000 samples" in text
    assert (
        "truncated_image, " in text and "bytes that do not decode" in text and "bad_samples" in text
    )


def test_shards_beyond_the_limit_are_refused_at_the_start(data, tmp_path):
    with pytest.raises(loop.SetupError, match=r"1 of 2 files are damaged(?s:.*)b\.tar, bytes 3072"):
        loop.train(config(data, data__max_bad_rate=0.4), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_other_data_under_the_same_name_is_refused(data, run, tmp_path):
    workdir, other = shutil.copytree(run, tmp_path / "run"), tmp_path / "other"
    other.mkdir()
    write(other / "a.tar", range(40), set())
    shutil.copy(data / "b.tar", other / "b.tar")
    was = json.loads((workdir / "config.json").read_text())
    changed = config(data, data__mixture=config(other).data.mixture)
    (workdir / "config.json").write_text(
        json.dumps(was | {"data": was["data"] | {"mixture": changed.data.mixture}})
    )
    with pytest.raises(ConfigError, match="now there are others, as many"):
        loop.train(changed, workdir)
