"""Requests in progress count with their upper bounds, and a dialect's usage counts only if it is valid."""

import math

import pytest

from sandbox.gateway.event_reporter import EventReporter
from sandbox.gateway.limits import IN_FLIGHT_REQUESTS_WITHOUT_COST_CHECK
from sandbox.gateway.model_api.request_gate import BudgetSpending, valid_usage
from sandbox.interfaces.gateway import Budget
from sandbox.model.events import Usage

TOKENS_MAX = 10**12
COUNTS = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens")


def usage(usd: float | None = 0.0, **tokens: int) -> Usage:
    return Usage("claude-haiku-4-5", cost_usd=usd, **dict.fromkeys(COUNTS[:2], 0) | tokens)


@pytest.mark.parametrize("name", COUNTS)
def test_usage_is_valid_only_if_each_count_is_valid(name):
    for count, is_valid in ((0, True), (TOKENS_MAX, True), (TOKENS_MAX + 1, False), (-1, False), (True, False)):
        counted = usage(**{name: count})
        assert valid_usage(counted) is (counted if is_valid else None), count


@pytest.mark.parametrize(
    ("cost_usd", "is_valid"),
    [
        (None, True),
        (0.0, True),
        (0.5, True),
        (1e9, True),
        (1.1e9, False),
        (-0.5, False),
        (math.nan, False),
        (math.inf, False),
    ],
)
def test_usage_is_valid_only_if_its_cost_is_within_limits(cost_usd, is_valid):
    counted = Usage("claude", 1, 1, cost_usd=cost_usd)
    assert valid_usage(counted) is (counted if is_valid else None)


@pytest.mark.parametrize(("spent_tokens", "spent_usd"), [(0, 0.0), (7, 0.25)])
@pytest.mark.parametrize("kind", ["tokens", "usd"])
@pytest.mark.parametrize("is_exceeded", [False, True])
def test_bound_of_the_next_request_is_added_to_those_of_earlier_requests(
    spent_tokens: int, spent_usd: float, kind: str, is_exceeded: bool
):
    """The budget exactly covers the earlier attempts and these requests, or is one token or 0.001 USD too small."""
    bound, requests = usage(0.5, input_tokens=100, output_tokens=50), IN_FLIGHT_REQUESTS_WITHOUT_COST_CHECK + 1
    tokens = spent_tokens + 150 * requests - (1 if is_exceeded else 0)
    usd = spent_usd + 0.5 * requests - (0.001 if is_exceeded else 0.0)
    limits = {"tokens": tokens} if kind == "tokens" else {"usd": usd}
    budget = Budget(spent_tokens=spent_tokens, spent_usd=spent_usd, **limits)
    spending = BudgetSpending(budget, EventReporter([].append, lambda: 0.0))
    for source in range(IN_FLIGHT_REQUESTS_WITHOUT_COST_CHECK):
        spending.record_start(source, bound)
    assert spending.must_reject(bound) is is_exceeded


def test_request_without_a_cost_bound_adds_no_cost():
    spending = BudgetSpending(Budget(usd=0.5), EventReporter([].append, lambda: 0.0))
    for source in range(IN_FLIGHT_REQUESTS_WITHOUT_COST_CHECK):
        spending.record_start(source, usage(None, input_tokens=100, output_tokens=50))
    assert not spending.must_reject(usage(0.5, input_tokens=100, output_tokens=50))
    assert spending.must_reject(usage(0.501, input_tokens=100, output_tokens=50))
