"""The gateway serves a second model API, which has different paths, key headers and usage fields."""

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from doubles.responses_api import ResponsesApi
from doubles.scripted_upstream import Script, UpstreamRequest, scripted_upstream
from doubles.served_gateway import GATEWAY_KEY, SERVER_KEY, Client, ServedGateway, run, served_gateway
from sandbox.gateway.model_api.upstream import parse_upstream
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
    headers = headers or f"Authorization: Bearer {GATEWAY_KEY}\r\n"
    head = f"POST {target} HTTP/1.1\r\nHost: 127.0.0.1:{client.port}\r\n{headers}"
    client.writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)


@pytest.mark.parametrize("handler", [respond, respond_with_stream])
def test_request_is_forwarded_with_the_key_of_the_server_and_its_usage_is_read(handler):
    async def scenario():
        async with scripted_upstream(handler) as upstream, gateway_for(upstream.base_url) as served:
            client = await served.connect()
            send(client)
            assert (await client.read_response())[0] == 200
            [request] = upstream.requests
            assert request.target == "/v1/responses"
            assert request.headers["authorization"] == f"Bearer {SERVER_KEY}"
            assert GATEWAY_KEY.encode() not in request.head
            assert served.events == [EXPECTED_USAGE]

    run(scenario)


@pytest.mark.parametrize(
    ("target", "headers", "status", "message"),
    [
        ("/v1/messages", "", 403, "The gateway serves only POST /v1/responses and /v1/responses/input_tokens."),
        ("/v1/responses?beta=true", "", 403, "The gateway serves only POST"),
        ("/v1/files", "", 403, "The gateway serves only POST"),
        ("/v1/responses", f"X-Api-Key: {GATEWAY_KEY}\r\n", 401, "The request has no key"),
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
            key = f"Authorization: Bearer {GATEWAY_KEY}\r\n"
            send(client, headers=f"{key}Anthropic-Version: 1\r\nX-Api-Key: {GATEWAY_KEY}\r\nOpenAI-Beta: a\r\n")
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


USAGE_EVENT = (
    b'data: {"type":"response.%s","response":{"model":"scripted-1","usage":{"input_tokens":9,"output_tokens":%d}}}\n\n'
)
TEXT_EVENT = b'data: {"type":"response.output_text.delta","delta":"Hello"}\n\n'
JSON_HEADER, SSE_HEADER = b"Content-Type: application/json\r\n", b"Content-Type: text/event-stream\r\n"
RESPONSES_WITHOUT_USAGE = {
    "compressed": (200, JSON_HEADER + b"Content-Encoding: gzip\r\nContent-Length: 5\r\n", b"abcde"),
    "compressed stream": (200, SSE_HEADER + b"Content-Encoding: gzip\r\nContent-Length: 5\r\n", b"abcde"),
    "empty": (200, JSON_HEADER + b"Content-Length: 0\r\n", b""),
    "no content": (204, b"", b""),
    "cut after the head": (200, JSON_HEADER + b"Content-Length: 500\r\n", b""),
    "unreadable head": (200, JSON_HEADER + b"Transfer-Encoding: gzip, chunked\r\n", b""),
    "cut stream": (200, SSE_HEADER, TEXT_EVENT),
    "stream that is cut within its first event": (200, SSE_HEADER, TEXT_EVENT[:30]),
    "stream in another format": (200, SSE_HEADER, b"event: a\rdata: {}\r"),
    "stream that reports usage at its start": (200, SSE_HEADER, USAGE_EVENT % (b"created", 1) + TEXT_EVENT),
    "long document": (200, JSON_HEADER, b'{"output": "' + b"x" * 5_000_000 + b'", ' + RESPONSE[1:]),
}


def respond_and_close(status: int, headers: bytes, body: bytes) -> Script:
    async def respond_once(_: UpstreamRequest, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 %d A\r\n%b\r\n%b" % (status, headers, body))
        await writer.drain()
        writer.close()

    return respond_once


async def usages_of(handler: Script) -> list[Usage]:
    """Return the usage that is counted for one request with a limit of 77 tokens."""
    rules = GatewayRules(budget=Budget(tokens=10_000))
    async with scripted_upstream(handler) as upstream, gateway_for(upstream.base_url, rules) as served:
        client = await served.connect()
        headers = f"Authorization: Bearer {GATEWAY_KEY}\r\nConnection: close\r\n"
        send(client, json.dumps({"model": "scripted-1", "max_output_tokens": 77}).encode(), headers=headers)
        await client.read_to_end()
        return served.events_of(Usage)


@pytest.mark.parametrize("name", RESPONSES_WITHOUT_USAGE)
def test_response_without_final_usage_is_charged_with_its_upper_bound(name):
    async def scenario():
        [usage] = await usages_of(respond_and_close(*RESPONSES_WITHOUT_USAGE[name]))
        assert usage.output_tokens == 77

    run(scenario)


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (200, SSE_HEADER, b": ping\n\n" * 5 + b'event: keepalive\ndata: {"type":"keepalive"}\n\n'),
        (200, SSE_HEADER, b'event: error\ndata: {"type":"error","message":"Overloaded"}\n\n'),
        (200, SSE_HEADER, b""),
        (400, JSON_HEADER, b'{"error": {"message": "No."}}'),
        (429, JSON_HEADER + b"Content-Length: 500\r\n", b""),
        (500, JSON_HEADER + b"Content-Encoding: gzip\r\n", b"abcde"),
        (500, JSON_HEADER + b"Transfer-Encoding: gzip, chunked\r\n", b""),
    ],
    ids=["pings", "error event", "empty stream", "400", "cut 429", "compressed 500", "500 with an unreadable head"],
)
def test_response_without_model_output_is_free(status, headers, body):
    async def scenario():
        assert await usages_of(respond_and_close(status, headers, body)) == []

    run(scenario)


def test_highest_reported_usage_of_a_stream_is_counted():
    async def scenario():
        for counts in ((50, 20), (20, 50)):
            events = b"".join(USAGE_EVENT % (b"completed", count) for count in counts)
            [usage] = await usages_of(respond_and_close(200, SSE_HEADER, events))
            assert (usage.input_tokens, usage.output_tokens) == (9, 50)
        created_and_completed = USAGE_EVENT % (b"created", 60) + USAGE_EVENT % (b"incomplete", 30)
        [usage] = await usages_of(respond_and_close(200, SSE_HEADER, created_and_completed))
        assert usage.output_tokens == 60

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
    "item without a type": {"input": [{"id": "msg_1"}]},
    "item with a null type": {"input": [{"type": None, "id": "msg_1"}]},
    "reasoning": {"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]},
    "container": {"tools": [{"type": "code_interpreter", "container": "cntr_1"}]},
    "container's file": {"input": [{"content": [{"type": "output_text", "annotations": [{"container_id": "c_1"}]}]}]},
    "files of a tool": {"tools": [{"type": "code_interpreter", "container": {"type": "auto", "file_ids": ["f_1"]}}]},
    "vector store": {"tools": [{"type": "file_search", "vector_store_ids": ["vs_1"]}]},
    "nested tool": {"tools": [{"type": "namespace", "tools": [{"type": "file_search", "vector_store_ids": ["vs_1"]}]}]},
    "output of a call": {"input": [{"type": "function_call_output", "output": [{"file_id": "file_1"}]}]},
    "other capitalization": {"Previous_Response_Id": "resp_1"},
}


@pytest.mark.parametrize("budget", [Budget(), Budget(usd=1)])
@pytest.mark.parametrize("is_unrestricted", [False, True])
@pytest.mark.parametrize("name", STORED_DATA)
def test_reference_to_stored_data_is_rejected(name, is_unrestricted, budget):
    async def scenario():
        rules = GatewayRules(egress=EgressRules(is_unrestricted=is_unrestricted), budget=budget)
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


FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"image_url": {}}}}
EXTERNAL_ACCESS = {
    "tool": {"tools": [FUNCTION, {"type": "web_search"}]},
    "tool without a type": {"tools": [{"name": "web_search"}]},
    "tool of another type": {"tools": [{"type": "message"}]},
    "tool with a list as its type": {"tools": [{"type": ["function"]}]},
    "tools in an object": {"tools": {"type": "web_search"}},
    "tool as text": {"tools": ["web_search"]},
    "nested tool": {"tools": [{"type": "function", "content": [{"type": "web_search"}]}]},
    "tool in an item": {"input": [{"role": "user", "tools": [{"type": "web_search"}]}]},
    "choice of a tool": {"tool_choice": {"type": "web_search"}},
    "name of a tool as the choice": {"tool_choice": "web_search"},
    "allowed tools": {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}},
    "call of a server's tool": {"input": [{"type": "mcp_call", "name": "f", "arguments": "{}"}]},
    "null type": {"input": [{"type": None, "role": "user", "content": "a"}]},
    "unknown item": {"input": [{"type": "shell_call", "call_id": "1"}]},
    "image": {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "https://a.example/b"}]}]},
    "image in an object": {"input": [{"content": [{"type": "input_image", "image_url": {"text": "https://a"}}]}]},
    "file": {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "https://a.example/b"}]}]},
    "result": {"input": [{"type": "function_call_output", "output": [{"type": "input_image", "image_url": "//a"}]}]},
}
UNKNOWN_FIELDS = {
    "server": {"tools": [{"type": "mcp", "server_url": "https://a.example"}]},
    "connector": {"tools": [{"type": "mcp", "connector_id": "c_1"}]},
    "url": {"input": [{"content": [{"type": "input_image", "image_url": {"url": "https://a.example"}}]}]},
    "other capitalization": {"Tools": [{"type": "web_search"}]},
}
WITHOUT_ACCESS = {
    "tools": [FUNCTION],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    "text": {"format": {"type": "json_schema", "name": "s", "schema": {"id": "a", "type": "object"}}},
    "input": [
        {"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "a"}], "encrypted_content": "AAAA"},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "https://a.example"},
    ],
}


async def status_of(fields: dict[str, Any], rules: GatewayRules = GatewayRules()) -> tuple[int, int]:
    """Return the status of the response, and how many requests were forwarded."""
    async with scripted_upstream(respond) as upstream, gateway_for(upstream.base_url, rules) as served:
        client = await served.connect()
        send(client, json.dumps({"model": "scripted-1", **fields}).encode())
        status, _, _ = await client.read_response()
        return status, len(upstream.requests)


@pytest.mark.parametrize("fields", [*EXTERNAL_ACCESS.values(), *UNKNOWN_FIELDS.values()])
def test_external_access_is_rejected_anywhere_in_a_request(fields):
    async def scenario():
        assert await status_of(fields) == (403, 0)

    run(scenario)


@pytest.mark.parametrize("fields", EXTERNAL_ACCESS.values(), ids=EXTERNAL_ACCESS)
def test_external_access_is_forwarded_with_full_egress_but_not_with_a_budget_in_usd(fields):
    async def scenario():
        egress = EgressRules(is_unrestricted=True)
        assert await status_of(fields, GatewayRules(egress=egress)) == (200, 1)
        assert await status_of(fields, GatewayRules(egress=egress, budget=Budget(usd=1))) == (402, 0)

    run(scenario)


@pytest.mark.parametrize("rules", [GatewayRules(), GatewayRules(budget=Budget(usd=1))])
def test_request_without_external_access_is_forwarded(rules):
    async def scenario():
        assert await status_of(WITHOUT_ACCESS, rules) == (200, 1)
        assert await status_of({"tools": None, "tool_choice": None, "max_output_tokens": None}, rules) == (200, 1)

    run(scenario)


@pytest.mark.parametrize(
    ("limit", "status", "expected"), [(250_000, 200, 250_000), (None, 200, 100_000), ("9", 400, 0)]
)
def test_upper_bound_follows_the_limit_in_the_request(limit, status, expected):
    async def scenario():
        rules = GatewayRules(budget=Budget(tokens=10**6))
        handler = respond_and_close(200, JSON_HEADER + b"Content-Length: 500\r\n", b"")
        async with scripted_upstream(handler) as upstream, gateway_for(upstream.base_url, rules) as served:
            client = await served.connect()
            send(client, json.dumps({"model": "scripted-1", "max_output_tokens": limit}).encode())
            if status == 400:
                assert (await client.read_response())[0] == 400
            else:
                await client.read_to_end()
            assert sum(usage.output_tokens for usage in served.events_of(Usage)) == expected

    run(scenario)


def test_meter_keeps_only_a_small_part_of_a_long_response():
    for content_type in (b"application/json", b"text/event-stream"):
        for piece in (b"x" * 1_000_000, TEXT_EVENT * 10_000):
            meter = ResponsesApi().create_meter(content_type)
            tracemalloc.start()
            for _ in range(30):
                meter.feed(piece)
            kept_bytes, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert kept_bytes < 5_000_000


def test_error_for_a_missing_server_key_names_the_variable_of_the_api():
    with pytest.raises(ValueError, match="RESPONSES_API_KEY is missing"):
        SocketGatewayFactory(ResponsesApi()).create(ModelUpstream("http://127.0.0.1:9"), GATEWAY_KEY, lambda _: None)


class UnvalidatedUsageDialect(ResponsesApi):
    """A dialect that returns the given usage and the limits of the request without validating them."""

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
    """A dialect that sends the server's token even if the server also has a key."""

    def credential(self, upstream: ModelUpstream) -> tuple[bytes, bytes]:
        return b"authorization", b"Bearer " + upstream.auth_token.encode()


def test_sent_credential_is_redacted():
    settings = ModelUpstream("http://127.0.0.1:9", api_key="other-key-0123", auth_token="sent-token-0123")
    text = b"other-key-0123 sent-token-0123"
    assert parse_upstream(settings, AuthTokenDialect()).key_redactor.redact(text) == b"other-key-0123 ***************"
    assert parse_upstream(settings, ResponsesApi()).key_redactor.redact(text) == b"************** sent-token-0123"


def in_json(text: bytes) -> bytes:
    return json.dumps(text.decode())[1:-1].encode()


ESCAPED_KEY = b"".join(rb"\u%04X" % byte for byte in SERVER_KEY.encode())
KEY_ENCODINGS = {
    "plain": SERVER_KEY.encode(),
    "JSON": ESCAPED_KEY,
    "JSON in JSON": in_json(ESCAPED_KEY),
    "JSON in JSON in JSON": in_json(in_json(ESCAPED_KEY)),
}


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("encoded_key", KEY_ENCODINGS.values(), ids=KEY_ENCODINGS)
@pytest.mark.parametrize(
    ("status", "content_type", "body"),
    [
        (400, b"application/json", b'{"error": {"message": "Not authorised: Bearer %b."}}'),
        (200, b"application/json", b'{"model": "scripted-1", "output": [{"text": "%b"}]}'),
        (200, b"text/event-stream", b'event: error\ndata: {"type": "error", "message": "%b"}\n\n'),
    ],
    ids=["error", "response", "stream"],
)
def test_key_in_a_response_is_redacted_in_each_encoding(status, content_type, body, encoded_key, size):
    async def repeat_key(_: UpstreamRequest, writer: asyncio.StreamWriter) -> None:
        content = body % encoded_key
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
            assert (response[0], response[2]) == (status, body % (b"*" * len(encoded_key)))

    run(scenario)
