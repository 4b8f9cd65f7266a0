"""Parses responses: checked JSON objects, and the events and log lines of a stream. Performs no I/O."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

from sandbox.client.errors import UnexpectedResponseError
from sandbox.model.wire.event_bodies import BaseEvent, Event

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


EVENT_BYTES_MAX = 16 * 1024 * 1024
"""Size limit of an event's JSON; an output line of 1 MiB with all characters escaped is far smaller."""

LINE_BYTES_MAX = 2 * EVENT_BYTES_MAX
"""Size limit of a log line. The server joins the parts of a line up to half this size."""


class SseParser:
    """Parses the stream of one connection. Skips comments, and an event that is incomplete when the stream ends.

    last_id: the id after which a new connection continues the stream; empty if the server has not sent an id.
    """

    def __init__(self) -> None:
        self.last_id = ""
        self._id = ""
        self._pending = bytearray()
        self._data: list[bytes] = []
        self._data_bytes = 0

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Return the events completed by `chunk`.

        Raises UnexpectedResponseError for an event that is too large or malformed.
        """
        for line in self._lines(chunk):
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
                self._data_bytes += len(line)
                _check_size(self._data_bytes)
            elif line.startswith(b"id:"):
                self._id = line[3:].decode(errors="replace").strip()
            elif not line:
                self.last_id = self._id
                data, self._data, self._data_bytes = b"\n".join(self._data), [], 0
                if data:
                    yield parse_event(data)

    def _lines(self, chunk: bytes) -> Iterator[bytes]:
        # Split bytes, not text: str.splitlines also splits at U+2028 and other characters that do not end a line here.
        self._pending += chunk
        if b"\n" in chunk:
            *whole, rest = bytes(self._pending).split(b"\n")
            self._pending = bytearray(rest)
            for line in whole:
                yield line.removesuffix(b"\r")
        _check_size(len(self._pending))


def _check_size(size_bytes: int) -> None:
    if size_bytes > EVENT_BYTES_MAX:
        raise UnexpectedResponseError("The server sent an event that is too large.")


def parse_event(data: bytes) -> Event:
    """Parse one event from JSON. Raises UnexpectedResponseError if it is malformed."""
    data_object = parse_object(data)
    is_event = data_object is not None and isinstance(data_object.get("type"), str) and "seq" in data_object
    if not is_event or not matches_schema(data_object, BaseEvent) or not matches_schema(data_object, Event):
        raise UnexpectedResponseError("The server sent a malformed event.")
    return cast("Event", data_object)


class LineBuffer:
    """Reassembles lines from network chunks; every line keeps its newline."""

    def __init__(self) -> None:
        self._pending: list[bytes] = []
        self._pending_bytes = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the lines completed by `chunk`. Raises UnexpectedResponseError for a line that is too long."""
        if b"\n" not in chunk:
            self._pending.append(chunk)
            self._pending_bytes += len(chunk)
            if self._pending_bytes > LINE_BYTES_MAX:
                raise UnexpectedResponseError("The server sent a line that is too long.")
            return []
        *lines, rest = b"".join([*self._pending, chunk]).split(b"\n")
        self._pending, self._pending_bytes = [rest], len(rest)
        return [line + b"\n" for line in lines]

    def flush(self) -> list[bytes]:
        """Return the last line if it had no newline."""
        last = b"".join(self._pending)
        return [last + b"\n"] if last else []
