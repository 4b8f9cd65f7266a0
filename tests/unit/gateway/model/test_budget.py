"""A task's budget covers all its attempts and every kind of token; past it no request is forwarded."""

import pytest

from sandbox.gateway.event_reporter import EventReporter
from sandbox.gateway.limits import BUFFERED_BYTES_MAX
from sandbox.gateway.model.budget import ApprovedRequest, BudgetGate
from sandbox.gateway.model.request_policy import Rejected
from sandbox.gateway.model.usage_meter import JsonMeter, StreamMeter
from sandbox.interfaces.gateway import Budget, BudgetExhausted, GatewayRules
from sandbox.model.egress import EgressRule, EgressRules
from sandbox.model.events import Usage

MODEL = "claude-haiku-4-5"
STARTED = b'data: {"type": "message_start", "message": {"model": "claude-haiku-4-5", "usage": {"input_tokens": %d}}}\n'
REQUEST = b'{"model": "claude-haiku-4-5", "max_tokens": 9, "stream": true, "messages": []}'
WITH_A_FETCH = b'{"model": "claude-haiku-4-5", "tools": [{"type": "web_fetch_20250910", "name": "web_fetch"}]}'
WITHOUT_A_PRICE = b'{"model": "nobody-knows-it", "messages": []}'


def opened(budget: Budget = Budget(), **rules) -> tuple[BudgetGate, list]:
    told: list = []
    return BudgetGate(GatewayRules(budget=budget, **rules), EventReporter(told.append, lambda: 0.0)), told


def usage(
    input_tokens: int = 0, output_tokens: int = 0, read: int = 0, write: int = 0, usd: float | None = 0.0
) -> Usage:
    return Usage(MODEL, input_tokens, output_tokens, read, write, usd)


def refusal(admission: BudgetGate) -> str:
    refused = admission.check()
    assert isinstance(refused, Rejected)
    assert (refused.status, refused.error_type) == (403, "permission_error")
    return refused.message


# What earlier attempts have spent


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        (Budget(tokens=100, spent_tokens=90), "lifecycle.budget_tokens is spent (100 of 100 tokens)"),
        (Budget(usd=1.0, spent_usd=0.75), "lifecycle.budget_usd is spent (1 of 1 USD)"),
    ],
)
def test_an_attempt_has_what_the_earlier_ones_have_left_of_the_budget(budget, told):
    admission, reports = opened(budget)
    assert admission.check() is None
    admission.settle("first", usage(5, 4, usd=0.20))
    assert admission.check() is None
    admission.settle("second", usage(1, 0, usd=0.05))
    assert refusal(admission).startswith(told)
    assert reports == [BudgetExhausted(refusal(admission))]


@pytest.mark.parametrize(
    "budget", [Budget(tokens=100, spent_tokens=100), Budget(usd=1.0, spent_usd=1.0), Budget(usd=1.0, spent_usd=9.0)]
)
def test_an_attempt_after_one_that_has_spent_the_budget_forwards_nothing(budget):
    admission, reports = opened(budget)
    assert "is spent" in refusal(admission)
    assert reports == [BudgetExhausted(refusal(admission))]


def test_tokens_that_were_spent_do_not_count_as_dollars_nor_dollars_as_tokens():
    assert opened(Budget(tokens=100, spent_usd=500.0, spent_tokens=99))[0].check() is None
    assert opened(Budget(usd=100.0, spent_usd=99.0, spent_tokens=500))[0].check() is None


# What counts


@pytest.mark.parametrize(
    "used",
    [usage(input_tokens=10), usage(output_tokens=10), usage(read=10), usage(write=10), usage(1, 2, 3, 4)],
)
def test_every_kind_of_token_counts_once(used):
    admission, _ = opened(Budget(tokens=20))
    admission.settle("first", used)
    assert admission.check() is None
    admission.settle("second", used)
    assert refusal(admission).startswith("lifecycle.budget_tokens is spent (20 of 20 tokens)")


