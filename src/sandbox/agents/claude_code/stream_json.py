"""Decodes lines of Claude Code's stream-json output. Lines are untrusted: data of an unexpected shape is ignored."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from sandbox.model.display_text import replace_unprintable
from sandbox.model.errors import DECODE_ERRORS
from sandbox.model.fixed_limits import OUTPUT_LINE_BYTES_MAX


def parse_float(text: str) -> float:
    """Parse a JSON number with a fraction or an exponent. Raises ValueError if it is too large for a float.

    This is the `float_hook` of decoders for untrusted JSON without a schema. msgspec's own parser takes ten
    microseconds for a very small or a very large number, so half a million numbers would stop the process for seconds.
    """
    number = float(text)
    if math.isinf(number):
        raise ValueError("The number is too large.")
    return number


SHORT_TEXT_CHARACTERS_MAX = 256
"""Maximum length of names, ids and other short strings from the agent; longer ones are truncated."""

RESULT_BYTES_MAX = 256 * 1024
"""Maximum size of a complete result event. Larger events keep only their short fields and the start of their text."""

LONG_LINE_VALUES_MAX = 500_000
"""Maximum number of values in a line that is longer than OUTPUT_LINE_BYTES_MAX, or in a part of such a line.

Commas and brackets in strings count too. A line of OUTPUT_LINE_BYTES_MAX can contain the same number of values, so
decoding a longer line takes no more time or memory.
"""

BLOCKS_MAX = 1000
"""Maximum number of blocks of a message that are decoded. Claude Code writes a line for each block."""

_RESULT_TEXT_CHARACTERS_MAX = 32 * 1024
_FIELD_CHARACTERS_MAX = 1024
_DEPTH_MAX = 16
_INTEGER_BITS_MAX = 53
_MALFORMED = (*DECODE_ERRORS, ValueError, OverflowError)
_ABSENT = msgspec.Raw(b"null")
_INDENTED_VALUES_MAX = 1000
_INDENTED_BRACKETS_MAX = 200
_INDENTATION_FACTOR_MAX = 8
"""JSON is indented for display unless it exceeds one of these limits on values, brackets and growth.

