"""Which sample comes when: parts in their shares, buckets, epochs, replacements."""

from collections import Counter
import itertools

import numpy as np
import pytest

from t2i_jax.data import buckets, order
from t2i_jax.data.order import NO_BUCKET, Order, Part

SEED = 7


def rows(one, steps, batch_size):
    return [[one.index(step, row) for row in range(batch_size)] for step in steps]


def flat(one, steps, batch_size):
    return [i for row in rows(one, steps, batch_size) for i in row]


def test_one_part_is_the_plain_shuffle():
    one = Order([Part(0, 50, 1.0)], 8, SEED)
    plain = order.shuffled(50, SEED)
    assert flat(one, range(40), 8) == [plain[p] for p in range(320)]


def test_parts_come_in_their_shares_and_each_in_epochs_of_its_own():
    parts = [Part(0, 30, 3.0), Part(30, 40, 1.0), Part(40, 60, 1.0)]
    seen = flat(Order(parts, 10, SEED), range(100), 10)
    for part, share in zip(parts, (600, 200, 200), strict=True):
        own = [i for i in seen if part.start <= i < part.stop]
        assert abs(len(own) - share) <= 1
        n = part.stop - part.start
        epochs = [own[k : k + n] for k in range(0, len(own) - n + 1, n)]
        assert all(sorted(epoch) == list(range(part.start, part.stop)) for epoch in epochs)
        assert len(set(map(tuple, epochs))) > len(epochs) / 2
    # no run of one part is longer than its share explains
    longest = max(len(list(g)) for k, g in itertools.groupby(i < 30 for i in seen) if not k)
    assert longest <= 2


def test_weights_need_not_be_whole_numbers():
    parts = [Part(0, 5000, 0.07), Part(5000, 10_000, 0.93)]
    seen = flat(Order(parts, 10, SEED), range(1000), 10)
    assert abs(sum(i < 5000 for i in seen) - 700) <= 1


BUCKETS = np.array(([0] * 60 + [1] * 30 + [NO_BUCKET] * 3 + [3] * 10) * 2)


def test_a_batch_is_of_one_bucket_and_buckets_come_in_their_shares():
    one = Order([Part(0, len(BUCKETS), 1.0)], 5, SEED, BUCKETS, num_buckets=4)
    batches = rows(one, range(1024), 5)
    of = [BUCKETS[batch[0]] for batch in batches]
    assert all((BUCKETS[batch] == of[s]).all() for s, batch in enumerate(batches))
    assert [one.bucket(s)[0] for s in range(1024)] == of
    count = Counter(int(b) for b in of)
    assert count.keys() == {0, 1, 3}
    for bucket, share in ((0, 0.6), (1, 0.3), (3, 0.1)):
        assert abs(count[bucket] - 1024 * share) <= 1
    turns = "".join(map(str, of))
    assert turns[:512] != turns[512:] and "00000" in turns  # shuffled, not in a fixed rhythm


def test_buckets_have_whole_epochs():
    one = Order([Part(0, len(BUCKETS), 1.0)], 5, SEED, BUCKETS, num_buckets=4)
    steps = [s for s in range(600) if one.bucket(s)[0] == 1]
    seen = [i for s in steps for i in rows(one, [s], 5)[0]]
    members = np.flatnonzero(BUCKETS == 1).tolist()
    for start in range(0, len(seen) - 60, 60):
        assert sorted(seen[start : start + 60]) == members
    assert [one.bucket(s)[1] for s in steps] == list(range(len(steps)))


class Forgetful(dict):
    """Another thread forgets everything as soon as one has looked whether it is there."""

    def __contains__(self, key):
        return self.get(key) is not None

    def get(self, key, default=None):
        found = super().get(key, default)
        self.clear()
        return found


def test_threads_may_stand_in_different_windows():
    one = Order([Part(0, len(BUCKETS), 1.0)], 5, SEED, BUCKETS, num_buckets=4)
    expected = [one.bucket(step) for step in (0, 1, 1024, 1025)]
    one._windows = Forgetful(one._windows)
    assert [one.bucket(step) for step in (0, 1, 1024, 1025)] == expected


