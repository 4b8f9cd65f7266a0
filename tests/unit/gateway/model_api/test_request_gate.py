"""A task's budget covers all attempts and every kind of token. Once it is spent, no request is forwarded."""

import time
import tracemalloc

import pytest

from doubles.responses_api import ResponsesApi
from sandbox.agents.claude_code.messages_api.dialect import MessagesApi
from sandbox.agents.claude_code.messages_api.usage_meter import JsonMeter, StreamMeter
from sandbox.gateway import limits
from sandbox.gateway.event_reporter import EventReporter
from sandbox.gateway.limits import BUFFERED_BYTES_MAX, IN_FLIGHT_REQUESTS_WITHOUT_COST_CHECK
from sandbox.gateway.model_api import request_gate
from sandbox.gateway.model_api.request_gate import ApprovedRequest, ModelRequestGate, Rejected
from sandbox.gateway.model_api.upstream import parse_upstream
from sandbox.interfaces.gateway import Budget, BudgetExhausted, CostBound, GatewayRules, ModelDialect, ModelUpstream
from sandbox.model.egress import EgressRule, EgressRules
from sandbox.model.events import Usage

MODEL = "claude-haiku-4-5"
STARTED = b'data: {"type": "message_start", "message": {"model": "claude-haiku-4-5", "usage": {"input_tokens": %d}}}\n'
REQUEST = b'{"model": "claude-haiku-4-5", "max_tokens": 9, "stream": true, "messages": []}'
WEB_FETCH_REQUEST = b'{"model": "claude-haiku-4-5", "tools": [{"type": "web_fetch_20250910", "name": "web_fetch"}]}'
UNPRICED_REQUEST = b'{"model": "nobody-knows-it", "messages": []}'


def create_gate(budget: Budget = Budget(), **rules) -> tuple[ModelRequestGate, list]:
    events: list = []
    return ModelRequestGate(
        GatewayRules(budget=budget, **rules), EventReporter(events.append, lambda: 0.0), MessagesApi()
    ), events


def usage(
    input_tokens: int = 0,
    output_tokens: int = 0,
    cache_read_tokens: int = 0,
    cache_write_tokens: int = 0,
    usd: float | None = 0.0,
) -> Usage:
    return Usage(MODEL, input_tokens, output_tokens, cache_read_tokens, cache_write_tokens, usd)


def rejection_message(gate: ModelRequestGate) -> str:
    rejection = gate.check()
    assert isinstance(rejection, Rejected)
    assert rejection.status == 402, "Claude Code prints login advice after 403, and repeats requests after other errors"
    return rejection.message


# Spending by earlier attempts


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(tokens=100, spent_tokens=90), "lifecycle.budget_tokens (100 tokens) is spent"),
        (Budget(usd=1.0, spent_usd=0.75), "lifecycle.budget_usd (1 USD) is spent"),
    ],
)
def test_attempt_has_the_budget_left_by_earlier_attempts(budget, message):
    gate, events = create_gate(budget)
    assert gate.check() is None
    gate.charge("first", usage(5, 4, usd=0.20))
    assert gate.check() is None
    gate.charge("second", usage(1, 0, usd=0.05))
    assert rejection_message(gate).startswith(message)
    assert events == [BudgetExhausted(rejection_message(gate))]


@pytest.mark.parametrize(
    "budget", [Budget(tokens=100, spent_tokens=100), Budget(usd=1.0, spent_usd=1.0), Budget(usd=1.0, spent_usd=9.0)]
)
def test_attempt_with_a_spent_budget_forwards_nothing(budget):
    gate, events = create_gate(budget)
    assert "is spent" in rejection_message(gate)
    assert events == [BudgetExhausted(rejection_message(gate))]


def test_token_and_usd_budgets_are_independent():
    assert create_gate(Budget(tokens=100, spent_usd=500.0, spent_tokens=99))[0].check() is None
    assert create_gate(Budget(usd=100.0, spent_usd=99.0, spent_tokens=500))[0].check() is None


