"""What is shown is the loader's batch, and what is told agrees with what the test wrote."""

import io
import itertools
import math

import numpy as np
from PIL import Image, ImageDraw
import pytest

from t2i_jax.data import sources
from t2i_jax.data.bad import BadSample, Cause
from t2i_jax.data.loader import Loader
from t2i_jax.data.prompts import Prompts
from t2i_jax.data.tokenizer import Tokenizer
from t2i_jax.errors import ConfigError, UserError
from t2i_jax.prepare import inspect as module
from t2i_jax.prepare.inspect import COLUMNS, GAP, inspect
from t2i_jax.training import loop
from tests import archives, tiny

BYTES = 260  # tokens of a tokenizer without merges: BOS, a space, and one for every byte
LENGTH = tiny.config().data.max_text_tokens
# Of 40 samples, by number; the images of the others are 20 + i pixels wide and 30 high.
BAD = {5: "broken_image", 8: "truncated_image", 17: "empty_caption", 23: "missing_caption"}
BAD |= {31: "tiny_image", 33: "empty_caption"}
GOOD = [i for i in range(40) if i not in BAD]


def caption(i):
    return chr(ord("a") + i % 26) * (i + 1)


def png(i, width=None, height=30):
    return archives.encoded(i, (width or 20 + i, height), "PNG")


def members(i):
    """Of sample i, by its field."""
    image = {5: b"<html>", 8: archives.encoded(8)[:-90], 31: png(i, 5, 4)}.get(i, png(i))
    text = "" if i in (17, 33) else caption(i)
    texts = {} if i == 23 else {"text.txt": text.encode()}
    return {"image.png": image, **texts, "original.txt": b"o" * 70}


def write(path, samples):
    """A shard of [{field: bytes}], named 000, 001, ..."""
    named = [(f"{i:03d}.{f}", data) for i, each in enumerate(samples) for f, data in each.items()]
    archives.write_tar(path, named)
    return str(path)


def setup(path, **changes):
    fields = {"image_field": "image.png", "caption_field": "text.txt"}
    fields |= {"original_caption_field": "original.txt", "source": "webdataset", "path": str(path)}
    fields |= {"validation_size": 0, "min_image_size": 8, "caption_dropout": 0.0}
    named = {f"data__{name}": value for name, value in fields.items()}
    return tiny.config(
        **{"pretrain__vocab_size": BYTES, "train__batch_size": 4, **named, **changes}
    )


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shards") / "forty.tar", map(members, range(40)))


