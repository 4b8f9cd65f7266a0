"""JSON that a server told: objects that miss no key silently, and whether they have the kinds that are promised."""

from __future__ import annotations

import json
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints, is_typeddict

from sandbox.client.errors import UnexpectedAnswerError

NUMBER_MAX = 2**63
"""What lies beyond, infinity and what is no number have no meaning in any answer."""


class ResponseDict(dict[str, Any]):
    """An object of an answer. Whoever reads a key that is not there gets UnexpectedAnswerError."""

    def __missing__(self, key: str) -> NoReturn:
        raise UnexpectedAnswerError(f"The server's answer lacks {key!r}. Check the address of the server.")


def parse_object(text: bytes | str) -> ResponseDict | None:
    """The JSON object, None for everything else."""
    try:
        value = json.loads(text, object_hook=ResponseDict)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, ResponseDict) else None


def matches_schema(value: Any, kind: Any) -> bool:
    """Whether what is there has the kinds that `kind`, a TypedDict or what stands in one, promises.

    Keys may be missing, as an older server has them not; further keys and other words for a Literal are a newer one's.
    """
    if is_typeddict(kind):
        fields = _schema_fields(kind)
        return isinstance(value, dict) and all(
            matches_schema(value[name], fields[name]) for name in fields.keys() & value.keys()
        )
    origin, parts = get_origin(kind), get_args(kind)
    if origin in {UnionType, Union}:
        return any(matches_schema(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(matches_schema(each, parts[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(matches_schema(each, parts[1]) for each in value.values())
    if kind is int or kind is float:
        return isinstance(value, int | kind) and abs(value) <= NUMBER_MAX
    return kind is Any or isinstance(value, str if origin is Literal else kind)


@cache
def _schema_fields(kind: Any) -> dict[str, Any]:
    """Without those that are always null until now."""
    return {name: each for name, each in get_type_hints(kind).items() if each is not NoneType}
