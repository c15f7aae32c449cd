"""Parameters written under published names and read again, bit by bit."""

import json
import pathlib

from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from t2i_jax import parity
from t2i_jax.interop import mapping, reference, safetensors
from tests import tiny, toys

GOLDENS = sorted((pathlib.Path(__file__).parent.parent / "goldens").glob("*.npz"))


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


def published(golden):
    """(Their tensors, our parameters as paths, the rules between them), the table apart."""
    prefix, table = "transformer/", "pos_embed"
    names = [n for n in golden.arrays if n.startswith(prefix) and not n.endswith(table)]
    theirs = {n.removeprefix(prefix): golden.arrays[n] for n in names}
    ours = flatten_dict(golden.params, sep="/")
    if golden.theirs["model_type"] == "DiT":
        ours = {path: x for path, x in ours.items() if not path.startswith("llm/")}
    return theirs, ours, reference.rules(golden.theirs, ours)


@pytest.mark.parametrize("file", GOLDENS, ids=lambda file: file.stem)
def test_a_published_model_is_written_as_it_was(folder, file):
    theirs, ours, rules = published(parity.read(file))
    found = {path: toys.Memory(np.asarray(x)) for path, x in ours.items()}
    entries = mapping.entries(found, rules)
    files = safetensors.write(folder, "model", entries, "float32", max_bytes=60_000)
    assert len(files) > 3 and all(f.stat().length < 100_000 for f in files)
    written = {name: x for f in files for name, x in load_file(f).items()}
    assert written.keys() == theirs.keys()
    for name, x in theirs.items():
        assert written[name].dtype == np.float32
        np.testing.assert_array_equal(written[name], x)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in theirs.values())
    assert {folder / name for name in index["weight_map"].values()} == set(files)
    shapes = {path: x.shape for path, x in ours.items()}
    tensors = safetensors.open_tensors(files)
    again = mapping.materialise(mapping.sources(folder, tensors, shapes, rules), None, "float32")
    tiny.equal(flatten_dict(again, sep="/"), ours)
    dtypes = {path: "bfloat16" if x.ndim > 1 else "float32" for path, x in ours.items()}
    found = mapping.sources(folder, tensors, shapes, rules)
    mixed = mapping.materialise(found, None, unflatten_dict(dtypes, sep="/"))
    assert {p: x.dtype.name for p, x in flatten_dict(mixed, sep="/").items()} == dtypes
    with pytest.raises(ValueError, match="is for parameters"):
        mapping.materialise(found, None, {"other": "float32"})


def entry(name, x):
    return safetensors.Entry(name, x.shape, lambda: x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_file_of_any_dtype(folder, dtype):
    x = np.random.default_rng(0).standard_normal((3, 5)).astype("f4")
    entries = [entry("a", x), entry("b.c", x[0]), entry("none", np.zeros((0, 2), "f4"))]
    seen = []
    (file,) = safetensors.write(folder, "model", entries, dtype, progress=seen.append)
    assert file.name == "model.safetensors" and len(list(folder.iterdir())) == 1
    read = safetensors.open_tensors([file])
    target = jax.numpy.dtype(dtype)
    np.testing.assert_array_equal(read["a"].read(), x.astype(target))
    np.testing.assert_array_equal(read["b.c"].read(), x[0].astype(target))
    assert read["none"].shape == (0, 2) and sum(seen) == 20 * target.itemsize
    start = int.from_bytes(file.read_bytes()[:8], "little")
    assert start % 8 == 0


@pytest.mark.parametrize(
    "x, dtype, message",
    [
        (np.array([1.0, np.nan], "f4"), "float32", "w has elements that are no finite float32"),
        (np.array([1e30], "f4"), "float16", "w has elements that are no finite float16"),
        (np.array([[1.0]], "f4"), "float32", r"w is \(1, 1\), not \(1,\)"),
    ],
)
def test_what_cannot_be_kept_is_refused(folder, x, dtype, message):
    wrong = safetensors.Entry("w", (x.size,), lambda: x)
    with pytest.raises(ValueError, match=message):
        safetensors.write(folder, "model", [wrong], dtype)


def test_tensors_are_made_one_at_a_time_in_their_turn(folder):
    made = []

    def lazy(k):
        return safetensors.Entry(str(k), (4,), lambda: made.append(k) or np.full(4, k, "f4"))

    entries = [lazy(k) for k in range(5)]
    assert not made
    files = safetensors.write(folder, "model", entries, "float32", max_bytes=40)
    assert made == list(range(5)) and len(files) == 3
    single = safetensors.write(folder, "large", entries[:1], "float32", max_bytes=3)
    assert len(single) == 1  # larger than a part: a part of its own


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(
    "shape, axes",
    [
        ((300, 513), [1, 0]),
        ((40, 16, 300), [2, 0, 1]),
        ((300, 40, 16), [1, 2, 0]),
        ((3, 5), [1, 0]),
        ((64, 32, 64), [1, 0, 2]),
        ((64, 32, 64), [0, 1, 2]),
        ((300, 3, 16, 16), [2, 3, 1, 0]),
    ],
)
def test_large_arrays_are_transposed_in_squares(shape, axes, dtype):
    x = np.random.default_rng(0).standard_normal(shape).astype(jax.numpy.dtype(dtype))
    found = mapping._permuted(x, axes)
    np.testing.assert_array_equal(found, x.transpose(axes), strict=True)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_not_finite_is_seen_in_any_dtype(folder, value, dtype):
    x = np.ones(7, "f4")
    safetensors.write(folder, "model", [entry("w", x)], dtype)
    x[5] = value
    with pytest.raises(ValueError, match="w has elements that are no finite"):
        safetensors.write(folder, "model", [entry("w", x)], dtype)
