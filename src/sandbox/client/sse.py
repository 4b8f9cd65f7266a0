"""Reassembles the events and the log lines of a stream: bytes in, events and lines out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from sandbox.client.errors import UnexpectedResponseError
from sandbox.client.response_validation import matches_schema, parse_object
from sandbox.model.wire.event_bodies import BaseEvent, Event

EVENT_BYTES_MAX = 16 * 1024 * 1024
"""Size limit of an event's JSON; an output line of 1 MiB with all characters escaped is far smaller."""

LINE_BYTES_MAX = 2 * EVENT_BYTES_MAX
"""Size limit of a log line. The server joins the parts of a line up to half this size."""


class SseParser:
    """Parses the stream of one connection. Skips comments, and an event that is incomplete when the stream ends.

    last_id: the latest id, which belongs to the event that was returned last or precedes it; empty if there is none.
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
