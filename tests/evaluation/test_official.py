"""Layouts of GenEval and DPG-Bench against what their scorers open, and their results read."""

import collections
import json
import os
import re
import sys

from etils import epath
import numpy as np
from PIL import Image
import pytest

from t2i_jax.errors import ConfigError, MissingError, UserError
from t2i_jax.evaluation import benchmarks, dpg, geneval, intervals
from t2i_jax.evaluation import report as pages
from t2i_jax.evaluation.benchmarks import Setting
from t2i_jax.evaluation.drawn import Way
from t2i_jax.pipeline import Pipeline

RECORDS = [
    {"tag": tag, "include": [{"class": "bench", "count": 1}], "prompt": f"a photo of {i} benches"}
    for i, tag in enumerate(["single_object", "two_object", "counting", "counting"])
]


@pytest.fixture(scope="module")
def way(trained):
    told = {"checkpoint": str(trained), "weights": "ema"}
    return Way(Pipeline.load(trained), 0, {"steps": 1}, told)


@pytest.fixture
def metadata(tmp_path):
    file = tmp_path / "metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, RECORDS)) + "\n")
    return str(file)


def opened_by_geneval(folder):
    """What its evaluate_images.py opens: folders that are numbers, metadata and N.png in them."""
    found = {}
    for name in os.listdir(folder):
        if os.path.isdir(folder / name) and name.isdigit():
            record = json.loads((folder / name / "metadata.jsonl").read_text())
            files = os.listdir(folder / name / "samples")
            found[name] = record, [f for f in files if re.match(r"\d+\.png", f)]
    return found


def test_geneval_has_the_files_that_its_scorer_opens(way, metadata, tmp_path):
    setting = Setting(way, epath.Path(tmp_path / "images"), prompts=metadata)
    report, samples = benchmarks.run("geneval", setting)
    found = opened_by_geneval(tmp_path / "images")
    assert sorted(found) == [f"{i:05d}" for i in range(4)]
    for i, record in enumerate(RECORDS):
        there, files = found[f"{i:05d}"]
        assert there == record and len(files) == 4
    assert report["score"] is None and report["num_images"] == 16
    assert "evaluation/evaluate_images.py" in report["todo"]
    assert {name: len(some) for name, some in samples.items()} == {
        "single object": 4,
        "two objects": 4,
        "counting": 8,
    }
    assert "16 images, not scored. In the scorer's checkout" in benchmarks.table(report)
    third = way.pipeline.draw([RECORDS[1]["prompt"]], numbers=[6], seed=0, steps=1)[0]
    with Image.open(tmp_path / "images" / "00001" / "samples" / "0002.png") as picture:
        np.testing.assert_array_equal(picture, third)


def results_of_geneval(passes):
    """Its lines, for {tag: passes of each image of each prompt}."""
    lines = []
    for tag, prompts in passes.items():
        for i, images in enumerate(prompts):
            record = json.dumps({"tag": tag, "prompt": f"{tag} {i}"})
            lines += [{"tag": tag, "correct": bool(ok), "metadata": record} for ok in images]
    return "\n".join(map(json.dumps, lines)) + "\n"


def test_results_of_geneval_become_its_table(tmp_path):
    passes = {"counting": [[1, 1, 0, 0], [1, 0, 0, 0]], "single_object": [[1, 1, 1, 1]]}
    (tmp_path / "results.jsonl").write_text(results_of_geneval(passes))
    found = geneval.read_results(tmp_path / "results.jsonl")
    assert found["score"] == (3 / 8 + 1) / 2
    assert found["scored"] == {"counting 0": 4, "counting 1": 4, "single_object 0": 4}
    assert found["categories"]["counting"]["fraction"] == 3 / 8
    assert found["categories"]["single object"]["n"] == 4
    low, high = found["interval"]
    # Of two prompts with 2 and 1 passes, resampled: a mean of 1/4, 3/8 or 1/2.
    assert (low, high) == ((1 / 4 + 1) / 2, (1 / 2 + 1) / 2)


def test_an_official_scorer_is_run_where_it_is_installed(way, metadata, tmp_path):
    """A stand-in that opens what the real one does and writes its kind of lines."""
    checkout = tmp_path / "geneval" / "evaluation"
    checkout.mkdir(parents=True)
    (checkout / "evaluate_images.py").write_text(
        "import argparse, json, os\n"
        "p = argparse.ArgumentParser()\n"
        "p.add_argument('imagedir'); p.add_argument('--outfile'); p.add_argument('--model-path')\n"
        "a = p.parse_args()\n"
        "assert a.model_path == '/a b'\n"
        "with open(a.outfile, 'w') as out:\n"
        "    for name in sorted(d for d in os.listdir(a.imagedir) if d.isdigit()):\n"
        "        record = json.load(open(os.path.join(a.imagedir, name, 'metadata.jsonl')))\n"
        "        for k in sorted(os.listdir(os.path.join(a.imagedir, name, 'samples'))):\n"
        "            line = {'tag': record['tag'], 'correct': k < '0002.png',\n"
        "                    'metadata': json.dumps(record)}\n"
        "            out.write(json.dumps(line) + '\\n')\n"
    )
    setting = Setting(
        way,
        epath.Path(tmp_path / "images"),
        prompts=metadata,
        scorer=str(tmp_path / "geneval"),
        scorer_python=sys.executable,
        scorer_args="--model-path='/a b'",
    )
    report, _ = benchmarks.run("geneval", setting)
    assert report["score"] == 0.5 and report["scored_images"] == 16 and "pipeline" not in report
    with pytest.raises(UserError, match="scorer ended with status"):
        benchmarks.run("geneval", setting._replace(scorer_args="--model-path=/c"))
    with pytest.raises(ConfigError, match="--scorer="):
        benchmarks.run("geneval", setting._replace(scorer=str(tmp_path / "none")))


