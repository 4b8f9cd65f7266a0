"""Decides when a model request may be forwarded.

Requests are held until the agent has been checked. They are denied if they would make the model's servers access
external resources, if the budget is spent, or if the server's key was rejected.
"""

import re
from typing import Any

import msgspec

from sandbox.gateway import limits
from sandbox.gateway.event_reporter import EventReporter
from sandbox.gateway.limits import BUFFERED_BYTES_MAX, REQUEST_BODY_BYTES_MAX
from sandbox.gateway.model_api.budget_spending import BudgetSpending, is_token_count, valid_usage
from sandbox.gateway.model_api.upstream import Upstream
from sandbox.interfaces.gateway import GatewayRules
from sandbox.interfaces.model_dialect import CostBound, ModelDialect, Rejected, UsageMeter
from sandbox.model.events import Usage

BUDGET_STATUS = 402
"""Status of the response to a request that the budget does not allow.

Agents show its message and end. Some agents repeat a request after 400, 409 or 422, print advice about the login
before the message after 403, and replace the message after 404 or 413.
"""


_STRUCTURAL_BYTES = (b",", b":", b"[", b"{")
_LONG_INTEGER = re.compile(rb"[\[:,][ \t\n\r]*+-?[0-9]{%d}" % limits.LONG_INTEGER_DIGITS)
"""Matches the start of a long integer, and of the same characters in a string."""


def _decode(dialect: ModelDialect, body: bytes | bytearray) -> dict[str, Any] | Rejected:
    """Decode the body, or reject it. A body that needs too much memory or time is rejected before it is decoded."""
    if sum(map(body.count, _STRUCTURAL_BYTES)) > limits.REQUEST_JSON_VALUES_MAX:
        count = limits.REQUEST_JSON_VALUES_MAX
        return Rejected(413, f"The request body has more than {count} commas, colons and opening brackets.")
    if sum(1 for _ in _LONG_INTEGER.finditer(body)) > limits.LONG_INTEGERS_MAX:
        count, digits = limits.LONG_INTEGERS_MAX, limits.LONG_INTEGER_DIGITS
        return Rejected(413, f"The request body has more than {count} integers with {digits} or more digits.")
    return dialect.decode_request(body)


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
        """Whether there is a budget. If there is one, every response must be metered."""
        return self._spending.has_budget_limit

    def release(self) -> None:
        """Stop holding requests."""
        self.is_holding = False

    def reserve_bytes(self, byte_count: int) -> Rejected | None:
        """Reserve buffer space for a request body, or return a rejection if the limit is reached.

        `free_bytes` releases the space.
        """
        if self._buffered_bytes + byte_count > BUFFERED_BYTES_MAX:
            return Rejected(429, "Too many bytes of model requests are pending; send fewer at once.")
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
        if cost_bound is not None and self._spending.may_be_exceeded(self._usage_bound(cost_bound)):
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
        reason = self._dialect.external_access_reason(document, self._reporter.sanitize)
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
