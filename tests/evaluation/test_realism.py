"""FID and its kin as benchmarks, with networks that are small enough to follow by hand."""

import json

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from scipy import linalg

from t2i_jax import sharding
from t2i_jax.errors import ConfigError, MissingError
from t2i_jax.evaluation import benchmarks, features, realism
from t2i_jax.evaluation.benchmarks import Setting
from t2i_jax.evaluation.drawn import Way
from t2i_jax.evaluation.statistics import Statistics
from t2i_jax.pipeline import Pipeline


def mean_colours(picture):
    """(3,) in [0, 1]."""
    return features.pixels(picture).astype(np.float32).mean((0, 1)) / 255


def letters(prompt):
    """Counts of three letters."""
    return np.array([prompt.count(letter) for letter in "aer"], np.float32)


@pytest.fixture(scope="module")
def networks():
    """The mean colour, and a nonlinear function of it, stand for both networks."""
    mesh, reads = sharding.make_mesh(), jax.ShapeDtypeStruct((3,), np.float32)

    def extractor(prepare, network):
        return features.Extractor(prepare, network, {}, mesh, reads, batch_size=8)

    colours = extractor(mean_colours, lambda params, x: x)
    clip = extractor(mean_colours, lambda params, x: jnp.concatenate([x, x**2], -1))
    prompts = extractor(letters, lambda params, x: jnp.concatenate([x, x**2], -1))
    return realism.Networks(colours, (clip, prompts))


@pytest.fixture
def setting(trained, networks, monkeypatch, tmp_path):
    realism.load.cache_clear()
    monkeypatch.setattr(
        realism.Networks,
        "load",
        classmethod(
            lambda cls, inception, clip: cls(
                networks.inception if inception else None, networks.clip if clip else None
            )
        ),
    )
    told = {"checkpoint": str(trained), "weights": "ema"}
    way = Way(Pipeline.load(trained), 0, {"steps": 1}, told)
    return Setting(way, epath.Path(tmp_path / "images"), inception="x", clip="x")