The size of indented JSON is quadratic in its depth.
"""


class StreamEvent(msgspec.Struct):
    """The outer fields of an event. The message is decoded only if needed."""

    type: str = ""
    subtype: str = ""
    session_id: str = ""
    parent_tool_use_id: str | None = None
    message: msgspec.Raw = _ABSENT


class Message(msgspec.Struct):
    """A message in the conversation. `content` may be a plain string, which contains no tool call."""

    id: str = ""
    model: str = ""
    content: list[msgspec.Raw] | str = ""


class ContentBlock(msgspec.Struct):
    """A block of a message. Fields whose type varies stay encoded.

    A tool_use block has `id`, `name` and `input`; a tool_result block has `tool_use_id`, `is_error` and `content`.
    """

    type: str = ""
    id: str = ""
    name: str = ""
    tool_use_id: str = ""
    is_error: bool | None = None
    text: msgspec.Raw = _ABSENT
    thinking: msgspec.Raw = _ABSENT
    input: msgspec.Raw = _ABSENT
    content: msgspec.Raw = _ABSENT


class McpServerStatus(msgspec.Struct):
    """An MCP server in an init event."""

    name: str = ""
    status: str = ""


class InitEvent(msgspec.Struct):
    """A `system/init` event."""

    tools: list[str] = []
    mcp_servers: list[McpServerStatus] = []
    claude_code_version: msgspec.Raw = _ABSENT
    model: msgspec.Raw = _ABSENT


class ApiRetryEvent(msgspec.Struct):
    """A `system/api_retry` event."""

    attempt: int = 0
    max_retries: int = 0
    error_status: int | None = None
    error: str = ""


class ClaudeTaskPatch(msgspec.Struct):
    """The changed fields of a task in a `system/task_updated` event."""

    is_backgrounded: bool | None = None


class ClaudeTaskEvent(msgspec.Struct):
    """A `system` event about a tool call that runs as a task of Claude Code, such as a long command or a subagent.

    tasks: all background tasks, in a `background_tasks_changed` event.
    """

    task_id: str = ""
    tool_use_id: str | None = None
    is_backgrounded: bool | None = None
    status: str = ""
    patch: ClaudeTaskPatch | None = None
    tasks: list[ClaudeTaskEvent] = []


class ResultEvent(msgspec.Struct):
    """A `result` event, without the fields that are not displayed."""

    subtype: msgspec.Raw = _ABSENT
    is_error: msgspec.Raw = _ABSENT
    result: msgspec.Raw = _ABSENT
    num_turns: msgspec.Raw = _ABSENT
    duration_ms: msgspec.Raw = _ABSENT
    total_cost_usd: msgspec.Raw = _ABSENT


_Shape = TypeVar("_Shape")
_EVENT = msgspec.json.Decoder(StreamEvent)
_MESSAGE = msgspec.json.Decoder(Message)
_BLOCK = msgspec.json.Decoder(ContentBlock)
_INIT = msgspec.json.Decoder(InitEvent)
_RETRY = msgspec.json.Decoder(ApiRetryEvent)
_CLAUDE_TASK = msgspec.json.Decoder(ClaudeTaskEvent)
_RESULT = msgspec.json.Decoder(dict[str, Any], float_hook=parse_float)
_RESULT_EVENT = msgspec.json.Decoder(ResultEvent)
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ITEMS = msgspec.json.Decoder(list[msgspec.Raw])
_STRING = msgspec.json.Decoder(str)
_INTEGER = msgspec.json.Decoder(int)
_NUMBER = msgspec.json.Decoder(float)


_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)
"""Matches an escape in a JSON string, or two escapes that form a surrogate pair. Group 1 is half a pair."""


def replace_lone_surrogates(line: bytes) -> bytes:
    r"""Return a line with `\ufffd` for each escape of half a surrogate pair, which JSON decoders reject.

    JavaScript writes such an escape if a string was cut inside a pair. Lines over OUTPUT_LINE_BYTES_MAX are unchanged.
    """
    if len(line) > OUTPUT_LINE_BYTES_MAX or not (b"\\ud" in line or b"\\uD" in line):
        return line
    return _ESCAPE.sub(lambda found: rb"\ufffd" if found[1] else found[0], line)


def read_event(line: bytes) -> StreamEvent | None:
    """Decode the event on a line; None for anything else."""
    return _decode(_EVENT, line)


def read_message(event: StreamEvent) -> Message:
    """Decode the message in an event; empty if there is none."""
    return _decode_unless_too_many_values(_MESSAGE, event.message) or Message()


def read_blocks(message: Message) -> list[ContentBlock]:
    """Decode the valid blocks among the first BLOCKS_MAX blocks in a message."""
    if isinstance(message.content, str):
        return []
    return [block for raw in message.content[:BLOCKS_MAX] if (block := _decode(_BLOCK, raw)) is not None]


def read_init(line: bytes) -> InitEvent:
    """Decode an `init` event; fields of an unexpected shape are empty."""
    return _decode_unless_too_many_values(_INIT, line) or InitEvent()


def read_retry(line: bytes) -> ApiRetryEvent:
    """Decode an `api_retry` event."""
    return _decode(_RETRY, line) or ApiRetryEvent()


def read_claude_task(line: bytes) -> ClaudeTaskEvent:
    """Decode an event about a task; fields of an unexpected shape are empty."""
    return _decode_unless_too_many_values(_CLAUDE_TASK, line) or ClaudeTaskEvent()


def read_all_result_fields(line: bytes) -> dict[str, Any] | None:
    """Decode a result event; None for any other line.

    The size, depth and integers of the returned event are limited, so every encoder accepts it.
    """
    result = _decode_unless_too_many_values(_RESULT, line)
    if result is None:
        return None
    if len(line) > RESULT_BYTES_MAX:
        result = {key: _truncate(key, value) for key, value in result.items() if not isinstance(value, dict | list)}
    return {sanitize(key): _bound_depth(value, _DEPTH_MAX) for key, value in list(result.items())[:64]}


def read_displayed_result_fields(line: bytes) -> ResultEvent:
    """Decode the displayed fields of a result event."""
    return _decode_unless_too_many_values(_RESULT_EVENT, line) or ResultEvent()


def read_fields(value: msgspec.Raw) -> dict[str, msgspec.Raw]:
    """Decode an object; empty for any other value."""
    return _decode_unless_too_many_values(_FIELDS, value) or {}


def read_string(value: msgspec.Raw) -> str | None:
    """Decode a string; None for any other value."""
    return _decode(_STRING, value) if bytes(memoryview(value)[:1]) == b'"' else None


def read_integer(value: msgspec.Raw) -> int | None:
    """Decode an integer of at most 53 bits; None for any other value."""
    number = _decode(_INTEGER, value)
    return number if number is not None and number.bit_length() <= _INTEGER_BITS_MAX else None


def read_number(value: msgspec.Raw) -> float | None:
    """Decode a finite number; None for any other value."""
    number = _decode(_NUMBER, value)
    return number if number is not None and math.isfinite(number) else None


def to_text(value: msgspec.Raw) -> str:
    """Return a string unchanged, null as "", and any other value as JSON, indented unless that would be too long."""
    text = read_string(value)
    if text is not None:
        return text
    encoded = bytes(value)
    if encoded == b"null":
        return ""
    return (_indent(encoded) or encoded).decode(errors="replace")


def _indent(encoded: bytes) -> bytes | None:
    """Return indented JSON; None if the input has no brackets, is large or invalid, or would become much longer."""
    brackets = encoded.count(b"[") + encoded.count(b"{")
    if not 0 < brackets <= _INDENTED_BRACKETS_MAX or brackets + encoded.count(b",") > _INDENTED_VALUES_MAX:
        return None
    with suppress(*_MALFORMED):
        indented = msgspec.json.format(encoded)
        return indented if len(indented) <= _INDENTATION_FACTOR_MAX * len(encoded) else None
    return None


def content_text(content: msgspec.Raw, blocks_max: int) -> str:
    """Return a tool_result's content as text. Blocks other than text, such as images, are replaced by their type."""
    items = _decode_unless_too_many_values(_ITEMS, content)
    if items is None:
        return to_text(content)
    blocks = (_decode(_BLOCK, item) or ContentBlock() for item in items[:blocks_max])
    return "\n".join(
        to_text(block.text) if block.type == "text" else f"[{sanitize_name(block.type)}]" for block in blocks
    )


