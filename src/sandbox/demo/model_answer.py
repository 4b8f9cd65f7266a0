"""Answers in the Anthropic Messages API's form: server-sent events, or one JSON object."""

from __future__ import annotations

from typing import Any

import msgspec

from sandbox.demo.model_script import Block, Text, Turn

_DELTA_CHARACTERS = 4096


def stream_parts(turn: Turn, model: str, message_id: str) -> list[bytes]:
    """The answer as server-sent events: its beginning, one part for each block, its end."""
    parts = [_event("message_start", message={**_message(turn, model, message_id), "content": []})]
    parts += [_block_events(index, block, message_id) for index, block in enumerate(turn.content)]
    end = _event(
        "message_delta",
        delta={"stop_reason": turn.reason, "stop_sequence": None},
        usage={"output_tokens": turn.output_tokens},
    )
    return [*parts, end + _event("message_stop")]


def whole_message(turn: Turn, model: str, message_id: str) -> bytes:
    """The answer to a request that did not ask for a stream."""
    message = _message(turn, model, message_id)
    blocks = [_start(index, block, message_id, filled=True) for index, block in enumerate(turn.content)]
    message |= {"content": blocks, "stop_reason": turn.reason}
    message["usage"]["output_tokens"] = turn.output_tokens
    return msgspec.json.encode(message)


def error_body(status: int, message: str) -> bytes:
    """An error as the API words it."""
    return msgspec.json.encode(
        {"type": "error", "error": {"type": _ERROR_TYPES.get(status, "api_error"), "message": message}}
    )


_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: ".encode() + msgspec.json.encode({"type": kind, **fields}) + b"\n\n"


def _message(turn: Turn, model: str, message_id: str) -> dict[str, Any]:
    usage = {
        "input_tokens": turn.input_tokens,
        "cache_creation_input_tokens": turn.cache_write_tokens,
        "cache_read_input_tokens": turn.cache_read_tokens,
        "output_tokens": 1,
    }
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }


def _start(index: int, block: Block, message_id: str, *, filled: bool) -> dict[str, Any]:
    if isinstance(block, Text):
        return {"type": "text", "text": block.text if filled else ""}
    tool_use_id = f"toolu_{message_id.removeprefix('msg_')}_{index}"
    return {"type": "tool_use", "id": tool_use_id, "name": block.name, "input": block.input if filled else {}}


def _block_events(index: int, block: Block, message_id: str) -> bytes:
    if isinstance(block, Text):
        kind, key, text = "text_delta", "text", block.text
    else:
        kind, key, text = "input_json_delta", "partial_json", msgspec.json.encode(block.input).decode()
    deltas = [
        _event("content_block_delta", index=index, delta={"type": kind, key: text[at : at + _DELTA_CHARACTERS]})
        for at in range(0, len(text), _DELTA_CHARACTERS)
    ]
    start = _event("content_block_start", index=index, content_block=_start(index, block, message_id, filled=False))
    return start + b"".join(deltas) + _event("content_block_stop", index=index)
