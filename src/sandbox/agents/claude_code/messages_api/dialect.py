"""The part of the Messages API that the gateway forwards: Claude Code's requests and headers, with the server's key."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from sandbox.agents.claude_code.messages_api import pricing, request_restrictions, usage_meter
from sandbox.agents.claude_code.stream_json import parse_float
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


class _Error(msgspec.Struct):
    message: str


class _ErrorBody(msgspec.Struct):
    error: _Error


_CONVERTED_NUMBER_CHARACTERS_MAX = 32


def _parse_number(text: str) -> float | msgspec.Raw:
    """Parse a JSON number with a fraction or an exponent (`parse_float`), or keep a long one as text.

    A float has at most 17 significant digits. The conversion of a longer number can take 40 microseconds.
    """
    return parse_float(text) if len(text) <= _CONVERTED_NUMBER_CHARACTERS_MAX else msgspec.Raw(text.encode())


_request_decoder = msgspec.json.Decoder(float_hook=_parse_number)

_REQUEST_HEADERS = RequestHeaders(
    forwarded=frozenset(
        {
            b"accept",
            b"accept-language",
            b"anthropic-beta",
            b"anthropic-client-feature",
            b"anthropic-client-os",
            b"anthropic-client-platform",
            b"anthropic-client-version",
            b"anthropic-dangerous-direct-browser-access",
            b"anthropic-version",
            b"user-agent",
            b"x-anthropic-additional-protection",
            b"x-app",
            b"x-client-app",
            b"x-client-request-id",
        }
    ),
    forwarded_prefixes=(b"x-claude-code-", b"x-stainless-"),
    repeatable=frozenset({b"accept", b"anthropic-beta"}),
)
"""The request headers to forward. Some of them identify Claude Code and its SDK."""

_RESPONSE_HEADERS = ResponseHeaders(
    forwarded=frozenset(
        {
            b"anthropic-thinking-prefix-mismatch",
            b"cf-mitigated",
            b"cf-ray",
            b"date",
            b"request-id",
            b"retry-after",
            b"retry-after-ms",
            b"x-request-id",
            b"x-should-retry",
        }
    ),
    forwarded_prefixes=(b"anthropic-ratelimit-",),
    account_identifying=frozenset({b"anthropic-organization-id", b"anthropic-workspace-id"}),
)
"""The response headers to forward: those that Claude Code and its SDK read. Others may reveal the key's account."""

_ERROR_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    413: "request_too_large",
    429: "rate_limit_error",
    502: "api_error",
    503: "api_error",
    504: "timeout_error",
}
_API_KEY, _AUTHORIZATION = b"x-api-key", b"authorization"


class MessagesApi:
    """Implements `ModelDialect` for the Messages API."""

    base_url_variable = "ANTHROPIC_BASE_URL"
    endpoints: Mapping[bytes, Endpoint] = {
        b"/v1/messages": Endpoint(is_metered=True),
        b"/v1/messages/count_tokens": Endpoint(is_metered=False),
    }
    accepted_queries = frozenset({b"", b"beta=true"})
    credential_headers = frozenset({_API_KEY, _AUTHORIZATION})
    request_headers = _REQUEST_HEADERS
    response_headers = _RESPONSE_HEADERS

    def credential(self, upstream: ModelUpstream) -> tuple[bytes, bytes]:
        """Return the header with the server's key. Raises ValueError if there is not exactly one valid key."""
        key = upstream.api_key or upstream.auth_token
        if bool(upstream.api_key) == bool(upstream.auth_token):
            raise ValueError("Set exactly one of ANTHROPIC_API_KEY and ANTHROPIC_AUTH_TOKEN.")
        if not re.fullmatch(r"[!-~]+", key):
            name = "ANTHROPIC_API_KEY" if upstream.api_key else "ANTHROPIC_AUTH_TOKEN"
            raise ValueError(f"{name} has characters that are invalid in a header.")
        return (_API_KEY, key.encode()) if upstream.api_key else (_AUTHORIZATION, b"Bearer " + key.encode())

    def presented_key(self, header_name: bytes, value: bytes) -> bytes:
        """Return the key from a header, or an empty string if there is none."""
        if header_name == _API_KEY:
            return value
        scheme, _, token = value.partition(b" ")
        return token.strip() if scheme.lower() == b"bearer" else b""

    def encode_error(self, status: int, message: str) -> bytes:
        """Return the body of an error response."""
        kind = _ERROR_TYPES.get(status, "invalid_request_error")
        return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": message}})

    def decode_error(self, body: bytes) -> str:
        """Return the message in an error response; empty if there is none."""
        try:
            return msgspec.json.decode(body, type=_ErrorBody).error.message
        except DECODE_ERRORS:
            return ""

    def decode_request(self, body: bytes | bytearray) -> dict[str, Any] | Rejected:
        """Decode the body, or reject it."""
        try:
            document = _request_decoder.decode(body)
        except DECODE_ERRORS:
            document = None
        if not isinstance(document, dict) or not request_restrictions.is_short_string(document.get("model", "")):
            return Rejected(400, "The request body must be a JSON object that names a model.")
        if request_restrictions.has_too_many_objects(document):
            return Rejected(413, f"The request body has more than {request_restrictions.REQUEST_OBJECTS_MAX} objects.")
        return document

    def find_external_access(self, request: dict[str, Any], sanitize: Callable[[str], str]) -> str | None:
        """Return a noun phrase for a part of the request that has external access; None if there is no such part."""
        return request_restrictions.find_external_access(request, sanitize)

    def unpriced_reason(self, request: dict[str, Any], sanitize: Callable[[str], str]) -> str | None:
        """Return why the cost of the request cannot be bounded and what to do instead; None if it can be bounded."""
        return pricing.unpriced_reason(request, sanitize)

    def estimate_cost_bound(self, request: dict[str, Any], byte_count: int) -> CostBound:
        """Estimate an upper bound on the cost from a decoded request and the length of its body."""
        return pricing.estimate_cost_bound(request, byte_count)

    def create_meter(self, content_type: bytes) -> UsageMeter:
        """Create a meter for a response body of this content type."""
        return usage_meter.create_meter(content_type)
