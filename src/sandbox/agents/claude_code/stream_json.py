"""Decodes lines of Claude Code's stream-json output. They are untrusted: data of a different shape is ignored."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from sandbox.model.errors import DECODE_ERRORS
from sandbox.model.limits import OUTPUT_LINE_BYTES_MAX
from sandbox.model.printable import replace_unprintable

TEXT_CHARACTERS_MAX = 256
"""Maximum length of names, ids and words from the agent; longer ones are truncated."""

RESULT_BYTES_MAX = 256 * 1024
"""Maximum size of a complete result event. From a larger one, only short fields and the start of its text are kept."""

LONG_LINE_VALUES_MAX = 500_000
"""Maximum number of values in a line, or a part of one, that is longer than OUTPUT_LINE_BYTES_MAX.

Commas and brackets in strings count too. A line of OUTPUT_LINE_BYTES_MAX can contain as many values, so decoding a
longer one takes no more time and memory.
"""

_RESULT_TEXT_CHARACTERS_MAX = 32 * 1024
_FIELD_CHARACTERS_MAX = 1024
_DEPTH_MAX = 16
_INTEGER_BITS_MAX = 53
_MALFORMED = (*DECODE_ERRORS, ValueError, OverflowError)


class StreamEvent(msgspec.Struct):
    """The outer fields of an event. The message is decoded only if needed."""

    type: str = ""
    subtype: str = ""
    session_id: str = ""
    parent_tool_use_id: str | None = None
    message: msgspec.Raw = msgspec.Raw(b"null")


class Message(msgspec.Struct):
    """A message of the conversation. `content` may be a plain string, which contains no tool call."""

    id: str = ""
    model: str = ""
    content: list[msgspec.Raw] | str = ""


class ContentBlock(msgspec.Struct):
    """A block of a message: a tool_use has `id` and `name`, a tool_result `tool_use_id` and `is_error`."""

    type: str = ""
    id: str = ""
    name: str = ""
    tool_use_id: str = ""
    is_error: bool | None = None


class McpServerStatus(msgspec.Struct):
    """An MCP server in an init event."""

    name: str = ""
    status: str = ""


class InitEvent(msgspec.Struct):
    """A `system/init` event."""

    tools: list[str] = []
    mcp_servers: list[McpServerStatus] = []


class ApiRetryEvent(msgspec.Struct):
    """A `system/api_retry` event."""

    attempt: int = 0
    max_retries: int = 0
    error_status: int | None = None
    error: str = ""


_Shape = TypeVar("_Shape")
_EVENT = msgspec.json.Decoder(StreamEvent)
_MESSAGE = msgspec.json.Decoder(Message)
_BLOCK = msgspec.json.Decoder(ContentBlock)
_INIT = msgspec.json.Decoder(InitEvent)
_RETRY = msgspec.json.Decoder(ApiRetryEvent)
_RESULT = msgspec.json.Decoder(dict[str, Any])


def read_event(line: bytes) -> StreamEvent | None:
    """Decode the event on a line; None for anything else."""
    return _decode(_EVENT, line)


def read_message(event: StreamEvent) -> Message:
    """Decode the message of an event; empty if it has none."""
    return _decode_if_sparse(_MESSAGE, event.message) or Message()


def read_blocks(message: Message) -> list[ContentBlock]:
    """Decode the valid blocks of a message."""
    if isinstance(message.content, str):
        return []
    return [block for raw in message.content if (block := _decode(_BLOCK, raw)) is not None]


def read_init(line: bytes) -> InitEvent:
    """Decode an `init` event; fields of a different shape are empty."""
    return _decode_if_sparse(_INIT, line) or InitEvent()


def read_retry(line: bytes) -> ApiRetryEvent:
    """Decode an `api_retry` event."""
    return _decode(_RETRY, line) or ApiRetryEvent()


def read_result(line: bytes) -> dict[str, Any] | None:
    """Decode a result event, limited in size, depth and integers, so that it can be encoded anywhere."""
    result = _decode_if_sparse(_RESULT, line)
    if result is None:
        return None
    if len(line) > RESULT_BYTES_MAX:
        result = {key: _truncate(key, value) for key, value in result.items() if not isinstance(value, dict | list)}
    return {sanitize(key): _bound_depth(value, _DEPTH_MAX) for key, value in list(result.items())[:64]}


def sanitize(text: str, characters_max: int = TEXT_CHARACTERS_MAX) -> str:
    """Return text for display on one line: truncated, with control and format characters replaced."""
    return replace_unprintable(text[:characters_max], lambda _: " ")


def _decode_if_sparse(decoder: msgspec.json.Decoder[_Shape], data: bytes | msgspec.Raw) -> _Shape | None:
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
        return None  # beyond the integers that JSON readers of clients represent exactly
    return value
