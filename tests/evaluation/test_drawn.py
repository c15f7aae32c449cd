"""Images of a benchmark in files: all of them, once, and the same however often it was killed."""

import json
import pathlib

from etils import epath
import jax
import numpy as np
from PIL import Image
import pytest

from t2i_jax import sharding
from t2i_jax.errors import ConfigError
from t2i_jax.evaluation import drawn
from t2i_jax.evaluation.drawn import Item, Way
from t2i_jax.pipeline import Pipeline

PROMPTS = ["a red ring", "two blue squares", "<b>'/../\u202e", ""]
ITEMS = [Item(f"{i}/{i:04d}.png", prompt, (i,)) for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def pipeline(trained):
    loaded = Pipeline.load(trained)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    params, frozen = jax.device_put((loaded.params, loaded.frozen), sharding.replicated(mesh))
    return loaded._replace(mesh=mesh, params=params, frozen=frozen)


class Counting:
    """A pipeline that notes what it draws, and dies at the image of a number."""

    def __init__(self, pipeline, dies_at=None):
        self._pipeline, self._dies_at, self.numbers = pipeline, dies_at, []

    def __getattr__(self, name):
        return getattr(self._pipeline, name)

    def draw(self, prompts, *, numbers, **options):
        self.numbers += numbers
        if self._dies_at in numbers:
            raise KeyboardInterrupt
        return self._pipeline.draw(prompts, numbers=numbers, **options)


def way(pipeline, seed=3, **choices):
    told = {"checkpoint": "here", "weights": "ema"}
    return Way(pipeline, seed, {"steps": 2} | choices, told)


def contents(folder):
    folder = pathlib.Path(folder)
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_images_are_those_of_the_pipeline_with_what_made_them(pipeline, tmp_path):
    drawn.draw(way(pipeline), ITEMS, epath.Path(tmp_path), "drawing")
    expected = pipeline.draw(PROMPTS, seed=3, steps=2)
    for item, image in zip(ITEMS, expected, strict=True):
        np.testing.assert_array_equal(drawn.read(epath.Path(tmp_path), item), [image])
        with Image.open(tmp_path / item.file) as picture:
            told = json.loads(picture.text["drawn"])
        assert told["prompt"] == item.prompt and told["numbers"] == list(item.numbers)
        assert (told["seed"], told["steps"], told["checkpoint_step"]) == (3, 2, 4)
    about = json.loads((tmp_path / drawn.ABOUT).read_text())
    assert about["solver"] == "euler" and about["checkpoint"] == "here"


def test_a_killed_run_goes_on_with_what_is_missing(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(drawn, "_CHUNK", 1)
    whole, cut = epath.Path(tmp_path / "whole"), epath.Path(tmp_path / "cut")
    one = pipeline.config.copy_and_resolve_references().unlock()
    one.sampling.batch_size = 1  # chunks of an image
    pipeline = pipeline._replace(config=one)
    drawn.draw(way(pipeline), ITEMS, whole, "drawing")
    dying = Counting(pipeline, dies_at=2)
    with pytest.raises(KeyboardInterrupt):
        drawn.draw(way(dying), ITEMS, cut, "drawing")
    assert dying.numbers == [0, 1, 2] and not (cut / ITEMS[2].file).exists()
    again = Counting(pipeline)
    drawn.draw(way(again), ITEMS, cut, "drawing")
    assert again.numbers == [2, 3] and contents(cut) == contents(whole)
    done = Counting(pipeline)
    drawn.draw(way(done), ITEMS, cut, "drawing")
    assert done.numbers == []


def test_four_images_in_a_file(pipeline, tmp_path):
    folder = epath.Path(tmp_path)
    item = Item("images/a.png", "a red ring", (4, 5, 6, 7))
    drawn.draw(way(pipeline), [item], folder, "drawing")
    images = pipeline.draw(["a red ring"] * 4, numbers=[4, 5, 6, 7], seed=3, steps=2)
    np.testing.assert_array_equal(drawn.read(folder, item), images)
    with Image.open(tmp_path / "images" / "a.png") as picture:
        whole = np.asarray(picture)
    assert whole.shape == (32, 32, 3)
    np.testing.assert_array_equal(whole[:16, 16:], images[1])
    np.testing.assert_array_equal(whole[16:, :16], images[2])


@pytest.mark.parametrize("what", ["seed", "steps", "weights_checksum"])
def test_a_folder_of_other_images_is_refused(pipeline, tmp_path, what):
    folder = epath.Path(tmp_path)
    drawn.draw(way(pipeline), ITEMS[:1], folder, "drawing")
    before = contents(folder)
    other = pipeline
    if what == "weights_checksum":
        params = jax.tree.map(lambda x: x + 1e-3, pipeline.params)
        other = pipeline._replace(params=params)
    changed = {"seed": way(pipeline, seed=4), "steps": way(pipeline, steps=3)}
    with pytest.raises(ConfigError, match=rf"drawn otherwise: {what} = .*, there"):
        drawn.draw(changed.get(what, way(other)), ITEMS[1:], folder, "drawing")
    assert contents(folder) == before
    moved = Way(pipeline, 3, {"steps": 2}, {"checkpoint": "elsewhere", "weights": "ema"})
    drawn.draw(moved, ITEMS, folder, "drawing")  # a checkpoint that was moved is the same
    assert way(pipeline).checksum() == moved.checksum() != way(pipeline, seed=4).checksum()
    assert moved.checksum("coco", "a.txt") != moved.checksum("coco", "b.txt")


def test_a_file_is_never_taken_for_a_picture_of_something_else(pipeline, tmp_path):
    """Other prompts or numbers under the same names are refused; more files are not."""
    folder = epath.Path(tmp_path)
    drawn.draw(way(pipeline), ITEMS[:2], folder, "drawing")
    before = contents(folder)
    for other in (Item(ITEMS[0].file, "a blue ring", (0,)), Item(ITEMS[0].file, PROMPTS[0], (7,))):
        with pytest.raises(ConfigError, match=r"images of other prompts, or of other numbers, 0/"):
            drawn.draw(way(pipeline), [other, ITEMS[1]], folder, "drawing")
    assert contents(folder) == before
    drawn.draw(way(pipeline), ITEMS, folder, "drawing", alone=True)
    drawn.draw(way(pipeline), ITEMS[:1], folder, "drawing")
    with pytest.raises(ConfigError, match=r"3 files more than are asked for, 1/0001\.png among"):
        drawn.draw(way(pipeline), ITEMS[:1], folder, "drawing", alone=True)


def test_what_cannot_be_written_or_read_is_told(pipeline, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"file cannot hold images"):
        drawn.draw(way(pipeline), ITEMS, epath.Path(tmp_path / "file"), "drawing")
    folder = epath.Path(tmp_path / "images")
    folder.mkdir()
    (folder / "0").write_text("no folder")
    with pytest.raises(ConfigError, match="Images cannot be written to"):
        drawn.draw(way(pipeline), ITEMS[:1], folder, "drawing")
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    with pytest.raises(ConfigError, match=r"bad\.png cannot be read"):
        drawn.read(folder, Item("bad.png", "", (0,)))
