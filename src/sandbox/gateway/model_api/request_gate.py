"""Decides whether and when a model request may be forwarded: by its head, its key, its body and the task's budget.

If the agent must be checked, requests are held until then. Requests are denied if they are malformed or too large, if
the budget is spent or may be exceeded, if a budget in USD lacks a price, if the server's key was rejected, and, without
full network access, if they would make the model's servers access external resources.
"""

import re
from collections.abc import Iterator
from hmac import compare_digest
from typing import Any

import h11
import msgspec

from sandbox.gateway import limits
from sandbox.gateway.event_reporter import EventReporter
from sandbox.gateway.limits import BUFFERED_BYTES_MAX, IN_FLIGHT_REQUESTS_WITHOUT_COST_CHECK, REQUEST_BODY_BYTES_MAX
from sandbox.gateway.model_api.upstream import Upstream
from sandbox.interfaces.gateway import Budget, CostBound, GatewayRules, ModelDialect, Rejected, UsageMeter
from sandbox.model.events import COST_USD_MAX, Usage


class AllowedHead(msgspec.Struct, frozen=True):
    """An allowed head of a request. target: path and query at the upstream. is_metered: the response uses tokens."""

    target: bytes
    is_metered: bool


class ModelPolicy:
    """Checks the heads of requests to the model's listener on `port`."""

    def __init__(self, dialect: ModelDialect, gateway_key: str, port: int) -> None:
        if not gateway_key:
            raise ValueError("A gateway needs a key for the agent.")
        self._dialect = dialect
        self._gateway_key = gateway_key.encode()
        self._hosts = {b"127.0.0.1:%d" % port, b"localhost:%d" % port}

    def check(self, request: h11.Request) -> AllowedHead | Rejected:
        """Check the request's format first, then the key, then the target."""
        return self._check_shape(request) or self._check_key(request) or self._check_target(request)

    def _check_shape(self, request: h11.Request) -> Rejected | None:
        names = [name for name, _ in request.headers]
        if request.http_version != b"1.1":
            return _invalid_head("The gateway supports only HTTP/1.1.")
        if [value for name, value in request.headers if name == b"host"] not in [[host] for host in self._hosts]:
            return _invalid_head("The Host header must name the gateway's own address.")
        if b"upgrade" in names:
            return _invalid_head("The gateway does not support protocol upgrades.")
        if b"transfer-encoding" in names and b"content-length" in names:
            return _invalid_head("A request must not have both Content-Length and Transfer-Encoding.")
        return None

    def _check_key(self, request: h11.Request) -> Rejected | None:
        dialect = self._dialect
        keys = [
            dialect.presented_key(name, value) for name, value in request.headers if name in dialect.credential_headers
        ]
        if len(keys) == 1 and compare_digest(keys[0], self._gateway_key):
            return None
        problem = "has no key" if not keys else "has a different key" if len(keys) == 1 else "has several keys"
        return Rejected(401, f"The request {problem}; the gateway accepts only this task's key.")

    def _check_target(self, request: h11.Request) -> AllowedHead | Rejected:
        path, _, query = request.target.partition(b"?")
        endpoint = self._dialect.endpoints.get(path)
        if endpoint is None or request.method != b"POST" or query not in self._dialect.accepted_queries:
            served = " and ".join(served_path.decode() for served_path in self._dialect.endpoints)
            return Rejected(403, f"The gateway serves only POST {served}.")
        if _content_length(request) > REQUEST_BODY_BYTES_MAX:
            return too_large()
        return AllowedHead(path + (b"?" + query if query else b""), endpoint.is_metered)


def _content_length(request: h11.Request) -> int:
    # h11 rejects values other than 1 to 20 digits, and repeated headers with different values.
    return next((int(value) for name, value in request.headers if name == b"content-length"), 0)


def too_large() -> Rejected:
    """Return the rejection for a body that exceeds the size limit."""
    limit = REQUEST_BODY_BYTES_MAX // 1024**2
    return Rejected(413, f"The request body is larger than {limit} MiB.")


def _invalid_head(message: str) -> Rejected:
    return Rejected(400, message)


TOKENS_MAX = 10**12
"""Maximum plausible token count of one request; a higher count is invalid."""


