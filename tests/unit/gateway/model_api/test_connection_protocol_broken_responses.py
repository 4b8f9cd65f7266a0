"""Under a budget, a response that ends before it reports its usage is charged at its upper bound."""

import json

import pytest

from sandbox.agents.claude_code.messages_api.dialect import MessagesApi
from sandbox.agents.claude_code.messages_api.pricing import INPUT_TOKENS_MAX, OUTPUT_TOKENS_MAX
from sandbox.gateway.event_reporter import EventReporter
from sandbox.gateway.model_api.connection_protocol import ModelProtocol
from sandbox.gateway.model_api.request_gate import ModelPolicy, ModelRequestGate
from sandbox.gateway.model_api.upstream import parse_upstream
from sandbox.interfaces.gateway import Budget, GatewayRules, ModelUpstream
from sandbox.model.egress import EgressRules
from sandbox.model.events import ErrorReported, Usage

DIALECT = MessagesApi()
GATEWAY_KEY = "task-key-of-this-task"
MODEL = "claude-haiku-4-5"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DOCUMENT_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
START = {"type": "message_start", "message": {"model": MODEL, "usage": {"input_tokens": 10, "output_tokens": 1}}}
DELTA = {"type": "message_delta", "usage": {"output_tokens": 7}}
OVERLOADED = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
USD, TOKENS, NO_BUDGET = Budget(usd=1000.0), Budget(tokens=10**9), Budget()


