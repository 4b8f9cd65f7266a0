"""Where there is a budget, an answer that ends before it has told its cost counts as the most that it can have cost."""

import json

import pytest

from sandbox.gateway.event_reporter import EventReporter
from sandbox.gateway.limits import INPUT_TOKENS_MAX, OUTPUT_TOKENS_MAX
from sandbox.gateway.model.budget import BudgetGate
from sandbox.gateway.model.dialer import parse_upstream
from sandbox.gateway.model.protocol import ModelProtocol
from sandbox.gateway.model.request_policy import ModelPolicy
from sandbox.interfaces.gateway import Budget, GatewayRules, ModelUpstream
from sandbox.model.egress import EgressRules
from sandbox.model.events import ErrorReported, Usage

TASK_KEY = "task-key-of-this-task"
MODEL = "claude-haiku-4-5"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DOCUMENT_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
START = {"type": "message_start", "message": {"model": MODEL, "usage": {"input_tokens": 10, "output_tokens": 1}}}
DELTA = {"type": "message_delta", "usage": {"output_tokens": 7}}
OVERLOADED = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
USD, TOKENS, NONE = Budget(usd=1000.0), Budget(tokens=10**9), Budget()


def text(said: str) -> dict:
    return {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": said}}


def sse(*events: dict) -> bytes:
    data = b"".join(f"event: {e['type']}\ndata: {json.dumps(e, separators=(',', ':'))}\n\n".encode() for e in events)
    return b"%x\r\n%s\r\n" % (len(data), data)


class Asking:
    """One request, forwarded under a budget."""

    def __init__(self, budget: Budget = USD, *, is_full: bool = False, headers: str = "", **fields) -> None:
        self.told: list = []
        reports = EventReporter(self.told.append, lambda: 0.0)
        rules = GatewayRules(egress=EgressRules(is_unrestricted=is_full), budget=budget)
        upstream = parse_upstream(ModelUpstream("https://up.example", api_key="sk-the-servers-own"))
        self.conversation = ModelProtocol(
            ModelPolicy(TASK_KEY, 8123), BudgetGate(rules, reports), upstream, reports, 8123
        )
        body = json.dumps({"model": MODEL, "max_tokens": 64_000, "messages": []} | fields).encode()
        head = f"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1:8123\r\nX-Api-Key: {TASK_KEY}\r\n{headers}"
        self.conversation.client_data_received(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert self.conversation.is_in_flight
        self.body_bytes = len(body)

    def heard(self, *said: bytes) -> "Asking":
        for one in said:
            self.conversation.upstream_data_received(one)
        return self

    @property
    def usage(self) -> Usage | None:
        usages = [one for one in self.told if isinstance(one, Usage)]
        assert len(usages) <= 1
        return usages[0] if usages else None

    @property
    def troubles(self) -> list[str]:
        return [one.error for one in self.told if isinstance(one, ErrorReported)]


@pytest.mark.parametrize("budget", [USD, TOKENS])
@pytest.mark.parametrize("is_full", [True, False])
def test_a_stream_that_breaks_costs_a_token_for_each_byte_that_was_heard(budget, is_full):
    """No token is shorter; so who has a bad line pays for what came, not for all that might have come."""
    asking = Asking(budget, stream=True, is_full=is_full)
    asking.heard(STREAM_HEAD, sse(START), *[sse(text("x" * 500))] * 20, b"")
    assert (asking.usage.model, asking.usage.input_tokens) == (MODEL, 10)
    assert 20 * 500 <= asking.usage.output_tokens < 20 * 500 + 1000
    assert asking.usage.cost_usd == pytest.approx((10 + asking.usage.output_tokens * 5) / 1e6)
    assert "usage_unread" in asking.troubles


def test_it_never_costs_more_than_was_asked_for():
    asking = Asking(stream=True, max_tokens=300).heard(STREAM_HEAD, sse(START), sse(text("x" * 5000)), b"")
    assert asking.usage.output_tokens == 300


def test_a_stream_that_tells_an_error_instead_of_its_end_counts_as_broken():
    asking = Asking(stream=True)
    asking.heard(STREAM_HEAD, sse(START), sse(text("x" * 2000)), sse(OVERLOADED), b"0\r\n\r\n")
    assert 2000 <= asking.usage.output_tokens < 3000


def test_an_answer_in_one_piece_that_breaks_costs_all_that_was_asked_for():
    """It was written in full before its first byte came."""
    asking = Asking().heard(DOCUMENT_HEAD, b'{"model":"claude-haiku-4-5"', b"")
    assert asking.usage.output_tokens == 64_000
    assert asking.usage.input_tokens == asking.body_bytes // 3


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("said", [[], [STREAM_HEAD, sse(START)]])
def test_an_answer_for_which_nobody_waits_any_longer_costs_all_that_was_asked_for(is_streamed, said):
    asking = Asking(stream=is_streamed).heard(*said)
    asking.conversation.upstream_timed_out()
    assert asking.usage.output_tokens == 64_000
    assert asking.usage.input_tokens == (10 if said else asking.body_bytes // 3)


@pytest.mark.parametrize(("is_streamed", "output"), [(True, 0), (False, 64_000)])
def test_what_is_under_way_when_the_gateway_ends_is_not_free(is_streamed, output):
    asking = Asking(stream=is_streamed)
    asking.conversation.connection_lost()
    assert (asking.usage.input_tokens, asking.usage.output_tokens) == (asking.body_bytes // 3, output)


@pytest.mark.parametrize(
    "said",
    [
        [b""],
        [STREAM_HEAD[:20], b""],
        [STREAM_HEAD, sse(OVERLOADED), b"0\r\n\r\n"],
        [b"HTTP/1.1 529 Overloaded\r\nContent-Length: 2\r\n\r\n{}"],
    ],
)
def test_an_upstream_that_breaks_or_refuses_before_its_answer_has_begun_costs_nothing(said):
    asking = Asking(stream=True).heard(*said)
    assert not asking.conversation.is_in_flight
    assert asking.usage is None


def test_an_upstream_that_is_not_reached_costs_nothing():
    asking = Asking()
    asking.conversation.upstream_failed(504, "It could not be reached.")
    assert asking.usage is None


@pytest.mark.parametrize("end", [b"", b"0\r\n\r\n"])
def test_an_answer_that_told_its_cost_costs_that(end):
    asking = Asking(stream=True).heard(STREAM_HEAD, sse(START), sse(text("x" * 500)), sse(DELTA), end)
    assert (asking.usage.input_tokens, asking.usage.output_tokens) == (10, 7)
    assert "usage_unread" not in asking.troubles


def test_without_a_budget_it_counts_as_far_as_it_came():
    asking = Asking(NONE, stream=True).heard(STREAM_HEAD, sse(START), sse(text("x" * 500)), b"")
    assert (asking.usage.input_tokens, asking.usage.output_tokens) == (10, 1)


@pytest.mark.parametrize("wanted", [None, "all", 0, -5, 10**30])
def test_a_request_that_says_nothing_sensible_of_its_answers_length_may_have_cost_the_most(wanted):
    asking = Asking(max_tokens=wanted)
    asking.conversation.upstream_timed_out()
    assert asking.usage.output_tokens == OUTPUT_TOKENS_MAX


def test_no_request_counts_as_more_input_than_a_model_takes():
    asking = Asking(padding="x" * 4 * INPUT_TOKENS_MAX)
    asking.conversation.upstream_timed_out()
    assert asking.usage.input_tokens == INPUT_TOKENS_MAX


@pytest.mark.parametrize("headers", ["Connection: close\r\n", ""])
def test_what_is_sent_behind_a_request_makes_its_answer_cost_no_less(headers):
    """After a last request nothing may follow: that is no HTTP, and all the same no way out of paying."""
    asking = Asking(headers=headers)
    reaction = asking.conversation.client_data_received(b"x")
    assert not reaction.close_upstream
    asking.heard(DOCUMENT_HEAD, b'{"model":"claude-haiku-4-5"', b"")
    assert asking.usage.output_tokens == 64_000


@pytest.mark.parametrize("status", [429, 529])
def test_a_refusal_that_is_not_heard_to_its_end_costs_nothing(status):
    asking = Asking().heard(b"HTTP/1.1 %d No\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n" % status)
    asking.conversation.upstream_timed_out()
    assert asking.usage is None