def valid_usage(usage: Usage | None) -> Usage | None:
    """Return the usage, or None if it is invalid and could lower the total cost or make the journal unreadable."""
    if usage is None:
        return None
    counts = (usage.input_tokens, usage.output_tokens, usage.cache_read_tokens, usage.cache_write_tokens)
    are_counts_valid = all(map(is_token_count, counts))
    is_cost_valid = usage.cost_usd is None or 0 <= usage.cost_usd <= COST_USD_MAX
    return usage if are_counts_valid and is_cost_valid else None


def is_token_count(count: object) -> bool:
    """Return whether the value is a plausible token count."""
    return type(count) is int and 0 <= count <= TOKENS_MAX


def _total_tokens(usage: Usage) -> int:
    return usage.input_tokens + usage.cache_read_tokens + usage.cache_write_tokens + usage.output_tokens


class BudgetSpending:
    """The total cost of all responses, compared with the budget. Reports a spent budget only once."""

    def __init__(self, budget: Budget, reporter: EventReporter) -> None:
        self._budget = budget
        self._reporter = reporter
        self._finished = (budget.spent_tokens, budget.spent_usd)
        self._running: dict[object, tuple[int, float]] = {}
        self._bounds: dict[object, Usage | None] = {}
        self._unpriced: str | None = None
        self._exhausted_reason: str | None = None
        self.has_budget_limit = budget.usd is not None or budget.tokens is not None

    def must_reject(self, bound: Usage | None) -> bool:
        """Return whether the requests in flight and one more may exceed the remaining budget.

        A few requests are always allowed: their actual cost is usually far below their bounds.
        """
        if len(self._bounds) < IN_FLIGHT_REQUESTS_WITHOUT_COST_CHECK:
            return False
        bounds = [each for each in (bound, *self._bounds.values()) if each is not None]
        tokens = self._finished[0] + sum(map(_total_tokens, bounds))
        usd = self._finished[1] + sum(each.cost_usd or 0.0 for each in bounds)
        budget = self._budget
        return (budget.tokens is not None and tokens > budget.tokens) or (budget.usd is not None and usd > budget.usd)

    def record_start(self, source: object, bound: Usage | None) -> None:
        """Record a request in flight and the upper bound of its usage."""
        self._bounds[source] = bound

    def update(self, source: object, usage: Usage | None) -> None:
        """Replace the running cost of a response."""
        if usage is not None:
            self._running[source] = self._cost(usage)
            self._check_budget()

    def finish(self, source: object, usage: Usage | None) -> None:
        """Add the final cost of a response to the total."""
        self._running.pop(source, None)
        self._bounds.pop(source, None)
        if usage is not None:
            tokens, usd = self._cost(usage)
            self._finished = (self._finished[0] + tokens, self._finished[1] + usd)
            self._check_budget()

    def exhausted_reason(self) -> str | None:
        """Return a sentence that says which budget is spent or cannot be enforced, or None."""
        self._check_budget()
        return self._exhausted_reason

    def _cost(self, usage: Usage) -> tuple[int, float]:
        if usage.cost_usd is None:
            self._unpriced = usage.model
        return _total_tokens(usage), usage.cost_usd or 0.0

    def _check_budget(self) -> None:
        if self.has_budget_limit and self._exhausted_reason is None:
            self._exhausted_reason = self._find_exhausted_reason()
            if self._exhausted_reason is not None:
                self._reporter.report_budget_exhausted(self._exhausted_reason)

    def _find_exhausted_reason(self) -> str | None:
        costs = [self._finished, *self._running.values()]
        tokens = sum(cost[0] for cost in costs)
        usd = round(sum(cost[1] for cost in costs), 6)
        consequence = "no more model requests are forwarded"
        if self._budget.usd is not None and self._unpriced is not None:
            model = self._reporter.sanitize(self._unpriced)
            return (
                f"A response came from the model {model}, which has no known price, so lifecycle.budget_usd cannot be "
                f"enforced; {consequence}. Set lifecycle.budget_tokens instead."
            )
        # The message omits the cost so far: the response continues, and the task's status will contain the final cost.
        spent = f"is spent; {consequence}. Raise the budget."
        if self._budget.usd is not None and usd >= self._budget.usd:
            return f"lifecycle.budget_usd ({self._budget.usd:.6g} USD) {spent}"
        if self._budget.tokens is not None and tokens >= self._budget.tokens:
            return f"lifecycle.budget_tokens ({self._budget.tokens:,} tokens) {spent}"
        return None


BUDGET_STATUS = 402
"""Status of the response to a request that the budget does not allow.

Agents show its message and end. Some agents repeat a request after 400, 409 or 422, print advice about the login
before the message after 403, and replace the message after 404 or 413.
"""


