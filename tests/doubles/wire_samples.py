"""Encodes sample values of types: `python wire_samples.py json module:Type …` prints a list of samples for each type.

The samples cover all alternatives, and each is also decoded. The program needs only msgspec, so it can run with every
version of Sandbox.
"""

import importlib
import json
import sys
from datetime import UTC, datetime
from typing import Union

import msgspec
from msgspec import inspect

_PLAIN = {
    inspect.AnyType: "any",
    inspect.BytesType: b"\x00bytes",
    inspect.DateTimeType: datetime(2026, 1, 29, 10, 0, 0, 250_000, tzinfo=UTC),
    inspect.FloatType: 2.5,
    inspect.IntType: 7,
    inspect.NoneType: None,
    inspect.StrType: "text",
}


def encoded_samples(names, kind):
    """Encoded samples of each `module:Type`; names separated by `|` are a union."""
    codec = {"json": msgspec.json, "msgpack": msgspec.msgpack}[kind]
    return {name: [_round_trip(codec, sample, _find(name)) for sample in samples(_find(name))] for name in names}


def reencoded(encoded, names, kind):
    """The samples (hexadecimal) after they were decoded as `module:Type` and encoded again."""
    codec = {"json": msgspec.json, "msgpack": msgspec.msgpack}[kind]
    return [codec.encode(codec.decode(bytes.fromhex(sample), type=_find(names))).hex() for sample in encoded]


def samples(type_):
    """Values that cover every field, union member and enum value."""
    return _samples(inspect.type_info(type_))


def _find(name):
    modules = [importlib.import_module(module) for module in [part.partition(":")[0] for part in name.split("|")]]
    types = [getattr(module, part.partition(":")[2]) for module, part in zip(modules, name.split("|"), strict=True)]
    return Union[tuple(types)]  # noqa: UP007  (built from a list)


def _round_trip(codec, sample, type_):
    encoded = codec.encode(sample)
    assert codec.encode(codec.decode(encoded, type=type_)) == encoded
    return encoded.hex()


def _samples(info):
    match info:
        case inspect.UnionType():
            return [sample for member in info.types for sample in _samples(member)]
        case inspect.LiteralType():
            return sorted(info.values)
        case inspect.BoolType():
            return [True, False]
        case inspect.EnumType():
            return list(info.cls)
        case inspect.VarTupleType() | inspect.ListType():
            return [tuple(_samples(info.item_type))]
        case inspect.DictType():
            return [{"key": value} for value in _samples(info.value_type)]
        case inspect.StructType() | inspect.DataclassType():
            return _records(info)
        case _:
            return [_PLAIN[type(info)]]


def _records(info):
    """One record for each sample of the field that has the most samples."""
    fields = {field.name: _samples(field.type) for field in info.fields}
    count = max((len(values) for values in fields.values()), default=1)
    return [info.cls(**{name: values[n % len(values)] for name, values in fields.items()}) for n in range(count)]


if __name__ == "__main__":
    json.dump(encoded_samples(sys.argv[2:], sys.argv[1]), sys.stdout)