# Counted tokens and costs


@pytest.mark.parametrize(
    "used",
    [
        usage(input_tokens=10),
        usage(output_tokens=10),
        usage(cache_read_tokens=10),
        usage(cache_write_tokens=10),
        usage(1, 2, 3, 4),
    ],
)
def test_every_kind_of_token_counts_once(used):
    gate, _ = create_gate(Budget(tokens=20))
    gate.charge("first", used)
    assert gate.check() is None
    gate.charge("second", used)
    assert rejection_message(gate).startswith("lifecycle.budget_tokens (20 tokens) is spent")


def test_budget_is_spent_when_usage_equals_the_budget():
    gate, _ = create_gate(Budget(tokens=20))
    gate.charge("first", usage(19))
    assert gate.check() is None
    gate.charge("second", usage(1))
    assert gate.check() is not None
    usd_gate, _ = create_gate(Budget(usd=0.3))
    for number in range(3):
        assert usd_gate.check() is None
        usd_gate.charge(number, usage(usd=0.1))
    assert rejection_message(usd_gate).startswith("lifecycle.budget_usd (0.3 USD) is spent")


def test_costs_of_a_millionth_of_a_dollar_are_summed():
    gate, _ = create_gate(Budget(usd=0.000003))
    gate.charge("first", usage(usd=0.000001))
    gate.charge("second", usage(usd=0.000001))
    assert gate.check() is None
    gate.charge("third", usage(usd=0.0000004))
    assert gate.check() is None, "less than half a millionth rounds to zero"
    gate.charge("fourth", usage(usd=0.0000006))
    assert gate.check() is not None


def test_costs_are_rounded_to_a_millionth_of_a_dollar():
    gate, _ = create_gate(Budget(usd=0.000003))
    gate.charge("first", usage(usd=0.0000026))
    assert gate.check() is not None


def test_response_without_cost_spends_no_dollars():
    gate, _ = create_gate(Budget(usd=1.0))
    gate.charge("first", usage(5, 5, usd=0.0))
    assert gate.check() is None


@pytest.mark.parametrize("budget", [Budget(tokens=1000), Budget()])
def test_unpriced_model_is_allowed_without_a_usd_budget(budget):
    gate, _ = create_gate(budget)
    gate.charge("first", usage(1, usd=None))
    assert gate.check() is None


def test_response_of_an_unpriced_model_exhausts_a_usd_budget():
    gate, events = create_gate(Budget(usd=100.0))
    gate.charge("first", Usage("a-new-model", 1, 1, cost_usd=None))
    assert "A response came from the model a-new-model, which has no known price" in rejection_message(gate)
    gate.charge("second", usage(1, usd=1.0))
    gate.check()
    assert len(events) == 1


def test_exhausted_budget_is_reported_immediately():
    for budget in (Budget(tokens=10), Budget(usd=1.0)):
        gate, events = create_gate(budget)
        gate.charge("first", usage(10, usd=1.0))
        assert [type(one) for one in events] == [BudgetExhausted]


# Responses in progress


def streaming_meter(*input_tokens: int) -> StreamMeter:
    meter = StreamMeter()
    for number in input_tokens:
        meter.feed(STARTED % number)
    return meter


def test_responses_in_progress_count_with_their_latest_usage():
    gate, events = create_gate(Budget(tokens=100))
    gate.record_progress("first", streaming_meter(40))
    gate.record_progress("second", streaming_meter(40))
    assert events == []
    gate.record_progress("second", streaming_meter(40, 59))
    assert events == []
    gate.record_progress("second", streaming_meter(60))
    assert [type(one) for one in events] == [BudgetExhausted]
    assert rejection_message(gate).startswith("lifecycle.budget_tokens (100 tokens) is spent")


def test_charge_of_a_response_replaces_its_progress():
    gate, _ = create_gate(Budget(tokens=100))
    gate.record_progress("first", streaming_meter(60))
    gate.charge("first", usage(60))
    assert gate.check() is None
    gate.record_progress("second", streaming_meter(39))
    gate.charge("second", None)
    gate.record_progress("third", streaming_meter(39))
    assert gate.check() is None


