"""The dialect of a model API, which the gateway calls."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from sandbox.interfaces.gateway import ModelUpstream
from sandbox.model.events import Usage


class Rejected(msgspec.Struct, frozen=True):
    """A request is rejected with this HTTP status. `message` is for users."""

    status: int
    message: str


class CostBound(msgspec.Struct, frozen=True):
    """Upper bound of a request's tokens.

    input_tokens: estimated from the request's length.
    output_tokens_max: the limit in the request, which is untrusted; the gateway rejects a negative limit.
    """

    model: str
    input_tokens: int
    output_tokens_max: int
    is_streamed: bool


class Endpoint(msgspec.Struct, frozen=True):
    """A path to which POST requests are forwarded.

    is_metered: the response uses tokens. may_refer_to_stored_data: a request can refer to data that other tasks have
    stored with the same key. The gateway then decodes every request, so that `decode_request` can reject it.
    """

    is_metered: bool
    may_refer_to_stored_data: bool = False


class RequestHeaders(msgspec.Struct, frozen=True):
    """Lower-case names of request headers.

    forwarded, forwarded_prefixes: the headers that are forwarded to the API.
    repeatable: the forwarded headers that may occur several times.
    """

    forwarded: frozenset[bytes]
    forwarded_prefixes: tuple[bytes, ...] = ()
    repeatable: frozenset[bytes] = frozenset()


class ResponseHeaders(msgspec.Struct, frozen=True):
    """Lower-case names of response headers.

    forwarded, forwarded_prefixes: the headers that are forwarded to the sandbox.
    account_identifying: the headers that identify the account of the server's key. Their values are masked in error
        responses.
    """

    forwarded: frozenset[bytes]
    forwarded_prefixes: tuple[bytes, ...] = ()
    account_identifying: frozenset[bytes] = frozenset()


class UsageMeter(Protocol):
    """Reads usage from a response body. Never raises on upstream data; ignores data that it cannot parse.

    The gateway treats usage with a negative or excessive number as missing.
    """

    def feed(self, data: bytes) -> None:
        """Process the next bytes of the body, which may be split at any position."""
        ...

    def usage(self) -> Usage | None:
        """Return the usage in the bytes so far, or None if they contain no model response."""
        ...

    def partial_usage(self) -> Usage | None:
        """Return the usage so far, or None if it cannot be computed cheaply before the body is complete."""
        ...

    @property
    def has_started(self) -> bool:
        """Whether a model has started to respond.

        The gateway uses this only for event streams. Any other response of a model has started when its head arrives.
        """
        ...

    @property
    def is_complete(self) -> bool:
        """Whether `usage` covers the complete response."""
        ...

    def upper_bound(self, cost_bound: CostBound, *, is_fully_received: bool) -> Usage | None:
        """Return an upper bound on the usage of an interrupted response. Call no other method afterwards.

        is_fully_received: all output that the model has produced so far was received.
        """
        ...


class ModelDialect(Protocol):
    """One model API. All requests come from a sandbox and are untrusted.

    `sanitize` makes untrusted text safe for reports.
    """

    @property
    def base_url_variable(self) -> str:
        """The server's environment variable that contains the address of the API, for messages."""
        ...

    @property
    def endpoints(self) -> Mapping[bytes, Endpoint]:
        """The endpoints, keyed by path. The gateway rejects requests to other paths."""
        ...

    @property
    def accepted_queries(self) -> frozenset[bytes]:
        """The query strings to forward, usually only the empty one."""
        ...

    @property
    def credential_headers(self) -> frozenset[bytes]:
        """Lower-case names of the headers in which clients send a key."""
        ...

    @property
    def request_headers(self) -> RequestHeaders:
        """The request headers that are forwarded to the API, in addition to those that describe the body."""
        ...

    @property
    def response_headers(self) -> ResponseHeaders:
        """The response headers that are forwarded to the sandbox, in addition to those that describe the body."""
        ...

    def credential(self, upstream: ModelUpstream) -> tuple[bytes, bytes]:
        """Return the header with the server's key. Raises ValueError, with a message that never contains the key."""
        ...

    def presented_key(self, header_name: bytes, value: bytes) -> bytes:
        """Return the key from one of the `credential_headers`, or an empty string if there is none."""
        ...

    def encode_error(self, status: int, message: str) -> bytes:
        """Return the body of an error response, as JSON."""
        ...

    def decode_error(self, body: bytes) -> str:
        """Return the message of the API's error response, which is untrusted; empty if there is none."""
        ...

    def decode_request(self, body: bytes | bytearray) -> dict[str, Any] | Rejected:
        """Decode the body, or reject it. The gateway limits the number of JSON values in the body before this call."""
        ...

    def external_access_reason(self, request: dict[str, Any], sanitize: Callable[[str], str]) -> str | None:
        """Return the part of the request that accesses external resources, as the start of a sentence, or None."""
        ...

    def unpriced_reason(self, request: dict[str, Any], sanitize: Callable[[str], str]) -> str | None:
        """Return why no bound on the request's cost can be computed and what to do instead, or None."""
        ...

    def estimate_cost_bound(self, request: dict[str, Any], byte_count: int) -> CostBound:
        """Estimate the upper bound of the cost from a decoded request and the length of its body."""
        ...

    def create_meter(self, content_type: bytes) -> UsageMeter:
        """Create a meter for a response body of this content type."""
        ...