@pytest.fixture
def real(tmp_path):
    """Real pictures of two categories."""
    rng = np.random.default_rng(0)
    for category in ("animals", "food"):
        (tmp_path / "real" / category).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (12, 9, 3)).astype(np.uint8)
            Image.fromarray(pixels // (1 + i % 3)).save(tmp_path / "real" / category / f"{i}.png")
    return tmp_path / "real"


def fid_by_scipy(a, b):
    """The published formula, with scipy's matrix root."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)


def colours_of(files):
    return [mean_colours(np.asarray(Image.open(file).convert("RGB"))) for file in files]


def test_mjhq_is_laid_out_by_category_and_scored_whole_and_by_category(setting, real, tmp_path):
    prompts = {
        f"id-{i}": {"category": ["animals", "food"][i % 2], "prompt": f"a red ring {i}"}
        for i in range(12)
    }
    (tmp_path / "meta_data.json").write_text(json.dumps(prompts))
    given = {"prompts": str(tmp_path / "meta_data.json"), "reference": str(real)}
    report, samples = benchmarks.run("mjhq", setting._replace(**given))
    files = sorted((tmp_path / "images").rglob("*.png"))
    assert len(files) == 12 and (tmp_path / "images" / "food" / "id-3.png") in files
    theirs = sorted(real.rglob("*.png"))
    expected = fid_by_scipy(colours_of(files), colours_of(theirs))
    assert report["score"] == pytest.approx(expected, rel=1e-3)
    assert (report["metric"], report["better"], report["num_images"]) == ("FID", "lower", 12)
    for category in ("animals", "food"):
        ours = [file for file in files if file.parent.name == category]
        both = colours_of(ours), colours_of(f for f in theirs if f.parent.name == category)
        part = report["categories"][category]
        assert part["fraction"] == pytest.approx(fid_by_scipy(*both), rel=1e-3)
        assert part["n"] == 6 and len(samples[category]) == 6
    assert {"CMMD", "CLIP score"} < set(report["metrics"])
    assert any(name.startswith("KID x 1000") for name in report["metrics"])
    assert "299 x 299" in report["pipeline"] and "Of 12 pictures" in report["pipeline"]
    assert "FID" in benchmarks.table(report)


def test_statistics_take_the_place_of_pictures(setting, real, tmp_path):
    (tmp_path / "captions.txt").write_text("a red ring\n\ntwo blue squares\na ring\nx\n")
    given = {"prompts": str(tmp_path / "captions.txt"), "clip": ""}
    setting = setting._replace(**given)
    whole, _ = benchmarks.run("coco", setting._replace(reference=str(real)))
    Statistics.of(np.array(colours_of(sorted(real.rglob("*.png"))))).save(tmp_path / "s.npz")
    from_file, _ = benchmarks.run("coco", setting._replace(reference=str(tmp_path / "s.npz")))
    assert from_file["score"] == pytest.approx(whole["score"], rel=1e-5)
    assert "KID" not in str(from_file["metrics"]) and "KID" in str(whole["metrics"])
    assert sorted(f.name for f in (tmp_path / "images").glob("*.png")) == [
        f"{i:012d}.png" for i in range(4)
    ]


def test_the_clip_score_is_of_each_picture_and_its_own_prompt(setting, tmp_path):
    (tmp_path / "captions.jsonl").write_text(
        "".join(json.dumps({"caption": c}) + "\n" for c in ("are", "aaa eer", "rrr"))
    )
    given = {"prompts": str(tmp_path / "captions.jsonl"), "inception": ""}
    report, _ = benchmarks.run("coco", setting._replace(**given))
    pictures = np.array(colours_of(sorted((tmp_path / "images").glob("*.png"))))
    texts = np.array([letters(c) for c in ("are", "aaa eer", "rrr")])
    x, y = np.hstack([pictures, pictures**2]), np.hstack([texts, texts**2])
    cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert report["score"] == pytest.approx(100 * cosines.mean(), rel=1e-5)
    assert (report["metric"], report["better"]) == ("CLIP score", "higher")


def test_without_networks_images_are_drawn_and_the_rest_is_told(setting, tmp_path):
    (tmp_path / "captions.txt").write_text("a red ring\n")
    given = {"prompts": str(tmp_path / "captions.txt"), "inception": "", "clip": ""}
    report, samples = benchmarks.run("coco", setting._replace(**given))
    assert report["score"] is None and "--reference and --inception" in report["todo"]
    assert len(samples["captions"]) == 1


def test_captions_of_coco_are_one_for_each_image(tmp_path):
    rows = [(7, 3, "second"), (5, 3, " the first\n one"), (9, 11, "other"), (1, 2, "two")]
    annotations = [{"id": i, "image_id": image, "caption": c} for i, image, c in rows]
    (tmp_path / "c.json").write_text(json.dumps({"annotations": annotations}))
    assert realism.read_captions(str(tmp_path / "c.json")) == {
        "000000000002": "two",
        "000000000003": "the first one",
        "000000000011": "other",
    }
    some = realism.some_of(100, 10, seed=1)
    assert len(set(some)) == 10 and some == sorted(some) and 0 <= some[0] <= some[-1] < 100
    assert some == realism.some_of(100, 10, seed=1) != realism.some_of(100, 10, seed=2)
    assert set(some) < set(realism.some_of(100, 20, seed=1))
    assert realism.some_of(100, None, 0) == list(range(100))


def test_more_images_are_those_that_are_there_and_others(setting, tmp_path):
    (tmp_path / "captions.txt").write_text("".join(f"a ring {i}\n" for i in range(9)))
    given = {"prompts": str(tmp_path / "captions.txt"), "inception": "", "clip": ""}
    setting = setting._replace(**given)
    other = setting._replace(folder=epath.Path(tmp_path / "at_once"))
    for few, place in ((3, setting), (6, setting), (6, other)):
        benchmarks.run("coco", place._replace(num_images=few))
    grown, once = (
        {f.name: f.read_bytes() for f in (tmp_path / name).glob("*.png")}
        for name in ("images", "at_once")
    )
    assert grown == once and len(once) == 6


def test_what_cannot_be_compared_is_refused(networks, real, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match="has no picture"):
        realism.reference(networks, str(tmp_path / "empty"))
    with pytest.raises(MissingError, match="no such folder of pictures"):
        realism.reference(networks, str(tmp_path / "none"))
    (tmp_path / "bad.npz").write_bytes(b"PK no")
    with pytest.raises(ConfigError, match="--reference="):
        realism.reference(networks, str(tmp_path / "bad.npz"))
    seen = realism.see(networks, sorted(real.rglob("*.png")), "x")
    wide = realism.Seen(Statistics.of(np.random.default_rng(0).standard_normal((9, 5))))
    with pytest.raises(ConfigError, match=r"cannot be compared: .*5"):
        realism.compare(networks, seen, wide)
    for text in ("[]", '{"a": {"category": "x"}}', '{"../a": {"category": "x", "prompt": "p"}}'):
        (tmp_path / "m.json").write_text(text)
        with pytest.raises(ConfigError, match=r"is not meta_data\.json"):
            realism.read_mjhq(str(tmp_path / "m.json"))
    (tmp_path / "c.json").write_text('{"annotations": [{"id": 1}]}')
    with pytest.raises(ConfigError, match="no captions that can be read"):
        realism.read_captions(str(tmp_path / "c.json"))
