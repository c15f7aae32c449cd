"""The loader: order, hosts, resumption, randomness, threads."""

import itertools
import threading
import time

import numpy as np
import pytest

from configs import base
from t2i_jax.data import loader, order
from t2i_jax.data.loader import Loader
from t2i_jax.data.prompts import Prompts
from t2i_jax.data.tokenizer import Tokenizer

SIZE, LENGTH = 6, 24


class Numbered:
    """Sample i: an 8 x 6 image whose columns are 10, 20, ... and whose blue is i; caption 's i'."""

    fingerprint = "numbered"

    def __init__(self, length):
        self._length = length

    def __len__(self):
        return self._length

    def __getitem__(self, i):
        image = np.zeros((SIZE, SIZE + 2, 3), np.uint8)
        image[..., 0] = 10 * np.arange(1, SIZE + 3)
        image[..., 1:] = divmod(i, 256)
        return {"image": image, "captions": (self.caption(i),), "original_caption": f"o {i}"}

    def caption(self, i):
        return f"s {i}"

    def name(self, i):
        return f"numbered/{i}"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train((f"s {i} o {i} draw this:" for i in range(1000)), 400)


def data_config(**options):
    data = base.get_config().data
    data.update(
        image_size=SIZE, max_text_tokens=LENGTH, caption_dropout=0.0, num_threads=2, prefetch=2
    )
    data.update(options)
    return data


def make(tokenizer, length=1000, batch_size=8, seed=5, rows=None, **options):
    data = data_config(**options)
    return Loader(Numbered(length), Prompts(tokenizer, data), data, batch_size, seed, rows)


def numbers(batch):
    """The samples of a batch, as their pixels tell."""
    return (batch["image"][:, 0, 0, 1].astype(int) * 256 + batch["image"][:, 0, 0, 2]).tolist()


def texts(tokenizer, batch):
    return [tokenizer.decode(row) for row in batch["ids"]]


def take(loader_, n, start=0):
    with loader_:
        return [batch.arrays for batch in itertools.islice(loader_.batches(start), n)]


def assert_equal(batch, other):
    assert batch.keys() == other.keys()
    for name in batch:
        np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


RANDOM = dict(caption_dropout=0.3, original_caption_rate=0.4, center_crop=False, flip=True)


def test_shapes_and_agreement_of_image_and_caption(tokenizer):
    for batch in take(make(tokenizer), 3):
        assert batch["image"].shape == (8, SIZE, SIZE, 3) and batch["image"].dtype == np.uint8
        assert batch["ids"].shape == (8, LENGTH) and batch["ids"].dtype == np.int32
        assert batch["mask"].shape == (8, LENGTH) and batch["mask"].dtype == bool
        assert texts(tokenizer, batch) == [f"s {i}" for i in numbers(batch)]
        assert (batch["image"][:, 0, :, 0] == 10 * np.arange(2, SIZE + 2)).all()  # central crop


