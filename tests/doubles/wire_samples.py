"""Encodes sample values of the given types: `python wire_samples.py json module:Type …` prints samples of each type.

The samples cover all alternatives, and each is also decoded. The program runs with every version of Sandbox.
"""

import importlib
import json
import sys
from datetime import UTC, datetime
from typing import Union

import msgspec
from msgspec import inspect

try:
    from sandbox.agents.claude_code.manifest_section import Claude
    from sandbox.model.manifest.schema import Manifest, declare_manifest, decode_manifest, encode_manifest
except ImportError:  # in this version, the manifest is a dataclass
    Manifest = encode_manifest = decode_manifest = None

_ADDED_FIELDS = {("AgentStarted", "agent"), ("Task", "agent_name"), ("ToolResult", "in_background")}
"""Fields that the first version did not have. In samples, they have default values, which are not encoded."""

_SCALAR_SAMPLES = {
    inspect.AnyType: "any",
    inspect.BytesType: b"\x00bytes",
    inspect.DateTimeType: datetime(2026, 1, 29, 10, 0, 0, 250_000, tzinfo=UTC),
    inspect.FloatType: 2.5,
    inspect.IntType: 7,
    inspect.NoneType: None,
    inspect.StrType: "text",
}

_SHA256 = f"sha256:{'5a' * 32}"
_FIELD_SAMPLES = {"checksum": _SHA256, "digest": _SHA256, "base_commit": "5a" * 20, "chain_base_commit": "5a" * 20}
"""The samples for fields with these names. In these fields, new versions accept only digests or commit ids."""


def encoded_samples(names, kind):
    """Return encoded samples of each `module:Type`; names separated by `|` are a union."""
    codec = {"json": msgspec.json, "msgpack": msgspec.msgpack}[kind]
    return {name: [_round_trip(codec, sample, _find(name)) for sample in samples(_find(name))] for name in names}


def keeps_all_fields(encoded, names, kind):
    """Decode the samples as `module:Type`, and encode them again. Return whether they still have all fields.

    encoded: the samples in hexadecimal. names: as for `encoded_samples`.
    """
    codec = {"json": msgspec.json, "msgpack": msgspec.msgpack}[kind]
    for sample in map(bytes.fromhex, encoded):
        decoded = codec.decode(sample, type=_find(names), dec_hook=decode_manifest)
        if not _contains(codec.decode(codec.encode(decoded, enc_hook=encode_manifest)), codec.decode(sample)):
            return False
    return True


def _contains(extended, original):
    if isinstance(original, dict):
        return all(key in extended and _contains(extended[key], value) for key, value in original.items())
    if isinstance(original, list):
        return len(extended) == len(original) and all(map(_contains, extended, original))
    return bool(extended == original)


def samples(type_):
    """Return values of a type that cover every field, union member and enum value."""
    return _samples(inspect.type_info(type_))


def _find(name):
    modules = [importlib.import_module(module) for module in [part.partition(":")[0] for part in name.split("|")]]
    types = [getattr(module, part.partition(":")[2]) for module, part in zip(modules, name.split("|"), strict=True)]
    return Union[tuple(types)]  # noqa: UP007  (built from a list)


def _round_trip(codec, sample, type_):
    encoded = codec.encode(sample, enc_hook=encode_manifest)
    decoded = codec.decode(encoded, type=type_, dec_hook=decode_manifest)
    assert codec.encode(decoded, enc_hook=encode_manifest) == encoded
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
        case inspect.StructType() | inspect.DataclassType() | inspect.CustomType():
            return _manifests() if isinstance(info, inspect.CustomType) else _records(info)
        case _:
            return [_SCALAR_SAMPLES[type(info)]]


def _manifests():
    declared = inspect.type_info(declare_manifest({"claude": Claude}))
    return [decode_manifest(Manifest, msgspec.to_builtins(record)) for record in _records(declared)]


def _records(info):
    """Return one record for each sample of the field that has the most samples."""
    added = {name for kind, name in _ADDED_FIELDS if kind == info.cls.__name__}
    fields = {field.name: _field_samples(field) for field in info.fields if field.name not in added}
    count = max((len(values) for values in fields.values()), default=1)
    return [info.cls(**{name: values[n % len(values)] for name, values in fields.items()}) for n in range(count)]


def _field_samples(field):
    return [_FIELD_SAMPLES[field.name]] if field.name in _FIELD_SAMPLES else _samples(field.type)


if __name__ == "__main__":
    json.dump(encoded_samples(sys.argv[2:], sys.argv[1]), sys.stdout)
