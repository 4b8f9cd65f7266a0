"""A second model API, similar to OpenAI's Responses API, with different paths, key header and usage fields.

The module shows what a dialect needs. The prices are invented, and the API is not complete enough for real use.
"""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec

from sandbox.interfaces.gateway import CostBound, ModelUpstream, Rejected, RequestHeaders, ResponseHeaders, UsageMeter
from sandbox.model.errors import DECODE_ERRORS
from sandbox.model.events import Usage

USD_PER_TOKEN = {"scripted-1": (1e-6, 4e-6)}
"""The prices of one input token and one output token."""

_OUTPUT_TOKENS_MAX = 100_000
_STORED_DATA_FIELDS = frozenset({"previous_response_id", "conversation", "prompt", "file_id"})


class ResponsesApi:
    """The dialect of the API."""

    base_url_setting = "RESPONSES_BASE_URL"
    endpoints: Mapping[bytes, bool] = {b"/v1/responses": True, b"/v1/responses/input_tokens": False}
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
            return Rejected(400, "The request's body must be a JSON object that names a model.")
        if (field := _stored_data_field(request)) is not None:
            return Rejected(403, f"The field {field} refers to data that other tasks may have stored.")
        return request

    def external_access_reason(self, request: dict[str, Any], sanitize: Callable[[str], str]) -> str | None:
        tools = request.get("tools") or []
        if not isinstance(tools, list):
            return "The value of tools"
        kinds = [tool.get("type") if isinstance(tool, dict) else None for tool in tools]
        denied = next((kind for kind in kinds if kind != "function"), "function")
        return None if denied == "function" else f"The tool {sanitize(str(denied))}"

    def unpriced_reason(self, request: dict[str, Any], sanitize: Callable[[str], str]) -> str | None:
        model = request["model"]
        return None if model in USD_PER_TOKEN else f"The model {sanitize(model)} has no price in Sandbox's table."

    def estimate_cost_bound(self, request: dict[str, Any], byte_count: int) -> CostBound:
        output_tokens_max = request.get("max_output_tokens")
        if not isinstance(output_tokens_max, int) or not 0 < output_tokens_max < _OUTPUT_TOKENS_MAX:
            output_tokens_max = _OUTPUT_TOKENS_MAX
        return CostBound(request["model"], byte_count // 3, output_tokens_max, request.get("stream") is True)

    def create_meter(self, content_type: bytes) -> UsageMeter:
        return _Meter(is_stream=content_type.startswith(b"text/event-stream"))


def _stored_data_field(value: object) -> str | None:
    """Return a field that refers to data on the model's servers, where all tasks with the same key share their data."""
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, dict):
            if one.get("type") == "item_reference":
                return "id"
            if found := _STORED_DATA_FIELDS & one.keys():
                return min(found)
            pending += [item for name, item in one.items() if name != "tools"]
        elif isinstance(one, list):
            pending += one
    return None


_Count = Annotated[int, msgspec.Meta(ge=0, le=10**12)]


class _Counts(msgspec.Struct):
    input_tokens: _Count
    output_tokens: _Count


class _Response(msgspec.Struct):
    model: str = ""
    usage: _Counts | None = None


class _StreamEvent(msgspec.Struct):
    response: _Response = msgspec.field(default_factory=_Response)


class _Meter:
    """Reads the usage of a whole response, or of the last event of a stream (`response.completed`)."""

    def __init__(self, *, is_stream: bool) -> None:
        self._is_stream = is_stream
        self._body = b""

    def feed(self, data: bytes) -> None:
        self._body += data

    @property
    def has_started(self) -> bool:
        return bool(self._body)

    @property
    def is_complete(self) -> bool:
        return self.usage() is not None

    def usage(self) -> Usage | None:
        documents = re.findall(rb"^data: (.*)$", self._body, re.MULTILINE) if self._is_stream else [self._body]
        for document in reversed(documents):
            try:
                if self._is_stream:
                    response = msgspec.json.decode(document, type=_StreamEvent).response
                else:
                    response = msgspec.json.decode(document, type=_Response)
            except DECODE_ERRORS:
                continue
            if (counts := response.usage) is not None:
                return _usage(response.model, counts.input_tokens, counts.output_tokens)
        return None

    def partial_usage(self) -> Usage | None:
        return None

    def upper_bound(self, cost_bound: CostBound, *, is_fully_received: bool) -> Usage | None:
        return _usage(cost_bound.model, cost_bound.input_tokens, cost_bound.output_tokens_max)


def _usage(model: str, input_tokens: int, output_tokens: int) -> Usage:
    price = USD_PER_TOKEN.get(model)
    usd = None if price is None else round(input_tokens * price[0] + output_tokens * price[1], 6)
    return Usage(model, input_tokens, output_tokens, 0, 0, usd)
