"""Which samples come, and their pixels, for any number of hosts and any point of resumption."""

import collections
import io
import tarfile

import numpy as np
from PIL import Image
import pytest

from configs import base
from t2i_jax.data import order, sources
from t2i_jax.data.loader import Loader
from t2i_jax.data.prompts import Prompts
from t2i_jax.data.tokenizer import Tokenizer

LENGTHS, BATCH, SEED = (3000, 2600), 40, 11  # grain shuffles less than 1000 slowly
STEPS = 10_000 // BATCH
HOSTS = (1, 2, 4)
FAR = 1_000_000


def picture(number):
    """A PNG of 1 x 1 to 8 x 8 pixels whose colour is its number."""
    size = 1 + number % 8, 1 + number // 8 % 8
    colour = number // 65536, number // 256 % 256, number % 256
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two sources of two shards each; samples are called by their number."""
    folder = tmp_path_factory.mktemp("determinism")
    for which, length in zip("ab", LENGTHS, strict=True):
        start = "ab".index(which) * LENGTHS[0]
        for k, part in enumerate(np.array_split(np.arange(start, start + length), 2)):
            with tarfile.open(folder / f"{which}{k}.tar", "w") as archive:
                for number in part.tolist():
                    bodies = {"jpg": picture(number), "txt": f"s {number}".encode()}
                    for field, body in bodies.items():
                        info = tarfile.TarInfo(f"{number:05}.{field}")
                        info.size = len(body)
                        archive.addfile(info, io.BytesIO(body))
    return folder


@pytest.fixture(scope="module")
def prompts():
    data = base.get_config().data
    data.max_text_tokens = 8
    return Prompts(Tokenizer.train((f"s {i}" for i in range(1000)), 300), data)


class Case:
    """One config: its source, opened once, and loaders for any host."""

    def __init__(self, name, shards, prompts):
        config = base.get_config()
        config.data.update(image_field="jpg", caption_field="txt", original_caption_field="")
        config.data.update(image_size=8, min_image_size=1, validation_size=0, caption_dropout=0.3)
        config.data.update(center_crop=False, flip=True, num_threads=2, prefetch=2)
        config.data.update(index_dir=str(shards / "index"), path=f"{shards}/a*.tar")
        if name != "plain":
            config.data.mixture = tuple(
                f"weight={w} path={shards}/{x}*.tar" for w, x in ((3, "a"), (2, "b"))
            )
        if name == "buckets":
            config.data.buckets = ("8x8", "12x4", "4x12")
        self.data, self.prompts = config.data, prompts
        self.source = sources.make_source(config, "train")
        self.seen = [self.ids(hosts, range(STEPS)) for hosts in HOSTS]

    def loader(self, host=0, hosts=1):
        rows = range(host * BATCH // hosts, (host + 1) * BATCH // hosts)
        return Loader(self.source, self.prompts, self.data, BATCH, SEED, rows)

    def ids(self, hosts, steps):
        """The names of the global batches of `steps`, of loaders that have just been made."""
        loaders = [self.loader(host, hosts) for host in range(hosts)]
        return [
            [self.source.name(i) for loader in loaders for i in loader.indices(step)]
            for step in steps
        ]


@pytest.fixture(scope="module", params=["plain", "mixture", "buckets"])
def case(request, shards, prompts):
    return Case(request.param, shards, prompts)


def test_ten_thousand_samples_are_the_same_for_any_number_of_hosts(case):
    assert sum(map(len, case.seen[0])) == 10_000
    assert case.seen[0] == case.seen[1] == case.seen[2]
    assert len({name for batch in case.seen[0] for name in batch}) == len(case.source)


@pytest.mark.parametrize("before", HOSTS)
@pytest.mark.parametrize("after", HOSTS)
def test_resuming_on_other_hosts_goes_on_where_it_was(case, before, after):
    """What had been seen before the step, and all that follows for some steps."""
    for step in (1, 74, 75, 149):  # 75 steps are an epoch of the plain source
        resumed = case.seen[HOSTS.index(before)][:step] + case.ids(after, range(step, step + 8))
        assert resumed == case.seen[0][: step + 8]


def changing(case, last=STEPS):
    """The steps to `last`, on a number of hosts that changes within an epoch and at its end."""
    legs = [(4, 0, 20), (1, 20, 75), (2, 75, 76), (4, 76, 170), (2, 170, last)]
    return [batch for hosts, start, stop in legs for batch in case.ids(hosts, range(start, stop))]


def test_a_run_that_changes_its_hosts_all_the_time_sees_the_same(case):
    assert changing(case) == case.seen[0]


def stream_of(case, number, shape):
    """What has epochs of its own: a part of the mixture, and of it one bucket."""
    parts = case.source.parts
    return next(k for k, p in enumerate(parts) if p.start <= number < p.stop), shape


def members_of(case):
    """stream -> the numbers of its samples; between the ratios 1 and 3, the middle is 3**0.5."""
    found = collections.defaultdict(set)
    for number in range(len(case.source)):
        ratio = (1 + number % 8) / (1 + number // 8 % 8)
        shape = (4, 12) if ratio > 3**0.5 else (12, 4) if ratio < 3**-0.5 else (8, 8)
        found[stream_of(case, number, shape if case.data.buckets else (8, 8))].add(number)
    return found


def test_no_sample_is_lost_or_repeated_where_the_hosts_change(case):
    """Each stream comes whole before any of it comes again, and then in another order."""
    streams, members, one = collections.defaultdict(list), members_of(case), case.loader()
    last = 1100 if case.data.buckets else STEPS  # of 1,024 steps the turns are shuffled together
    for step, batch in enumerate(changing(case, last)):
        for name in batch:
            number = int(name.rpartition("/")[2])
            streams[stream_of(case, number, one.shape(step))].append(number)
    assert streams.keys() == members.keys()
    for stream, seen in streams.items():
        length = len(members[stream])
        epochs = [seen[start : start + length] for start in range(0, len(seen), length)]
        assert len(epochs) > 1
        for epoch in epochs:
            assert len(set(epoch)) == len(epoch) and set(epoch) <= members[stream]
        assert epochs[0][: len(epochs[1])] != epochs[1]


PIXEL_STEPS = (0, 74, 75, 199, 249)  # 200 positions


def test_pixels_and_captions_are_the_same_on_any_hosts(case, prompts):
    """From batches that are resumed at a step; what is drawn for a sample is the same, too."""
    loaders = [[case.loader(host, hosts) for host in range(hosts)] for hosts in HOSTS]
    for step in PIXEL_STEPS:
        made = []
        for of_run in loaders:
            parts = []
            for one in of_run:
                with one:
                    parts.append(next(one.batches(step)))
            assert not any(part.faults for part in parts)
            made.append({k: np.concatenate([p.arrays[k] for p in parts]) for k in parts[0].arrays})
        for other in made[1:]:
            assert other.keys() == made[0].keys()
            for name in other:
                np.testing.assert_array_equal(other[name], made[0][name])
        colour_BC = made[0]["image"][:, 0, 0].astype(int)
        assert (made[0]["image"] == made[0]["image"][:, :1, :1]).all()  # each is of one colour
        numbers = [int(name.rpartition("/")[2]) for name in case.seen[0][step]]
        assert (colour_BC @ [65536, 256, 1]).tolist() == numbers
        texts = [prompts.tokenizer.decode(row) for row in made[0]["ids"]]
        kept = [text == f"s {number}" for text, number in zip(texts, numbers, strict=True)]
        assert all(k or text == "" for k, text in zip(kept, texts, strict=True))
        assert 10 < sum(kept) < BATCH


# --- a far step ---


class Counted:
    """A shuffle, or a source, that keeps what it was asked for."""

    def __init__(self, inner, asked):
        self._inner, self._asked = inner, asked

    def __getitem__(self, i):
        self._asked.append(i)
        return self._inner[i]

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def __len__(self):
        return len(self._inner)


def test_a_far_step_takes_as_few_lookups_as_the_first(case, monkeypatch):
    """One a row; with buckets also those of the 1,024 steps whose turns are shuffled together."""
    asked, shuffled = [], order.shuffled
    monkeypatch.setattr(order, "shuffled", lambda *a: Counted(shuffled(*a), asked))
    for step in (0, FAR, 10**12):
        one = case.loader()
        assert not asked
        one.indices(step)
        assert len(asked) == BATCH + (1024 if case.data.buckets else 0)
        asked.clear()


def test_a_far_step_reads_only_what_is_ahead_of_it(case):
    """No sample from before the step, and of those behind it no more than are made ahead."""
    asked = []
    source = Counted(case.source, asked)
    with Loader(source, case.prompts, case.data, BATCH, SEED) as one:
        batch = next(one.batches(FAR))
    ahead = [i for step in range(FAR, FAR + 1 + case.data.prefetch + 1) for i in one.indices(step)]
    assert asked and not collections.Counter(asked) - collections.Counter(ahead)
    for name, array in one.batch(FAR).arrays.items():
        np.testing.assert_array_equal(batch.arrays[name], array)
    far = [one.indices(step) for step in (FAR, FAR + 1)]
    assert far[0] != far[1] and far == [case.loader().indices(step) for step in (FAR, FAR + 1)]
