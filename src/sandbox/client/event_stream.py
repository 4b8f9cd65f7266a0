"""Server-sent events: bytes in, frames out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from sandbox.client.answers import Frame
from sandbox.client.errors import UnexpectedAnswerError

EVENT_BYTES_MAX = 16 * 1024 * 1024
"""An event in its JSON form; a line of output of 1 MiB, all of it escaped, stays far below."""


def frames(chunks: Iterable[bytes]) -> Iterator[Frame]:
    """The frames in the bytes of an event stream; comments and an event that is cut off are left out.

    Raises UnexpectedAnswerError for an event that is too large or not a JSON object.
    """
    data: list[bytes] = []
    for line in _lines(chunks):
        if line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
        elif not line and data:
            yield _frame(b"\n".join(data))
            data = []


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    # By bytes and not as text: U+2028 and its like are ends of lines to Python, but not here.
    pending = bytearray()
    for chunk in chunks:
        pending += chunk
        if b"\n" in chunk:
            *whole, rest = bytes(pending).split(b"\n")
            pending = bytearray(rest)
            for line in whole:
                yield line.removesuffix(b"\r")
        if len(pending) > EVENT_BYTES_MAX:
            raise UnexpectedAnswerError("The server sent an event that is too large.")


def _frame(data: bytes) -> Frame:
    try:
        frame = json.loads(data)
    except (ValueError, RecursionError):
        frame = None
    if not isinstance(frame, dict) or not isinstance(frame.get("type"), str) or not isinstance(frame.get("seq"), int):
        raise UnexpectedAnswerError("The server sent an event that is not Sandbox's.")
    return frame
