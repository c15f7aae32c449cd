"""Bad samples: replaced by the same others every time, each of them told."""

import io
import itertools
import multiprocessing
import pathlib
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest

from configs import base
from t2i_jax.data.bad import BadSample, Cause
from t2i_jax.data.loader import Loader
from t2i_jax.data.prompts import Prompts
from t2i_jax.data.sources import Mixture
from t2i_jax.data.tokenizer import Tokenizer
from t2i_jax.errors import UserError

SIZE = 8


def encoded(image, format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


class Marked:
    """Sample i is one colour, (i, i, i), with the caption 'colour i'; `bad` has other samples."""

    fingerprint = "marked"

    def __init__(self, length, bad=None):
        self._length, self._bad = length, bad or {}

    def __len__(self):
        return self._length

    def __getitem__(self, i):
        if i in self._bad:
            if isinstance(self._bad[i], Exception):
                raise self._bad[i]
            return self._bad[i]
        return {"image": encoded(Image.new("RGB", (12, 9), (i, i, i))), "captions": self.texts(i)}

    def texts(self, i):
        return (self.caption(i),)

    def caption(self, i):
        return f"colour {i}"

    def name(self, i):
        return f"marked/{i}"

    def size(self, i):
        return 12, 9


def make_tokenizer():
    return Tokenizer.train((f"colour {i}" for i in range(300)), 300)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make(tokenizer, source, batch_size=8, rows=None, **options):
    data = base.get_config().data
    data.update(image_size=SIZE, max_text_tokens=16, caption_dropout=0.0, min_image_size=2)
    data.update({"num_threads": 2, "prefetch": 2, **options})
    return Loader(source, Prompts(tokenizer, data), data, batch_size, 3, rows)


def colours(batch):
    return batch.arrays["image"][:, 0, 0, 0].tolist()


def captions(tokenizer, batch):
    return [tokenizer.decode(row) for row in batch.arrays["ids"]]


GOOD = encoded(Image.effect_noise((40, 40), 90))
BAD = {
    3: BadSample(Cause.MISSING_IMAGE, "no image"),
    5: {"image": b"<html>", "captions": ("x",)},
    8: {"image": GOOD[: len(GOOD) // 2], "captions": ("x",)},
    13: {"image": encoded(Image.new("1", (8192, 8193))), "captions": ("x",)},
    21: {"image": encoded(Image.new("RGB", (5, 1))), "captions": ("x",)},
    34: BadSample(Cause.MISSING_CAPTION, "no caption"),
    40: BadSample(Cause.BROKEN_CAPTION, "not UTF-8"),
    41: {"image": GOOD, "captions": ("", "")},
    42: {"image": GOOD, "captions": ("x" * 10_001,)},
    43: BadSample(Cause.UNREADABLE, "the file changed"),
}
CAUSES = {
    5: Cause.BROKEN_IMAGE,
    8: Cause.TRUNCATED_IMAGE,
    13: Cause.TOO_LARGE_IMAGE,
    21: Cause.TINY_IMAGE,
    41: Cause.EMPTY_CAPTION,
    42: Cause.LONG_CAPTION,
}


def test_every_sample_is_delivered_or_on_the_list(tokenizer):
    """An epoch and the next: what is bad is told each time, all else stands where it is meant."""
    one = make(tokenizer, Marked(48, BAD))
    for epoch in (range(6), range(6, 12)):
        told, meant = [], []
        for step in epoch:
            batch = one.batch(step)
            meant += one.indices(step)
            assert [c for c, i in zip(colours(batch), one.indices(step), strict=True)
                    if i not in BAD] == [i for i in one.indices(step) if i not in BAD]  # fmt: skip
            assert set(colours(batch)).isdisjoint(BAD)
            assert captions(tokenizer, batch) == [f"colour {c}" for c in colours(batch)]
            told += [f for f in batch.faults if f.sample.removeprefix("marked/").isdigit()]
            by_cause = {c: 0 for c in Cause}
            for fault in batch.faults:
                by_cause[fault.cause] += 1
                assert fault.step == step
            assert batch.arrays["bad"].sum(0).tolist() == list(by_cause.values())
        assert sorted(meant) == list(range(48))
        first = {f.sample: f.cause for f in told}
        assert first.keys() >= {f"marked/{i}" for i in BAD}
        for i, cause in CAUSES.items():
            assert first[f"marked/{i}"] == cause
        for i in BAD.keys() - CAUSES.keys():
            assert first[f"marked/{i}"] == BAD[i].cause


def test_what_replaces_is_the_same_for_any_hosts_threads_and_start(tokenizer):
    source = Marked(48, BAD)
    whole = [make(tokenizer, source).batch(step) for step in range(6)]
    with make(tokenizer, source, num_threads=5, prefetch=1) as other:
        for step, batch in zip(range(3, 6), other.batches(3), strict=False):
            assert colours(batch) == colours(whole[step])
            assert batch.faults == whole[step].faults
    for step in range(6):
        hosts = [make(tokenizer, source, rows=(r, r + 1)).batch(step) for r in range(0, 8, 2)]
        assert list(itertools.chain(*map(colours, hosts))) == colours(whole[step])
        assert tuple(itertools.chain(*(h.faults for h in hosts))) == whole[step].faults


def test_validation_takes_the_next_good_sample(tokenizer):
    batch = make(tokenizer, Marked(48, BAD)).fixed_batch([2, 3, 40, 47])
    assert colours(batch) == [2, 4, 44, 47]
    assert [f.sample for f in batch.faults] == [f"marked/{i}" for i in (3, 40, 41, 42, 43)]
    assert {f.step for f in batch.faults} == {-1}


def test_nothing_good_at_all(tokenizer):
    bad = {i: BadSample(Cause.MISSING_IMAGE, "no image") for i in range(5)}
    with pytest.raises(UserError, match=r"100 samples in a row(?s:.*)marked/\d: missing_image"):
        make(tokenizer, Marked(5, bad)).batch(0)


def test_of_several_captions_one_is_drawn(tokenizer):
    class Several(Marked):
        def texts(self, i):
            return ("a", "", "b", "c")

    one = make(tokenizer, Several(50), batch_size=30)
    seen = [text for step in range(20) for text in captions(tokenizer, one.batch(step))]
    counts = [seen.count(text) for text in "abc"]
    assert sum(counts) == 600 and min(counts) > 150  # 200 expected, standard deviation 11.5
    assert captions(tokenizer, one.fixed_batch([0])) == ["a"]


def test_a_batch_is_of_one_shape(tokenizer, tmp_path):
    class Wide(Marked):
        def __getitem__(self, i):
            return {"image": encoded(Image.new("RGB", self.size(i))), "captions": (f"s {i}",)}

        def size(self, i):
            if i == 7:
                raise BadSample(Cause.BROKEN_IMAGE, "no header")
            return (24, 12) if i % 3 else (12, 12)

    shapes = {(8, 8), (8, 16)}
    source = Mixture([Wide(60)])
    one = make(tokenizer, source, buckets=("8x8", "16x8"), index_dir=str(tmp_path))
    seen = set()
    for step in range(40):
        batch = one.batch(step)
        seen.add(one.shape(step))
        assert batch.arrays["image"].shape == (8, *one.shape(step), 3)
        square = one.shape(step) == (8, 8)
        assert {i % 3 == 0 for i in one.indices(step)} == {square}
    assert seen == shapes
    assert [(f.sample, f.cause) for f in one.left_out] == [("marked/7", "broken_image")]
    assert one.fixed_batch([1]).arrays["image"].shape == (1, 8, 8, 3)


def test_worker_processes_make_the_same_batches_and_end(tokenizer):
    source, options = Marked(48, BAD), dict(caption_dropout=0.3, center_crop=False)
    expected = [make(tokenizer, source, **options).batch(step) for step in range(2, 6)]
    with make(tokenizer, source, num_workers=2, **options) as one:
        batches = one.batches(2)
        made = list(itertools.islice(batches, 4))
        assert len(multiprocessing.active_children()) == 2
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()
    for batch, other in zip(made, expected, strict=True):
        assert batch.faults == other.faults and batch.arrays.keys() == other.arrays.keys()
        for name in batch.arrays:
            np.testing.assert_array_equal(batch.arrays[name], other.arrays[name])


_KILLED = """
import multiprocessing, sys, time
sys.path.insert(0, {root!r})
from tests.data.test_samples import Marked, make, make_tokenizer
if __name__ == "__main__":
    one = make(make_tokenizer(), Marked(48), num_workers=2)
    batches = one.batches()
    next(batches)
    print(*(p.pid for p in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


def test_worker_processes_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(_KILLED.format(root=str(pathlib.Path(__file__).parents[2])))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(workers) == 2

    def alive(pid):
        stat = pathlib.Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    deadline = time.monotonic() + 60
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))


_HELD = """
import sys
sys.path.insert(0, {root!r})
from tests.data.test_samples import Marked, make, make_tokenizer
if __name__ == "__main__":
    with make(make_tokenizer(), Marked(48), num_workers=2) as one:
        batches = one.batches()
        held = [next(batches) for _ in range(4)]
"""


def test_a_program_that_holds_batches_of_workers_ends_quietly(tmp_path):
    """Nothing of the shared memory is left, of which Python's resource tracker would speak."""
    script = tmp_path / "held.py"
    script.write_text(_HELD.format(root=str(pathlib.Path(__file__).parents[2])))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
