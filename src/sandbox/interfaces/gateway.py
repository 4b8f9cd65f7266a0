"""The gateway, a sandbox's only network access, and the dialect of the model API that it serves."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from sandbox.interfaces.runtime import Listeners
from sandbox.model.egress import EgressRules
from sandbox.model.events import EgressDenied, ErrorReported, Usage

MODEL_PORT = 8123
"""Port of the gateway's model API on 127.0.0.1."""

PROXY_PORT = 3128
"""Port of the gateway's HTTP proxy on 127.0.0.1."""


class ModelUpstream(msgspec.Struct, frozen=True, omit_defaults=True):
    """The address of the model API, and the server's own key for it.

    Exactly one of `api_key` and `auth_token` is set.
    """

    base_url: str
    api_key: str = ""
    auth_token: str = ""

    def __repr__(self) -> str:
        """Omit the credentials, which must not reach logs or tracebacks."""
        return f"ModelUpstream({self.base_url!r})"


class Budget(msgspec.Struct, frozen=True, omit_defaults=True):
    """Limits on the model's cost; None means no limit. tokens: input (including cached) plus output.

    spent_usd, spent_tokens: already spent by earlier gateways of the same task.
    """

    usd: float | None = None
    tokens: int | None = None
    spent_usd: float = 0.0
    spent_tokens: int = 0


class GatewayRules(msgspec.Struct, frozen=True, omit_defaults=True):
    """The egress rules and the budget that the gateway of one task enforces.

    hold_model_requests: model requests wait without a response until `release_model_requests` is called.
    """

    egress: EgressRules = EgressRules()
    budget: Budget = Budget()
    hold_model_requests: bool = False


class BudgetExhausted(msgspec.Struct, frozen=True):
    """The budget is spent; no more model requests are forwarded.

    `message`: the limit that was reached, human-readable.
    """

    message: str


class KeyRejected(msgspec.Struct, frozen=True):
    """The model API rejects the server's key; no more model requests are forwarded. `message`: human-readable."""

    message: str


ReportEvent = Callable[[Usage | EgressDenied | ErrorReported | BudgetExhausted | KeyRejected], None]
"""Receives usage, denials and errors. Called on the event loop's thread; must not block."""


class Gateway(Protocol):
    """Serves the connections of one sandbox."""

    @property
    def requests_in_flight(self) -> int:
        """The number of forwarded model requests whose responses are not complete."""
        ...

    @property
    def denied_count(self) -> int:
        """The number of connections, requests and names denied so far, including those that were not reported."""
        ...

    def release_model_requests(self) -> None:
        """Forward the model requests that `hold_model_requests` holds back."""
        ...

    async def serve(self, listeners: Listeners) -> None:
        """Serve until cancelled, then close every connection. Raises ExceptionGroup if a listener is lost."""
        ...


class GatewayFactory(Protocol):
    """Creates gateways."""

    def create(
        self,
        upstream: ModelUpstream,
        gateway_key: str,
        report: ReportEvent,
        rules: GatewayRules = GatewayRules(),
        redact: Callable[[str], str] = str,
    ) -> Gateway:
        """Create a gateway. `gateway_key` authenticates the agent; `upstream` is the model API.

        redact: removes secret values from names that come from the sandbox, before they are truncated for a report.
        """
        ...


class Rejected(msgspec.Struct, frozen=True):
    """A request is rejected with this HTTP status. `message` is for users."""

    status: int
    message: str


class CostBound(msgspec.Struct, frozen=True):
    """Upper bound of a request's tokens.

    input_tokens: estimated from the request's length.
    output_tokens_max: the limit in the request, which is untrusted; the gateway rejects a negative limit.
    hidden_output_tokens: the part of `output_tokens_max` that is not in the response, such as an advisor's output.
    has_hidden_input: the response may report its input before the model reads more, such as fetched pages.
    """

    model: str
    input_tokens: int
    output_tokens_max: int
    is_streamed: bool
    hidden_output_tokens: int = 0
    has_hidden_input: bool = False


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
        """Return the usage that the body has reported so far; None if it has reported none that can be parsed."""
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

    def find_external_access(self, request: dict[str, Any], sanitize: Callable[[str], str]) -> str | None:
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
