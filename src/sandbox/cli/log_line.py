"""The lines of a log as the API writes them, taken apart again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

_LINE = re.compile(rb"(\[[^\] ]{1,40}\] )(\[(?:STDOUT|STDERR|EVENT)\] )(.*\n)", re.DOTALL)


class Line(NamedTuple):
    """A line, or a part of one. goes_on: its next part is to come, which has neither time nor stream."""

    time: bytes
    stream: bytes
    content: bytes
    goes_on: bool = False


def split(line: bytes) -> Line:
    """The parts of a line; a line of another kind is all content."""
    match = _LINE.fullmatch(line)
    return Line(match[1], match[2], match[3]) if match else Line(b"", b"", line)


def frames_of(lines: Iterable[bytes], task_id: str) -> Iterator[Mapping[str, Any]]:
    """Lines as the frames that they were made of; output has no `seq` in them. Other lines are passed over."""
    for line in lines:
        time, tag, content, _ = split(line)
        if tag == b"[EVENT] ":
            yield from _event(content)
        elif tag:
            stamp, stream = time[1:-2].decode(errors="replace"), tag[1:-2].decode().lower()
            data = content.decode(errors="replace")
            yield {"type": "output", "task_id": task_id, "timestamp": stamp, "stream": stream, "data": data}


def _event(content: bytes) -> Iterator[Mapping[str, Any]]:
    from sandbox.client import UnexpectedAnswerError
    from sandbox.client.event_stream import read_event

    with suppress(UnexpectedAnswerError):
        yield read_event(content)