def test_buckets_of_a_mixture_keep_its_shares():
    bucket_N = np.array([0] * 800 + [1] * 200 + [0] * 100 + [1] * 300)
    parts = [Part(0, 1000, 1.0), Part(1000, 1400, 1.0)]
    one = Order(parts, 4, SEED, bucket_N, num_buckets=2)
    seen = np.array(flat(one, range(1024), 4))
    assert abs((seen < 1000).mean() - 0.5) < 0.01
    assert abs((bucket_N[seen] == 0).mean() - (0.8 + 0.25) / 2) < 0.01


def test_far_steps_are_reached_at_once():
    one = Order([Part(0, 50, 1.0), Part(50, 93, 2.0)], 5, SEED, BUCKETS[:93], num_buckets=4)
    assert len({tuple(batch) for batch in rows(one, range(10**12, 10**12 + 5), 5)}) == 5


def test_replacements_are_of_the_same_bucket_and_reproducible():
    one = Order([Part(0, len(BUCKETS), 1.0)], 5, SEED, BUCKETS, num_buckets=4)
    drawn = {(s, r): one.replacement(s, r, a) for s in range(30) for r in range(5) for a in (1, 2)}
    again = Order([Part(0, len(BUCKETS), 1.0)], 5, SEED, BUCKETS, num_buckets=4)
    for (step, row), index in drawn.items():
        assert BUCKETS[index] == one.bucket(step)[0]
        assert again.replacement(step, row, 2) == index
    assert len(set(drawn.values())) > 60
    attempts = {one.replacement(0, 0, a) for a in range(1, 20)}
    assert len(attempts) > 10


def test_nothing_to_order():
    with pytest.raises(ValueError, match="0 samples"):
        Order([Part(0, 0, 1.0)], 5, SEED)
    with pytest.raises(ValueError, match="No sample belongs"):
        Order([Part(0, 3, 1.0)], 5, SEED, np.full(3, NO_BUCKET), num_buckets=1)


# --- assigning buckets ---

SHAPES = buckets.shapes(["512x512", "640x384", "384x640"])


def test_shapes_are_written_width_first():
    assert SHAPES == [(512, 512), (384, 640), (640, 384)]
    for wrong in ("512", "512x", "x512", "512x512x3", "-5x5"):
        with pytest.raises(ValueError, match="640x384"):
            buckets.parse(wrong)


def test_a_sample_goes_to_the_nearest_ratio():
    sizes = np.array([(100, 100), (1000, 700), (70, 100), (130, 100), (124, 100), (0, 0)])
    # between 1 and 5/3 the geometric middle is 1.291
    assert buckets.assign(sizes, SHAPES, 1).tolist() == [0, 1, 2, 1, 0, NO_BUCKET]


def test_a_bucket_too_small_for_a_batch_gives_its_samples_away():
    sizes = np.array([(100, 100)] * 10 + [(200, 100)] * 3 + [(100, 200)] * 5)
    assert buckets.assign(sizes, SHAPES, 4).tolist() == [0] * 13 + [2] * 5
    assert buckets.assign(sizes, SHAPES, 6).tolist() == [0] * 18
    assert buckets.assign(sizes, SHAPES, 100).tolist() == [0] * 18


class Sized:
    fingerprint = "f00"

    def __init__(self):
        self.asked = 0

    def __len__(self):
        return 5

    def size(self, i):
        self.asked += 1
        if i == 3:
            raise buckets.BadSample("broken_image", "no image")
        return 10 + i, 20


def test_sizes_are_measured_once(tmp_path):
    source = Sized()
    expected = [[10, 20], [11, 20], [12, 20], [0, 0], [14, 20]]
    assert buckets.measure(source, str(tmp_path)).tolist() == expected
    assert buckets.measure(source, str(tmp_path)).tolist() == expected
    assert source.asked == 5
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:-3])  # damaged: measured anew
    assert buckets.measure(source, str(tmp_path)).tolist() == expected
    assert source.asked == 10
    source.fingerprint = "other"
    buckets.measure(source, str(tmp_path))
    assert source.asked == 15