@pytest.fixture
def drawn(monkeypatch):
    """All text that is drawn, in one string without spaces: lines are broken anywhere."""
    lines, draw = [], ImageDraw.ImageDraw.text

    def text(self, xy, line, *args, **options):
        lines.append("".join(line.split()))
        return draw(self, xy, line, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return lambda: "".join(lines)


def real_loader(config):
    source = sources.make_source(config, "train")
    prompts = Prompts(Tokenizer.train(["a"], BYTES), config.data)
    return Loader(source, prompts, config.data, config.train.batch_size, config.seed)


def line(report, start):
    """The one line that starts so, without that."""
    found = [each for each in report.splitlines() if each.startswith(start)]
    assert len(found) == 1, report
    return found[0].removeprefix(start)


def at(values, percent):
    """The least value that `percent` of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


# --- the statistics ---


def test_the_numbers_are_those_of_the_samples(shard, tmp_path):
    config = setup(shard, data__image_size=32)
    report = inspect(config, tmp_path / "sheet.png")
    assert line(report, "webdataset ") == f"{shard}: 40 training samples"
    assert line(report, "files: ") == "1, 0 damaged"
    assert line(report, "40 samples in the order of training: ").startswith(
        f"{len(GOOD)} good, 6 bad (15.0 %; training stops above 5.0 %)"
    )
    widths = [20 + i for i in GOOD]
    assert line(report, "width: ") == f"min 20, median {at(widths, 50)}, max 59 pixels"
    assert line(report, "height: ") == "min 30, median 30, max 30 pixels"
    ratios = [at([width / 30 for width in widths], q) for q in (5, 50, 95)]
    assert line(report, "width / height: ") == (
        "5 % {:.2f}, median {:.2f}, 95 % {:.2f}".format(*ratios)
    )
    assert line(report, "enlarged: ") == "100.0 %"  # all are 30 high
    chars = [i + 1 for i in GOOD]
    middle, high = at(chars, 50), at(chars, 95)
    assert line(report, "caption characters: ") == f"median {middle}, 95 % {high}, max 40"
    cut = sum(c + 2 > LENGTH for c in chars) / len(chars)
    assert line(report, "caption tokens: ") == (
        f"median {middle + 2}, 95 % {high + 2}, max 42; {100 * cut:.1f} % cut to {LENGTH}"
    )
    small = inspect(setup(shard, data__image_size=30), tmp_path / "sheet.png")
    enlarged = sum(width < 30 for width in widths) / len(widths)
    assert 0.2 < enlarged < 0.4 and line(small, "enlarged: ") == f"{100 * enlarged:.1f} %"


def test_bad_samples_are_told_by_cause_and_name(shard, tmp_path):
    lines = inspect(setup(shard), tmp_path / "sheet.png", samples=10**6).splitlines()
    for cause in set(BAD.values()):
        of_cause = [f"    forty.tar/{i:03d}" for i in BAD if BAD[i] == cause]
        count = f"{len(of_cause)} ({100 * len(of_cause) / 40:.1f} %)"
        start = lines.index(f"  {cause}: {count}") + 1
        told = itertools.takewhile(lambda each: each.startswith("    "), lines[start:])
        assert sorted(each[:17] for each in told) == of_cause
    assert lines.index("  empty_caption: 2 (5.0 %)") < lines.index("  broken_image: 1 (2.5 %)")


def test_of_many_bad_samples_three_are_named(tmp_path):
    bad = {"image.png": b"no", "text.txt": b"x"}
    path = write(tmp_path / "a.tar", [*[bad] * 7, *map(members, range(5))])
    report = inspect(setup(path), tmp_path / "sheet.png")
    assert line(report, "  broken_image: ") == "7 (58.3 %)"
    assert report.count("    a.tar/") == 3 and line(report, "    and ") == "4 more"


def test_the_samples_are_the_first_in_the_order_of_training(shard, tmp_path):
    config = setup(shard)
    loader = real_loader(config)
    first = [i for step in range(3) for i in loader.indices(step)][:10]
    chars = [i + 1 for i in first if i in GOOD]
    report = inspect(config, tmp_path / "sheet.png", samples=10)
    assert line(report, "10 samples").startswith(f" in the order of training: {len(chars)} good")
    told = line(report, "caption characters: ")
    assert told == f"median {at(chars, 50)}, 95 % {max(chars)}, max {max(chars)}"


def test_the_captions_are_those_that_training_draws(shard, tmp_path):
    config = setup(shard, data__original_caption_rate=1.0, data__caption_dropout=1.0)
    report = inspect(config, tmp_path / "sheet.png")
    assert line(report, "caption characters: ") == "median 70, 95 % 70, max 70"


def test_an_instruction_counts(shard, tmp_path):
    config = setup(shard, data__instruction="draw: ")
    told = line(inspect(config, tmp_path / "sheet.png"), "caption tokens: ")
    room = LENGTH + len(" draw:")  # the space before the caption takes a token of it
    cut = sum(len(" draw: ") + i + 2 > room for i in GOOD) / len(GOOD)
    assert told.endswith(f"max {42 + 6}; {100 * cut:.1f} % cut to {room}")


def test_buckets_are_counted_and_weighted(tmp_path):
    """Of A twelve are wide, eight square and one unknown; all of B are square."""

    def sample(i, width):
        return {**members(0), "image.png": png(i, width, 24)}

    broken = {**members(0), "image.png": b"<html>"}
    a = [*(sample(i, 48) for i in range(12)), *(sample(i, 24) for i in range(7)), broken]
    paths = [write(tmp_path / "a.tar", a)]
    paths.append(write(tmp_path / "b.tar", [sample(i, 26) for i in range(30)]))
    mixture = tuple(f"weight={w} path={p}" for w, p in zip((3, 1), paths, strict=True))
    config = setup(
        "none", data__buckets=("16x16", "32x16"), data__index_dir=str(tmp_path / "index")
    )
    with config.unlocked():
        config.data.mixture = mixture
    report = inspect(config, tmp_path / "sheet.png", samples=40)
    wide, square = 0.75 * 12 / 20, 0.75 * 7 / 20 + 0.25
    assert line(report, "  75.0 % webdataset ") == f"{paths[0]}: 20"
    assert line(report, "  25.0 % webdataset ") == f"{paths[1]}: 30"
    assert line(report, "buckets of all ") == "50 samples:"
    shares = [100 * share / (wide + square) for share in (square, wide)]
    assert line(report, "  16x16: ") == f"37 samples, {shares[0]:.1f} % of the steps"
    assert line(report, "  32x16: ") == f"12 samples, {shares[1]:.1f} % of the steps"
    assert line(report, "  none: ") == "1 samples whose size is not known, as a.tar/019"
    assert line(report, "enlarged: ") == "0.0 %"
    assert "bucket 16x16" in report.partition("\n\n")[0]


def test_damaged_files_are_told(shard, tmp_path):
    write(tmp_path / "a.tar", map(members, GOOD))
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: whole.index(b"PNG", len(whole) // 2) + 9])
    report = inspect(setup(tmp_path / "?.tar"), tmp_path / "sheet.png")
    assert line(report, "files: ") == "2, 1 damaged (training refuses more than 5.0 %)"
    assert "reaches over the end of the file" in line(report, "  b.tar, bytes ")


# --- the sheet ---


def places(sheet, pictures):
    """Asserts that the pictures are on the sheet, in rows; (left, top) of each."""
    side = pictures[0].shape[1]
    found, top = [], 0
    for row in range(0, len(pictures), COLUMNS):
        for i, picture in enumerate(pictures[row : row + COLUMNS]):
            left = GAP + i * (side + GAP)
            tops = range(top, sheet.shape[0] - picture.shape[0]) if i == 0 else [top]
            strip = sheet[:, left : left + side]
            top = next(y for y in tops if (strip[y : y + picture.shape[0]] == picture).all())
            found.append((left, top))
        top += pictures[0].shape[0]
    return found


@pytest.mark.parametrize("rows, step", [(None, 0), (3, 7), (16, 2), (99, 1)])
def test_the_very_pixels_of_the_batch(shard, tmp_path, rows, step):
    changes = {"data__flip": True, "data__center_crop": False, "train__batch_size": 12}
    config = setup(shard, **changes)
    report = inspect(config, tmp_path / "sheet.png", step=step, samples=1, rows=rows)
    batch = real_loader(config).batch(step)
    shown = min(rows or 32, 12)
    pictures = [image.repeat(12, 0).repeat(12, 1) for image in batch.arrays["image"][:shown]]
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    places(sheet, pictures)
    assert sheet.shape[1] == max(640, GAP + min(shown, 8) * (192 + GAP))
    assert f"step {step}, size 16x16, {shown} of 12 rows" in report
    if shown == 12:
        told = [each for each in report.splitlines() if each.startswith("  replaced: ")]
        assert told == [f"  replaced: {f.sample}: {f.cause}, {f.detail}" for f in batch.faults]


def test_captions_as_the_tokenizer_gives_them_back(shard, tmp_path, drawn):
    config = setup(shard, train__batch_size=16, data__caption_dropout=0.4)
    loader = real_loader(config)
    arrays = loader.batch(1).arrays
    report = inspect(config, tmp_path / "sheet.png", step=1)
    expected, dropped, cut = "", 0, 0
    for index, tokens in zip(loader.indices(1), arrays["mask"].sum(1), strict=True):
        if tokens == 1:
            expected, dropped = expected + "(dropped)1token,16x16", dropped + 1
        elif index not in GOOD:
            expected += "?"
        elif index + 3 > LENGTH:
            text = caption(index)[: LENGTH - 2]
            expected += f"{text}cut:{LENGTH}of{index + 3}tokens,16x16"
            cut += 1
        else:
            expected += f"{caption(index)}{index + 3}tokens,16x16"
    shown = drawn()
    assert shown.startswith("".join(f"webdataset{shard},step1,size16x16,16of16rows".split()))
    for part in expected.split("?"):
        assert part in shown
    assert 2 < dropped < 12 and cut > 2
    assert f"; {dropped} captions dropped, {shown.count('cut:')} cut" in report


def test_any_text_is_drawn(tmp_path, drawn):
    texts = ["🦄" * 40, "猫が座っている" * 30, "a\x07\x1b\x7f", "שלום \u202eabc"]
    texts += ["e\u0301\u0327", "\ufffe"]
    samples = [{**members(0), "text.txt": text.encode()} for text in texts]
    samples.append({**members(0), "text.txt": b""})
    path = write(tmp_path / "a.tar", samples)
    sizes = {"data__max_text_tokens": 4000, "llm__max_tokens": 5000, "train__batch_size": 16}
    report = inspect(setup(path, **sizes), tmp_path / "sheet.png")
    assert line(report, "7 samples").endswith("6 good, 1 bad (14.3 %; training stops above 5.0 %)")
    assert "猫" in drawn()


def test_shapes_are_kept_and_large_pictures_reduced(tmp_path):
    samples = []
    for value in range(0, 200, 50):
        file = io.BytesIO()
        Image.new("RGB", (600, 300), (value,) * 3).save(file, "PNG")
        samples.append({**members(0), "image.png": file.getvalue()})
    path = write(tmp_path / "a.tar", samples)
    options = {"data__buckets": ("400x200",), "data__index_dir": str(tmp_path / "index")}
    config = setup(path, **options)
    inspect(config, tmp_path / "sheet.png")
    values = real_loader(config).batch(0).arrays["image"][:, 0, 0, 0]
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    places(sheet, [np.full((128, 256, 3), value, np.uint8) for value in values])


class Stored:
    """Latents of images of 32 x 16 pixels; one is bad."""

    fingerprint = "stored"

    def __len__(self):
        return 20

    def __getitem__(self, i):
        if i == 11:
            raise BadSample(Cause.UNREADABLE, "gone")
        return {"moments": np.zeros((2, 4, 6), np.uint16), "captions": (self.caption(i),)}

    def caption(self, i):
        return f"latents number {i}"

    def name(self, i):
        return f"stored/\udcff{i}"  # as Python reads a name that is no UTF-8

    def size(self, i):
        return 32, 16


def test_latents_are_not_decoded(tmp_path, monkeypatch, drawn):
    monkeypatch.setitem(sources.SOURCES, "digits", lambda data, split: Stored())
    changes = {"data__source": "digits", "data__buckets": ("32x16",)}
    config = setup("nowhere", **changes, data__index_dir=str(tmp_path / "index"))
    report = inspect(config, tmp_path / "sheet.png")
    assert drawn().count("latents2x4") == 4
    assert line(report, "width: ") == "min 32, median 32, max 32 pixels"
    assert line(report, r"    stored/\udcff11: ") == "gone" and report.encode()
    assert "enlarged" not in report
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    tops = np.flatnonzero((sheet[:, GAP] == (212, 217, 228)).all(-1))
    assert len(tops) == 96 and tops[-1] - tops[0] == 95  # 6 x 16


def test_where_nothing_is_good_the_report_says_why(tmp_path):
    path = write(tmp_path / "a.tar", [{"image.png": b"no", "text.txt": b"x"}] * 5)
    for changes in ({}, {"data__buckets": ("16x16",), "data__index_dir": str(tmp_path / "index")}):
        report = inspect(
            setup(path, data__original_caption_rate=0.0, **changes), tmp_path / "s.png"
        )
        assert line(report, "no sheet: ") and not (tmp_path / "s.png").exists()
        assert line(report, "  broken_image: ") == "5 (100.0 %)"


@pytest.mark.parametrize("source", ["scenes", "digits"])
def test_the_built_in_worlds(tmp_path, source):
    Tokenizer.train(["a"], BYTES).save(tmp_path / "bytes")
    config = tiny.config(data__source=source, weights__tokenizer=str(tmp_path / "bytes"))
    report = inspect(config, tmp_path / "new" / "sheet.png", samples=50)
    count = len(sources.make_source(config, "train"))
    assert report.startswith(f"{source}: {count:,} training samples\nsheet: ")
    assert line(report, "50 samples in the order of training: ").startswith("50 good, 0 bad (0.0 %")
    assert line(report, "width: ") == "min 16, median 16, max 16 pixels"
    images = real_loader(config).batch(0).arrays["image"]
    pictures = [image.repeat(12, 0).repeat(12, 1) for image in images]
    places(np.asarray(Image.open(tmp_path / "new" / "sheet.png")), pictures)


# --- the tokenizer, and bad input ---


def test_the_tokenizer_is_that_of_training(tmp_path):
    config = tiny.config(weights__llm="not trained here")
    source = sources.make_source(config, "train")
    loop.make_tokenizer(config, tmp_path, source)
    module._prompts(config, source).tokenizer.save(tmp_path / "other")
    same = [(tmp_path / d / "tokenizer.json").read_bytes() for d in ("tokenizer", "other")]
    assert same[0] == same[1]


def test_a_tokenizer_that_the_config_names(shard, tmp_path):
    Tokenizer.train([caption(i) for i in range(40)], 300).save(tmp_path / "tokenizer")
    config = setup(shard, weights__tokenizer=str(tmp_path / "tokenizer"))
    told = line(inspect(config, tmp_path / "sheet.png"), "caption tokens: ")
    assert int(told.partition("max ")[2].partition(";")[0]) < 42


def test_bad_input_is_told_in_one_message(shard, tmp_path):
    out = tmp_path / "sheet.png"
    for options in ({"step": -1}, {"samples": 0}, {"rows": 0}):
        with pytest.raises(ConfigError, match="one sample and one row are the least"):
            inspect(setup(shard), out, **options)
    with pytest.raises(UserError, match=r"nowhere\.tar"):
        inspect(setup(tmp_path / "nowhere.tar"), out)
    with pytest.raises(UserError, match="No tokenizer: looked for"):
        inspect(setup(shard, weights__tokenizer=str(tmp_path / "nowhere")), out)
    with pytest.raises(UserError, match=r"JSON|field 'image.gif'"):
        inspect(setup(shard, data__image_field="image.gif"), out)
    assert not out.exists()


def test_what_to_install_is_told(tmp_path, monkeypatch):
    def absent(data, split):
        raise ImportError("pip install something")

    monkeypatch.setitem(sources.SOURCES, "digits", absent)
    with pytest.raises(UserError, match="pip install something"):
        inspect(tiny.config(data__source="digits"), tmp_path / "sheet.png")