def text(content: str) -> dict:
    return {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": content}}


def sse(*events: dict) -> bytes:
    data = b"".join(f"event: {e['type']}\ndata: {json.dumps(e, separators=(',', ':'))}\n\n".encode() for e in events)
    return b"%x\r\n%s\r\n" % (len(data), data)


class ForwardedRequest:
    """One request, forwarded under a budget."""

    def __init__(
        self,
        budget: Budget = USD,
        *,
        is_unrestricted: bool = False,
        is_connected: bool = True,
        headers: str = "",
        **fields,
    ) -> None:
        self.events: list = []
        reporter = EventReporter(self.events.append, lambda: 0.0)
        rules = GatewayRules(egress=EgressRules(is_unrestricted=is_unrestricted), budget=budget)
        upstream = parse_upstream(ModelUpstream("https://up.example", api_key="sk-the-servers-own"), DIALECT)
        self.protocol = ModelProtocol(
            DIALECT,
            ModelPolicy(DIALECT, GATEWAY_KEY, 8123),
            ModelRequestGate(rules, reporter, DIALECT),
            upstream,
            reporter,
            8123,
        )
        body = json.dumps({"model": MODEL, "max_tokens": 64_000, "messages": []} | fields).encode()
        head = f"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1:8123\r\nX-Api-Key: {GATEWAY_KEY}\r\n{headers}"
        self.protocol.client_data_received(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert self.protocol.is_in_flight
        if is_connected:
            assert self.protocol.upstream_connected() is None
        self.body_bytes = len(body)

    def receive(self, *pieces: bytes) -> "ForwardedRequest":
        for item in pieces:
            self.protocol.upstream_data_received(item)
        return self

    @property
    def usage(self) -> Usage | None:
        usages = [item for item in self.events if isinstance(item, Usage)]
        assert len(usages) <= 1
        return usages[0] if usages else None

    @property
    def errors(self) -> list[str]:
        return [item.error for item in self.events if isinstance(item, ErrorReported)]


@pytest.mark.parametrize("budget", [USD, TOKENS])
@pytest.mark.parametrize("is_unrestricted", [True, False])
def test_broken_stream_costs_one_token_per_received_byte(budget, is_unrestricted):
    """No token is shorter than a byte, so the bound grows with the received data, not with the requested maximum."""
    forwarded = ForwardedRequest(budget, stream=True, is_unrestricted=is_unrestricted)
    forwarded.receive(STREAM_HEAD, sse(START), *[sse(text("x" * 500))] * 20, b"")
    assert (forwarded.usage.model, forwarded.usage.input_tokens) == (MODEL, 10)
    assert 20 * 500 <= forwarded.usage.output_tokens < 20 * 500 + 1000
    assert forwarded.usage.cost_usd == pytest.approx((10 + forwarded.usage.output_tokens * 5) / 1e6)
    assert "usage_unread" in forwarded.errors


def test_broken_stream_costs_at_most_max_tokens():
    forwarded = ForwardedRequest(stream=True, max_tokens=300).receive(
        STREAM_HEAD, sse(START), sse(text("x" * 5000)), b""
    )
    assert forwarded.usage.output_tokens == 300


def test_stream_that_ends_with_an_error_event_is_treated_as_broken():
    forwarded = ForwardedRequest(stream=True)
    forwarded.receive(STREAM_HEAD, sse(START), sse(text("x" * 2000)), sse(OVERLOADED), b"0\r\n\r\n")
    assert 2000 <= forwarded.usage.output_tokens < 3000


def test_broken_json_response_costs_max_tokens():
    """The model generates a JSON response in full before it sends the first byte."""
    forwarded = ForwardedRequest().receive(DOCUMENT_HEAD, b'{"model":"claude-haiku-4-5"', b"")
    assert forwarded.usage.output_tokens == 64_000
    assert forwarded.usage.input_tokens == forwarded.body_bytes // 3


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("pieces", [[], [STREAM_HEAD, sse(START)]])
def test_timed_out_response_costs_max_tokens(is_streamed, pieces):
    forwarded = ForwardedRequest(stream=is_streamed).receive(*pieces)
    forwarded.protocol.upstream_timed_out()
    assert forwarded.usage.output_tokens == 64_000
    assert forwarded.usage.input_tokens == (10 if pieces else forwarded.body_bytes // 3)


@pytest.mark.parametrize(("is_streamed", "output"), [(True, 0), (False, 64_000)])
def test_response_in_progress_at_shutdown_is_counted(is_streamed, output):
    forwarded = ForwardedRequest(stream=is_streamed)
    forwarded.protocol.connection_lost()
    assert (forwarded.usage.input_tokens, forwarded.usage.output_tokens) == (forwarded.body_bytes // 3, output)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_request_without_a_connection_at_shutdown_costs_nothing(is_streamed):
    forwarded = ForwardedRequest(stream=is_streamed, is_connected=False)
    forwarded.protocol.connection_lost()
    assert (forwarded.usage, forwarded.errors) == (None, [])


@pytest.mark.parametrize(
    "pieces",
    [
        [b""],
        [STREAM_HEAD[:20], b""],
        [STREAM_HEAD, sse(OVERLOADED), b"0\r\n\r\n"],
        [b"HTTP/1.1 529 Overloaded\r\nContent-Length: 2\r\n\r\n{}"],
    ],
)
def test_failure_before_the_response_starts_costs_nothing(pieces):
    forwarded = ForwardedRequest(stream=True).receive(*pieces)
    assert not forwarded.protocol.is_in_flight
    assert forwarded.usage is None


def test_unreachable_upstream_costs_nothing():
    forwarded = ForwardedRequest(is_connected=False)
    forwarded.protocol.upstream_failed(504, "It could not be reached.")
    assert forwarded.usage is None


@pytest.mark.parametrize("end", [b"", b"0\r\n\r\n"])
def test_reported_usage_is_counted_exactly(end):
    forwarded = ForwardedRequest(stream=True).receive(STREAM_HEAD, sse(START), sse(text("x" * 500)), sse(DELTA), end)
    assert (forwarded.usage.input_tokens, forwarded.usage.output_tokens) == (10, 7)
    assert "usage_unread" not in forwarded.errors


def test_broken_stream_without_a_budget_counts_partial_usage():
    forwarded = ForwardedRequest(NO_BUDGET, stream=True).receive(STREAM_HEAD, sse(START), sse(text("x" * 500)), b"")
    assert (forwarded.usage.input_tokens, forwarded.usage.output_tokens) == (10, 1)


@pytest.mark.parametrize("max_tokens", [None, "all", 0, -5, 10**30])
def test_invalid_max_tokens_costs_the_global_maximum(max_tokens):
    forwarded = ForwardedRequest(max_tokens=max_tokens)
    forwarded.protocol.upstream_timed_out()
    assert forwarded.usage.output_tokens == OUTPUT_TOKENS_MAX


def test_input_estimate_is_capped_at_the_model_maximum():
    forwarded = ForwardedRequest(padding="x" * 4 * INPUT_TOKENS_MAX)
    forwarded.protocol.upstream_timed_out()
    assert forwarded.usage.input_tokens == INPUT_TOKENS_MAX


@pytest.mark.parametrize("budget", [USD, TOKENS])
def test_complete_stream_in_another_format_costs_max_tokens(budget):
    forwarded = ForwardedRequest(budget, stream=True)
    content = b"data: text\rdata: more\r"
    forwarded.receive(STREAM_HEAD, b"%x\r\n%b\r\n" % (len(content), content), b"0\r\n\r\n")
    assert (forwarded.usage.input_tokens, forwarded.usage.output_tokens) == (forwarded.body_bytes // 3, 64_000)
    assert "usage_unread" in forwarded.errors


@pytest.mark.parametrize("headers", ["Connection: close\r\n", ""])
def test_data_after_a_request_does_not_reduce_its_cost(headers):
    """Data after the last request is invalid HTTP, and must not reduce the counted cost."""
    forwarded = ForwardedRequest(headers=headers)
    effects = forwarded.protocol.client_data_received(b"x")
    assert not effects.close_upstream
    forwarded.receive(DOCUMENT_HEAD, b'{"model":"claude-haiku-4-5"', b"")
    assert forwarded.usage.output_tokens == 64_000


@pytest.mark.parametrize("status", [429, 529])
def test_incomplete_error_response_costs_nothing(status):
    forwarded = ForwardedRequest().receive(
        b"HTTP/1.1 %d No\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n" % status
    )
    forwarded.protocol.upstream_timed_out()
    assert forwarded.usage is None


@pytest.mark.parametrize("end", [b"0\r\n\r\n", b"not a chunk size\r\n"])
def test_small_chunks_of_one_read_are_forwarded_and_counted_together(monkeypatch, end):
    """A read may contain thousands of chunks. Counting and redacting each one separately would block for seconds."""
    counted = []
    monkeypatch.setattr(ModelRequestGate, "record_progress", lambda *args: counted.append(args[-1].usage()))
    request = ForwardedRequest()
    body = f"data: {json.dumps(START)}\ndata: {json.dumps(DELTA)}\n".encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    effects = request.protocol.upstream_data_received(STREAM_HEAD + chunks + end)
    assert b"\r\n%x\r\n%s\r\n" % (len(body), body) in effects.to_client
    assert [one.output_tokens for one in counted] == [7]
    request.protocol.connection_lost()
    assert [one.output_tokens for one in request.events if isinstance(one, Usage)] == [7]


def test_endless_interim_responses_end_the_request():
    forwarded = ForwardedRequest()
    forwarded.receive(b"HTTP/1.1 100 Continue\r\n\r\n" * 60)
    assert forwarded.protocol.is_in_flight
    response = forwarded.protocol.upstream_data_received(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 60).to_client
    assert response.startswith(b"HTTP/1.1 502 ")
    assert not forwarded.protocol.is_in_flight


def test_response_after_interim_responses_is_forwarded():
    forwarded = ForwardedRequest()
    forwarded.receive(b"HTTP/1.1 100 Continue\r\n\r\n" * 60, STREAM_HEAD, sse(START, text("Hi"), DELTA), b"0\r\n\r\n")
    assert forwarded.usage.output_tokens == 7


GZIP_BODY_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"
UNREADABLE_HEADS = {
    "transfer encoding": GZIP_BODY_HEAD,
    "header line": b"HTTP/1.1 200 OK\r\nContent Type : application/json\r\n\r\n",
    "long head": b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 200_000,
    "status line": b"HTTP/2 200\r\n\r\n",
    "after an interim response": b"HTTP/1.1 103 Early Hints\r\n\r\n" + GZIP_BODY_HEAD,
    "interim response": b"HTTP/1.1 103 Early Hints\r\nBad Header : a\r\n\r\n",
    "too many interim responses": b"HTTP/1.1 100 Continue\r\n\r\n" * 101,
}


@pytest.mark.parametrize("piece_bytes", [1000, 10**6])
@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("name", UNREADABLE_HEADS)
def test_response_with_an_unreadable_head_costs_max_tokens(name, is_streamed, piece_bytes):
    head = UNREADABLE_HEADS[name]
    forwarded = ForwardedRequest(stream=is_streamed)
    forwarded.receive(*(head[at : at + piece_bytes] for at in range(0, len(head), piece_bytes)))
    assert not forwarded.protocol.is_in_flight
    assert (forwarded.usage.input_tokens, forwarded.usage.output_tokens) == (forwarded.body_bytes // 3, 64_000)
    assert "usage_unread" in forwarded.errors


@pytest.mark.parametrize("interim", [b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"])
@pytest.mark.parametrize("status", [302, 401, 429, 500])
def test_refusal_with_an_unreadable_head_costs_nothing(status, interim):
    status_line = b"HTTP/1.1 %d No\r\n" % status
    for rest in (b"Bad Header : a\r\n\r\n", b"Transfer-Encoding: gzip, chunked\r\n\r\n", b"X-Long: " + b"x" * 200_000):
        forwarded = ForwardedRequest().receive(interim + status_line + rest)
        assert not forwarded.protocol.is_in_flight
        assert forwarded.usage is None


def test_unreadable_head_without_a_budget_is_not_counted():
    assert ForwardedRequest(NO_BUDGET).receive(GZIP_BODY_HEAD).usage is None


def test_response_truncated_in_its_head_costs_max_tokens():
    assert ForwardedRequest().receive(DOCUMENT_HEAD[:20], b"").usage.output_tokens == 64_000
    assert ForwardedRequest().receive(b"").usage is None
