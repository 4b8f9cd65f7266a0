"""A second model API, similar to OpenAI's Responses API, with different paths, key header and usage fields.

The module shows what a dialect needs. The prices are invented, and the API is not complete enough for real use.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import NoneType
from typing import Annotated, Any

import msgspec

from sandbox.interfaces.gateway import (
    CostBound,
    Endpoint,
    ModelUpstream,
    Rejected,
    RequestHeaders,
    ResponseHeaders,
    UsageMeter,
)
from sandbox.model.errors import DECODE_ERRORS
from sandbox.model.events import Usage

USD_PER_TOKEN = {"scripted-1": (1e-6, 4e-6)}
"""The prices in USD of one input token and of one output token."""

_OUTPUT_TOKENS_MAX = 100_000
_TEXT_BYTES_MAX = 4 * 1024 * 1024
"""Maximum size of a document, or of a line of a stream, that is searched for usage; longer ones are not read."""

_FIELD = re.compile(
    r"arguments|call_id|content|description|detail|effort|encrypted_content|file_data|file_url|filename|format|"
    r"image_url|include|input|instructions|max_output_tokens|mode|model|name|output|parallel_tool_calls|"
    r"parameters|reasoning|refusal|role|schema|status|store|stream|strict|summary|temperature|text|tool_choice|"
    r"tools|top_p|truncation|type|verbosity"
)
"""The accepted fields. Other fields are rejected, because they may refer to stored data or change the price."""

_TYPE_WITHOUT_EXTERNAL_ACCESS = re.compile(
    r"allowed_tools|function|function_call|function_call_output|input_file|input_image|input_text|json_object|"
    r"json_schema|message|output_text|reasoning|reasoning_text|refusal|summary_text|text"
)
_DATA_FIELDS = {"function": "parameters", "json_schema": "schema"}
"""The data field of each type of object. Its content is never a tool or an address, even if it looks like one."""


class ResponsesApi:
    """The dialect of the API."""

    base_url_variable = "RESPONSES_BASE_URL"
    endpoints: Mapping[bytes, Endpoint] = {
        b"/v1/responses": Endpoint(is_metered=True, may_refer_to_stored_data=True),
        b"/v1/responses/input_tokens": Endpoint(is_metered=False, may_refer_to_stored_data=True),
    }
    accepted_queries = frozenset({b""})
    credential_headers = frozenset({b"authorization"})
    request_headers = RequestHeaders(frozenset({b"accept", b"user-agent", b"openai-beta"}))
    response_headers = ResponseHeaders(frozenset({b"retry-after", b"x-request-id"}))

    def credential(self, upstream: ModelUpstream) -> tuple[bytes, bytes]:
        if not re.fullmatch(r"[!-~]+", upstream.api_key):
            raise ValueError("RESPONSES_API_KEY is missing or has characters that are invalid in a header.")
        return b"authorization", b"Bearer " + upstream.api_key.encode()

    def presented_key(self, header_name: bytes, value: bytes) -> bytes:
        scheme, _, key = value.partition(b" ")
        return key if scheme == b"Bearer" else b""

    def encode_error(self, status: int, message: str) -> bytes:
        return msgspec.json.encode({"error": {"code": str(status), "message": message}})

    def decode_error(self, body: bytes) -> str:
        return ""

    def decode_request(self, body: bytes | bytearray) -> dict[str, Any] | Rejected:
        try:
            request = msgspec.json.decode(body)
        except DECODE_ERRORS:
            request = None
        if not isinstance(request, dict) or not isinstance(request.get("model"), str):
            return Rejected(400, "The request body must be a JSON object that names a model.")
        if type(request.get("max_output_tokens")) not in (int, NoneType):
            return Rejected(400, "max_output_tokens must be an integer.")
        if any(_FIELD.fullmatch(name) is None for _, value in _iter_objects(request) for name in value):
            return Rejected(403, "A field of the request may refer to data that other tasks may have stored.")
        return request

    def find_external_access(self, request: dict[str, Any], sanitize: Callable[[str], str]) -> str | None:
        tools, choice = request.get("tools") or [], request.get("tool_choice") or "auto"
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            return "The value of tools"
        if choice not in ("auto", "none", "required") and not isinstance(choice, dict):
            return "The value of tool_choice"
        for field, value in _iter_objects(request):
            kind = value.get("type", "" if field == "tools" else "message")
            if field == "tools" and kind != "function":
                return f"The tool {sanitize(str(kind))}"
            if not isinstance(kind, str) or _TYPE_WITHOUT_EXTERNAL_ACCESS.fullmatch(kind) is None:
                return f"The type {sanitize(str(kind))}"
            for name, address in value.items():
                if name.endswith("_url") and not (isinstance(address, str) and address.startswith("data:")):
                    return f"'{sanitize(name)}'"
        return None

    def unpriced_reason(self, request: dict[str, Any], sanitize: Callable[[str], str]) -> str | None:
        if (reason := self.find_external_access(request, sanitize)) is not None:
            return f"The price of {reason} is not in Sandbox's table."
        model = request["model"]
        return None if model in USD_PER_TOKEN else f"The model {sanitize(model)} has no price in Sandbox's table."

    def estimate_cost_bound(self, request: dict[str, Any], byte_count: int) -> CostBound:
        output_tokens_max = request.get("max_output_tokens") or _OUTPUT_TOKENS_MAX
        return CostBound(request["model"], byte_count // 3, output_tokens_max, request.get("stream") is True)

    def create_meter(self, content_type: bytes) -> UsageMeter:
        return _Meter(is_stream=content_type.split(b";")[0].strip().lower() == b"text/event-stream")


def _iter_objects(request: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every object that is not in a data field, with the name of the field that contains it or its list."""
    pending: list[tuple[str, Any]] = [("", request)]
    while pending:
        field, value = pending.pop()
        if isinstance(value, list):
            pending += [(field, item) for item in value]
        elif isinstance(value, dict):
            yield field, value
            kind = value.get("type")
            data_field = _DATA_FIELDS.get(kind) if isinstance(kind, str) else None
            pending += [(name, item) for name, item in value.items() if name != data_field]