def test_json_response_is_counted_when_it_is_complete():
    gate, _ = create_gate(Budget(tokens=1))
    meter = JsonMeter()
    meter.feed(b'{"model": "claude-haiku-4-5", "usage": {"input_tokens": 5}}')
    gate.record_progress("first", meter)
    assert gate.check() is None
    gate.charge("first", meter.usage())
    assert gate.check() is not None


def test_gate_without_a_budget_is_never_exhausted():
    gate, events = create_gate()
    gate.record_progress("first", streaming_meter(10**9))
    gate.charge("first", usage(10**9, usd=10.0**9))
    assert not gate.has_budget_limit
    assert (gate.check(), events) == (None, [])


# Buffered bodies and recorded cost bounds


@pytest.mark.parametrize(
    ("rules", "needs_body"),
    [
        ({}, True),
        ({"egress": EgressRules((EgressRule("files.example.org"),))}, True),
        ({"egress": EgressRules(is_unrestricted=True)}, False),
        ({"egress": EgressRules(is_unrestricted=True), "budget": Budget(tokens=0)}, True),
        ({"egress": EgressRules(is_unrestricted=True), "budget": Budget(usd=0.0)}, True),
    ],
)
def test_body_is_needed_with_restricted_egress_or_a_budget(rules, needs_body):
    gate, _ = create_gate(**rules)
    assert gate.needs_body is needs_body


def test_body_is_needed_if_requests_can_refer_to_stored_data():
    rules = GatewayRules(egress=EgressRules(is_unrestricted=True))
    reporter = EventReporter([].append, lambda: 0.0)
    assert ModelRequestGate(rules, reporter, ResponsesApi()).needs_body
    assert not ModelRequestGate(rules, reporter, MessagesApi()).needs_body


def test_body_is_needed_while_model_requests_are_held():
    gate, _ = create_gate(egress=EgressRules(is_unrestricted=True), hold_model_requests=True)
    assert gate.needs_body
    gate.release()
    assert not gate.needs_body


def test_cost_bound_is_recorded_for_metered_requests_with_a_budget():
    limited, unlimited = create_gate(Budget(tokens=10**6))[0], create_gate()[0]
    approved = limited.check_body(REQUEST, is_metered=True)
    assert isinstance(approved, ApprovedRequest)
    assert (approved.cost_bound.model, approved.cost_bound.input_tokens) == (MODEL, len(REQUEST) // 3)
    assert (approved.cost_bound.output_tokens_max, approved.cost_bound.is_streamed) == (9, True)
    assert limited.check_body(REQUEST, is_metered=False).cost_bound is None
    assert unlimited.check_body(REQUEST, is_metered=True).cost_bound is None


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        (MessagesApi(), b'{"model": "claude-haiku-4-5", "max_tokens": 9, "tools": [{"input_schema": {"enum": [%s]}}]}'),
        (ResponsesApi(), b'{"model": "scripted-1", "tools": [{"type": "function", "parameters": {"enum": [%s]}}]}'),
    ],
)
def test_cost_bound_counts_the_bytes_that_are_forwarded(dialect, body):
    """The number 1e15 has 4 bytes in the request, and 18 bytes in the forwarded body."""
    rules = GatewayRules(budget=Budget(tokens=10**9))
    gate = ModelRequestGate(rules, EventReporter([].append, lambda: 0.0), dialect)
    approved = gate.check_body(body % b", ".join([b"1e15"] * 1000), is_metered=True)
    assert isinstance(approved, ApprovedRequest)
    assert len(approved.body) > 18_000
    assert approved.cost_bound.input_tokens >= len(approved.body) // 3