def sanitize(text: str, characters_max: int = SHORT_TEXT_CHARACTERS_MAX) -> str:
    """Return text for display on one line: truncated, with control and format characters replaced."""
    return replace_unprintable(text[:characters_max], lambda _: " ")


_PRINTABLE_ASCII = bytes(code if 0x20 <= code < 0x7F else ord(" ") for code in range(256))


def sanitize_name(text: str) -> str:
    """Return a tool's name or an id for display: truncated, with spaces for control characters.

    The Messages API accepts only ASCII there, so any other character becomes `?`. A line may contain 100,000 names;
    `sanitize` would take seconds for them.
    """
    return text[:SHORT_TEXT_CHARACTERS_MAX].encode("ascii", "replace").translate(_PRINTABLE_ASCII).decode("ascii")


def _decode_unless_too_many_values(decoder: msgspec.json.Decoder[_Shape], data: bytes | msgspec.Raw) -> _Shape | None:
    text = bytes(data)
    if len(text) > OUTPUT_LINE_BYTES_MAX and sum(map(text.count, (b",", b"[", b"{"))) > LONG_LINE_VALUES_MAX:
        return None
    return _decode(decoder, text)


def _decode(decoder: msgspec.json.Decoder[_Shape], data: bytes | msgspec.Raw) -> _Shape | None:
    try:
        return decoder.decode(data)
    except _MALFORMED:
        return None


def _truncate(key: str, value: Any) -> Any:
    limit = _RESULT_TEXT_CHARACTERS_MAX if key == "result" else _FIELD_CHARACTERS_MAX
    return value[:limit] if isinstance(value, str) else value


def _bound_depth(value: Any, depth: int) -> Any:
    if isinstance(value, dict):
        return {key: _bound_depth(item, depth - 1) for key, item in value.items()} if depth else None
    if isinstance(value, list):
        return [_bound_depth(item, depth - 1) for item in value] if depth else None
    if isinstance(value, int) and value.bit_length() > _INTEGER_BITS_MAX:
        return None  # larger than the integers that clients' JSON parsers can represent exactly
    return value
