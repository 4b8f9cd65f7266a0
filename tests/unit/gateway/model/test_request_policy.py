"""The model's own servers fetch nothing for a sandbox that may not fetch it itself, and a refused key ends the work."""

import json
from typing import Any

import pytest

from sandbox.gateway.event_reporter import EventReporter
from sandbox.gateway.limits import MODEL_STRING_CHARACTERS_MAX
from sandbox.gateway.model import request_body
from sandbox.gateway.model.budget import BudgetGate
from sandbox.gateway.model.dialer import parse_upstream
from sandbox.gateway.model.protocol import ModelProtocol
from sandbox.gateway.model.request_policy import ModelPolicy
from sandbox.interfaces.gateway import Budget, GatewayRules, KeyRejected, ModelUpstream
from sandbox.model.egress import EgressRule, EgressRules
from sandbox.model.events import EgressDenied

ISOLATED = GatewayRules()
OUTBOUND = GatewayRules(egress=EgressRules((EgressRule("files.example.org"),)))
FULL = GatewayRules(egress=EgressRules(is_unrestricted=True))
TASK_KEY, SERVER_KEY = "task-key-of-this-task", "sk-the-servers-own"
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
BY_URL = {"type": "image", "source": {"type": "url", "url": "https://evil.example/?q=secret"}}


