"""Lines of Claude Code's stream-json output, read without trust: what has another shape is not there."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from sandbox.model.errors import DECODE_ERRORS
from sandbox.model.limits import OUTPUT_LINE_BYTES_MAX
from sandbox.model.printable import printable

TEXT_CHARACTERS_MAX = 256
"""Names, ids and words that the agent gives; longer ones are cut."""

RESULT_BYTES_MAX = 256 * 1024
"""A result event kept whole; of a larger one the short fields and the beginning of its text are kept."""

LONG_LINE_VALUES_MAX = 500_000
"""What may stand in a part of a line that is over OUTPUT_LINE_BYTES_MAX, commas and brackets in its texts counted too.

So many fit into a line of that bound: a longer one takes no more time and memory to read.
"""

_RESULT_TEXT_CHARACTERS_MAX = 32 * 1024
_FIELD_CHARACTERS_MAX = 1024
_DEPTH_MAX = 16
_INTEGER_BITS_MAX = 53
_MALFORMED = (*DECODE_ERRORS, ValueError, OverflowError)


class Line(msgspec.Struct):
    """The outer part of an event; the inner part is decoded only where it matters."""

    type: str = ""
    subtype: str = ""
    session_id: str = ""
    parent_tool_use_id: str | None = None
    message: msgspec.Raw = msgspec.Raw(b"null")


class Message(msgspec.Struct):
    """A message of the conversation; `content` may also be a plain string, which holds no tool call."""

    id: str = ""
    model: str = ""
    content: list[msgspec.Raw] | str = ""


class Block(msgspec.Struct):
    """A block of a message: a tool_use has `id` and `name`, a tool_result `tool_use_id` and `is_error`."""

    type: str = ""
    id: str = ""
    name: str = ""
    tool_use_id: str = ""
    is_error: bool | None = None


class Server(msgspec.Struct):
    """An MCP server in an init event."""

    name: str = ""
    status: str = ""


class Beginning(msgspec.Struct):
    """A `system/init` event."""

    tools: list[str] = []
    mcp_servers: list[Server] = []


class Retry(msgspec.Struct):
    """A `system/api_retry` event."""

    attempt: int = 0
    max_retries: int = 0
    error_status: int | None = None
    error: str = ""


_Shape = TypeVar("_Shape")
_LINE = msgspec.json.Decoder(Line)
_MESSAGE = msgspec.json.Decoder(Message)
_BLOCK = msgspec.json.Decoder(Block)
_BEGINNING = msgspec.json.Decoder(Beginning)
_RETRY = msgspec.json.Decoder(Retry)
_RESULT = msgspec.json.Decoder(dict[str, Any])


def read_line(line: bytes) -> Line | None:
    """The event on a line; None for anything else."""
    return _decoded(_LINE, line)


def read_message(line: Line) -> Message:
    """The message of an event; an empty one where it has none."""
    return _decoded_if_sparse(_MESSAGE, line.message) or Message()


def read_blocks(message: Message) -> list[Block]:
    """The blocks of a message that have a block's shape."""
    if isinstance(message.content, str):
        return []
    return [block for raw in message.content if (block := _decoded(_BLOCK, raw)) is not None]


def read_beginning(line: bytes) -> Beginning:
    """What an `init` event says; nothing is there where it has another shape."""
    return _decoded_if_sparse(_BEGINNING, line) or Beginning()


def read_retry(line: bytes) -> Retry:
    """What an `api_retry` event says."""
    return _decoded(_RETRY, line) or Retry()


def read_result(line: bytes) -> dict[str, Any] | None:
    """A result event, bounded in size, depth and numbers, so that it can be encoded anywhere."""
    result = _decoded_if_sparse(_RESULT, line)
    if result is None:
        return None
    if len(line) > RESULT_BYTES_MAX:
        result = {key: _shortened(key, value) for key, value in result.items() if not isinstance(value, dict | list)}
    return {clean(key): _bounded(value, _DEPTH_MAX) for key, value in list(result.items())[:64]}


def clean(text: str, characters_max: int = TEXT_CHARACTERS_MAX) -> str:
    """Text for a person's eyes on one line: cut, and every control or format character replaced."""
    return printable(text[:characters_max], lambda _: " ")


def _decoded_if_sparse(decoder: msgspec.json.Decoder[_Shape], data: bytes | msgspec.Raw) -> _Shape | None:
    text = bytes(data)
    if len(text) > OUTPUT_LINE_BYTES_MAX and sum(map(text.count, (b",", b"[", b"{"))) > LONG_LINE_VALUES_MAX:
        return None
    return _decoded(decoder, text)


def _decoded(decoder: msgspec.json.Decoder[_Shape], data: bytes | msgspec.Raw) -> _Shape | None:
    try:
        return decoder.decode(data)
    except _MALFORMED:
        return None


def _shortened(key: str, value: Any) -> Any:
    limit = _RESULT_TEXT_CHARACTERS_MAX if key == "result" else _FIELD_CHARACTERS_MAX
    return value[:limit] if isinstance(value, str) else value


def _bounded(value: Any, depth: int) -> Any:
    if isinstance(value, dict):
        return {key: _bounded(item, depth - 1) for key, item in value.items()} if depth else None
    if isinstance(value, list):
        return [_bounded(item, depth - 1) for item in value] if depth else None
    if isinstance(value, int) and value.bit_length() > _INTEGER_BITS_MAX:
        return None  # no client's JSON reader would get it right
    return value
