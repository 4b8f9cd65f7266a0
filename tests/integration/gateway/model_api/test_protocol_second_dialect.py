"""The gateway serves a second model API, which has different paths, key headers and usage fields."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from doubles.responses_api import ResponsesApi
from doubles.scripted_upstream import UpstreamRequest, scripted_upstream
from doubles.served_gateway import SERVER_KEY, TASK_KEY, Client, ServedGateway, run, served_gateway
from sandbox.gateway.model_api.dialer import parse_upstream
from sandbox.gateway.server import SocketGatewayFactory
from sandbox.interfaces.gateway import Budget, BudgetExhausted, CostBound, GatewayRules, ModelUpstream, UsageMeter
from sandbox.model.egress import EgressRules
from sandbox.model.events import EgressDenied, ErrorReported, Usage

BODY = json.dumps({"model": "scripted-1", "input": "Say hello."}).encode()
RESPONSE = json.dumps(
    {"model": "scripted-1", "output": [], "usage": {"input_tokens": 100, "output_tokens": 50}}
).encode()
EXPECTED_USAGE = Usage("scripted-1", 100, 50, 0, 0, 0.0003)
STREAM = (
    b'event: response.created\ndata: {"type":"response.created","response":{"model":"scripted-1"}}\n\n'
    b'event: response.completed\ndata: {"type":"response.completed","response":' + RESPONSE + b"}\n\n"
)


async def respond(_: UpstreamRequest, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(RESPONSE))
    writer.write(RESPONSE)


async def respond_with_stream(_: UpstreamRequest, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(STREAM))
    writer.write(STREAM)


async def abort_during_response(_: UpstreamRequest, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
    await writer.drain()
    writer.transport.abort()


@asynccontextmanager
async def gateway_for(
    base_url: str, rules: GatewayRules = GatewayRules(), dialect: ResponsesApi | None = None
) -> AsyncIterator[ServedGateway]:
    async with served_gateway(base_url, rules, dialect=dialect or ResponsesApi()) as served:
        yield served


def send(client: Client, body: bytes = BODY, *, target: str = "/v1/responses", headers: str = "") -> None:
    headers = headers or f"Authorization: Bearer {TASK_KEY}\r\n"
    head = f"POST {target} HTTP/1.1\r\nHost: 127.0.0.1:{client.port}\r\n{headers}"
    client.writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)


@pytest.mark.parametrize("handler", [respond, respond_with_stream])
def test_request_is_forwarded_with_the_servers_key_and_its_usage_is_read(handler):
    async def scenario():
        async with scripted_upstream(handler) as upstream, gateway_for(upstream.base_url) as served:
            client = await served.connect()
            send(client)
            assert (await client.read_response())[0] == 200
            [request] = upstream.requests
            assert request.target == "/v1/responses"
            assert request.headers["authorization"] == f"Bearer {SERVER_KEY}"
            assert TASK_KEY.encode() not in request.head
            assert served.events == [EXPECTED_USAGE]

    run(scenario)


@pytest.mark.parametrize(
    ("target", "headers", "status", "message"),
    [
        ("/v1/messages", "", 403, "The gateway serves only POST /v1/responses and /v1/responses/input_tokens."),
        ("/v1/responses?beta=true", "", 403, "The gateway serves only POST"),
        ("/v1/files", "", 403, "The gateway serves only POST"),
        ("/v1/responses", f"X-Api-Key: {TASK_KEY}\r\n", 401, "The request has no key"),
        ("/v1/responses", "Authorization: Bearer other\r\n", 401, "The request has a different key"),
    ],
    ids=["path of another API", "query", "other endpoint", "header of another API", "different key"],
)
def test_other_requests_are_rejected_in_the_format_of_the_api(target, headers, status, message):
    async def scenario():
        async with scripted_upstream(respond) as upstream, gateway_for(upstream.base_url) as served:
            client = await served.connect()
            send(client, target=target, headers=headers)
            received, _, body = await client.read_response()
            error = json.loads(body)["error"]
            assert (received, error["code"]) == (status, str(status))
            assert message in error["message"]
            assert upstream.requests == []
            assert [event.host for event in served.events_of(EgressDenied)] == ["model"]

    run(scenario)


def test_headers_of_another_api_are_not_forwarded():
    async def scenario():
        async with scripted_upstream(respond) as upstream, gateway_for(upstream.base_url) as served:
            client = await served.connect()
            key = f"Authorization: Bearer {TASK_KEY}\r\n"
            send(client, headers=f"{key}Anthropic-Version: 1\r\nX-Api-Key: {TASK_KEY}\r\nOpenAI-Beta: a\r\n")
            assert (await client.read_response())[0] == 200
            headers = upstream.requests[0].headers
            assert headers["openai-beta"] == "a"
            assert not headers.keys() & {"anthropic-version", "x-api-key"}

    run(scenario)


def test_budget_is_charged_with_the_usage_of_the_api():
    async def scenario():
        rules = GatewayRules(budget=Budget(usd=0.0003))
        async with scripted_upstream(respond) as upstream, gateway_for(upstream.base_url, rules) as served:
            client = await served.connect()
            send(client)
            assert (await client.read_response())[0] == 200
            send(client)
            status, _, body = await client.read_response()
            assert status == 402
            assert "lifecycle.budget_usd (0.0003 USD) is spent" in json.loads(body)["error"]["message"]
            assert len(upstream.requests) == 1
            assert len(served.events_of(BudgetExhausted)) == 1

    run(scenario)


def test_interrupted_response_is_charged_with_its_upper_bound():
    async def scenario():
        rules = GatewayRules(budget=Budget(tokens=10_000))
        async with (
            scripted_upstream(abort_during_response) as upstream,
            gateway_for(upstream.base_url, rules) as served,
        ):
            client = await served.connect()
            send(client, json.dumps({"model": "scripted-1", "max_output_tokens": 77}).encode())
            await client.read_to_end()
            [usage] = served.events_of(Usage)
            assert usage.output_tokens == 77

    run(scenario)


@pytest.mark.parametrize(
    ("request_fields", "rules", "expected", "message"),
    [
        ({"model": "unknown-1"}, GatewayRules(budget=Budget(usd=1)), 402, "The model unknown-1 has no price"),
        ({"model": "scripted-1", "tools": [{"type": "web_search"}]}, GatewayRules(), 403, "The tool web_search"),
    ],
    ids=["unpriced model", "tool of the provider's servers"],
)
def test_denied_requests_are_not_forwarded(request_fields, rules, expected, message):
    async def scenario():
        async with scripted_upstream(respond) as upstream, gateway_for(upstream.base_url, rules) as served:
            client = await served.connect()
            send(client, json.dumps(request_fields).encode())
            status, _, body = await client.read_response()
            assert (status, upstream.requests) == (expected, [])
            assert message in json.loads(body)["error"]["message"]

    run(scenario)


STORED_DATA = {
    "earlier response": {"previous_response_id": "resp_1"},
    "conversation": {"conversation": "conv_1"},
    "prompt": {"prompt": {"id": "pmpt_1"}},
    "item": {"input": [{"type": "item_reference", "id": "msg_1"}]},
    "file": {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "file_1"}]}]},
}


@pytest.mark.parametrize("is_unrestricted", [False, True])
@pytest.mark.parametrize("name", STORED_DATA)
def test_reference_to_stored_data_is_rejected(name, is_unrestricted):
    async def scenario():
        rules = GatewayRules(egress=EgressRules(is_unrestricted=is_unrestricted), budget=Budget(usd=1))
        async with scripted_upstream(respond) as upstream, gateway_for(upstream.base_url, rules) as served:
            client = await served.connect()
            send(client, json.dumps({"model": "scripted-1", **STORED_DATA[name]}).encode())
            status, _, body = await client.read_response()
            assert (status, upstream.requests) == (403, [])
            assert "other tasks may have stored" in json.loads(body)["error"]["message"]

    run(scenario)


def test_names_of_stored_data_in_tools_and_text_are_forwarded():
    async def scenario():
        tools = [{"type": "function", "parameters": {"properties": {"file_id": {"type": "string"}}}}]
        body = {"model": "scripted-1", "input": "file_id and previous_response_id", "tools": tools}
        async with scripted_upstream(respond) as upstream, gateway_for(upstream.base_url) as served:
            client = await served.connect()
            send(client, json.dumps(body).encode())
            assert (await client.read_response())[0] == 200
            assert json.loads(upstream.requests[0].body) == body

    run(scenario)


def test_error_for_a_missing_server_key_names_the_variable_of_the_api():
    with pytest.raises(ValueError, match="RESPONSES_API_KEY is missing"):
        SocketGatewayFactory(ResponsesApi()).create(ModelUpstream("http://127.0.0.1:9"), TASK_KEY, lambda _: None)


class UnvalidatedUsageDialect(ResponsesApi):
    """Returns a request's usage and limits without validating them."""

    def __init__(self, usage: Usage) -> None:
        self.usage = usage

    def create_meter(self, content_type: bytes) -> UsageMeter:
        meter = super().create_meter(content_type)
        meter.usage = meter.partial_usage = lambda: self.usage  # type: ignore[method-assign]
        return meter

    def estimate_cost_bound(self, request: dict[str, Any], byte_count: int) -> CostBound:
        return CostBound(request["model"], 10, request["max_output_tokens"], is_streamed=False)


