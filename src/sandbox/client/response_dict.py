"""JSON that a server told: objects that miss no key silently, and whether they have the kinds that are promised."""

from __future__ import annotations

import json
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints, is_typeddict

from sandbox.client.errors import UnexpectedAnswerError

NUMBER_MAX = 2**63
"""What lies beyond, infinity and what is no number have no meaning in any answer."""


class Told(dict[str, Any]):
    """An object of an answer. Whoever reads a key that is not there gets UnexpectedAnswerError."""

    def __missing__(self, key: str) -> NoReturn:
        raise UnexpectedAnswerError(f"The server's answer lacks {key!r}. Check the address of the server.")


def read_object(text: bytes | str) -> Told | None:
    """The JSON object, None for everything else."""
    try:
        told = json.loads(text, object_hook=Told)
    except (ValueError, RecursionError):
        return None
    return told if isinstance(told, Told) else None


def fits(told: Any, kind: Any) -> bool:
    """Whether what is there has the kinds that `kind`, a TypedDict or what stands in one, promises.

    Keys may be missing, as an older server has them not; further keys and other words for a Literal are a newer one's.
    """
    if is_typeddict(kind):
        fields = _fields(kind)
        return isinstance(told, dict) and all(fits(told[name], fields[name]) for name in fields.keys() & told.keys())
    origin, parts = get_origin(kind), get_args(kind)
    if origin in {UnionType, Union}:
        return any(fits(told, part) for part in parts)
    if origin is list:
        return isinstance(told, list) and all(fits(each, parts[0]) for each in told)
    if origin is dict:
        return isinstance(told, dict) and all(fits(each, parts[1]) for each in told.values())
    if kind is int or kind is float:
        return isinstance(told, int | kind) and abs(told) <= NUMBER_MAX
    return kind is Any or isinstance(told, str if origin is Literal else kind)


@cache
def _fields(kind: Any) -> dict[str, Any]:
    """Without those that are always null until now."""
    return {name: each for name, each in get_type_hints(kind).items() if each is not NoneType}