def test_a_budget_holds_a_token_before_its_end_and_not_at_it():
    admission, _ = opened(Budget(tokens=20))
    admission.settle("first", usage(19))
    assert admission.check() is None
    admission.settle("second", usage(1))
    assert admission.check() is not None
    in_dollars, _ = opened(Budget(usd=0.3))
    for number in range(3):
        assert in_dollars.check() is None
        in_dollars.settle(number, usage(usd=0.1))
    assert refusal(in_dollars).startswith("lifecycle.budget_usd is spent (0.3 of 0.3 USD)")


def test_costs_of_a_millionth_of_a_dollar_add_up():
    admission, _ = opened(Budget(usd=0.000003))
    admission.settle("first", usage(usd=0.000001))
    admission.settle("second", usage(usd=0.000001))
    assert admission.check() is None
    admission.settle("third", usage(usd=0.0000004))
    assert admission.check() is None, "less than half a millionth is none"
    admission.settle("fourth", usage(usd=0.0000006))
    assert admission.check() is not None


def test_costs_are_rounded_to_a_millionth_of_a_dollar():
    admission, _ = opened(Budget(usd=0.000003))
    admission.settle("first", usage(usd=0.0000026))
    assert admission.check() is not None


def test_an_answer_that_cost_nothing_costs_nothing():
    admission, _ = opened(Budget(usd=1.0))
    admission.settle("first", usage(5, 5, usd=0.0))
    assert admission.check() is None


@pytest.mark.parametrize("budget", [Budget(tokens=1000), Budget()])
def test_a_model_without_a_price_ends_nothing_where_dollars_are_not_bounded(budget):
    admission, _ = opened(budget)
    admission.settle("first", usage(1, usd=None))
    assert admission.check() is None


def test_a_model_without_a_price_that_has_answered_ends_a_budget_in_dollars():
    admission, reports = opened(Budget(usd=100.0))
    admission.settle("first", Usage("a-new-model", 1, 1, cost_usd=None))
    assert "The model a-new-model answered, which has no price" in refusal(admission)
    admission.settle("second", usage(1, usd=1.0))
    admission.check()
    assert len(reports) == 1


def test_that_the_budget_is_spent_is_told_at_once_and_not_at_the_next_request():
    for budget in (Budget(tokens=10), Budget(usd=1.0)):
        admission, reports = opened(budget)
        admission.settle("first", usage(10, usd=1.0))
        assert [type(one) for one in reports] == [BudgetExhausted]


# Answers that are under way


def streaming(*input_tokens: int) -> StreamMeter:
    meter = StreamMeter()
    for number in input_tokens:
        meter.feed(STARTED % number)
    return meter


def test_answers_under_way_count_by_what_they_have_told_last():
    admission, reports = opened(Budget(tokens=100))
    admission.record_progress("first", streaming(40))
    admission.record_progress("second", streaming(40))
    assert reports == []
    admission.record_progress("second", streaming(40, 59))
    assert reports == []
    admission.record_progress("second", streaming(60))
    assert [type(one) for one in reports] == [BudgetExhausted]
    assert refusal(admission).startswith("lifecycle.budget_tokens is spent (100 of 100 tokens)")


def test_an_answer_that_is_over_counts_once_and_one_that_cost_nothing_no_longer():
    admission, _ = opened(Budget(tokens=100))
    admission.record_progress("first", streaming(60))
    admission.settle("first", usage(60))
    assert admission.check() is None
    admission.record_progress("second", streaming(39))
    admission.settle("second", None)
    admission.record_progress("third", streaming(39))
    assert admission.check() is None


def test_a_document_is_counted_when_it_has_come_to_its_end():
    admission, _ = opened(Budget(tokens=1))
    meter = JsonMeter()
    meter.feed(b'{"model": "claude-haiku-4-5", "usage": {"input_tokens": 5}}')
    admission.record_progress("first", meter)
    assert admission.check() is None
    admission.settle("first", meter.usage())
    assert admission.check() is not None


