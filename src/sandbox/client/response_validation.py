"""Validation of JSON responses: a structural type check, and dictionaries that raise an error for missing keys."""

from __future__ import annotations

import json
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints, is_typeddict

from sandbox.client.errors import UnexpectedResponseError

NUMBER_MAX = 2**63
"""Maximum absolute value of a number in a response. Infinity and NaN are invalid."""


class ResponseDict(dict[str, Any]):
    """A JSON object in a response. Reading a missing key raises UnexpectedResponseError."""

    def __missing__(self, key: str) -> NoReturn:
        raise UnexpectedResponseError(f"The server's response lacks {key!r}. Check the address of the server.")


def parse_object(text: bytes | str) -> ResponseDict | None:
    """Parse a JSON object; return None for anything else."""
    try:
        value = json.loads(text, object_hook=ResponseDict)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, ResponseDict) else None


def matches_schema(value: Any, kind: Any) -> bool:
    """Return whether the present values have the types that `kind` (a TypedDict or a type used in one) requires.

    Missing keys are accepted, because an older server omits them. Additional keys, other values of a Literal and
    objects with another `type` are accepted, because a newer server may send them.
    """
    if is_typeddict(kind):
        fields = _schema_fields(kind)
        return isinstance(value, dict) and all(
            matches_schema(value[name], fields[name]) for name in fields.keys() & value.keys()
        )
    origin, parts = get_origin(kind), get_args(kind)
    if origin in {UnionType, Union}:
        if types := _tagged_types(kind):
            return isinstance(value, dict) and matches_schema(value, types.get(str(value.get("type")), Any))
        return any(matches_schema(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(matches_schema(each, parts[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(matches_schema(each, parts[1]) for each in value.values())
    if kind is int or kind is float:
        return isinstance(value, int | kind) and abs(value) <= NUMBER_MAX
    if origin is Literal:
        return isinstance(value, tuple(type(part) for part in parts))
    return kind is Any or isinstance(value, kind)


@cache
def _tagged_types(kind: Any) -> dict[str, Any]:
    """Return the members of a union of TypedDicts, keyed by their `type`; empty for any other union."""
    parts = get_args(kind)
    if not all(is_typeddict(part) and "type" in _schema_fields(part) for part in parts):
        return {}
    return {get_args(_schema_fields(part)["type"])[0]: part for part in parts}


@cache
def _schema_fields(kind: Any) -> dict[str, Any]:
    """Return the fields of a TypedDict, without those that are always null in this version."""
    return {name: each for name, each in get_type_hints(kind).items() if each is not NoneType}
