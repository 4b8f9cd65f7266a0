"""Parses lines of the text log."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from sandbox.model.wire.event_bodies import CONVERSATION_TYPES

_LINE = re.compile(rb"(\[[^\] ]{1,40}\] )(\[(?:STDOUT|STDERR|EVENT)\] )(.*\n)", re.DOTALL)


class LogLine(NamedTuple):
    """A line or a part of one. is_continued: whether another part follows, which has no time and no stream."""

    time: bytes
    stream: bytes
    content: bytes
    is_continued: bool = False


def parse_line(line: bytes) -> LogLine:
    """Split a line into its parts; the whole text of an unrecognized line is content."""
    match = _LINE.fullmatch(line)
    return LogLine(match[1], match[2], match[3]) if match else LogLine(b"", b"", line)


def parse_log_events(lines: Iterable[bytes], task_id: str) -> Iterator[Mapping[str, Any]]:
    """Convert log lines back to events; skip unrecognized lines. Events of type `output` lack `seq` and `parsed`."""
    for line in lines:
        time, tag, content, _ = parse_line(line)
        if tag == b"[EVENT] ":
            yield from _parse_event_line(content)
        elif tag:
            stamp, stream = time[1:-2].decode(errors="replace"), tag[1:-2].decode().lower()
            data = content.decode(errors="replace")
            yield {"type": "output", "task_id": task_id, "timestamp": stamp, "stream": stream, "data": data}


def _parse_event_line(content: bytes) -> Iterator[Mapping[str, Any]]:
    from sandbox.client import UnexpectedResponseError
    from sandbox.client.parsing import parse_event

    with suppress(UnexpectedResponseError):
        yield parse_event(content)


def mark_parsed_lines(events: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Add `parsed` to the output events of a text log.

    Lines of stdout that are JSON objects count as parsed, beginning with the line before the first conversation event.
    A log without conversation events, such as a terminal's log, has no parsed lines.
    """
    held: Mapping[str, Any] | None = None
    has_conversation = False
    for event in events:
        has_conversation = has_conversation or event.get("type") in CONVERSATION_TYPES
        if held is not None:
            yield {**held, "parsed": has_conversation}
            held = None
        if event.get("type") != "output":
            yield event
        elif _is_json_object(event):
            held = event
        else:
            yield {**event, "parsed": False}
    if held is not None:
        yield {**held, "parsed": has_conversation}


def _is_json_object(output: Mapping[str, Any]) -> bool:
    text = str(output["data"])
    return output["stream"] == "stdout" and text.startswith('{"') and text.rstrip().endswith("}")