def test_without_a_budget_nothing_is_counted_and_nothing_ends():
    admission, reports = opened()
    admission.record_progress("first", streaming(10**9))
    admission.settle("first", usage(10**9, usd=10.0**9))
    assert not admission.has_budget
    assert (admission.check(), reports) == (None, [])


# Which requests wait for their body, and what of them is remembered


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
def test_a_body_is_read_where_it_may_matter(rules, needs_body):
    admission, _ = opened(**rules)
    assert admission.needs_body is needs_body


def test_a_body_is_read_while_the_agent_is_held_back():
    admission, _ = opened(egress=EgressRules(is_unrestricted=True), hold_model_requests=True)
    assert admission.needs_body
    admission.release()
    assert not admission.needs_body


def test_a_request_is_remembered_where_its_answer_may_not_go_uncounted():
    bounded, free = opened(Budget(tokens=10**6))[0], opened()[0]
    admitted = bounded.check_body(REQUEST, is_metered=True)
    assert isinstance(admitted, ApprovedRequest)
    assert (admitted.cost_bound.model, admitted.cost_bound.input_tokens) == (MODEL, len(REQUEST) // 3)
    assert (admitted.cost_bound.output_tokens_max, admitted.cost_bound.is_streamed) == (9, True)
    assert bounded.check_body(REQUEST, is_metered=False).cost_bound is None
    assert free.check_body(REQUEST, is_metered=True).cost_bound is None


def test_dollars_are_bounded_for_what_spends_tokens_only():
    in_dollars, in_tokens = opened(Budget(usd=1.0))[0], opened(Budget(tokens=1000))[0]
    refused = in_dollars.check_body(WITHOUT_A_PRICE, is_metered=True)
    assert isinstance(refused, Rejected)
    assert (refused.status, refused.error_type) == (403, "permission_error")
    assert isinstance(in_dollars.check_body(WITHOUT_A_PRICE, is_metered=False), ApprovedRequest)
    assert isinstance(in_tokens.check_body(WITHOUT_A_PRICE, is_metered=True), ApprovedRequest)


def test_a_price_does_not_let_through_what_reaches_elsewhere():
    in_dollars, _ = opened(Budget(usd=1.0))
    refused = in_dollars.check_body(WITH_A_FETCH, is_metered=True)
    assert isinstance(refused, Rejected)
    assert (refused.status, refused.error_type) == (403, "permission_error")
    assert "vm.network_mode full only" in refused.message
    everywhere, _ = opened(Budget(usd=1.0), egress=EgressRules(is_unrestricted=True))
    assert isinstance(everywhere.check_body(WITH_A_FETCH, is_metered=True), ApprovedRequest)


# Room for waiting bodies


def test_bodies_that_wait_have_so_much_room_together_and_not_a_byte_more():
    admission, _ = opened()
    assert admission.reserve_bytes(BUFFERED_BYTES_MAX - 10) is None
    assert admission.reserve_bytes(10) is None
    refused = admission.reserve_bytes(1)
    assert isinstance(refused, Rejected)
    assert (refused.status, refused.error_type) == (429, "rate_limit_error")
    admission.free_bytes(10)
    assert admission.reserve_bytes(10) is None
    assert admission.reserve_bytes(1) is not None
    admission.free_bytes(BUFFERED_BYTES_MAX)
    assert admission.reserve_bytes(BUFFERED_BYTES_MAX) is None


# The server's key


def test_a_key_is_good_once_an_answer_was_and_not_before():
    for good, other in ((200, 300), (299, 404)):
        known, unknown = opened()[0], opened()[0]
        known.check_response_status(good, "up.example")
        unknown.check_response_status(other, "up.example")
        assert known.check_response_status(403, "up.example") is None
        assert unknown.check_response_status(403, "up.example") is not None


def test_a_refused_key_is_told_once_and_refuses_what_comes_after():
    admission, reports = opened()
    refused = admission.check_response_status(401, "up.example")
    assert (refused.status, refused.error_type) == (403, "permission_error")
    assert admission.check_response_status(401, "up.example") == refused
    assert admission.check() == refused
    assert len(reports) == 1
