"""Files of Inception weights: what is read, and what is refused. (Its values: tests/parity.)"""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from t2i_jax.interop import inception
from t2i_jax.interop.directory import shapes_of
from t2i_jax.models.inception import Inception

IMAGE = jax.ShapeDtypeStruct((1, 299, 299, 3), np.uint8)


@pytest.fixture(scope="module")
def tensors():
    """By their published names, zeros; 94 convolutions with their norms, and what is not read."""
    made = {}
    for path, shape in shapes_of(Inception().init, IMAGE).items():
        rule = inception._rule(path)
        shape = [shape[i] for i in (3, 2, 0, 1)] if len(shape) == 4 else shape
        made[rule.theirs] = np.zeros(shape, np.float32)
    made |= {"fc.weight": np.ones((8, 2048), "f4"), "fc.bias": np.ones(8, "f4")}
    made["AuxLogits.fc.weight"] = np.ones((8, 768), "f4")
    made["Conv2d_1a_3x3.bn.num_batches_tracked"] = np.array(7)
    return made


def test_published_names_are_read(tensors, tmp_path):
    weight = np.arange(32 * 3 * 9, dtype=np.float32).reshape(32, 3, 3, 3)
    save_file(tensors | {"Conv2d_1a_3x3.conv.weight": weight}, tmp_path / "a.safetensors")
    net, params = inception.load_inception(tmp_path / "a.safetensors")
    assert net == Inception() and len(jax.tree.leaves(params)) == 94 * 5
    actual = params["Conv2d_1a_3x3"]["weight"]
    np.testing.assert_array_equal(actual, weight.transpose(2, 3, 1, 0))
    names = {"weight", "norm_weight", "norm_bias", "norm_mean", "norm_variance"}
    assert params["Mixed_7c"]["branch3x3dbl_3b"].keys() == names


def test_what_is_wrong_is_one_message(tensors, tmp_path):
    changed = tensors | {
        "Mixed_5b.branch1x1.bn.bias": np.zeros(3, "f4"),
        "extra": np.zeros(1, "f4"),
    }
    del changed["Mixed_6e.branch_pool.conv.weight"]
    save_file(changed, tmp_path / "a.safetensors")
    with pytest.raises(ValueError) as error:
        inception.load_inception(tmp_path / "a.safetensors")
    for text in (
        "missing: Mixed_6e.branch_pool.conv.weight",
        "not known: extra",
        "Mixed_5b.branch1x1.bn.bias is (3,), not (64,)",
    ):
        assert text in str(error.value)


def test_pickles_are_not_opened(tmp_path):
    (tmp_path / "a b.pth").write_bytes(b"\x80\x02.")
    with pytest.raises(ValueError) as error:
        inception.load_inception(tmp_path / "a b.pth")
    command = str(error.value).splitlines()[-1]
    assert "weights_only=True" in command
    assert command.endswith(f"'{tmp_path}/a b.pth' '{tmp_path}/a b.safetensors'")


def test_missing_weights_say_how_they_are_made(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        inception.load_inception(tmp_path / "w.safetensors")
    _, fetch, convert = str(error.value).splitlines()
    assert fetch.strip() == f"curl -LO {inception.PUBLISHED}"
    assert convert.endswith(f"pt_inception-2015-12-05-6726825d.pth {tmp_path}/w.safetensors")
