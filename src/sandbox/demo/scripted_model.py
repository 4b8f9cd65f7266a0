"""Server that implements the Anthropic Messages API by following a script: `python -m sandbox.demo.scripted_model`.

The number of assistant messages in a request determines the turn, so a retried request gets the same response. Each
fault applies to a fixed number of requests, so a request succeeds after enough retries.
"""

from __future__ import annotations

import argparse
import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from sandbox.demo.loopback_http_service import HttpService, request_target
from sandbox.model.errors import DECODE_ERRORS

_DELTA_CHARACTERS = 4096


class Text(msgspec.Struct, frozen=True, tag="text"):
    """A text block in the model's response."""

    text: str


class ToolUse(msgspec.Struct, frozen=True, tag="tool_use"):
    """A tool call in the model's response; the server generates its id."""

    name: str
    input: dict[str, Any]


Block = Text | ToolUse


class Fault(msgspec.Struct, frozen=True):
    """A fault that affects `times` consecutive requests.

    kind: `error` sends an error response with `status`, `hang` sends no response, and `cut` aborts the stream halfway
    through.
    """

    kind: Literal["error", "hang", "cut"] = "error"
    status: int = 500
    message: str = "The script makes this request fail."
    times: int = 1


class Turn(msgspec.Struct, frozen=True):
    """One response of the model. Requests for this turn first get the turn's `faults` in order, one fault per request.

    stop_reason: for example `refusal`. If it is empty, the content determines the stop reason: `tool_use` or
    `end_turn`.
    delay_seconds: delay before the first byte.
    block_delay_seconds: delay before each block.
    """

    content: tuple[Block, ...] = ()
    stop_reason: str = ""
    input_tokens: int = 1000
    output_tokens: int = 50
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    delay_seconds: float = 0.0
    block_delay_seconds: float = 0.0
    faults: tuple[Fault, ...] = ()

    @property
    def effective_stop_reason(self) -> str:
        """The stop reason of the response, as in the API."""
        calls_tool = any(isinstance(block, ToolUse) for block in self.content)
        return self.stop_reason or ("tool_use" if calls_tool else "end_turn")

    def fault(self, request_count: int) -> Fault | None:
        """Return the fault for the request that follows `request_count` earlier ones for this turn, or None."""
        for fault in self.faults:
            if request_count < fault.times:
                return fault
            request_count -= fault.times
        return None


class Script(msgspec.Struct, frozen=True):
    """The turns of the main conversation and of its branches.

    A branch (a subagent's conversation) is identified by a word in its first user message.
    """

    turns: tuple[Turn, ...]
    branches: dict[str, tuple[Turn, ...]] = {}

    def branch(self, first_user_message: str) -> str:
        """Return the branch of a conversation; empty for the main one."""
        return next((word for word in self.branches if word in first_user_message), "")

    def turn(self, branch: str, index: int) -> Turn:
        """Return the turn at `index` (from 0); END_OF_SCRIPT after the last one."""
        turns = self.branches[branch] if branch else self.turns
        return turns[index] if index < len(turns) else END_OF_SCRIPT


END_OF_SCRIPT = Turn(
    (Text("This is the demo's scripted model. For other prompts, start the demo with your API key."),),
    output_tokens=20,
)


def load_script(path: Path) -> Script:
    """Read a script from JSON. Raises OSError or msgspec.DecodeError."""
    return msgspec.json.decode(path.read_bytes(), type=Script)


def example_script() -> Script:
    """Return the script for the example repository."""
    from importlib import resources

    return msgspec.json.decode(resources.files(__package__).joinpath("example_script.json").read_bytes(), type=Script)


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


def message_object(turn: Turn, model: str, message_id: str) -> dict[str, Any]:
    """Return the response to a non-streaming request."""
    message = _message(turn, model, message_id)
    blocks = [_content_block(index, block, message_id, has_content=True) for index, block in enumerate(turn.content)]
    message |= {"content": blocks, "stop_reason": turn.effective_stop_reason}
    message["usage"]["output_tokens"] = turn.output_tokens
    return message


def error_response(status: int, message: str) -> Response:
    """Return an error response in the API's format."""
    error = {"type": _ERROR_TYPES.get(status, "api_error"), "message": message}
    return JSONResponse({"type": "error", "error": error}, status)


_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
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


