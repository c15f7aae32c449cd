"""Which of the LLM's layers a DiT of fewer layers sees, and how memories are put together."""

import numpy as np
import pytest

from t2i_jax.models import memory

L, B, T, K, H = 4, 2, 3, 1, 2
THETA = 100.0


def features():
    keys = np.arange(L * B * T * K * H, dtype=np.float32).reshape(L, B, T, K, H)
    mask = np.array([[True, True, True], [True, False, False]])
    return memory.TextFeatures(keys, -keys, np.zeros((B, T, 5)), mask)


@pytest.mark.parametrize("layers", [1, 3, 4])
def test_deep_shares_the_last_layers(layers):
    source = features()
    made = memory.deep(source, layers, THETA)
    turn = np.exp(1j * np.arange(T))[:, None]  # a head of two numbers is one complex one
    for i in range(layers):
        key = source.keys_LBTKH[L - layers + i]
        turned = (key[..., 0] + 1j * key[..., 1]) * turn
        expected = np.stack([turned.real, turned.imag], -1)
        np.testing.assert_allclose(made.keys_LBTKH[i], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(made.values_LBTKH[i], -source.keys_LBTKH[L - layers + i])
    assert len(made.keys_LBTKH) == len(made.values_LBTKH) == layers
    np.testing.assert_array_equal(made.mask_BT, source.mask_BT)
    np.testing.assert_array_equal(made.length_B, [3, 1])


def test_a_dit_deeper_than_its_llm_is_refused():
    with pytest.raises(ValueError, match=r"5 layers.*4 layers.*dit\.num_layers"):
        memory.deep(features(), 5, THETA)


def test_concatenate_and_repeat_are_along_the_batch():
    made = memory.deep(features(), 2, THETA)
    joined = memory.concatenate(made, made)
    assert joined.keys_LBTKH.shape == (2, 4, T, K, H)
    for half in (slice(0, 2), slice(2, 4)):
        np.testing.assert_array_equal(joined.keys_LBTKH[:, half], made.keys_LBTKH)
        np.testing.assert_array_equal(joined.values_LBTKH[:, half], made.values_LBTKH)
        np.testing.assert_array_equal(joined.mask_BT[half], made.mask_BT)
    one = memory.TextMemory(made.keys_LBTKH[:, 1:], made.values_LBTKH[:, 1:], made.mask_BT[1:])
    repeated = memory.repeat(one, 3)
    for i in range(3):
        np.testing.assert_array_equal(repeated.keys_LBTKH[:, i], made.keys_LBTKH[:, 1])
        np.testing.assert_array_equal(repeated.values_LBTKH[:, i], made.values_LBTKH[:, 1])
    np.testing.assert_array_equal(repeated.length_B, [1, 1, 1])
