"""From configs to sources, held-out samples, and the order of samples."""

import io
import tarfile

import numpy as np
import pytest

from configs import base
from t2i_jax.data import order, sources


class Words:
    """Sample i is captioned 'word i'; touching its pixels is an error."""

    def __init__(self, length):
        self._length = length

    def __len__(self):
        return self._length

    def __getitem__(self, i):
        raise AssertionError("an image was read")

    def caption(self, i):
        return f"word {i}"


def config_of(**data):
    config = base.get_config()
    config.data.update(data)
    return config


def write_shards(folder, shards, per_shard):
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:02}.tar", "w") as archive:
            for i in range(per_shard):
                for field in ("image.jpg", "synthetic_caption.txt", "original_caption.txt"):
                    body = f"{field} {shard * per_shard + i}".encode()
                    info = tarfile.TarInfo(f"{i:04}.{field}")
                    info.size = len(body)
                    archive.addfile(info, io.BytesIO(body))
    return f"{folder}/{{00..{shards - 1:02}}}.tar"


def test_webdataset_holds_out_its_last_samples(tmp_path):
    config = config_of(path=write_shards(tmp_path, 3, 5), validation_size=4)
    train, validation = (sources.make_source(config, split) for split in sources.SPLITS)
    assert [train.caption(i) for i in range(len(train))] == [
        f"synthetic_caption.txt {i}" for i in range(11)
    ]
    assert [validation[i]["captions"][0] for i in range(len(validation))] == [
        f"synthetic_caption.txt {i}" for i in range(11, 15)
    ]
    with pytest.raises(IndexError):
        train[11]


def test_original_captions_are_read_only_if_used(tmp_path):
    path = write_shards(tmp_path, 1, 2)
    off = sources.make_source(config_of(path=path, validation_size=1), "train")
    on = config_of(path=path, validation_size=1, original_caption_rate=0.5)
    assert off[0]["original_caption"] is None
    assert sources.make_source(on, "train")[0]["original_caption"] == "original_caption.txt 0"


def test_scenes_and_digits():
    for name, sizes in (("scenes", (1_000_000, 100)), ("digits", (1697, 100))):
        config = config_of(source=name, image_size=16, validation_size=100)
        for split, size in zip(sources.SPLITS, sizes, strict=True):
            source = sources.make_source(config, split)
            assert len(source) == size
            sample = source[size - 1]
            assert sample["image"].shape == (16, 16, 3) and sample["image"].dtype == np.uint8
            assert sample["captions"][0] == source.caption(size - 1)


def test_shuffled_captions_are_those_of_samples_half_the_data_away(tmp_path):
    path = write_shards(tmp_path, 2, 3)
    options = {"path": path, "validation_size": 1, "original_caption_rate": 0.5}
    own = sources.make_source(config_of(**options), "train")
    other = sources.make_source(config_of(**options, shuffle_captions=True), "train")
    assert len(own) == len(other) == 5 and own.fingerprint != other.fingerprint
    for i in range(5):
        assert other[i]["image"] == own[i]["image"] and other.name(i) == own.name(i)
        assert other[i]["captions"] == (other.caption(i),) == (own.caption((i + 2) % 5),)
        assert "original_caption" not in other[i]


def test_wrong_names_and_sizes(tmp_path):
    with pytest.raises(ValueError, match=r"'webdatset'.*Did you mean 'webdataset'\?"):
        sources.make_source(config_of(source="webdatset"), "train")
    with pytest.raises(ValueError, match="'train' or 'validation'"):
        sources.make_source(config_of(source="scenes"), "test")
    config = config_of(path=write_shards(tmp_path, 1, 3), validation_size=3)
    with pytest.raises(ValueError, match=r"validation_size=3 of 3 samples"):
        sources.make_source(config, "train")


@pytest.mark.parametrize("length", [1, 2, 7, 1000])
def test_every_epoch_is_a_new_permutation(length):
    shuffled = order.shuffled(length, 3)
    epochs = [[shuffled[e * length + i] for i in range(length)] for e in range(4)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    if length > 2:
        assert len({tuple(epoch) for epoch in epochs}) == 4


def test_neighbouring_seeds_share_no_epoch():
    epochs = {
        tuple(order.shuffled(50, seed)[e * 50 + i] for i in range(50))
        for seed in range(4)
        for e in range(4)
    }
    assert len(epochs) == 16


def test_the_order_looks_random():
    n = 2000
    shuffled = order.shuffled(n, 0)
    x = np.array([shuffled[i] for i in range(n)])
    assert abs(np.corrcoef(np.arange(n), x)[0, 1]) < 0.1  # standard deviation 0.022
    assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 0.1


def test_the_order_never_changes():
    """Literal values: a run that is resumed after an upgrade must go on where it was."""
    shuffled = order.shuffled(1000, 42)
    assert [shuffled[p] for p in (0, 1, 2, 999, 1000, 10**12)] == [93, 202, 440, 909, 846, 953]


def test_captions_are_different_samples_without_pixels():
    drawn = list(sources.captions(Words(100), 60, seed=1))
    assert len(set(drawn)) == 60 and set(drawn) <= {f"word {i}" for i in range(100)}
    assert drawn == list(sources.captions(Words(100), 60, seed=1))
    assert drawn != list(sources.captions(Words(100), 60, seed=2))
    assert len(list(sources.captions(Words(5), 60, seed=1))) == 5