_STRUCTURAL_BYTES = b",:[{"
_LONG_INTEGER = re.compile(rb"[\[:,][ \t\n\r]*+-?[0-9]{%d}" % limits.LONG_INTEGER_DIGITS)
"""Matches the start of a long integer, and of the same characters in a string."""
_DIGITS_AS_ZEROS = bytes(ord("0") if chr(byte).isdecimal() else ord(" ") for byte in range(128)) + b" " * 128
_LONG_RUN_OF_ZEROS = b"0" * limits.LONG_INTEGER_DIGITS
_PART_BYTES = 64 * 1024


def _decode(dialect: ModelDialect, body: bytes | bytearray) -> dict[str, Any] | Rejected:
    """Decode the body, or reject it. A body that needs too much memory or time is rejected before it is decoded."""
    if _count_structural_bytes(body) > limits.REQUEST_JSON_VALUES_MAX:
        count = limits.REQUEST_JSON_VALUES_MAX
        return Rejected(413, f"The request body has more than {count} commas, colons and opening brackets.")
    if _count_long_integers(body) > limits.LONG_INTEGERS_MAX:
        count, digits = limits.LONG_INTEGERS_MAX, limits.LONG_INTEGER_DIGITS
        return Rejected(413, f"The request body has more than {count} integers with {digits} or more digits.")
    return dialect.decode_request(body)


def _count_structural_bytes(body: bytes | bytearray) -> int:
    """Count structural characters of JSON, including those in strings. One `translate` is faster than four `count`."""
    return sum(len(part) - len(part.translate(None, _STRUCTURAL_BYTES)) for part in _parts(body, overlap_bytes=0))


def _count_long_integers(body: bytes | bytearray) -> int:
    """Count the matches of `_LONG_INTEGER`. First search for any long run of digits, which is five times as fast."""
    parts = _parts(body, overlap_bytes=limits.LONG_INTEGER_DIGITS - 1)
    if not any(_LONG_RUN_OF_ZEROS in part.translate(_DIGITS_AS_ZEROS) for part in parts):
        return 0
    return sum(1 for _ in _LONG_INTEGER.finditer(body))


def _parts(body: bytes | bytearray, overlap_bytes: int) -> Iterator[bytes | bytearray]:
    """Yield parts of the body, because a modified copy of the whole body would use as much memory again."""
    for begin in range(0, len(body), _PART_BYTES):
        yield body[begin : begin + _PART_BYTES + overlap_bytes]


class ApprovedRequest(msgspec.Struct, frozen=True):
    """A body to forward. `cost_bound` is set if the response must be metered."""

    body: bytes
    cost_bound: CostBound | None


class KeyRejection(msgspec.Struct):
    """A response that rejects the server's key. body: the part received so far."""

    status: int
    body: bytearray = bytearray()