def test_dpg_has_the_files_that_its_scorer_cuts(way, tmp_path):
    """All of a folder are opened, and of each the four squares in this order are taken."""
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    texts = {"diffusiondb12": "a red\nring", "COCOval_7": "two squares", "9": "a cross"}
    for name, text in texts.items():
        (prompts / f"{name}.txt").write_text(text)
    setting = Setting(way, epath.Path(tmp_path / "out"), prompts=str(prompts))
    report, _ = benchmarks.run("dpg", setting)
    names = os.listdir(tmp_path / "out" / "images")
    assert sorted(name.split(".")[0] for name in names) == sorted(texts)
    side = report["sampling"]["height"]
    images = way.pipeline.draw(["a red ring"] * 4, numbers=[8, 9, 10, 11], seed=0, steps=1)
    with Image.open(tmp_path / "out" / "images" / "diffusiondb12.png") as picture:
        assert picture.size == (2 * side, 2 * side)
        for image, (x, y) in zip(images, [(0, 0), (side, 0), (0, side), (side, side)], strict=True):
            np.testing.assert_array_equal(picture.crop((x, y, x + side, y + side)), image)
    assert f"--resolution={side}" in report["todo"] and "--pic-num=4" in report["todo"]
    assert report["num_images"] == 12 and report["score"] is None
    with pytest.raises(ConfigError, match="4 images a prompt"):
        benchmarks.run("dpg", setting._replace(num_images=6))
    results = tmp_path / "results.txt"
    results.write_text("/x/9.png, 1.0, 0.5, 0.5, 1.0, 0.75\n")
    report, samples = benchmarks.run("dpg", setting._replace(results=str(results)))
    assert report["score"] == 75 and report["scored_images"] == 4
    assert "4 of 12 images" in report["pipeline"]
    page = pages.html([report], [samples])
    assert "75" in page and "4 of 12 images" in page
    results.write_text("/x/elsewhere.png, 1.0, 0.5, 0.5, 1.0, 0.75\n")
    with pytest.raises(ConfigError, match="results of other prompts, 'elsewhere' among them"):
        benchmarks.run("dpg", setting._replace(results=str(results)))
    with pytest.raises(ConfigError, match=r"4 files|2 files more than are asked for"):
        benchmarks.run("dpg", setting._replace(num_images=4))


def test_results_of_dpg_become_its_table(tmp_path):
    text = (
        "/x/images/9.png, 1.0, 0.5, 0.5, 1.0, 0.75\n"
        "/x/a, b/images/COCOval_7.png, 0.25, 0.25, 0.25, 0.25, 0.25\n"
        "Model: images\nL1 category scores:\n\tentity: 81.5\n\tother: 40.0\n"
        "L2 category scores:\n\tentity - whole: 81.5\n"
        "Image path: /x/images\nSave results to: /x/r.txt\nDPG-Bench score: 50.0\n"
    )
    (tmp_path / "results.txt").write_text(text)
    found = dpg.read_results(tmp_path / "results.txt")
    assert found["score"] == 50 and found["scored"] == {"9": 4, "COCOval_7": 4}
    assert found["interval"] == (25, 75)
    assert {k: v["fraction"] for k, v in found["categories"].items()} == {
        "entity": 81.5,
        "other": 40.0,
    }


def test_what_is_no_benchmark_or_no_result_is_refused(way, metadata, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"tag": "single_object", "prompt": "a"}\n{"tag": "texture", "prompt": "b"}\n')
    with pytest.raises(ConfigError, match=r"line 2 is no prompt of GenEval: its tag is 'texture'"):
        geneval.read_prompts(str(bad))
    with pytest.raises(MissingError, match=r"It is evaluation_metadata\.jsonl"):
        geneval.read_prompts(str(tmp_path / "none"))
    with pytest.raises(MissingError, match="dpg_bench/prompts"):
        dpg.read_prompts(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="line 1 is no result"):
        geneval.read_results(bad)
    with pytest.raises(ConfigError, match="no scores of prompts"):
        dpg.read_results(bad)
    for name in ("geneval", "dpg"):
        with pytest.raises(ConfigError, match=f"--benchmark={name} needs --prompts"):
            benchmarks.run(name, Setting(way, epath.Path(tmp_path / "images")))


def test_intervals_of_clusters_are_wider_than_of_single_images():
    """Images of a prompt that all pass or all fail are one observation, not four."""
    rng = np.random.default_rng(0)
    prompts = [[float(p)] * 4 for p in rng.integers(0, 2, 60)]
    low, high = intervals.resampled([prompts])
    alone = intervals.resampled([[[x] for prompt in prompts for x in prompt]])
    assert 1.7 < (high - low) / (alone[1] - alone[0]) < 2.3
    share = np.mean([p[0] for p in prompts])
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(share * (1 - share) / 60), rel=0.1)
    counts = collections.Counter(p[0] for p in prompts)
    assert low < counts[1.0] / 60 < high
