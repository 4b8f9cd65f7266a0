"""Server that implements the Anthropic Messages API from a script: `python -m sandbox.demo.scripted_model`.

The turn is determined by counting the assistant's messages in the request, so a retried request gets the same response.
Faults are counted by request, so they end after a number of retries.
"""

from __future__ import annotations

import argparse
import asyncio
import uuid
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from sandbox.demo.http_service import HttpConnection, HttpRequest, HttpService
from sandbox.demo.model_script import Block, Fault, Script, Text, Turn, example_script, load_script
from sandbox.model.errors import DECODE_ERRORS

_DELTA_CHARACTERS = 4096


def sse_parts(turn: Turn, model: str, message_id: str) -> list[bytes]:
    """Encode the response as server-sent events: its start, one part for each block, its end."""
    parts = [_event("message_start", message={**_message(turn, model, message_id), "content": []})]
    parts += [_block_events(index, block, message_id) for index, block in enumerate(turn.content)]
    end = _event(
        "message_delta",
        delta={"stop_reason": turn.effective_stop_reason, "stop_sequence": None},
        usage={"output_tokens": turn.output_tokens},
    )
    return [*parts, end + _event("message_stop")]


def json_message(turn: Turn, model: str, message_id: str) -> bytes:
    """Encode the response to a request without streaming."""
    message = _message(turn, model, message_id)
    blocks = [_content_block(index, block, message_id, has_content=True) for index, block in enumerate(turn.content)]
    message |= {"content": blocks, "stop_reason": turn.effective_stop_reason}
    message["usage"]["output_tokens"] = turn.output_tokens
    return msgspec.json.encode(message)


def error_body(status: int, message: str) -> bytes:
    """Encode an error as the API does."""
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


def _content_block(index: int, block: Block, message_id: str, *, has_content: bool) -> dict[str, Any]:
    if isinstance(block, Text):
        return {"type": "text", "text": block.text if has_content else ""}
    tool_use_id = f"toolu_{message_id.removeprefix('msg_')}_{index}"
    return {"type": "tool_use", "id": tool_use_id, "name": block.name, "input": block.input if has_content else {}}


def _block_events(index: int, block: Block, message_id: str) -> bytes:
    if isinstance(block, Text):
        kind, key, text = "text_delta", "text", block.text
    else:
        kind, key, text = "input_json_delta", "partial_json", msgspec.json.encode(block.input).decode()
    deltas = [
        _event("content_block_delta", index=index, delta={"type": kind, key: text[at : at + _DELTA_CHARACTERS]})
        for at in range(0, len(text), _DELTA_CHARACTERS)
    ]
    start = _event(
        "content_block_start", index=index, content_block=_content_block(index, block, message_id, has_content=False)
    )
    return start + b"".join(deltas) + _event("content_block_stop", index=index)


_JSON_HEADERS = (("content-type", "application/json"),)
_SSE_HEADERS = (("content-type", "text/event-stream"), ("cache-control", "no-cache"))


class ScriptedModel:
    """Serves a script on a port of `host`. `requests` records all requests in order."""

    def __init__(
        self, script: Script, *, host: str = "127.0.0.1", port: int = 0, record_path: Path | None = None
    ) -> None:
        self.requests: list[HttpRequest] = []
        self.service = HttpService(host, port, self._handle)
        self._script = script
        self._record_path = record_path
        self._request_counts: Counter[tuple[str, int]] = Counter()

    async def __aenter__(self) -> ScriptedModel:
        await self.service.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.service.__aexit__(kind, error, traceback)

    @property
    def url(self) -> str:
        """The URL for ANTHROPIC_BASE_URL."""
        return self.service.url

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The bodies of the recorded Messages requests."""
        return [_read_body(request) for request in self.requests if _is_message_request(request)]

    async def _handle(self, request: HttpRequest, connection: HttpConnection) -> None:
        self._record_request(request)
        if request.path.startswith("/v1/messages/count_tokens"):
            await connection.send(200, _JSON_HEADERS, [msgspec.json.encode({"input_tokens": len(request.body) // 4})])
        elif _is_message_request(request):
            await self._handle_message(request, connection)
        elif request.method == "HEAD":
            await connection.send(200, (), ())
        else:
            await connection.send(
                404, _JSON_HEADERS, [error_body(404, f"{request.method} {request.path} is not supported.")]
            )

    def _record_request(self, request: HttpRequest) -> None:
        self.requests.append(request)
        if self._record_path is not None:
            line = {"method": request.method, "path": request.path, "headers": request.headers}
            body = request.body.decode(errors="replace")
            with self._record_path.open("ab") as file:
                file.write(msgspec.json.encode({**line, "body": body}) + b"\n")

    async def _handle_message(self, request: HttpRequest, connection: HttpConnection) -> None:
        try:
            body = _read_body(request)
            turn, fault = self._next_turn(body)
            model = str(body["model"])
        except (LookupError, TypeError, *DECODE_ERRORS) as error:
            await connection.send(400, _JSON_HEADERS, [error_body(400, f"Not a Messages request: {error}")])
            return
        await asyncio.sleep(turn.delay_seconds)
        message_id = f"msg_{uuid.uuid4().hex[:24]}"
        if fault is not None:
            await _inject_fault(fault, sse_parts(turn, model, message_id), connection)
        elif body.get("stream"):
            await connection.send(200, _SSE_HEADERS, sse_parts(turn, model, message_id), turn.block_delay_seconds)
        else:
            await connection.send(200, _JSON_HEADERS, [json_message(turn, model, message_id)])

    def _next_turn(self, body: dict[str, Any]) -> tuple[Turn, Fault | None]:
        messages = body["messages"]
        branch = self._script.branch(msgspec.json.encode(messages[0]).decode())
        index = sum(message["role"] == "assistant" for message in messages)
        turn = self._script.turn(branch, index)
        previous_requests = self._request_counts[branch, index]
        self._request_counts[branch, index] += 1
        return turn, turn.fault(previous_requests)


async def _inject_fault(fault: Fault, parts: list[bytes], connection: HttpConnection) -> None:
    match fault.kind:
        case "error":
            await connection.send(fault.status, _JSON_HEADERS, [error_body(fault.status, fault.message)])
        case "cut":
            await connection.start_response(200, _SSE_HEADERS, b"".join(parts[: len(parts) // 2]))
            raise ConnectionAbortedError
        case "hang":
            await asyncio.Event().wait()


def _is_message_request(request: HttpRequest) -> bool:
    return request.method == "POST" and request.path.partition("?")[0] == "/v1/messages"


def _read_body(request: HttpRequest) -> dict[str, Any]:
    return msgspec.json.decode(request.body, type=dict[str, Any])


def main() -> None:
    """Serve until SIGTERM or SIGINT; print the URL as one JSON line."""
    parser = argparse.ArgumentParser(description="Serve the Anthropic Messages API from a script.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 means any free port")
    parser.add_argument("--script", type=Path, help="JSON file; default: the script of the example")
    parser.add_argument("--record", type=Path, help="append every request to this file, one JSON line each")
    options = parser.parse_args()
    script = load_script(options.script) if options.script else example_script()
    model = ScriptedModel(script, host=options.host, port=options.port, record_path=options.record)
    asyncio.run(model.service.serve_until_signalled())


if __name__ == "__main__":
    main()
