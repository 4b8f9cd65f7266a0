"""Heads of the requests and responses that are forwarded between a task and the model, using h11. No I/O."""

from collections.abc import Sequence
from functools import cache

import h11

from sandbox.gateway.http_messages import (
    BODY_HEADERS,
    Headers,
    connection_header_names,
    framing_headers,
    header,
    is_compressed,
)
from sandbox.gateway.model_api.upstream import Upstream, ValueRedactor
from sandbox.interfaces.gateway import ModelDialect, ResponseHeaders

_CONNECTION_HEADERS = frozenset(
    {
        b"accept-encoding",
        b"connection",
        b"content-length",
        b"expect",
        b"host",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"transfer-encoding",
    }
)
"""Headers that clients send to the gateway itself; the gateway handles them or sets its own values."""


@cache
def _expected_headers(credential_headers: frozenset[bytes], body_headers: frozenset[bytes]) -> frozenset[bytes]:
    """Return the headers that are neither forwarded unchanged nor reported as dropped."""
    return (_CONNECTION_HEADERS | credential_headers | BODY_HEADERS) - body_headers


def _select_headers(
    request: h11.Request, dialect: ModelDialect, *, is_body_unchanged: bool
) -> tuple[Headers, list[bytes]]:
    """Return the headers to forward, spelled as received, and the names of the dropped ones.

    is_body_unchanged: the body is forwarded unchanged, so the headers that describe its encoding are forwarded too.
    """
    body_headers = BODY_HEADERS if is_body_unchanged else frozenset()
    expected = _expected_headers(dialect.credential_headers, body_headers)
    named, rules = connection_header_names(request), dialect.request_headers
    forwarded: Headers = []
    dropped: list[bytes] = []
    seen_names: set[bytes] = set()
    for original, value in request.headers.raw_items():
        name = original.lower()
        if name in expected:
            continue
        is_known = name in body_headers or name in rules.forwarded or name.startswith(rules.forwarded_prefixes)
        if is_known and name not in named and (name not in seen_names or name in rules.repeatable):
            seen_names.add(name)
            forwarded.append((original, value))
        else:
            dropped.append(name)
    return forwarded, dropped


def forwarded_request(
    request: h11.Request, target: bytes, upstream: Upstream, dialect: ModelDialect, body: bytes | None = None
) -> tuple[h11.Request, list[bytes]]:
    """Build the upstream request. It has the server's key instead of the task's and asks for an uncompressed response.

    body: the complete JSON body if known; if None, the client's framing is kept. Returns the request and the names of
    the dropped headers.
    """
    forwarded_headers, dropped = _select_headers(request, dialect, is_body_unchanged=body is None)
    headers = [
        (b"host", upstream.authority),
        upstream.credential,
        (b"accept-encoding", b"identity"),
        *forwarded_headers,
    ]
    if body is None:
        framing = framing_headers(request.headers) or [(b"content-length", b"0")]
    else:
        framing = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    return h11.Request(method=request.method, target=upstream.path_prefix + target, headers=headers + framing), dropped


def forwarded_response(
    response: h11.Response, rules: ResponseHeaders, redactors: Sequence[ValueRedactor]
) -> h11.Response:
    """Build the response for the client. h11 uses chunked framing if there is no length."""

    def redact(text: bytes) -> bytes:
        for redactor in redactors:
            text = redactor.redact(text)
        return text

    named = connection_header_names(response)
    headers = [
        (redact(original), redact(value))
        for original, value in response.headers.raw_items()
        if (name := original.lower()) not in named and _is_returned(name, rules)
    ]
    framing = [(name, value) for name, value in framing_headers(response.headers) if name == b"content-length"]
    return h11.Response(status_code=response.status_code, reason=redact(response.reason), headers=headers + framing)


def _is_returned(name: bytes, rules: ResponseHeaders) -> bool:
    return name in BODY_HEADERS or name in rules.forwarded or name.startswith(rules.forwarded_prefixes)


def is_readable_stream(response: h11.Response) -> bool:
    """Return whether the body is an event stream that shows the gateway when the model starts to respond."""
    content_type = header(response.headers, b"content-type").split(b";")[0].strip().lower()
    return content_type == b"text/event-stream" and not is_compressed(response)