class ModelRequestGate:
    """Approves or rejects a gateway's model requests. `release` clears `is_holding` permanently."""

    def __init__(self, rules: GatewayRules, reporter: EventReporter, dialect: ModelDialect) -> None:
        self._dialect = dialect
        self._reporter = reporter
        self._has_full_egress = rules.egress.is_unrestricted
        self._may_refer_to_stored_data = any(one.may_refer_to_stored_data for one in dialect.endpoints.values())
        self._has_accepted_key = False
        self._key_rejection: Rejected | None = None
        self._budget = rules.budget
        self._spending = BudgetSpending(rules.budget, reporter)
        self._buffered_bytes = 0
        self.is_holding = rules.hold_model_requests

    @property
    def needs_body(self) -> bool:
        """Whether a request can only be checked together with its body."""
        return self.is_holding or self.has_budget_limit or not self._has_full_egress or self._may_refer_to_stored_data

    @property
    def has_budget_limit(self) -> bool:
        """Whether there is a budget. If there is one, every response that uses tokens must be metered."""
        return self._spending.has_budget_limit

    def release(self) -> None:
        """Stop holding requests."""
        self.is_holding = False

    def reserve_bytes(self, byte_count: int) -> Rejected | None:
        """Reserve buffer space for a request body, or return a rejection if the limit is reached.

        `free_bytes` releases the space.
        """
        if self._buffered_bytes + byte_count > BUFFERED_BYTES_MAX:
            return Rejected(429, "The pending model requests are too large in total; send fewer at once.")
        self._buffered_bytes += byte_count
        return None

    def free_bytes(self, byte_count: int) -> None:
        """Release buffer space reserved by `reserve_bytes`."""
        self._buffered_bytes -= byte_count

    def check(self) -> Rejected | None:
        """Return a rejection if the next request must be rejected regardless of its body, otherwise None."""
        if self._key_rejection is not None:
            return self._key_rejection
        exhausted_reason = self._spending.exhausted_reason()
        return None if exhausted_reason is None else Rejected(BUDGET_STATUS, exhausted_reason)

    def check_body(self, body: bytes | bytearray, *, is_metered: bool) -> Rejected | ApprovedRequest:
        """Return the body to forward, or a rejection. is_metered: the response uses tokens."""
        document = _decode(self._dialect, body)
        if isinstance(document, Rejected):
            return document
        rejected = None if self._has_full_egress else self._external_access_rejection(document)
        if rejected is None and self._budget.usd is not None and is_metered:
            rejected = self._price_rejection(document)
        if rejected is not None:
            return rejected
        encoded = msgspec.json.encode(document)
        if len(encoded) > REQUEST_BODY_BYTES_MAX:
            return Rejected(413, "The numbers in the model request are too long when written out; send fewer.")
        # Numbers such as 1e15 are longer in the forwarded body.
        byte_count = max(len(body), len(encoded))
        cost_bound = (
            self._dialect.estimate_cost_bound(document, byte_count) if self.has_budget_limit and is_metered else None
        )
        if cost_bound is not None and not (
            is_token_count(cost_bound.input_tokens) and is_token_count(cost_bound.output_tokens_max)
        ):
            return Rejected(400, "The request's output token limit is out of range.")
        if cost_bound is not None and self._spending.must_reject(self._usage_bound(cost_bound)):
            message = "The model requests in flight may spend the rest of the budget; send fewer at once."
            return Rejected(429, message)
        return ApprovedRequest(encoded, cost_bound)

    def observe_status(self, status: int) -> bool:
        """Record the status of a response. Returns whether it means that the upstream rejected the server's key.

        403 may refer to the requested resource, so it counts as a rejected key only until the key has been accepted
        once.
        """
        self._has_accepted_key |= status < 300
        return status == 401 or (status == 403 and not self._has_accepted_key)

    def report_key_rejection(self, status: int, upstream: Upstream, body: bytes) -> Rejected:
        """Report that the key was rejected; return the response to send instead of the upstream's.

        body: the upstream's response. Only the report contains its message, because the sandbox must not receive
            details about the account that the server's key belongs to.
        """
        problem, todo = f"The model at {upstream.address} rejected the server's key ({status})", "check the key"
        if self._key_rejection is None:
            message = self._dialect.decode_error(upstream.key_redactor.redact(body))
            quote = self._reporter.quote(message).rstrip(".")
            quoted = f": {quote}" if quote else ""
            self._reporter.report_key_rejected(f"{problem}{quoted}; {todo}.")
        # The status is 403, because some agents retry for minutes after a 401.
        self._key_rejection = Rejected(403, f"{problem}; {todo}.")
        return self._key_rejection

    def record_progress(self, source: object, meter: UsageMeter) -> None:
        """Update the running cost of the response on the connection `source`."""
        if self._spending.has_budget_limit:
            self._spending.update(source, valid_usage(meter.partial_usage()))

    def record_start(self, source: object, cost_bound: CostBound | None) -> None:
        """Record a forwarded request whose response must be metered. `charge` removes the record."""
        if cost_bound is not None:
            self._spending.record_start(source, self._usage_bound(cost_bound))

    def _usage_bound(self, cost_bound: CostBound) -> Usage | None:
        meter = self._dialect.create_meter(b"application/json")
        return valid_usage(meter.upper_bound(cost_bound, is_fully_received=False))

    def charge(self, source: object, usage: Usage | None) -> None:
        """Record the final usage of the response on the connection `source`."""
        self._spending.finish(source, usage)

    def _external_access_rejection(self, document: dict[str, Any]) -> Rejected | None:
        reason = self._dialect.find_external_access(document, self._reporter.sanitize)
        if reason is None:
            return None
        message = (
            f"{reason} makes the model provider's servers access the network for the agent, which requires "
            "vm.network_mode full."
        )
        return Rejected(403, message)

    def _price_rejection(self, document: dict[str, Any]) -> Rejected | None:
        message = self._dialect.unpriced_reason(document, self._reporter.sanitize)
        return None if message is None else Rejected(BUDGET_STATUS, message)