def test_request_whose_forwarded_body_is_too_long_is_rejected(monkeypatch):
    monkeypatch.setattr(request_gate, "REQUEST_BODY_BYTES_MAX", 1000)
    gate, _ = create_gate()
    body = b'{"model": "claude-haiku-4-5", "messages": [], "tools": [{"input_schema": {"enum": [%s]}}]}'
    assert isinstance(gate.check_body(body % b"1e15, 1e15", is_metered=True), ApprovedRequest)
    rejected = gate.check_body(body % b", ".join([b"1e15"] * 100), is_metered=True)
    assert isinstance(rejected, Rejected)
    assert rejected.status == 413


def test_message_states_the_size_limit_in_mebibytes():
    assert request_gate.too_large().message == "The request body is larger than 32 MiB."


def test_unpriced_model_is_rejected_only_for_metered_requests_in_usd():
    usd_gate, token_gate = create_gate(Budget(usd=1.0))[0], create_gate(Budget(tokens=1000))[0]
    rejection = usd_gate.check_body(UNPRICED_REQUEST, is_metered=True)
    assert isinstance(rejection, Rejected)
    assert rejection.status == 402
    assert isinstance(usd_gate.check_body(UNPRICED_REQUEST, is_metered=False), ApprovedRequest)
    assert isinstance(token_gate.check_body(UNPRICED_REQUEST, is_metered=True), ApprovedRequest)


def test_external_access_is_rejected_even_for_a_priced_model():
    usd_gate, _ = create_gate(Budget(usd=1.0))
    rejection = usd_gate.check_body(WEB_FETCH_REQUEST, is_metered=True)
    assert isinstance(rejection, Rejected)
    assert rejection.status == 403
    assert "requires vm.network_mode full" in rejection.message
    unrestricted, _ = create_gate(Budget(usd=1.0), egress=EgressRules(is_unrestricted=True))
    assert isinstance(unrestricted.check_body(WEB_FETCH_REQUEST, is_metered=True), ApprovedRequest)


# Memory for buffered bodies


def test_buffered_bodies_share_a_byte_limit():
    gate, _ = create_gate()
    assert gate.reserve_bytes(BUFFERED_BYTES_MAX - 10) is None
    assert gate.reserve_bytes(10) is None
    rejection = gate.reserve_bytes(1)
    assert isinstance(rejection, Rejected)
    assert rejection.status == 429
    gate.free_bytes(10)
    assert gate.reserve_bytes(10) is None
    assert gate.reserve_bytes(1) is not None
    gate.free_bytes(BUFFERED_BYTES_MAX)
    assert gate.reserve_bytes(BUFFERED_BYTES_MAX) is None


# Token counting by a dialect

TOKENS_MAX = 10**12


class FixedBoundDialect(MessagesApi):
    """Reports the same upper bound for every request."""

    def __init__(self, bound: CostBound) -> None:
        super().__init__()
        self.bound = bound

    def estimate_cost_bound(self, document: object, body_bytes: int) -> CostBound:
        return self.bound


@pytest.mark.parametrize(
    ("input_tokens", "output_tokens", "is_forwarded"),
    [
        (TOKENS_MAX, TOKENS_MAX, True),
        (TOKENS_MAX + 1, 1, False),
        (1, TOKENS_MAX + 1, False),
        (-1, 1, False),
        (1, -1, False),
    ],
)
def test_request_is_forwarded_only_if_both_upper_bounds_are_valid(input_tokens, output_tokens, is_forwarded):
    dialect = FixedBoundDialect(CostBound(MODEL, input_tokens, output_tokens, is_streamed=False))
    rules = GatewayRules(budget=Budget(tokens=100))
    gate = ModelRequestGate(rules, EventReporter([].append, lambda: 0.0), dialect)
    outcome = gate.check_body(REQUEST, is_metered=True)
    assert isinstance(outcome, ApprovedRequest) is is_forwarded
    if not is_forwarded:
        assert isinstance(outcome, Rejected)
        assert outcome.status == 400


# The server's key


