"""A request that is forwarded to the model: the heads of the request and its response, and its usage. No I/O."""

import re
from collections.abc import Sequence
from functools import cache

import h11
import msgspec

from sandbox.gateway.event_reporter import EventReporter
from sandbox.gateway.http_messages import (
    BODY_HEADERS,
    Headers,
    connection_header_names,
    framing_headers,
    header,
    is_compressed,
)
from sandbox.gateway.model_api.request_gate import KeyRejection, valid_usage
from sandbox.gateway.model_api.upstream import BodyRedactor, Upstream, ValueRedactor
from sandbox.interfaces.gateway import CostBound, ModelDialect, ResponseHeaders, UsageMeter
from sandbox.model.events import Usage

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
    """Return the headers to forward, with their names unchanged, and the names of the dropped ones.

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
    """Build the upstream request. It has the server's key instead of the task's and requests an uncompressed response.

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


def is_uncompressed_event_stream(response: h11.Response) -> bool:
    """Return whether the body is an event stream in which the gateway can see when the model starts to respond."""
    content_type = header(response.headers, b"content-type").split(b";")[0].strip().lower()
    return content_type == b"text/event-stream" and not is_compressed(response)


_STATUS_LINE_BYTES = 64
_REFUSED_STATUS_LINE = re.compile(rb"HTTP/1\.[01] [345][0-9]{2}[ \r\n]")


class InflightRequest(msgspec.Struct):
    """A forwarded request.

    cost_bound: set if the response must be metered.
    is_sent: a connection to the upstream exists, so the request may incur cost.
    may_have_started: count the request at its maximum cost unless the response reports its usage.
    head_prefix: the first bytes of the response's head, until the head is complete.
    interim_responses: number of responses with a status below 200, each of which extends the time limit.
    received: the part of the response body that has not been forwarded yet.
    meter: set at the start of a response whose usage must be read.
    key_rejection: set at the start of a response that rejects the server's key.
    """

    dialect: ModelDialect
    is_metered: bool
    body_redactor: BodyRedactor
    cost_bound: CostBound | None = None
    is_sent: bool = False
    may_have_started: bool = False
    head_prefix: bytearray = bytearray()
    interim_responses: int = 0
    has_response: bool = False
    has_timed_out: bool = False
    received: bytearray = bytearray()
    meter: UsageMeter | None = None
    key_rejection: KeyRejection | None = None

    def redact(self, redactors: Sequence[ValueRedactor]) -> None:
        """Redact the body with these redactors."""
        self.body_redactor = BodyRedactor(redactors)

    def record_key_rejection(self, status: int) -> None:
        """Treat the response as one that rejects the server's key."""
        self.key_rejection = KeyRejection(status)

    def receive_head(self, data: bytes) -> None:
        """Keep the first bytes of a head that is not complete."""
        if not self.has_response and len(self.head_prefix) < _STATUS_LINE_BYTES:
            self.head_prefix += data[:_STATUS_LINE_BYTES]

    def finish_interim_head(self, rest: bytes) -> None:
        """Handle the end of an interim response's head. rest: the received part of the next head."""
        self.head_prefix = bytearray(rest[:_STATUS_LINE_BYTES])

    def assume_started(self) -> None:
        """Count the request at its maximum cost unless its usage is reported, even if no response has started."""
        self.may_have_started = True

    def fail_head(self, *, is_cut: bool) -> None:
        """Handle an unreadable head. Unless its status reports an error, the request may incur cost.

        is_cut: the connection ended within the head. A stream whose head is cut has not started.
        """
        if self.cost_bound is None or self.meter is not None or (is_cut and self.cost_bound.is_streamed):
            return
        self.may_have_started |= bool(self.head_prefix) and _REFUSED_STATUS_LINE.match(self.head_prefix) is None

    def report_usage(self, reporter: EventReporter, *, is_complete: bool, is_abandoned: bool) -> Usage | None:
        """Report and return the usage of the finished request.

        is_complete: the response reached its end.
        is_abandoned: the gateway stopped reading it.
        """
        reported = None if self.meter is None else valid_usage(self.meter.usage())
        bound = self._upper_bound(reported, is_abandoned=is_abandoned)
        usage = bound or reported
        if usage is not None:
            reporter.report_usage(usage)
        if bound is not None:
            message = "A model response ended before it reported its usage; the maximum is counted."
            reporter.report_error("usage_unread", message)
        elif usage is None and is_complete and self.meter is not None:
            reporter.report_error("usage_unread", "A model response reported no usage; its tokens are not counted.")
        return usage

    def _upper_bound(self, reported: Usage | None, *, is_abandoned: bool) -> Usage | None:
        """Return the maximum usage of a request if its actual usage is required but unknown, otherwise None.

        Returns None if usage was reported, the request was rejected or not sent, or no response started. A response
        other than an event stream has started as soon as its head has arrived. An abandoned
        or timed-out request counts even without a response, because the model may have produced output.
        """
        cost_bound, meter = self.cost_bound, self.meter
        if cost_bound is None:
            return None
        is_refused = not self.is_sent or (self.has_response and meter is None)
        is_reported = meter is not None and reported is not None and meter.is_complete
        if is_refused or is_reported:
            return None
        has_started = self.may_have_started or (meter is not None and meter.has_started)
        if not (has_started or is_abandoned or self.has_timed_out):
            return None
        is_fully_received = not (self.has_timed_out or (self.may_have_started and meter is None))
        meter = meter or self.dialect.create_meter(b"text/event-stream" if cost_bound.is_streamed else b"")
        return valid_usage(meter.upper_bound(cost_bound, is_fully_received=is_fully_received))
