"""The page of evaluation reports, read back as a browser would read it."""

import base64
from html.parser import HTMLParser
import io
import json
import math
import os
from pathlib import Path
import re
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from t2i_jax.evaluation import charts, report, tables
from t2i_jax.evaluation.charts import Estimate
from t2i_jax.evaluation.report import Sample

ROOT = Path(__file__).parents[2]
VOID = {"meta", "img", "br", "line", "rect", "path", "circle"}
NASTY = [
    "<script>alert('x')</script>",
    '" onerror="alert(1)',
    "]]>--></style><img src=x>",
    "{{ 7 * 7 }} {% for %} &lt;",
    "قطة حمراء بجانب كلب",
    "🦊🌈 👩‍🚀",
]


class Page(HTMLParser):
    """The elements of a page as (tag, attributes, text inside), in the order in which they end."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict, str]] = []
        self._open: list[list] = []
        self.feed(html)
        self.close()
        assert not self._open, [tag for tag, *_ in self._open]

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        if tag in VOID:
            self.elements.append((tag, dict(attributes), ""))
        else:
            self._open.append([tag, dict(attributes), ""])

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self._open[-1][0] == tag
        element = self._open.pop()
        self.elements.append(tuple(element))
        if self._open:
            self._open[-1][2] += element[2]

    def handle_data(self, data):
        if self._open:
            self._open[-1][2] += data

    def all(self, tag: str, kind: str = "") -> list[tuple[dict, str]]:
        return [
            (attributes, " ".join(text.split()))
            for name, attributes, text in self.elements
            if name == tag and (not kind or kind in (attributes.get("class") or "").split())
        ]

    def texts(self, tag: str, kind: str = "") -> list[str]:
        return [text for _, text in self.all(tag, kind)]

    def table(self) -> list[list[str]]:
        """The rows of the one table."""
        rows: list[list[str]] = [[]]
        for tag, _, text in self.elements:
            if tag in ("th", "td"):
                rows[-1].append(" ".join(text.split()))
            elif tag == "tr":
                rows.append([])
        return rows[:-1]


def noise(side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def scenes(step=4000, score=0.75, **changes):
    return {
        "benchmark": "scenes",
        "metric": "accuracy",
        "better": "higher",
        "checkpoint": "runs/scenes",
        "checkpoint_step": step,
        "weights": "ema",
        "num_images": 1200,
        "seed": 3,
        "sampling": {
            "height": 24,
            "width": 32,
            "steps": 25,
            "solver": "euler",
            "guidance_scale": 6.0,
            "guidance": {"kind": "apg", "eta": 0.5},
        },
        "score": score,
        "interval": score and [score - 0.02, score + 0.03],
        "categories": {
            "two_objects": {"fraction": 0.5, "n": 600, "passed": 300, "interval": [0.46, 0.54]},
            "counting": {"fraction": 0.25, "n": 600, "passed": 150, "interval": None},
        },
        "controls": {"shuffled": 0.0625},
        "metrics": {"KID": {"value": 0.00123, "interval": None, "n": 1000}},
        "pipeline": "as drawn",
        **changes,
    }


def page(*arguments) -> Page:
    return Page(report.html(*arguments))


def test_one_checkpoint_is_told_with_all_that_was_measured():
    shown = page([scenes()])
    assert shown.texts("h1") == ["Scenes"]
    (hero,) = shown.texts("div", "hero")
    assert hero == "0.750 accuracy, higher is better 95% interval 0.730 to 0.780"
    assert shown.table() == [
        ["", "accuracy", "95% interval", "images"],
        ["overall", "0.750", "0.730 to 0.780", "1,200"],
        ["two objects", "0.500", "0.460 to 0.540", "300 of 600"],
        ["counting", "0.250", "", "150 of 600"],
        ["shuffled control", "0.062", "", ""],
        ["KID", "0.0012", "", "1,000"],
    ]
    told = dict(zip(shown.texts("dt"), shown.texts("dd"), strict=True))
    assert told == {
        "images": "1,200",
        "seed": "3",
        "size": "32 × 24 pixels",
        "steps": "25",
        "solver": "euler",
        "guidance scale": "6.0",
        "guidance": "kind apg, eta 0.5",
        "weights": "averaged (EMA)",
        "training steps": "4,000",
        "checkpoint": "runs/scenes",
        "how images were handled": "as drawn",
    }
    assert len(shown.all("svg")) == 1  # bars, and no curve through one point


def test_bars_and_whiskers_are_as_long_as_what_they_show():
    shown = page([scenes()])
    left, right = (float(line["x1"]) for line, _ in (shown.all("line")[0], shown.all("line")[-1]))
    widths = [float(bar["width"]) / (right - left) for bar, _ in shown.all("rect")]
    np.testing.assert_allclose(widths, [0.75, 0.5, 0.25, 0.0625], atol=1e-3)
    assert [bar["class"] for bar, _ in shown.all("rect")] == ["fill"] * 3 + ["hollow"]
    whiskers = [path["d"] for path, _ in shown.all("path", "whisker")]
    ends = [
        [(float(x) - left) / (right - left) for x in re.match(r"M(\S+) .*?H(.*?)M", d).groups()]
        for d in whiskers
    ]
    np.testing.assert_allclose(ends, [[0.73, 0.78], [0.46, 0.54]], atol=1e-3)


def test_several_checkpoints_are_columns_by_step_and_the_best_is_marked():
    shown = page([scenes(4000, 0.7), scenes(1000, 0.2), scenes(2000, 0.8)])
    rows = shown.table()
    assert rows[0] == ["", "step 1,000", "step 2,000", "step 4,000", "images"]
    assert rows[1][1:3] == ["0.200 0.180 to 0.230", "0.800 0.780 to 0.830"]
    assert rows[1][3:] == ["0.700 0.680 to 0.730", "1,200"]
    assert [text[:5] for text in shown.texts("td", "best")] == ["0.800"]  # where all differ
    last, best = shown.texts("div", "hero")
    assert last.startswith("0.700") and last.endswith("step 4,000, the last")
    assert best.startswith("0.800") and best.endswith("step 2,000, the best of 3")
    assert shown.texts("dd").count("runs/scenes") == 1


def test_lower_is_better_where_the_report_says_so():
    fid = {"metric": "FID", "better": "lower", "categories": {}, "controls": {}}
    shown = page([scenes(1, 30.0, **fid), scenes(2, 12.0, **fid), scenes(3, 20.0, **fid)])
    assert [text.split()[0] for text in shown.texts("td", "best")] == ["12.00"]
    assert shown.texts("div", "hero")[1].startswith("12.00 FID, lower is better")


def test_many_checkpoints_are_rows():
    many = [scenes(1000 * k, 0.04 * k) for k in range(1, 21)]
    rows = page(many).table()
    assert rows[0][:4] == ["", "overall", "two objects", "counting"]
    assert [row[0] for row in rows[1:]] == [f"step {1000 * k:,}" for k in range(1, 21)] + ["images"]
    assert rows[10][1] == "0.400 0.380 to 0.430"


def test_curves_pass_through_the_scores_and_bands_through_the_intervals():
    ends = (0, Estimate(0.0, (0.0, 0.5))), (100, Estimate(0.5, (0.25, 1.0)))
    curve = charts.curve([[ends[0], (50, Estimate(1.0, None)), ends[1]]], [0.0, 0.5, 1.0])
    (line,) = curve["lines"]
    bottom, half, top = (mark["y"] for mark in curve["up"])
    left, right = curve["left"], curve["right"]
    assert half == (bottom + top) / 2 and bottom > top
    assert line["dots"] == [(left, bottom), ((left + right) / 2, top), (right, half)]
    quarter = (bottom + half) / 2
    corners = [(left, half), ((left + right) / 2, top), (right, top)]
    corners += [(right, quarter), ((left + right) / 2, top), (left, bottom)]
    assert line["band"] == "M" + " L".join(f"{x:g} {y:g}" for x, y in corners) + "Z"


def test_curves_are_of_the_score_the_categories_and_the_metrics_and_never_of_one_step():
    reports = [scenes(1000), scenes(2000), scenes(1000, weights="params"), scenes(3000, None)]
    names = ["overall", "two objects", "counting", "KID"]
    drawn = tables.curves(reports)
    assert [curve["name"] for curve in drawn] == ["accuracy", *names[1:]]
    assert [curve["weights"] for curve in drawn] == [["ema", "params"]] * 4
    assert [len(line["dots"]) for line in drawn[0]["lines"]] == [2, 1]  # one has no score
    assert [len(line["dots"]) for line in drawn[1]["lines"]] == [3, 1]
    assert tables.curves([scenes(1000), scenes(1000, seed=4)]) == []
    assert tables.curves([scenes(1000), scenes(None)]) == []


@pytest.mark.parametrize("low, high", [(0, 1), (0, 44.3), (2500, 50_000), (-0.01, 0.3), (5, 5)])
def test_ticks_are_round_and_span(low, high):
    marks = charts.ticks(low, high, most=5)
    assert 2 <= len(marks) <= 6 and marks[0] <= low and marks[-1] >= high
    steps = np.diff(marks)
    np.testing.assert_allclose(steps, steps[0])
    assert f"{steps[0]:e}"[:3] in ("1.0", "2.0", "2.5", "5.0")
    if high > low:
        assert len(marks) == 2 or (marks[-2] < high and marks[1] > low)


def test_what_is_not_scored_says_what_to_do():
    waiting = scenes(score=0.5) | {"score": None, "interval": None, "todo": "Run <it>\n  so."}
    shown = page([waiting | {"categories": {}, "controls": {}, "metrics": {}}])
    assert shown.texts("p", "todo") == ["Not scored yet. Run <it> so."]
    assert shown.texts("div", "hero") == []
    assert shown.table()[1:] == [["overall", "–", "", "1,200"]]
    both = page([scenes(1000), waiting])
    assert both.texts("p", "todo") == ["Not scored yet (step 4,000). Run <it> so."]
    assert len(both.texts("div", "hero")) == 1


def test_what_is_no_number_is_not_drawn():
    nothing = {"fraction": math.nan, "n": 0, "interval": [0.0, math.inf]}
    shown = page([scenes(categories={"empty": nothing, "counting": {"fraction": 1.0, "n": 2}})])
    assert shown.table()[2:4] == [["empty", "–", "", "0"], ["counting", "1.000", "", "2"]]
    assert len(shown.all("rect")) == 3
    assert not re.search(r"\b(nan|inf)\b", report.html([scenes(categories={"empty": nothing})]))


def test_small_images_are_whole_and_enlarged_and_large_ones_are_reduced():
    samples = {"all": [Sample(noise(24), "small"), Sample(noise(700), "large", False)]}
    (small, _), (large, _) = page([scenes()], [samples]).all("img")
    kind, data = small["src"].split(",")
    assert kind == "data:image/png;base64" and small["class"] == "enlarged"
    assert small["width"] == small["height"] == "144"  # six times
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_array_equal(pixels, noise(24))
    kind, data = large["src"].split(",")
    assert kind == "data:image/jpeg;base64" and "class" not in large
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (256, 256)
    assert (small["alt"], large["alt"]) == ("small", "large, failed")


def test_verdicts_are_words():
    samples = {"counting": [Sample(noise(16), str(v), v) for v in (True, False, None)]}
    shown = page([scenes()], [samples])
    assert shown.texts("div", "tile") == ["✓ passed", "✗ failed", ""]
    assert "3 of 600 images, the first drawn; 1 of these passed." in shown.texts("p")


def test_the_first_samples_are_shown_of_how_many():
    samples = {"all": [Sample(noise(8, i), f"prompt {i}", i > 200) for i in range(300)]}
    shown = page([scenes(num_images=300)], [samples])
    assert shown.texts("figcaption", "")[-16:] == [f"prompt {i}" for i in range(16)]
    assert "16 of 300 images, the first drawn; 0 of these passed." in shown.texts("p")
    few = page([scenes(num_images=2)], [{"all": samples["all"][:2]}])
    assert "All 2 images; 0 of these passed." in few.texts("p")


def test_images_of_a_prompt_stand_together():
    four = {"all": [Sample(noise(8, i), f"prompt {i // 4}") for i in range(8)]}
    shown = page([scenes()], [four])
    assert len(shown.all("figure", "prompt")) == 2 and len(shown.all("img")) == 8
    three = page([scenes(step) for step in (1, 2, 3)], [four] * 3)  # the first of each
    assert len(three.all("img")) == 6
    assert three.texts("div", "tile") == ["step 1", "step 2", "step 3"] * 2
    assert three.texts("figcaption")[-2:] == ["prompt 0", "prompt 1"]


def test_samples_follow_their_reports_into_the_order_of_steps():
    shown = page(
        [scenes(2000), scenes(1000)],
        [{"all": [Sample(noise(8), "late")]}, {"all": [Sample(noise(8), "early")]}],
    )
    alts = [image["alt"] for image, _ in shown.all("img")]
    assert alts == ["early, step 1,000", "late, step 2,000"]


def test_twenty_checkpoints_with_large_images_stay_small():
    categories = {f"c{k}": {"fraction": 0.5, "n": 50, "interval": [0.4, 0.6]} for k in range(10)}
    ramp = np.linspace(0, 255, 256).astype(np.uint8)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], noise(256)[..., 0] // 8), -1)
    some = {name: [Sample(picture, f"{name} {i}", True) for i in range(50)] for name in categories}
    text = report.html([scenes(k, categories=categories) for k in range(1, 21)], [some] * 20)
    assert len(text) < 4e6
    shown = Page(text)
    assert len(shown.all("img")) == 6 * 10
    steps = [f"step {k}" for k in (1, 5, 9, 12, 16, 20)]
    assert shown.texts("div", "tile")[:6] == [f"{step} ✓ passed" for step in steps]
    told = "6 of 300 images, one of each of the first prompts, of 6 of 20 checkpoints; 6 of these "
    assert told + "passed." in shown.texts("p")


@pytest.mark.parametrize("text", NASTY)
def test_any_text_is_text(text):
    part = {"fraction": 0.5, "n": 1, "interval": [0.1, 0.9]}
    told = scenes(1, categories={text: part}, controls={text: 0.1}, pipeline=text, checkpoint=text)
    told |= {"metrics": {text: {"value": 1.0, "n": 1}}, "todo": text, "weights": text}
    told["sampling"] = {**told["sampling"], "solver": text, "guidance": {text: text}}
    shown = page([told, told | {"checkpoint_step": None}], [{text: [Sample(noise(8), text)]}] * 2)
    words = " ".join(text.split())
    captions = [(a, t) for a, t in shown.all("figcaption") if "dir" in a]
    assert captions == [({"dir": "auto"}, words)]
    assert all(image["alt"].startswith(text) for image, _ in shown.all("img"))
    assert words.replace("_", " ") in [row[0] for row in shown.table()]
    assert words in " ".join(shown.texts("dd"))
    assert {tag for tag, *_ in shown.elements}.isdisjoint({"script", "iframe", "object", "link"})
    names = {name for _, attributes, _ in shown.elements for name in attributes}
    assert not [name for name in names if name.startswith("on")]
    assert len(shown.all("img")) == 2 and len(shown.all("style")) == 1


def test_text_that_no_page_can_hold_is_replaced(tmp_path):
    samples = {"all": [Sample(noise(8), "a\x00b\x1b\ud800c"), Sample(noise(8), "w" * 10_000)]}
    report.write(tmp_path / "new" / "report.html", [scenes()], [samples])
    text = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    nul, long = Page(text).texts("figcaption")[-2:]
    assert nul == "a\ufffdb\ufffd\ufffdc"
    assert long == "w" * 399 + "…" and len(text) < 40_000


def test_the_page_needs_nothing_else_and_runs_nothing():
    text = report.html([scenes(1), scenes(2)], [{"all": [Sample(noise(8), "a")]}] * 2)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|javascript:", text)
    shown = Page(text)
    sources = [
        value
        for _, attributes, _ in shown.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "poster", "data", "action", "xlink:href")
    ]
    assert sources and all(source.startswith("data:image/") for source in sources)
    policy = [a["content"] for a, _ in shown.all("meta") if "http-equiv" in a]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert all("alt" in image for image, _ in shown.all("img"))
    assert all(chart["role"] == "img" and chart["aria-label"] for chart, _ in shown.all("svg"))


def test_the_same_reports_give_the_same_bytes(tmp_path):
    samples = [{"all": [Sample(noise(8), "a"), Sample(noise(300), "b", True)]}]
    code = (
        "import json, sys; import numpy as np; from t2i_jax.evaluation import report;"
        "images = np.load(sys.argv[1]);"
        "a, b = report.Sample(images['a'], 'a'), report.Sample(images['b'], 'b', True);"
        "report.write(sys.argv[2], [json.loads(sys.argv[3])], [{'all': [a, b]}])"
    )
    np.savez(tmp_path / "images.npz", a=noise(8), b=noise(300))
    other = tmp_path / "other.html"  # of a process that orders sets otherwise
    arguments = [str(tmp_path / "images.npz"), str(other), json.dumps(scenes())]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, check=True)
    report.write(tmp_path / "one.html", [scenes()], samples)
    assert (tmp_path / "one.html").read_bytes() == other.read_bytes()


def test_checkpoints_are_told_apart_by_as_little_as_does():
    def heads(*reports):
        return page(list(reports)).table()[0][1:-1]

    assert heads(scenes(1), scenes(1, weights="params")) == ["step 1, ema", "step 1, params"]
    assert heads(scenes(None, checkpoint="a"), scenes(None, checkpoint="b")) == ["a", "b"]
    same = "step 1, ema, runs/scenes, report "
    assert heads(scenes(1), scenes(1, seed=4)) == [same + "1", same + "2"]


def test_settings_that_differ_say_whose_they_are():
    other = scenes(2, num_images=100)
    told = page([scenes(1), other])
    values = dict(zip(told.texts("dt"), told.texts("dd"), strict=True))
    assert values["images"] == "1,200 (step 1)100 (step 2)"  # in two lines
    assert values["solver"] == "euler"


@pytest.mark.parametrize(
    "reports, samples, message",
    [
        ([], (), "one benchmark and score, got"),
        ([scenes(), scenes(benchmark="digits")], (), "'digits'.*'scenes'"),
        ([scenes(), scenes(metric="FID")], (), "'FID'"),
        ([scenes()], [{}, {}], "1 reports, but samples of 2"),
        ([scenes()], [{"all": [Sample(noise(8) / 255, "a")]}], "uint8 .* got float64"),
    ],
)
def test_a_page_is_refused(reports, samples, message):
    with pytest.raises(ValueError, match=message):
        report.html(reports, samples)


def test_a_page_that_cannot_be_written_says_where(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/report\.html"):
        report.write(tmp_path / "file" / "report.html", [scenes()])


def test_the_template_is_in_the_wheel():
    code = (
        "from setuptools import Distribution; d = Distribution(); d.parse_config_files();"
        "c = d.get_command_obj('build_py'); c.ensure_finalized();"
        "print(*(f'{p}/{f}' for p, _, _, fs in c.data_files for f in fs))"
    )
    listed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert "t2i_jax.evaluation/report.html" in listed.stdout.split()
