"""tf.train.Example, the record of many data sets, without TensorFlow.

The messages are those of tensorflow/core/example/example.proto and feature.proto, field number by
field number. They live in a descriptor pool of their own, so that TensorFlow and
tensorflow-datasets may register theirs in the same process.
"""

from collections.abc import Collection, Mapping, Sequence
import numbers

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

_PACKAGE = "t2i_jax"
_Field = descriptor_pb2.FieldDescriptorProto
_LISTS = {  # field of Feature -> its message, the type of its values; numbered from 1
    "bytes_list": ("BytesList", _Field.TYPE_BYTES),
    "float_list": ("FloatList", _Field.TYPE_FLOAT),
    "int64_list": ("Int64List", _Field.TYPE_INT64),
}


def _file() -> descriptor_pb2.FileDescriptorProto:
    """Example { features { feature: map<string, Feature> } }; a Feature is one of _LISTS."""
    file = descriptor_pb2.FileDescriptorProto(
        name="t2i_jax/example.proto", package=_PACKAGE, syntax="proto3"
    )

    def add(parent, name: str, number: int, kind: str = "", **options) -> None:
        if kind:
            options.update(type=_Field.TYPE_MESSAGE, type_name=f".{_PACKAGE}.{kind}")
        options.setdefault("label", _Field.LABEL_OPTIONAL)
        parent.field.add(name=name, number=number, **options)

    for name, value_type in _LISTS.values():
        values = file.message_type.add(name=name)
        add(values, "value", 1, type=value_type, label=_Field.LABEL_REPEATED)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (field, (name, _)) in enumerate(_LISTS.items(), 1):
        add(feature, field, number, name, oneof_index=0)
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, type=_Field.TYPE_STRING)
    add(entry, "value", 2, "Feature")
    add(features, "feature", 1, "Features.FeatureEntry", label=_Field.LABEL_REPEATED)
    add(file.message_type.add(name="Example"), "features", 1, "Features")
    return file


_POOL = descriptor_pool.DescriptorPool()
_POOL.Add(_file())
_Example = message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{_PACKAGE}.Example"))

Value = bytes | int | float
Values = list[bytes] | list[int] | list[float]


def encode(features: Mapping[str, Value | Sequence[Value]]) -> bytes:
    """The serialized Example; equal features give equal bytes.

    A value, or several of one kind: bytes, integers (64 bits), or numbers (32-bit floats if one of
    them is none of the integers). Raises TypeError for others, text among them, and ValueError for
    an integer that is too large.
    """
    example = _Example()
    for name, values in features.items():
        several = [values] if isinstance(values, bytes | numbers.Real) else list(values)
        feature = example.features.feature[name]
        if isinstance(values, str):
            raise TypeError(f"feature {name!r} is text; encode it as UTF-8")
        if all(isinstance(value, bytes) for value in several):
            feature.bytes_list.value.extend(several)
        elif all(isinstance(value, numbers.Integral) for value in several):
            feature.int64_list.value.extend(map(int, several))
        elif all(isinstance(value, numbers.Real) for value in several):
            feature.float_list.value.extend(map(float, several))
        else:
            kinds = sorted({type(value).__name__ for value in several})
            raise TypeError(f"feature {name!r} has {' and '.join(kinds)}; bytes or numbers only")
    return example.SerializeToString(deterministic=True)


def decode(data: bytes, names: Collection[str] | None = None) -> dict[str, Values]:
    """The features, all or those of `names` that are there, and their values.

    Raises ValueError where `data` is no Example. (Protobuf bounds the depth, and what it allocates
    by the length of the data.)
    """
    try:
        stored = _Example.FromString(data).features.feature
    except message.DecodeError as error:
        raise ValueError(f"{len(data)} bytes that are no tf.train.Example: {error}") from error
    return {
        name: _values(stored[name])
        for name in (stored if names is None else names)
        if name in stored
    }


def _values(feature: message.Message) -> Values:
    kind = feature.WhichOneof("kind")
    return list(getattr(feature, kind).value) if kind else []