@pytest.mark.parametrize(
    "usage",
    [
        Usage("scripted-1", -1000, 0, cost_usd=0.1),
        Usage("scripted-1", 0, 10**30, cost_usd=0.1),
        Usage("scripted-1", 1.5, 0, cost_usd=0.1),  # type: ignore[arg-type]
        Usage("scripted-1", 1, 1, cost_usd=float("nan")),
        Usage("scripted-1", 1, 1, cost_usd=-5.0),
    ],
)
def test_invalid_usage_is_charged_with_its_upper_bound(usage):
    async def scenario():
        budget = GatewayRules(budget=Budget(tokens=100, usd=1.0))
        dialect = UnvalidatedUsageDialect(usage)
        async with scripted_upstream(respond) as upstream, gateway_for(upstream.base_url, budget, dialect) as served:
            client = await served.connect()
            send(client, json.dumps({"model": "scripted-1", "max_output_tokens": 90}).encode())
            assert (await client.read_response())[0] == 200
            [counted] = served.events_of(Usage)
            assert (counted.input_tokens, counted.output_tokens) == (10, 90)
            assert [event.error for event in served.events_of(ErrorReported)] == ["usage_unread"]
            send(client)
            assert (await client.read_response())[0] == 402

    run(scenario)


def test_valid_usage_of_the_same_dialect_is_counted():
    async def scenario():
        budget, dialect = GatewayRules(budget=Budget(tokens=100)), UnvalidatedUsageDialect(Usage("scripted-1", 3, 4))
        async with scripted_upstream(respond) as upstream, gateway_for(upstream.base_url, budget, dialect) as served:
            client = await served.connect()
            send(client, json.dumps({"model": "scripted-1", "max_output_tokens": 90}).encode())
            assert (await client.read_response())[0] == 200
            assert served.events == [Usage("scripted-1", 3, 4)]

    run(scenario)