class Model:
    """Conversations of one gateway with an upstream that is a script."""

    def __init__(self, rules: GatewayRules, redact=str) -> None:
        self.told: list = []
        self._reports = EventReporter(self.told.append, lambda: 0.0, redact)
        self._admission = BudgetGate(rules, self._reports)

    def conversation(self) -> ModelProtocol:
        upstream = parse_upstream(ModelUpstream("https://up.example", api_key=SERVER_KEY))
        return ModelProtocol(ModelPolicy(TASK_KEY, 8123), self._admission, upstream, self._reports, 8123)

    def ask(self, body: Any, *headers: str, target: str = "/v1/messages?beta=true") -> tuple[int | None, str, bytes]:
        """Status and message of a refusal, and the body that goes on."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = (f"POST {target} HTTP/1.1", "Host: 127.0.0.1:8123", f"X-Api-Key: {TASK_KEY}", *headers)
        head = "\r\n".join((*lines, f"Content-Length: {len(data)}")).encode() + b"\r\n\r\n"
        reaction = self.conversation().client_data_received(head + data)
        onward = bytes(reaction.to_upstream)
        if reaction.to_client:
            assert not onward
            answer, _, refusal = bytes(reaction.to_client).partition(b"\r\n\r\n")
            return int(answer.split(b" ")[1]), json.loads(refusal)["error"]["message"], b""
        return None, "", onward


def message(*content: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": list(content)}


def request(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "claude-haiku-4-5", "max_tokens": 5, "messages": list(messages), **fields}


def within_result(block: Any) -> dict[str, Any]:
    return message({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "x"}, block]})


def inline(definition: Any, kind: Any = "tool_definition") -> dict[str, Any]:
    return {"type": "tool_addition", "tool": {"type": kind, "definition": definition}}


FETCH = {"type": "web_fetch_20250910", "name": "web_fetch"}
SEARCH = {"type": "web_search_20250305", "name": "web_search"}
OWN_TOOL = {"name": "mcp__x__y", "description": "d", "input_schema": {"type": "object", "properties": {"Tools": {}}}}

REACHING = {
    "web_search": request(tools=[{"name": "Bash"}, {"type": "web_search_20250305", "name": "web_search"}]),
    "web_fetch": request(tools=[{"type": "web_fetch_20250910", "name": "web_fetch"}]),
    "code_execution": request(tools=[{"type": "code_execution_20250825", "name": "code_execution"}]),
    "mcp_toolset": request(tools=[{"type": "mcp_toolset", "mcp_server_name": "x"}]),
    "unknown": request(tools=[{"type": "teleport_20300101", "name": "x"}]),
    "type of another type": request(tools=[{"type": ["custom"], "name": "x"}]),
    "tool of another shape": request(tools=["web_search_20250305"]),
    "one tool without a list": request(tools={"type": "web_search_20250305"}),
    "mcp_servers": request(mcp_servers=[{"type": "url", "url": "https://evil.example", "name": "x"}]),
    "container": request(container={"skills": [{"type": "anthropic", "skill_id": "pptx"}]}),
    "image": request(message(BY_URL)),
    "document": request(message({"type": "document", "source": {"type": "url", "url": "https://evil.example"}})),
    "document within": request(
        message({"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "x"}, BY_URL]}})
    ),
    "file": request(message({"type": "image", "source": {"type": "file", "file_id": "file_1"}})),
    "upload": request(message({"type": "container_upload", "file_id": "file_1"})),
    "tool result": request(within_result(BY_URL)),
    "result within a result": request(within_result({"type": "tool_result", "content": [BY_URL]})),
    "of the assistant": request(message(BY_URL, role="assistant")),
    "system": request(system=[{"type": "text", "text": "x"}, BY_URL]),
    "block without a list": request({"role": "user", "content": BY_URL}),
    "source without a type": request(message({"type": "image", "source": {"url": "https://evil.example"}})),
    "capital tools": request(Tools=[{"type": "web_search_20250305", "name": "web_search"}]),
    "capital type": request(tools=[{"Type": "web_search_20250305", "name": "web_search"}]),
    "capital source": request(message({"type": "image", "Source": BY_URL["source"]})),
    "capital content": request({"role": "user", "Content": [BY_URL]}),
    "capital content beside": request({"role": "user", "content": "x", "CONTENT": [BY_URL]}),
    "one message without a list": {"model": "claude-haiku-4-5", "messages": {"role": "user", "Content": [BY_URL]}},
    "tool in a message": request(message(inline(FETCH), role="system")),
    "tool in a message of the user": request(message({"type": "text", "text": "x"}, inline(FETCH))),
    "tools in a message": request(message({"type": "tool_addition", "tools": [FETCH]}, role="system")),
    "mcp_toolset in a message": request(message(inline({"type": "mcp_toolset", "mcp_server_name": "x"}))),
    "unknown tool in a message": request(message(inline({"type": "teleport", "name": "x"}))),
    "tool in a message within": request(
        message({"type": "mid_conv_system", "content": [{"type": "text", "text": "x"}, inline(FETCH)]})
    ),
    "tool in a compaction": request(
        message({"type": "compaction", "content": None, "tool_changes": [inline(FETCH)]}, role="assistant")
    ),
    "tool in a result": request(within_result(inline(FETCH))),
    "tool of the system": request(system=[inline(FETCH)]),
    "tool without a place": request(message({"type": "tool_addition", "tool": FETCH})),
    "tool with another name": request(message({"type": "tool_addition", "new": {"what": FETCH}})),
    "change of tools of unknown type": request(message(inline(FETCH, "mcp_toolset_reference"))),
    "change of tools without a type": request(message(inline(OWN_TOOL, None))),
    "change of tools of another shape": request(message({"type": "tool_addition", "tool": "web_fetch"})),
    "definition of another shape": request(message(inline("web_fetch_20250910"))),
    "capital definition": request(
        message({"type": "tool_addition", "tool": {"type": "tool_definition", "Definition": FETCH}})
    ),
    "tool of a fallback": request(fallbacks=[{"model": "claude-haiku-4-5", "tools": [FETCH]}]),
    "mcp_servers of a fallback": request(fallbacks=[{"model": "claude-haiku-4-5", "mcp_servers": [{"name": "x"}]}]),
    "tools within a tool": request(tools=[{**OWN_TOOL, "tools": [SEARCH]}]),
    "one tool within a tool": request(tools=[{**OWN_TOOL, "tools": SEARCH}]),
    "tool within a tool of another name": request(tools=[{**OWN_TOOL, "delegate": {"to": [SEARCH]}}]),
    "tool of unknown type within a tool": request(tools=[{**OWN_TOOL, "delegate": {"type": "teleport"}}]),
    "tool without a date within a tool": request(tools=[{**OWN_TOOL, "delegate": {"type": "web_search"}}]),
    "definition within a tool": request(tools=[{**OWN_TOOL, "definition": SEARCH}]),
    "tool within a definition": request(message(inline({**OWN_TOOL, "tools": [SEARCH]}), role="system")),
    "tool within an advisor": request(tools=[{"type": "advisor_20260301", "name": "advisor", "tools": [SEARCH]}]),
    "tool within a tool without a type": request(tools=[{"name": "x", "custom": {"tools": [SEARCH]}}]),
    "mcp_servers within a tool": request(tools=[{**OWN_TOOL, "mcp_servers": [{"name": "x"}]}]),
    "container within a tool": request(tools=[{**OWN_TOOL, "container": "c"}]),
    "address within a tool": request(tools=[{**OWN_TOOL, "server": {"url": "https://evil.example"}}]),
    "source within a tool": request(tools=[{**OWN_TOOL, "source": BY_URL["source"]}]),
    "configuration of a tool of another type": request(tools=[{**OWN_TOOL, "configs": {"x": {"tools": [SEARCH]}}}]),
    "tool beside the choice": request(tool_choice={"type": "tool", "name": "x", "tools": [SEARCH]}),
    "choice of a tool by its type": request(tool_choice=SEARCH),
    "tool in what is data elsewhere": request({"role": "user", "content": "x", "metadata": {"tools": [SEARCH]}}),
    "tool in an input of the request": request(input={"tools": [SEARCH]}),
    "address in an input of an image": request(message({"type": "image", "source": IMAGE["source"], "input": BY_URL})),
    "schema of the request": request(input_schema={"tools": [SEARCH]}),
    "type with more behind its date": request(message({"type": "x", "of": {"type": "web_search_20250305-x"}})),
    "call of a search": request(
        message({"type": "server_tool_use", "id": "t", "name": "web_search", "input": {"query": "x"}}, role="assistant")
    ),
    "call of code": request(message({"type": "server_tool_use", "id": "t", "name": "bash_code_execution"})),
    "call without a name": request(message({"type": "server_tool_use", "id": "t", "input": {}})),
    "call of an MCP server": request(message({"type": "mcp_tool_use", "id": "t", "name": "x", "server_name": "y"})),
    "image by its address alone": request(message({"type": "image", "source": "https://evil.example/"})),
    "document without a source": request(message({"type": "document", "file_id": "file_1"})),
    "image of another API": request(message({"type": "image_url", "image_url": {"url": "https://evil.example/"}})),
    "image of another API, short": request(message({"type": "input_image", "image_url": "https://evil.example/"})),
    "file of another API": request(message({"type": "input_file", "file_id": "file_1"})),
    "source in place with an address": request(message({"type": "image", "source": {**IMAGE["source"], "url": "x"}})),
    "list of sources": request(message({"type": "image", "source": [IMAGE["source"]]})),
    "files of the request": request(file_ids=["file_1"]),
    "container by its number": request(container_id="c"),
    "address in the system": request(system=[{"type": "text", "text": "x", "document_url": "https://evil.example"}]),
    "name with a space": request(**{"tools ": [SEARCH]}),
    "name with a NUL": request(**{"tools\0": [SEARCH]}),
    "name with a hyphen": request(**{"mcp-servers": [{"name": "x"}]}),
    "name of full width": request(**{"\uff54ools": [SEARCH]}),
    "long s": request(**{"tool\u017f": [{"type": "web_search_20250305"}]}),
}

HARMLESS = {
    "nothing": request(),
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
    "images in place": request(message(IMAGE), within_result(IMAGE)),
    "documents in place": request(
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
    "what a tool is called with": request(
        message(
            {"type": "tool_use", "id": "t", "name": "mcp__x", "input": {"Source": {"type": "url"}}}, role="assistant"
        )
    ),
    "tools in messages": request(
        message({"type": "text", "text": "x"}, inline(OWN_TOOL), inline({"type": "custom", **OWN_TOOL}), role="system"),
        message(
            {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "Bash"}},
            {"type": "tool_removal", "tool": {"type": "tool_reference", "name": "Bash"}},
            inline({"type": "advisor_20260301", "name": "advisor", "model": "claude-opus-5"}),
            role="system",
        ),
        message({"type": "compaction", "content": "x", "tool_changes": [inline(OWN_TOOL)]}, role="assistant"),
    ),
    "what Claude Code says beside": request(
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
    "all that a tool may say": request(
        tools=[
            {
                **OWN_TOOL,
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
    "what nobody knows yet": request(
        message({"type": "text", "text": "x", "citations": {"enabled": True}, "novelty": {"type": "nice", "size": 3}}),
        novelty={"enabled": True, "of": [{"type": "mild"}]},
        cache_control={"type": "ephemeral"},
        thread={"type": "create"},
    ),
    "no address": request(message({"type": "text", "text": "x", "citations": [{"file_id": None, "url": ""}]})),
    "nulls": request(mcp_servers=[], container=None, tools=[], system=None),
}


@pytest.mark.parametrize("kind", [[], ["image"], {}, {"type": "x"}, 7, True, None])
def test_a_type_of_any_shape_is_judged(kind):
    block = {"type": kind, "source": "x", "name": ["x"]}
    assert Model(ISOLATED).ask(request(message(block), within_result(block)))[0] in (None, 403)
    assert Model(ISOLATED).ask(request(tools=[{"name": "x", "part": block}]))[0] in (None, 403)


@pytest.mark.parametrize("rules", [ISOLATED, OUTBOUND])
@pytest.mark.parametrize("name", REACHING)
@pytest.mark.parametrize("target", ["/v1/messages?beta=true", "/v1/messages/count_tokens"])
def test_what_makes_the_model_reach_elsewhere_is_refused_with_a_sentence_and_told(rules, name, target):
    model = Model(rules)
    status, told, _ = model.ask(REACHING[name], target=target)
    assert status == 403
    assert "reach elsewhere" in told
    assert "network_mode full" in told
    assert model.told == [EgressDenied("model", 8123, told)]


@pytest.mark.parametrize("name", REACHING)
def test_it_passes_where_the_sandbox_itself_may_reach_everything(name):
    model = Model(FULL)
    status, _, onward = model.ask(REACHING[name])
    assert status is None
    assert onward.endswith(json.dumps(REACHING[name]).encode())
    assert model.told == []


@pytest.mark.parametrize("rules", [ISOLATED, OUTBOUND, FULL])
@pytest.mark.parametrize("name", HARMLESS)
def test_what_claude_code_sends_passes_unchanged_in_meaning(rules, name):
    model = Model(rules)
    status, told, onward = model.ask(HARMLESS[name])
    assert status is None, told
    assert json.loads(onward.partition(b"\r\n\r\n")[2]) == HARMLESS[name]
    assert model.told == []


@pytest.mark.parametrize(
    "hidden",
    [
        b'{"model":"m","tools":[{"type":"web_search_20250305"}],"tools":[]}',
        b'{"model":"m","tools":[],"\\u0074ools":[{"name":"x"}],"mcp_servers":[{"url":"x"}],"mcp_servers":null}',
    ],
)
def test_what_stands_there_twice_goes_on_once(hidden):
    status, _, onward = Model(ISOLATED).ask(hidden)
    assert status is None
    assert b"web_search" not in onward
    assert b"url" not in onward


def test_what_stands_there_last_counts():
    assert Model(ISOLATED).ask(b'{"model":"m","tools":[],"tools":[{"type":"web_search_20250305"}]}')[0] == 403


def test_the_model_is_told_how_to_read_the_body_by_the_gateway():
    headers = ("Content-Type: application/json; charset=utf-7", "Content-Encoding: gzip")
    _, _, onward = Model(ISOLATED).ask(b' {"model" : "m" , "n": 1.0, "big": 18446744073709551615} ', *headers)
    head, _, body = onward.partition(b"\r\n\r\n")
    assert body == b'{"model":"m","n":1.0,"big":18446744073709551615}'
    assert b"content-type: application/json\r\n" in head.lower() + b"\r\n"
    assert b"gzip" not in head
    assert b"utf-7" not in head


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"1", b"nonsense", b'{"model":1}', b"\xff", b'{"a":"\xff"}', b'{"a":1}x', b"[" * 100_000, b"\x1f\x8b"],
)
def test_what_is_no_request_is_refused(body):
    assert Model(ISOLATED).ask(body)[0] == 400


def test_a_body_that_takes_far_more_memory_than_it_is_long_is_not_read(monkeypatch):
    monkeypatch.setattr(request_body, "REQUEST_JSON_VALUES_MAX", 1000)
    assert Model(ISOLATED).ask(b'{"model":"m","a":[%s]}' % b",".join([b"{}"] * 498))[0] is None
    assert Model(ISOLATED).ask(b'{"model":"m","a":[%s]}' % b",".join([b"{}"] * 500))[0] == 413


def test_a_model_without_a_price_is_told_without_a_secret_in_its_name():
    secret = "s3cr3t" * 40
    rules = GatewayRules(budget=Budget(usd=1.0))
    model = Model(rules, lambda text: text.replace(secret, "[REDACTED]"))
    status, told, _ = model.ask({"model": f"a{secret}", "messages": []})
    assert status == 403
    assert "The model a[REDACTED] has no price" in told


ENDLESS = "x" * (MODEL_STRING_CHARACTERS_MAX + 1)
ENDLESS_WORDS = {
    "model": {"model": ENDLESS},
    "tool": request(tools=[{"type": ENDLESS, "name": "x"}]),
    "source": request(message({"type": "image", "source": {"type": ENDLESS, "url": "x"}})),
}


@pytest.mark.parametrize("target", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize("name", ENDLESS_WORDS)
def test_an_endless_word_is_refused_before_anybody_looks_for_secrets_in_it(name, target):
    looked_at: list[str] = []

    def redact(text: str) -> str:
        looked_at.append(text)
        return text

    model = Model(GatewayRules(budget=Budget(usd=1.0)), redact)
    status, told, _ = model.ask(ENDLESS_WORDS[name], target=target)
    assert status in (400, 403)
    assert ENDLESS[:10] not in told
    assert max(map(len, looked_at)) < MODEL_STRING_CHARACTERS_MAX


def test_a_word_at_the_bound_is_told():
    _, told, _ = Model(ISOLATED).ask(request(tools=[{"type": ENDLESS[1:], "name": "x"}]))
    assert ENDLESS[2:256] in told


UNKNOWN_ADVISOR = {"type": "advisor_20260301", "name": "advisor", "model": "nobody-knows-it"}


@pytest.mark.parametrize(
    "fields",
    [
        {"fallbacks": [{"model": "claude-opus-4-8"}, {"model": "nobody-knows-it"}]},
        {"fallbacks": [{"model": "nobody-knows-it", "speed": "standard"}]},
        {"tools": [{"name": "Bash"}, UNKNOWN_ADVISOR]},
        {"messages": [message(inline(UNKNOWN_ADVISOR), role="system")]},
    ],
)
def test_another_model_without_a_price_is_refused_where_dollars_are_bounded(fields):
    in_dollars, in_tokens = (Model(GatewayRules(budget=budget)) for budget in (Budget(usd=1.0), Budget(tokens=1000)))
    status, told, _ = in_dollars.ask(request() | fields)
    assert (status, told.partition(" in Sandbox")[0]) == (403, "The model nobody-knows-it has no price")
    assert in_tokens.ask(request() | fields)[0] is None


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
def test_fallbacks_that_cost_nobody_knows_what_are_refused_where_dollars_are_bounded(fallbacks):
    in_dollars, in_tokens = (Model(GatewayRules(budget=budget)) for budget in (Budget(usd=1.0), Budget(tokens=1000)))
    status, told, _ = in_dollars.ask(request(fallbacks=fallbacks))
    assert status == 403
    assert "lifecycle.budget_usd cannot bound it" in told
    assert "endless" not in told
    assert in_tokens.ask(request(fallbacks=fallbacks))[0] is None


@pytest.mark.parametrize(
    "fallbacks", [None, [], "default", [{"model": "claude-opus-4-8", "max_tokens": 9, "speed": "standard"}]]
)
def test_fallbacks_as_claude_code_asks_for_them_pass_where_dollars_are_bounded(fallbacks):
    assert Model(GatewayRules(budget=Budget(usd=1.0))).ask(request(fallbacks=fallbacks))[0] is None


@pytest.mark.parametrize("dearer", [{"speed": "fast"}, {"inference_geo": "us"}, {"speed": ["fast"]}])
def test_what_costs_more_than_the_table_says_is_refused_where_dollars_are_bounded(dearer):
    asked = {"model": "claude-opus-5-5", "messages": []}
    in_dollars, in_tokens = (Model(GatewayRules(budget=budget)) for budget in (Budget(usd=1.0), Budget(tokens=1000)))
    status, told, _ = in_dollars.ask(asked | dearer)
    assert (status, told.partition(" costs")[0]) == (403, f"A request with '{next(iter(dearer))}'")
    assert in_tokens.ask(asked | dearer)[0] is None
    assert in_dollars.ask(asked | {"speed": "standard", "inference_geo": "global"})[0] is None
    assert in_dollars.ask(asked)[0] is None


@pytest.mark.parametrize("tool", ["code_execution_20250825", "teleport_20300101", ["custom"], "x" * 1000])
@pytest.mark.parametrize("name", ["tools", "Tools"])
def test_a_tool_of_the_models_servers_without_a_known_fee_is_refused_where_dollars_are_bounded(name, tool):
    in_dollars, in_tokens = (
        Model(GatewayRules(egress=EgressRules(is_unrestricted=True), budget=budget))
        for budget in (Budget(usd=1.0), Budget(tokens=1000))
    )
    asked = request(**{name: [{"name": "Bash"}, {"type": tool, "name": "x"}]})
    status, told, _ = in_dollars.ask(asked)
    assert status == 403
    assert "lifecycle.budget_usd cannot bound it" in told
    assert in_dollars.ask(asked, target="/v1/messages/count_tokens")[0] is None
    assert in_tokens.ask(asked)[0] is None
    assert in_dollars.ask(request(message(inline({"type": tool, "name": "x"}), role="system")))[0] == 403


@pytest.mark.parametrize("name", HARMLESS)
def test_what_has_a_known_fee_or_none_passes_where_dollars_are_bounded(name):
    model = Model(GatewayRules(egress=EgressRules(is_unrestricted=True), budget=Budget(usd=1.0)))
    places = {"user_location": {"type": "approximate", "city": "x"}, "allowed_domains": ["docs.example.org"]}
    servers = {"type": "mcp_toolset", "mcp_server_name": "x", "configs": {"Tool-1": {"enabled": True}}}
    own: list[dict[str, Any]] = [
        {"type": "web_search_20250305", "name": "web_search", **places},
        servers,
    ]
    own += [
        {"type": kind} for kind in ("web_search_20250305", "web_search_20260209", "web_fetch_20250910", "mcp_toolset")
    ]
    assert model.ask(HARMLESS[name])[0] is None
    assert model.ask(HARMLESS[name] | {"tools": own})[0] is None


# The server's key


def answered(model: Model, *statuses: int) -> list[tuple[int, str]]:
    """What the client is told when the upstream answers so, one request after the other."""
    told = []
    for status in statuses:
        conversation = model.conversation()
        head = (
            f"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1:8123\r\nX-Api-Key: {TASK_KEY}\r\nContent-Length: 2\r\n\r\n"
        )
        reaction = conversation.client_data_received(head.encode() + b"{}")
        if not reaction.to_client:
            assert reaction.dial
            reaction = conversation.upstream_data_received(
                f"HTTP/1.1 {status} X\r\nContent-Length: 2\r\n\r\n{{}}".encode()
            )
        answer, _, body = bytes(reaction.to_client).partition(b"\r\n\r\n")
        told.append((int(answer.split(b" ")[1]), body.decode()))
    return told


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_of_the_servers_is_told_once_and_ends_the_asking(status):
    model = Model(ISOLATED)
    answers = answered(model, status, 200)
    assert [told for told, _ in answers] == [403, 403], "403, because Claude Code asks again for minutes after a 401"
    assert all("refused the server's key" in body for _, body in answers)
    told = f"The model at up.example refused the server's key ({status}); check the key that it has."
    assert [one for one in model.told if isinstance(one, KeyRejected)] == [KeyRejected(told)]


def test_a_key_that_was_good_is_not_blamed_for_what_was_asked_for():
    model = Model(ISOLATED)
    assert answered(model, 200, 403, 200) == [(200, "{}"), (403, "{}"), (200, "{}")]
    assert not [one for one in model.told if isinstance(one, KeyRejected)]
    assert answered(model, 401)[0][0] == 403
    assert [type(one) for one in model.told].count(KeyRejected) == 1


@pytest.mark.parametrize("status", [400, 404, 429, 500, 529])
def test_other_errors_are_claude_codes_to_deal_with(status):
    model = Model(ISOLATED)
    assert answered(model, status, 200) == [(status, "{}"), (200, "{}")]
    assert not [one for one in model.told if isinstance(one, KeyRejected)]
