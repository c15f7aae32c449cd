"""tf.train.Examples against bytes written down by hand, and against tensorflow-datasets' class."""

import struct

import numpy as np
import pytest

from t2i_jax.data import example


def field(number: int, body: bytes) -> bytes:
    """A length-delimited field, by the encoding's documentation; bodies under 128 bytes."""
    assert len(body) < 128
    return bytes([number << 3 | 2, len(body)]) + body


def record(name: bytes, feature: bytes) -> bytes:
    return field(1, field(1, field(1, name) + field(2, feature)))


def test_bytes_written_by_hand():
    assert example.encode({"a": b"xy"}) == bytes.fromhex("0a0d 0a0b 0a0161 1206 0a04 0a027879")
    assert example.decode(bytes.fromhex("0a0d 0a0b 0a0161 1206 0a04 0a027879")) == {"a": [b"xy"]}


@pytest.mark.parametrize(
    ("values", "feature"),
    [
        ([b"", b"\xff\0"], field(1, field(1, b"") + field(1, b"\xff\0"))),
        ([1.5, -2.0], field(2, field(1, struct.pack("<2f", 1.5, -2.0)))),
        ([1, 300, 0], field(3, field(1, b"\x01\xac\x02\x00"))),
        ([-1], field(3, field(1, b"\xff" * 9 + b"\x01"))),
        ([], field(1, b"")),
    ],
)
def test_wire_format(values, feature):
    assert example.encode({"f": values}) == record(b"f", feature)
    assert example.decode(record(b"f", feature)) == {"f": values}


def test_what_other_writers_do():
    """Unpacked numbers, a feature without a kind, unknown fields, entries in any order."""
    floats = b"".join(b"\x0d" + struct.pack("<f", x) for x in (0.5, 2))
    assert example.decode(record(b"f", field(2, floats))) == {"f": [0.5, 2.0]}
    assert example.decode(record(b"f", field(3, b"\x08\x07\x08\x08"))) == {"f": [7, 8]}
    assert example.decode(record(b"f", b"")) == {"f": []}
    assert example.decode(b"") == {}
    assert example.decode(field(9, b"new") + record(b"f", field(1, field(1, b"x")))) == {
        "f": [b"x"]
    }
    both = field(1, field(1, b"x")) + field(3, field(1, b"\x07"))  # of which the last holds
    assert example.decode(record(b"f", both)) == {"f": [7]}
    reverse = field(2, field(1, field(1, b"x"))) + field(1, b"f")
    assert example.decode(field(1, field(1, reverse))) == {"f": [b"x"]}


def test_round_trip_and_selection():
    features = {
        "bytes": [b"\xff\xd8", b""],
        "one": b"x",
        "ints": np.array([-(2**63), 2**63 - 1]),
        "floats": np.array([0.5, 1e10], np.float32),
        "mixed": [1, 2.5],
        "scalar": np.int64(7),
        "flag": True,
        "ключ": 3.0,
    }
    data = example.encode(features)
    many = {f"feature {i}": i for i in range(100)}
    assert example.encode(many) == example.encode(dict(reversed(many.items())))
    assert example.decode(data) == {
        "bytes": [b"\xff\xd8", b""],
        "one": [b"x"],
        "ints": [-(2**63), 2**63 - 1],
        "floats": [0.5, 1e10],
        "mixed": [1.0, 2.5],
        "scalar": [7],
        "flag": [1],
        "ключ": [3.0],
    }
    assert example.decode(data, ["one", "absent"]) == {"one": [b"x"]}


def test_what_cannot_be_encoded():
    for values in ("text", ["text"], [b"x", 1], [None], [[1]]):
        with pytest.raises(TypeError, match="feature 'f'"):
            example.encode({"f": values})
    with pytest.raises(ValueError, match="range"):
        example.encode({"f": 2**63})


@pytest.mark.parametrize(
    "data",
    [
        b"\xff",
        b"\x0a\x05\x0a",  # shorter than it says
        b"\x0a\xff\xff\xff\xff\x07",  # two gigabytes, it says
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x0b" * 100_000,  # groups in groups
        b"\xff\xd8\xff\xe0 a picture",
        record(b"\xff", field(1, field(1, b"x"))),  # a name that is not UTF-8
        record(b"f", field(3, field(1, b"\xff" * 11))),
        record(b"f", field(2, field(1, b"\0\0\0"))),
    ],
)
def test_damage(data):
    with pytest.raises(ValueError, match=r"no tf\.train\.Example"):
        example.decode(data)


def test_cut_anywhere():
    """Never anything but a ValueError, and never a value that was not there."""
    data = example.encode({"image": b"p" * 300, "caption": [b"one", b"two"], "n": [1, 2, 3]})
    whole = example.decode(data)
    for end in range(len(data)):
        try:
            assert not example.decode(data[:end])
        except ValueError:
            continue
    flipped = np.frombuffer(data, np.uint8)
    for i in range(len(data)):
        changed = flipped.copy()
        changed[i] ^= 0x55
        try:
            assert isinstance(example.decode(changed.tobytes()), dict)
        except ValueError:
            continue
    assert whole["caption"] == [b"one", b"two"]


def test_agrees_with_the_class_of_tensorflow_datasets():
    pb2 = pytest.importorskip("tensorflow_datasets.proto").tf_example_pb2
    features = {"image": b"\xff\xd8", "captions": [b"a", b"b"], "x": [1.5, 2.5], "n": [-1, 7]}
    theirs = pb2.Example.FromString(example.encode(features)).features.feature
    assert theirs["image"].bytes_list.value == [b"\xff\xd8"]
    assert theirs["captions"].bytes_list.value == [b"a", b"b"]
    assert theirs["x"].float_list.value == [1.5, 2.5]
    assert theirs["n"].int64_list.value == [-1, 7]
    made = pb2.Example()
    made.features.feature["t"].bytes_list.value.append(b"text")
    made.features.feature["i"].int64_list.value.extend([2**40, -5])
    made.features.feature["f"].float_list.value.extend([0.25])
    made.features.feature["none"].int64_list.SetInParent()
    expected = {"t": [b"text"], "i": [2**40, -5], "f": [0.25], "none": []}
    assert example.decode(made.SerializeToString()) == expected
