"""Parses lines of the text log."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

_LINE = re.compile(rb"(\[[^\] ]{1,40}\] )(\[(?:STDOUT|STDERR|EVENT)\] )(.*\n)", re.DOTALL)


class LogLine(NamedTuple):
    """A line or a part of one. is_continued: the next part follows, without time and stream."""

    time: bytes
    stream: bytes
    content: bytes
    is_continued: bool = False


def parse_line(line: bytes) -> LogLine:
    """Split a line into its parts; an unrecognized line is all content."""
    match = _LINE.fullmatch(line)
    return LogLine(match[1], match[2], match[3]) if match else LogLine(b"", b"", line)


def parse_log_events(lines: Iterable[bytes], task_id: str) -> Iterator[Mapping[str, Any]]:
    """Convert log lines back to events; output has no `seq`. Other lines are skipped.

    A text log does not say which lines of stdout are `parsed`. Those that are JSON objects count as such, beginning
    with the line before the first conversation event. A log without such events, as of a terminal, has none.
    """
    held: dict[str, Any] | None = None
    has_conversation = False
    for event in _parse_events(lines, task_id):
        has_conversation = has_conversation or event["type"] in _CONVERSATION_TYPES
        if held is not None:
            yield {**held, "parsed": has_conversation}
            held = None
        if event["type"] != "output":
            yield event
        elif _is_json_object(event):
            held = event
        else:
            yield {**event, "parsed": False}
    if held is not None:
        yield {**held, "parsed": has_conversation}


_CONVERSATION_TYPES = frozenset({"agent_message", "tool_call_started", "tool_result", "agent_result", "conversation"})


def _is_json_object(output: Mapping[str, Any]) -> bool:
    text = str(output["data"])
    return output["stream"] == "stdout" and text.startswith('{"') and text.rstrip().endswith("}")


def _parse_events(lines: Iterable[bytes], task_id: str) -> Iterator[dict[str, Any]]:
    for line in lines:
        time, tag, content, _ = parse_line(line)
        if tag == b"[EVENT] ":
            yield from _parse_event_line(content)
        elif tag:
            stamp, stream = time[1:-2].decode(errors="replace"), tag[1:-2].decode().lower()
            data = content.decode(errors="replace")
            yield {"type": "output", "task_id": task_id, "timestamp": stamp, "stream": stream, "data": data}


def _parse_event_line(content: bytes) -> Iterator[dict[str, Any]]:
    from sandbox.client import UnexpectedAnswerError
    from sandbox.client.sse import parse_event

    with suppress(UnexpectedAnswerError):
        yield {**parse_event(content)}
