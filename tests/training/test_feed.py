"""Batches on eight devices: sent ahead, texts cut."""

import jax
import numpy as np
import pytest

from t2i_jax import sharding
from t2i_jax.data.loader import Batch
from t2i_jax.training.feed import feed


def batches(lengths, taken):
    """Batch k has a text of lengths[k] tokens, and others of 1."""
    for k, length in enumerate(lengths):
        taken.append(k)
        real = np.ones(16, int)
        real[k] = length
        mask = np.arange(12) < real[:, None]
        ids = np.where(mask, 10 + k, 0).astype(np.int32)
        yield Batch({"image": np.full((16, 2, 2, 3), k, np.uint8), "ids": ids, "mask": mask}, (k,))


@pytest.mark.parametrize("cut", [(), (4, 8), (8, 4, 12), (20,)])
def test_texts_are_cut_to_the_least_length_that_holds_them(cut):
    mesh = sharding.make_mesh(data=2, fsdp=4, tensor=1)
    lengths, taken = (3, 4, 5, 8, 9, 12), []
    for k, sent in enumerate(feed(batches(lengths, taken), mesh, cut)):
        fitting = [n for n in cut if lengths[k] <= n <= 12]
        width = min(fitting, default=12)
        assert sent.arrays["ids"].shape == sent.arrays["mask"].shape == (16, width)
        assert sent.arrays["mask"].sum() == 15 + lengths[k]
        assert (np.asarray(sent.arrays["ids"]) == 10 + k).sum() == 15 + lengths[k]
        assert (np.asarray(sent.arrays["image"]) == k).all() and sent.faults == (k,)
        for array in sent.arrays.values():
            assert len(array.sharding.device_set) == 8
            assert array.addressable_shards[0].data.shape[0] == 2
        assert taken == list(range(min(k + 2, len(lengths))))  # the next is on its way


def test_nothing_to_feed():
    mesh = sharding.make_mesh(data=1, fsdp=len(jax.devices()), tensor=1)
    assert list(feed(iter(()), mesh)) == []


def test_a_host_that_is_asked_to_stop_says_so_in_the_batches_that_follow():
    mesh = sharding.make_mesh(data=2, fsdp=4, tensor=1)
    asked, said = [False], []
    for k, sent in enumerate(feed(batches((3,) * 6, []), mesh, (), lambda: asked[0])):
        assert sent.arrays["stop"].shape == (16,)
        said.append(np.unique(sent.arrays["stop"]).tolist())
        asked[0] = k >= 2  # while the fourth batch is on its way
    assert said == [[0], [0], [0], [0], [1], [1]]