@pytest.mark.parametrize("limit", [-(10**9), 10**30])
def test_request_with_an_impossible_limit_is_rejected(limit):
    async def scenario():
        budget, dialect = GatewayRules(budget=Budget(tokens=100)), UnvalidatedUsageDialect(EXPECTED_USAGE)
        async with scripted_upstream(respond) as upstream, gateway_for(upstream.base_url, budget, dialect) as served:
            client = await served.connect()
            send(client, json.dumps({"model": "scripted-1", "max_output_tokens": limit}).encode())
            assert (await client.read_response())[0] == 400
            assert upstream.requests == []

    run(scenario)


class AuthTokenDialect(ResponsesApi):
    """Sends the server's token even if the server also has a key."""

    def credential(self, upstream: ModelUpstream) -> tuple[bytes, bytes]:
        return b"authorization", b"Bearer " + upstream.auth_token.encode()


def test_sent_credential_is_redacted():
    settings = ModelUpstream("http://127.0.0.1:9", api_key="other-key-0123", auth_token="sent-token-0123")
    text = b"other-key-0123 sent-token-0123"
    assert parse_upstream(settings, AuthTokenDialect()).key_redactor.redact(text) == b"other-key-0123 ***************"
    assert parse_upstream(settings, ResponsesApi()).key_redactor.redact(text) == b"************** sent-token-0123"


def in_json(text: bytes) -> bytes:
    return json.dumps(text.decode())[1:-1].encode()


SPELLED_KEY = b"".join(rb"\u%04X" % byte for byte in SERVER_KEY.encode())
SPELLINGS = {
    "plain": SERVER_KEY.encode(),
    "JSON": SPELLED_KEY,
    "JSON in JSON": in_json(SPELLED_KEY),
    "JSON in JSON in JSON": in_json(in_json(SPELLED_KEY)),
}


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize(
    ("status", "content_type", "body"),
    [
        (400, b"application/json", b'{"error": {"message": "Not authorised: Bearer %b."}}'),
        (200, b"application/json", b'{"model": "scripted-1", "output": [{"text": "%b"}]}'),
        (200, b"text/event-stream", b'event: error\ndata: {"type": "error", "message": "%b"}\n\n'),
    ],
    ids=["error", "response", "stream"],
)
def test_key_in_a_response_is_redacted_in_each_spelling(status, content_type, body, spelling, size):
    async def repeat_key(_: UpstreamRequest, writer: asyncio.StreamWriter) -> None:
        content = body % spelling
        head = b"HTTP/1.1 %d A\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n"
        writer.write(head % (status, content_type, len(content)))
        for at in range(0, len(content), size):
            writer.write(content[at : at + size])
            await writer.drain()
            await asyncio.sleep(0)

    async def scenario():
        async with scripted_upstream(repeat_key) as upstream, gateway_for(upstream.base_url) as served:
            client = await served.connect()
            send(client)
            response = await client.read_response()
            assert (response[0], response[2]) == (status, body % (b"*" * len(spelling)))

    run(scenario)