def test_403_counts_as_a_rejected_key_only_before_the_first_success():
    for good, other in ((200, 300), (299, 404)):
        known, unknown = create_gate()[0], create_gate()[0]
        assert not known.observe_status(good)
        assert not unknown.observe_status(other)
        assert not known.observe_status(403)
        assert unknown.observe_status(403)


def test_rejected_key_is_reported_once_and_rejects_later_requests():
    gate, events = create_gate()
    upstream = parse_upstream(ModelUpstream("https://up.example", api_key="key"), MessagesApi())
    rejection = gate.report_key_rejection(401, upstream, b"")
    assert rejection.status == 403
    assert gate.report_key_rejection(401, upstream, b"") == rejection
    assert gate.check() == rejection
    assert len(events) == 1


# Requests in flight

PARALLEL_REQUEST = b'{"model": "claude-haiku-4-5", "max_tokens": 2000, "stream": true, "messages": []}'
"""Costs at most 0.01 USD."""


def start_requests(gate: ModelRequestGate, count: int) -> list[ApprovedRequest | Rejected]:
    decisions = []
    for number in range(count):
        decision = gate.check_body(PARALLEL_REQUEST, is_metered=True)
        decisions.append(decision)
        if isinstance(decision, ApprovedRequest):
            gate.record_start(number, decision.cost_bound)
    return decisions


@pytest.mark.parametrize("budget", [Budget(usd=0.05), Budget(tokens=10_000), Budget(usd=1.0, spent_usd=0.95)])
def test_number_of_requests_that_may_exceed_the_budget_is_limited(budget):
    gate, events = create_gate(budget)
    decisions = start_requests(gate, 128)
    assert all(isinstance(each, ApprovedRequest) for each in decisions[:IN_FLIGHT_REQUESTS_WITHOUT_COST_CHECK])
    assert {each.status for each in decisions[IN_FLIGHT_REQUESTS_WITHOUT_COST_CHECK:]} == {429}
    assert gate.check() is None
    assert events == []


@pytest.mark.parametrize("budget", [Budget(), Budget(usd=2.0), Budget(tokens=300_000)])
def test_concurrent_requests_are_approved_if_the_budget_covers_all_of_them(budget):
    gate, _ = create_gate(budget)
    assert all(isinstance(each, ApprovedRequest) for each in start_requests(gate, 128))


def test_request_is_approved_again_when_another_request_has_ended():
    gate, _ = create_gate(Budget(usd=0.05))
    start_requests(gate, 17)
    gate.charge(3, usage(5, 5, usd=0.0001))
    assert isinstance(gate.check_body(PARALLEL_REQUEST, is_metered=True), ApprovedRequest)


def test_requests_that_cost_nothing_are_not_limited():
    gate, _ = create_gate(Budget(usd=0.05))
    start_requests(gate, 17)
    assert isinstance(gate.check_body(PARALLEL_REQUEST, is_metered=False), ApprovedRequest)


class ReceivedBytesMeter(JsonMeter):
    """Bounds the output of a fully received response by its size, like the meter for streams."""

    def upper_bound(self, cost_bound: CostBound, *, is_fully_received: bool) -> Usage | None:
        return usage(cost_bound.input_tokens, 0 if is_fully_received else cost_bound.output_tokens_max)


class ReceivedBytesDialect(MessagesApi):
    def create_meter(self, content_type: bytes) -> ReceivedBytesMeter:
        return ReceivedBytesMeter()


def test_upper_bound_of_a_request_in_flight_is_not_limited_to_the_bytes_received():
    rules = GatewayRules(budget=Budget(tokens=IN_FLIGHT_REQUESTS_WITHOUT_COST_CHECK * 2000))
    gate = ModelRequestGate(rules, EventReporter([].append, lambda: 0.0), ReceivedBytesDialect())
    decisions = start_requests(gate, 128)
    rejected = [each.status for each in decisions if isinstance(each, Rejected)]
    assert rejected == [429] * (128 - IN_FLIGHT_REQUESTS_WITHOUT_COST_CHECK)