def test_epochs_cover_every_sample_once_and_differ(tokenizer):
    seen = [n for batch in take(make(tokenizer, length=60), 30) for n in numbers(batch)]
    epochs = [seen[i : i + 60] for i in range(0, 240, 60)]
    assert all(sorted(epoch) == list(range(60)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = make(tokenizer, length=60, seed=6).batch(0).arrays
    assert numbers(other) != seen[:8]


def test_positions_follow_the_order_of_the_source(tokenizer):
    shuffled = order.shuffled(1000, 5)
    seen = [n for batch in take(make(tokenizer), 25) for n in numbers(batch)]
    assert seen == [shuffled[p] for p in range(200)]


@pytest.mark.parametrize(
    "hosts",
    [
        [range(4), range(4, 8)],
        [(0, 1, 4, 5), (2, 3, 6, 7)],  # as the chips of a pod's host lie
        [(0,), (1, 3, 7), (2, 4, 5, 6)],
    ],
)
def test_any_hosts_see_the_same_batches(tokenizer, hosts):
    """The first 200 positions, row by row: a host holds its rows of each global batch."""
    alone = take(make(tokenizer, **RANDOM), 25)
    parts = [take(make(tokenizer, rows=rows, **RANDOM), 25) for rows in hosts]
    for step in range(25):
        for rows, part in zip(hosts, parts, strict=True):
            held = {k: x[np.array(rows)] for k, x in alone[step].items()}
            assert_equal(part[step], held)


def test_neither_batch_size_nor_threads_change_a_sample(tokenizer):
    small = take(make(tokenizer, **RANDOM), 12)
    for batch_size, threads, prefetch in ((24, 5, 1), (96, 0, 0), (6, 3, 2)):
        options = dict(RANDOM, num_threads=threads, prefetch=prefetch)
        other = take(make(tokenizer, batch_size=batch_size, **options), 96 // batch_size)
        for name in ("image", "ids", "mask"):
            np.testing.assert_array_equal(
                np.concatenate([b[name] for b in other]), np.concatenate([b[name] for b in small])
            )


def test_resuming_equals_going_on(tokenizer):
    whole = take(make(tokenizer, length=30, **RANDOM), 12)
    for batch, resumed in zip(
        whole[7:], take(make(tokenizer, length=30, **RANDOM), 5, start=7), strict=True
    ):
        assert_equal(batch, resumed)
    with make(tokenizer, length=30, **RANDOM) as one:
        assert_equal(one.batch(11).arrays, whole[11])
        first, second = one.batches(0), one.batches(9)  # two iterators do not disturb each other
        assert_equal(next(second).arrays, whole[9])
        assert_equal(next(first).arrays, whole[0])


def test_a_far_step_costs_no_more_than_the_first(tokenizer):
    with make(tokenizer) as one:
        one.batch(0)
        start = time.perf_counter()
        assert_equal(next(one.batches(10**9)).arrays, one.batch(10**9).arrays)
        assert time.perf_counter() - start < 1


def _draws(tokenizer, steps=250, **options):
    """Per position: dropped, original caption, crop offset, mirrored."""
    rows = []
    for batch in take(make(tokenizer, batch_size=16, **options), steps):
        for text, image in zip(texts(tokenizer, batch), batch["image"], strict=True):
            mirrored = image[0, 0, 0] > image[0, -1, 0]
            offset = int(image[0, :, 0].min()) // 10 - 1
            rows.append((text == "", text.startswith("o"), offset, mirrored))
    return np.array(rows, float).T


def test_rates_and_independence(tokenizer):
    dropped, original, offset, mirrored = _draws(tokenizer, **RANDOM)
    n = len(dropped)  # 4000: standard deviations are below 0.008
    assert abs(dropped.mean() - 0.3) < 0.03
    assert abs(original[dropped == 0].mean() - 0.4) < 0.04
    assert abs(mirrored.mean() - 0.5) < 0.04
    assert np.bincount(offset.astype(int), minlength=3).min() > n / 3 - 130
    for a, b in itertools.combinations((dropped, offset, mirrored), 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.08  # 5 standard deviations
    kept = dropped == 0
    assert abs(np.corrcoef(original[kept], mirrored[kept])[0, 1]) < 0.1
    for lag in (1, 16, 1000):  # the next row, the next step, the next epoch
        assert abs(np.corrcoef(dropped[lag:], dropped[:-lag])[0, 1]) < 0.1


def test_an_option_does_not_move_the_others(tokenizer):
    alone = _draws(tokenizer, 40, caption_dropout=0.3)[0]
    np.testing.assert_array_equal(_draws(tokenizer, 40, **RANDOM)[0], alone)
    mirrored = _draws(tokenizer, 40, flip=True)[3]
    np.testing.assert_array_equal(_draws(tokenizer, 40, **RANDOM)[3], mirrored)


def test_draws_change_from_epoch_to_epoch(tokenizer):
    batches = take(make(tokenizer, length=8, caption_dropout=0.5), 40)
    dropped = [
        {n for n, m in zip(numbers(b), b["mask"], strict=True) if m.sum() == 1} for b in batches
    ]
    assert len({frozenset(d) for d in dropped}) > 20


def test_dropped_captions_have_no_instruction(tokenizer):
    (batch,) = take(
        make(tokenizer, batch_size=64, caption_dropout=0.5, instruction="draw this: "), 1
    )
    for text, mask, i in zip(texts(tokenizer, batch), batch["mask"], numbers(batch), strict=True):
        assert text in ("", f"draw this: s {i}")
        assert (mask.sum() == 1) == (text == "")
    assert 10 < (batch["mask"].sum(1) == 1).sum() < 54


def test_fixed_batch_is_neither_shuffled_nor_random(tokenizer):
    options = dict(RANDOM, caption_dropout=1.0, original_caption_rate=1.0, instruction="draw ")
    batch = make(tokenizer, **options).fixed_batch([3, 999, 4]).arrays
    assert numbers(batch) == [3, 999, 4]
    assert texts(tokenizer, batch) == ["draw s 3", "draw s 999", "draw s 4"]
    assert (batch["image"][:, 0, :, 0] == 10 * np.arange(2, SIZE + 2)).all()


def _prefetching():
    return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]


def test_no_thread_survives(tokenizer):
    def wait():
        deadline = time.monotonic() + 5
        while _prefetching() and time.monotonic() < deadline:
            time.sleep(0.01)
        return _prefetching()

    assert not wait()
    with make(tokenizer) as one:
        iterator = one.batches()
        next(iterator)
        assert _prefetching()
    assert not wait()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)
    unclosed = make(tokenizer).batches()
    next(unclosed)
    unclosed.close()
    assert not wait()


def test_wrong_sizes(tokenizer):
    with pytest.raises(ValueError, match=r"rows \[7, 8\] .* train\.batch_size=8"):
        make(tokenizer, rows=(7, 8))
    with pytest.raises(ValueError, match=r"rows \[\] of a batch of train\.batch_size=0"):
        make(tokenizer, batch_size=0)
    with pytest.raises(ValueError, match="0 samples"):
        make(tokenizer, length=0)


def test_text_batches(tokenizer):
    def run(seed, steps=10):
        return list(loader.text_batches(Numbered(40), tokenizer, 12, 8, seed, steps))

    batches = run(1)
    assert len(batches) == 10 and batches[0].keys() == {"ids", "mask"}
    assert batches[0]["ids"].shape == (8, 12)
    seen = [text for batch in batches for text in texts(tokenizer, batch)]
    assert sorted(seen[:40]) == sorted(seen[40:]) == sorted(f"s {i}" for i in range(40))
    for a, b in zip(batches, run(1), strict=True):
        assert_equal(a, b)
    assert texts(tokenizer, run(2, 1)[0]) != seen[:8]
