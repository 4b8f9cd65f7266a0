"""Parses Claude Code's output lines (stream-json), and lines of the text log, for display."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from sandbox.interfaces.file_layout import SANDBOX_WORKSPACE

LINE_CHARACTERS_MAX = 8 * 1024 * 1024
"""Longer lines are skipped, because none of their content would be displayed."""

SUMMARY_CHARACTERS_MAX = 2000
"""Longer summaries are cut; the status line prints them several times a second."""

_SUMMARY_FIELDS = ("command", "file_path", "notebook_path", "pattern", "path", "url", "query", "description", "prompt")
"""Fields of a tool's input that summarize a call, the best first."""


@dataclass(frozen=True)
class AgentMessage:
    """A text message of the agent."""

    text: str


@dataclass(frozen=True)
class TextOutput:
    """A line that is not an event: Claude Code's output in text format."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """The agent started a tool call."""

    id: str
    tool: str
    summary: str


@dataclass(frozen=True)
class ToolResult:
    """A tool call ended with this result or error."""

    id: str
    text: str
    is_error: bool


@dataclass(frozen=True)
class ApiRetry:
    """The model API did not respond; Claude Code retries."""

    attempt: int
    attempts_max: int
    reason: str


AgentOutputItem = AgentMessage | TextOutput | ToolCall | ToolResult | ApiRetry


class AgentOutputParser:
    """Reassembles split lines and parses them; untrusted lines are returned as text."""

    def __init__(self, *, is_trusted: bool = True) -> None:
        self._is_trusted = is_trusted
        self._parts: list[str] = []
        self._length = 0
        self._has_events = False

    def feed(self, data: str, *, continued: bool) -> Iterator[AgentOutputItem]:
        """Yield the items of a line once its last part has arrived."""
        self._length += len(data)
        if self._length <= LINE_CHARACTERS_MAX:
            self._parts.append(data)
        if continued:
            return
        line, is_whole = "".join(self._parts), self._length <= LINE_CHARACTERS_MAX
        self._parts, self._length = [], 0
        if is_whole:
            yield from self._parse_line(line)

    def _parse_line(self, line: str) -> Iterator[AgentOutputItem]:
        try:
            parsed = json.loads(line) if self._is_trusted else None
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict) or "type" not in parsed:
            if line.strip():
                yield TextOutput(line)
            return
        match parsed:
            case {"type": "result", "result": str(text)} if not self._has_events:
                yield AgentMessage(text)  # the only event if Claude Code's output is a single JSON document
        self._has_events = True
        yield from _parse_message(parsed)


def _parse_message(message: dict[str, Any]) -> Iterator[AgentOutputItem]:
    match message:
        case {"type": "assistant", "message": {"content": list(blocks)}}:
            yield from filter(None, map(_parse_agent_block, blocks))
        case {"type": "user", "message": {"content": list(blocks)}}:
            yield from filter(None, map(_parse_tool_block, blocks))
        case {"type": "system", "subtype": "api_retry"}:
            reason = message.get("error") or message.get("error_status") or "no response"
            yield ApiRetry(_int_or_zero(message.get("attempt")), _int_or_zero(message.get("max_retries")), str(reason))


def _parse_agent_block(block: Any) -> AgentOutputItem | None:
    match block:
        case {"type": "text", "text": str(text)} if text.strip():
            return AgentMessage(text)
        case {"type": "tool_use", "id": str(use_id), "name": str(tool)}:
            return ToolCall(use_id, tool, _summarize_input(block.get("input")))
    return None


def _parse_tool_block(block: Any) -> AgentOutputItem | None:
    match block:
        case {"type": "tool_result", "tool_use_id": str(use_id)}:
            return ToolResult(use_id, _content_text(block.get("content")), block.get("is_error") is True)
    return None


def _summarize_input(tool_input: Any) -> str:
    if not isinstance(tool_input, dict):
        return ""
    texts = (tool_input[field] for field in _SUMMARY_FIELDS if isinstance(tool_input.get(field), str))
    text = next((text for text in texts if text.strip()), "")
    return text.removeprefix(f"{SANDBOX_WORKSPACE}/")[:SUMMARY_CHARACTERS_MAX]


def _content_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else []
    return "\n".join(str(block.get("text", "")) for block in blocks if isinstance(block, dict))


def _int_or_zero(value: Any) -> int:
    return value if isinstance(value, int) else 0


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
    """Convert log lines back to events; output has no `seq`. Other lines are skipped."""
    for line in lines:
        time, tag, content, _ = parse_line(line)
        if tag == b"[EVENT] ":
            yield from _parse_event_line(content)
        elif tag:
            stamp, stream = time[1:-2].decode(errors="replace"), tag[1:-2].decode().lower()
            data = content.decode(errors="replace")
            yield {"type": "output", "task_id": task_id, "timestamp": stamp, "stream": stream, "data": data}


def _parse_event_line(content: bytes) -> Iterator[Mapping[str, Any]]:
    from sandbox.client import UnexpectedAnswerError
    from sandbox.client.sse import parse_event

    with suppress(UnexpectedAnswerError):
        yield parse_event(content)