class RecordedRequest(msgspec.Struct, frozen=True):
    """A received request. path: includes the query. headers: names are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def is_message(self) -> bool:
        """Whether this is a request for a message from the model."""
        return self.method == "POST" and self.path.partition("?")[0] == "/v1/messages"

    def decode(self) -> dict[str, Any]:
        """Return the JSON object in the body. Raises one of DECODE_ERRORS."""
        return msgspec.json.decode(self.body, type=dict[str, Any])


class ScriptedModel:
    """Serves a script on a port of `host`. `requests` records all requests in order."""

    def __init__(
        self, script: Script, *, host: str = "127.0.0.1", port: int = 0, record_path: Path | None = None
    ) -> None:
        self.requests: list[RecordedRequest] = []
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
        """The base URL of the model API."""
        return self.service.url

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The bodies of the recorded Messages requests."""
        return [request.decode() for request in self.requests if request.is_message]

    async def _handle(self, received: Request) -> Response:
        request = await self._record_request(received)
        if request.path.startswith("/v1/messages/count_tokens"):
            return JSONResponse({"input_tokens": len(request.body) // 4})
        if request.is_message:
            return await self._create_message(request)
        if request.method == "HEAD":
            return Response()
        return error_response(404, f"{request.method} {request.path} is not supported.")

    async def _record_request(self, received: Request) -> RecordedRequest:
        headers, body = dict(received.headers), await received.body()
        request = RecordedRequest(received.method, request_target(received), headers, body)
        self.requests.append(request)
        if self._record_path is not None:
            line = msgspec.structs.asdict(request) | {"body": request.body.decode(errors="replace")}
            line["received_at"] = time.time()
            with self._record_path.open("ab") as file:
                file.write(msgspec.json.encode(line) + b"\n")
        return request

    async def _create_message(self, request: RecordedRequest) -> Response:
        try:
            body = request.decode()
            turn, fault = self._next_turn(body)
            model = str(body["model"])
        except (LookupError, TypeError, *DECODE_ERRORS) as error:
            return error_response(400, f"Not a Messages request: {error}")
        await asyncio.sleep(turn.delay_seconds)
        message_id = f"msg_{uuid.uuid4().hex[:24]}"
        if fault is not None:
            return await _inject_fault(fault, sse_parts(turn, model, message_id))
        if body.get("stream"):
            return _stream_response(_delayed(sse_parts(turn, model, message_id), turn.block_delay_seconds))
        return JSONResponse(message_object(turn, model, message_id))

    def _next_turn(self, body: dict[str, Any]) -> tuple[Turn, Fault | None]:
        messages = body["messages"]
        branch = self._script.branch(msgspec.json.encode(messages[0]).decode())
        index = sum(message["role"] == "assistant" for message in messages)
        turn = self._script.turn(branch, index)
        previous_requests = self._request_counts[branch, index]
        self._request_counts[branch, index] += 1
        return turn, turn.fault(previous_requests)


async def _inject_fault(fault: Fault, parts: list[bytes]) -> Response:
    if fault.kind == "hang":
        await asyncio.Event().wait()  # until the service ends
    return error_response(fault.status, fault.message) if fault.kind == "error" else _stream_response(_cut(parts))


def _stream_response(parts: AsyncIterator[bytes]) -> Response:
    return StreamingResponse(parts, headers={"content-type": "text/event-stream", "cache-control": "no-cache"})


async def _delayed(parts: Sequence[bytes], delay_seconds: float) -> AsyncIterator[bytes]:
    for part in parts:
        await asyncio.sleep(delay_seconds)
        yield part


async def _cut(parts: Sequence[bytes]) -> AsyncIterator[bytes]:
    yield b"".join(parts[: len(parts) // 2])
    raise ConnectionAbortedError


def main() -> None:
    """Serve until SIGTERM or SIGINT; print the URL as one JSON line."""
    parser = argparse.ArgumentParser(description="Serve the Anthropic Messages API from a script.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 means any free port")
    parser.add_argument("--script", type=Path, help="JSON file; default: the script of the example")
    parser.add_argument(
        "--record", type=Path, help="append every request and its time to this file, one JSON line each"
    )
    options = parser.parse_args()
    script = load_script(options.script) if options.script else example_script()
    model = ScriptedModel(script, host=options.host, port=options.port, record_path=options.record)
    asyncio.run(model.service.serve_until_signalled())


if __name__ == "__main__":
    main()