class RecordingDialect(MessagesApi):
    """Records the content types for which meters are created."""

    def __init__(self) -> None:
        self.content_types: list[bytes] = []

    def create_meter(self, content_type: bytes) -> ReceivedBytesMeter:
        self.content_types.append(content_type)
        return ReceivedBytesMeter()


def test_bound_of_a_request_in_flight_is_that_of_a_json_response():
    dialect = RecordingDialect()
    gate = ModelRequestGate(GatewayRules(budget=Budget(tokens=9)), EventReporter([].append, lambda: 0.0), dialect)
    start_requests(gate, 1)
    assert set(dialect.content_types) == {b"application/json"}


# JSON values


def is_rejected(body: bytes, dialect: ModelDialect) -> bool:
    reporter = EventReporter(lambda _: None, lambda: 0.0)
    decision = ModelRequestGate(GatewayRules(), reporter, dialect).check_body(body, is_metered=True)
    if isinstance(decision, Rejected):
        assert decision.status == 413
    return isinstance(decision, Rejected)


@pytest.mark.parametrize("dialect", [MessagesApi(), ResponsesApi()])
def test_request_with_too_many_json_values_is_rejected(monkeypatch, dialect):
    monkeypatch.setattr(limits, "REQUEST_JSON_VALUES_MAX", 12)
    # The limit counts opening brackets, colons and commas: here one brace, two colons, one bracket, `count` + 1 commas.
    for count, is_denied in ((7, False), (8, True)):
        values = b",".join([b"1"] * (count + 1))
        assert is_rejected(b'{"model":"m","input":[%s]}' % values, dialect) is is_denied
    for sign in (b",", b":", b"[", b"{"):
        assert is_rejected(b'{"model":"m%s"}' % (sign * 11), dialect)
        assert not is_rejected(b'{"model":"m%s"}' % (sign * 10), dialect)
    assert not is_rejected(b'{"model":"%s"}' % (b"}]." * 50), dialect)


@pytest.mark.parametrize("dialect", [MessagesApi(), ResponsesApi()])
def test_request_may_have_half_a_million_json_values(dialect):
    assert not is_rejected(b'{"model":"m","input":"%s"}' % (b"," * 499_996), dialect)
    assert is_rejected(b'{"model":"m","input":"%s"}' % (b"," * 499_997), dialect)


@pytest.mark.parametrize("dialect", [MessagesApi(), ResponsesApi()])
def test_number_of_long_integers_is_limited(dialect):
    """Converting an integer with thousands of digits takes a hundred microseconds."""
    for digits, count, is_denied in ((299, 101, False), (300, 100, False), (300, 101, True), (4300, 7000, True)):
        integers = b", ".join([b"-" + (b"1234567890" * 430)[:digits]] * count)
        started_at = time.process_time()
        assert is_rejected(b'{"model":"m","input":[%s]}' % integers, dialect) is is_denied
        assert time.process_time() - started_at < 1.0
    text = b"9" * 5000 + b"." + b"9" * 5000
    assert not is_rejected(b'{"model":"m","input":"%s"}' % (text * 200), dialect)


@pytest.mark.parametrize("dialect", [MessagesApi(), ResponsesApi()])
def test_long_integer_is_found_anywhere_in_a_large_body(monkeypatch, dialect):
    monkeypatch.setattr(limits, "LONG_INTEGERS_MAX", 0)
    for begin in range(64 * 1024 - 301, 64 * 1024 + 1):
        for digits, is_denied in ((299, False), (300, True)):
            body = b'{"model":"m","input":['.ljust(begin) + b"7" * digits + b"]}"
            assert is_rejected(body, dialect) is is_denied


@pytest.mark.parametrize("dialect", [MessagesApi(), ResponsesApi()])
def test_request_with_too_many_json_values_is_not_decoded(dialect):
    body = b'{"model":"m","input":[%s[]]}' % (b"[]," * 1_000_000)
    tracemalloc.start()
    assert is_rejected(body, dialect)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1_000_000