_Count = Annotated[int, msgspec.Meta(ge=0, le=10**12)]


class _Counts(msgspec.Struct):
    input_tokens: _Count
    output_tokens: _Count


class _Response(msgspec.Struct):
    model: Annotated[str, msgspec.Meta(max_length=128)] = ""
    usage: _Counts | None = None


class _StreamEvent(msgspec.Struct):
    type: str
    response: _Response = msgspec.field(default_factory=_Response)


_NON_DATA_LINES = (b":", b"event:", b"id:", b"retry:")
_EVENTS_WITHOUT_CONTENT = ("error", "keepalive")
_LAST_EVENTS = ("response.completed", "response.failed", "response.incomplete")


class _Meter:
    """Reads the usage of a document, or the highest usage in a stream. Buffers a document, or one line of a stream."""

    def __init__(self, *, is_stream: bool) -> None:
        self._is_stream = is_stream
        self._text = bytearray()
        self._is_too_long = False
        self._has_content = False
        self._model = ""
        self._counts: _Counts | None = None
        self._is_complete = False

    def feed(self, data: bytes) -> None:
        first, *others = data.split(b"\n") if self._is_stream else [data]
        self._append(first)
        for other in others:
            self._finish_line()
            self._append(other)

    @property
    def has_started(self) -> bool:
        return self._has_content or _may_have_content(bytes(self._text))

    def usage(self) -> Usage | None:
        self._read_document()
        return self._latest_usage()

    def _latest_usage(self) -> Usage | None:
        counts = self._counts
        return None if counts is None else _usage(self._model, counts.input_tokens, counts.output_tokens)

    def partial_usage(self) -> Usage | None:
        return self._latest_usage()

    @property
    def is_complete(self) -> bool:
        self._read_document()
        return self._is_complete

    def upper_bound(self, cost_bound: CostBound, *, is_fully_received: bool) -> Usage | None:
        self._record(_Response(cost_bound.model, _Counts(cost_bound.input_tokens, cost_bound.output_tokens_max)))
        return self._latest_usage()

    def _append(self, part: bytes) -> None:
        if self._is_too_long or len(self._text) + len(part) > _TEXT_BYTES_MAX:
            self._is_too_long = self._has_content = True
            self._text.clear()
        else:
            self._text += part

    def _finish_line(self) -> None:
        line, self._is_too_long = bytes(self._text).removesuffix(b"\r"), False
        self._text.clear()
        self._has_content = self._has_content or _may_have_content(line)
        if line.startswith(b"data:") and b'"usage"' in line and (event := _decode_event(line)) is not None:
            self._record(event.response)
            self._is_complete |= event.type in _LAST_EVENTS and event.response.usage is not None

    def _read_document(self) -> None:
        if self._is_stream:
            return
        with suppress(*DECODE_ERRORS):
            response = msgspec.json.decode(self._text, type=_Response)
            self._record(response)
            self._is_complete = response.usage is not None

    def _record(self, response: _Response) -> None:
        """Keep the highest counts: a later event never lowers the usage."""
        if response.usage is not None:
            old, new = self._counts or response.usage, response.usage
            self._model = self._model or response.model
            self._counts = _Counts(max(old.input_tokens, new.input_tokens), max(old.output_tokens, new.output_tokens))


def _decode_event(line: bytes) -> _StreamEvent | None:
    try:
        return msgspec.json.decode(line.removeprefix(b"data:"), type=_StreamEvent)
    except DECODE_ERRORS:
        return None


def _may_have_content(line: bytes) -> bool:
    """Return whether a line can be part of a response, not just a ping or an error. The line may be incomplete."""
    if not line or (line.startswith(_NON_DATA_LINES) and b"\r" not in line):
        return False
    event = _decode_event(line) if line.startswith(b"data:") else None
    return event is None or event.type not in _EVENTS_WITHOUT_CONTENT


def _usage(model: str, input_tokens: int, output_tokens: int) -> Usage:
    price = USD_PER_TOKEN.get(model)
    usd = None if price is None else round(input_tokens * price[0] + output_tokens * price[1], 6)
    return Usage(model, input_tokens, output_tokens, 0, 0, usd)
