"""Server-sent events: bytes in, events out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import cast

from sandbox.client.errors import UnexpectedAnswerError
from sandbox.client.events import Event

EVENT_BYTES_MAX = 16 * 1024 * 1024
"""An event in its JSON form; a line of output of 1 MiB, all of it escaped, stays far below."""


class EventStream:
    """Reads one connection; comments, and an event that is cut off at its end, are left out."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """The events that `chunk` completes.

        Raises UnexpectedAnswerError for an event that is too large or not one of Sandbox's.
        """
        for line in self._lines(chunk):
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                data, self._data = b"\n".join(self._data), []
                yield _event(data)

    def _lines(self, chunk: bytes) -> Iterator[bytes]:
        # By bytes and not as text: U+2028 and its like are ends of lines to Python, but not here.
        self._pending += chunk
        if b"\n" in chunk:
            *whole, rest = bytes(self._pending).split(b"\n")
            self._pending = bytearray(rest)
            for line in whole:
                yield line.removesuffix(b"\r")
        if len(self._pending) > EVENT_BYTES_MAX:
            raise UnexpectedAnswerError("The server sent an event that is too large.")


def _event(data: bytes) -> Event:
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict) or not isinstance(told.get("type"), str) or not isinstance(told.get("seq"), int):
        raise UnexpectedAnswerError("The server sent an event that is not Sandbox's.")
    return cast("Event", told)
