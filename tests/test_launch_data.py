"""launch/prepare.py and launch/benchmark.py, as a new user would type them."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
from PIL import Image
import pytest

from t2i_jax.data.tokenizer import Tokenizer
from t2i_jax.speed import data as speed
from tests.test_launch import ROOT


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Runs a script in an empty directory: (status, out, err)."""
    directory = tmp_path_factory.mktemp("cwd")

    def run(script, *arguments):
        command = [sys.executable, ROOT / "launch" / f"{script}.py", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=directory, env=os.environ, capture_output=True, text=True, timeout=200
        )
        return done.returncode, done.stdout, done.stderr

    return run


def write(path, fields, count=6):
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            image = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (70, 80, 3), np.uint8)).save(image, "JPEG")
            for field, body in fields(i, image.getvalue()).items():
                info = tarfile.TarInfo(f"{i:09}.{field}")
                info.size = len(body)
                archive.addfile(info, io.BytesIO(body))
    return path


def published(i, image):
    return {"jpg": image, "txt": b"alt text", "json": b"{}"}


def ours(i, image):
    return {"image.jpg": image, "synthetic_caption.txt": f"a red ring {i}".encode()}


def test_a_published_set_is_merged_and_indexed(launch, tmp_path):
    write(tmp_path / "cc12m-train-0003.tar", published)
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as lines:
        for i in range(1, 6):  # the first has none
            lines.write(json.dumps({"key": f"{i:09}", "caption_llava": f"caption {i}"}) + "\n")
    places = (
        f"--images={tmp_path}/cc12m-train-*.tar",
        f"--captions={tmp_path}/train.jsonl.gz",
        f"--out={tmp_path}/out",
    )
    status, out, err = launch("prepare", "cc12m", *places, "--workers=1")
    assert status == 0 and "1 shards with 5 samples" in out and "1 missing_caption" in out, err
    status, out, err = launch("prepare", "index", f"--data={tmp_path}/out/*.tar", "--workers=1")
    assert status == 0 and "1 shards, 5 samples" in out and "synthetic_caption.txt" in out, err
    assert (tmp_path / "out" / "cc12m-train-0003.tar.index.npz").exists()


def test_damaged_shards_are_named_with_status_one(launch, tmp_path):
    path = write(tmp_path / "a.tar", ours)
    os.truncate(path, 20_000)
    index = tmp_path / "indexes"
    status, out, _ = launch("prepare", "index", f"--data={path}", f"--index_dir={index}")
    assert status == 1 and f"DAMAGED {path}, bytes " in out and "1 shards are damaged" in out
    assert [p.suffix for p in index.iterdir()] == [".npz"]
    assert [p.name for p in tmp_path.glob("*.npz")] == []


def test_inspect_and_tokenizer(launch, tmp_path):
    path = write(tmp_path / "a.tar", ours)
    config = (
        f"--config={ROOT}/configs/small_64.py",
        f"--config.data.path={path}",
        "--config.data.validation_size=2",
        "--config.train.batch_size=4",
    )
    status, out, err = launch("prepare", "inspect", *config, f"--out={tmp_path}/sheet.png")
    assert status == 0 and "80" in out and "sheet.png" in out, err
    assert Image.open(tmp_path / "sheet.png").width > 4 * 64
    where = f"--out={tmp_path}/tokenizer"
    status, out, err = launch("prepare", "tokenizer", *config, where, "--vocab_size=265")
    assert status == 0 and "265 tokens, trained on 4 captions" in out, err
    assert Tokenizer.load(tmp_path / "tokenizer").vocab_size == 265
    status, _, err = launch("prepare", "tokenizer", *config, where)
    assert status == 2 and "is there already" in err


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "which command? Known are index, inspect, latents, tokenizer, cc12m, sa1b, journeydb"),
        (["index"], "--data=... must be given"),
        (["index", "--data=none/*.tar"], "No file matches 'none/*.tar'"),
    ],
)
def test_wrong_command_lines(launch, words, message):
    status, _, err = launch("prepare", *words)
    assert status == 2 and message in err and "Traceback" not in err


def test_the_benchmark_of_the_data(launch, tmp_path):
    out = tmp_path / "data.json"
    status, text, err = launch("benchmark", "data", "--rounds=1", "--count=1", f"--out={out}")
    assert status == 0 and "images a second on one core" in text, err
    found = json.loads(out.read_text())
    assert list(found) == [f"{w} x {h}" for w, h in speed.SIZES]
    for entry in found.values():
        ways = {"decode", "decode, resize", "Pillow", "loader"}
        assert set(entry["images_per_second_per_core"]) == ways
        assert entry["loader_of_bare"] > 0 and entry["decode_share"] > 0
