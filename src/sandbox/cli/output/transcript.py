"""Claude Code's output lines (stream-json), as far as a viewer of the story needs them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from sandbox.interfaces.layout import WORKSPACE

LINE_CHARACTERS_MAX = 8 * 1024 * 1024
"""A longer line is not looked into: nothing of it would be shown anyway."""

_SUMMARIES = ("command", "file_path", "notebook_path", "pattern", "path", "url", "query", "description", "prompt")
"""The fields of a tool's input that say best what the call is about, the best first."""


@dataclass(frozen=True)
class Said:
    """The agent said something."""

    text: str


@dataclass(frozen=True)
class Printed:
    """A line that is no event: what Claude Code prints where the task's output is text."""

    text: str


@dataclass(frozen=True)
class ToolUsed:
    """The agent began a tool call."""

    id: str
    tool: str
    summary: str


@dataclass(frozen=True)
class ToolAnswered:
    """A tool call came to its end, with this answer or complaint."""

    id: str
    text: str
    is_error: bool


@dataclass(frozen=True)
class Retried:
    """The model API did not answer; Claude Code tries again."""

    attempt: int
    attempts_max: int
    reason: str


Saying = Said | Printed | ToolUsed | ToolAnswered | Retried


class Transcript:
    """Puts the parts of split lines together again, and reads them; those that are not believed are told as text."""

    def __init__(self, *, is_believed: bool = True) -> None:
        self._is_believed = is_believed
        self._parts: list[str] = []
        self._length = 0
        self._has_events = False

    def read(self, data: str, *, continued: bool) -> Iterator[Saying]:
        """What the line says, once its last part is here."""
        self._length += len(data)
        if self._length <= LINE_CHARACTERS_MAX:
            self._parts.append(data)
        if continued:
            return
        line, is_whole = "".join(self._parts), self._length <= LINE_CHARACTERS_MAX
        self._parts, self._length = [], 0
        if is_whole:
            yield from self._sayings(line)

    def _sayings(self, line: str) -> Iterator[Saying]:
        try:
            told = json.loads(line) if self._is_believed else None
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict) or "type" not in told:
            if line.strip():
                yield Printed(line)
            return
        match told:
            case {"type": "result", "result": str(text)} if not self._has_events:
                yield Said(text)  # all there is where the task's output is one JSON document
        self._has_events = True
        yield from _said(told)


def _said(told: dict[str, Any]) -> Iterator[Saying]:
    match told:
        case {"type": "assistant", "message": {"content": list(blocks)}}:
            yield from filter(None, map(_of_agent, blocks))
        case {"type": "user", "message": {"content": list(blocks)}}:
            yield from filter(None, map(_of_tool, blocks))
        case {"type": "system", "subtype": "api_retry"}:
            reason = told.get("error") or told.get("error_status") or "no answer"
            yield Retried(_number(told.get("attempt")), _number(told.get("max_retries")), str(reason))


def _of_agent(block: Any) -> Saying | None:
    match block:
        case {"type": "text", "text": str(text)} if text.strip():
            return Said(text)
        case {"type": "tool_use", "id": str(use_id), "name": str(tool)}:
            return ToolUsed(use_id, tool, _summary(block.get("input")))
    return None


def _of_tool(block: Any) -> Saying | None:
    match block:
        case {"type": "tool_result", "tool_use_id": str(use_id)}:
            return ToolAnswered(use_id, _text(block.get("content")), block.get("is_error") is True)
    return None


def _summary(given: Any) -> str:
    if not isinstance(given, dict):
        return ""
    texts = (given[field] for field in _SUMMARIES if isinstance(given.get(field), str))
    return next((text.removeprefix(f"{WORKSPACE}/") for text in texts if text.strip()), "")


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else []
    return "\n".join(str(block.get("text", "")) for block in blocks if isinstance(block, dict))


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


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
    from sandbox.client.sse import read_event

    with suppress(UnexpectedAnswerError):
        yield read_event(content)
