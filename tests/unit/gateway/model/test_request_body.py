"""A model request may use the tools that Claude Code runs itself, by their exact type, wherever the request has one."""

import json

import pytest

from sandbox.gateway.limits import MODEL_STRING_CHARACTERS_MAX
from sandbox.gateway.model import request_body
from sandbox.gateway.model.request_body import (
    additional_models,
    decode_body,
    external_access_reason,
    unknown_fee_reason,
)
from sandbox.gateway.model.request_policy import Rejected

RUN_INSIDE = [
    *("custom", "bash_20250124", "computer_20251124", "memory_20250818", "text_editor_20250728"),
    *("tool_search_tool_20251119", "tool_search_tool_regex_20251119", "tool_search_tool_bm25_20251119"),
    "advisor_20260301",
]
AT_KNOWN_FEE = ["web_search_20250305", "web_fetch_20250910", "mcp_toolset"]
WORD_AT_THE_BOUND = "x" * MODEL_STRING_CHARACTERS_MAX


def reach(**fields) -> str | None:
    return external_access_reason({"model": "m", **fields}, str.upper)


def fee(**fields) -> str | None:
    return unknown_fee_reason({"model": "m", **fields}, str.upper)


def tool(kind) -> list[dict]:
    return [{"name": "Bash"}, {"type": kind, "name": "x"}]


@pytest.mark.parametrize("kind", RUN_INSIDE)
def test_a_tool_that_runs_inside_reaches_nothing_and_has_no_fee(kind):
    assert (reach(tools=tool(kind)), fee(tools=tool(kind))) == (None, None)


@pytest.mark.parametrize("kind", RUN_INSIDE)
@pytest.mark.parametrize("suffix", ["x", "1", "-20250124", "\n", " ", "-evil", "_web_search"])
def test_a_known_type_with_a_suffix_is_another_type(kind, suffix):
    told = f"The tool {(kind + suffix).upper()}"
    assert (reach(tools=tool(kind + suffix)), fee(tools=tool(kind + suffix))) == (told, told)


@pytest.mark.parametrize("kind", RUN_INSIDE)
def test_a_known_type_with_a_prefix_is_another_type(kind):
    assert reach(tools=tool(f"x{kind}")) == f"The tool X{kind.upper()}"
    assert fee(tools=tool(f"web_{kind}")) == f"The tool WEB_{kind.upper()}"


@pytest.mark.parametrize(
    "kind", ["bash", "bash_2025012", "bash_202501240", "bash_2025012x", "tool_search_tool_REGEX_20251119"]
)
def test_a_known_name_without_a_date_of_eight_digits_is_another_type(kind):
    assert reach(tools=tool(kind)) == f"The tool {kind.upper()}"


@pytest.mark.parametrize("kind", AT_KNOWN_FEE)
def test_a_tool_of_the_models_servers_with_a_known_fee_reaches_elsewhere(kind):
    assert reach(tools=tool(kind)) == f"The tool {kind.upper()}"
    assert fee(tools=tool(kind)) is None
    assert fee(tools=tool(f"{kind}x")) == f"The tool {kind.upper()}X"


@pytest.mark.parametrize(
    "kind", ["mcp_toolset", "web_fetch_20250910", "web_fetch_20250910 ", "a\nb_20250910", "_20250910"]
)
@pytest.mark.parametrize("place", ["anything", "content", "system", "tool_choice"])
def test_what_is_such_a_tool_by_its_type_is_one_wherever_it_stands(kind, place):
    value = {"type": kind, "name": "x"}
    for found in (value, [value], [[value]], {"deep": [{"deeper": value}]}):
        assert reach(**{place: found}) == f"The tool {kind.upper()}"


@pytest.mark.parametrize("kind", ["mcp_toolset_x", "xmcp_toolset", "text", "web_fetch_2025091", 7, None])
def test_what_is_none_by_its_type_is_one_among_tools_only(kind):
    assert reach(content=[{"type": kind, "name": "x"}]) is None
    assert (reach(tools=tool(kind)) is None) == (kind is None)


# Where tools stand


@pytest.mark.parametrize("name", ["context_management", "metadata", "output_config", "output_format", "safeguards"])
def test_data_is_not_looked_at(name):
    data = {"type": "web_fetch_20250910", "Tools": [{"type": "web_fetch_20250910"}], "source": {"type": "url"}}
    assert reach(**{name: data}) is None
    assert reach(**{f"{name}s": data}) is not None


@pytest.mark.parametrize("name", ["caller", "input"])
def test_what_a_call_of_a_tool_is_given_is_not_looked_at(name):
    data = {"type": "web_fetch_20250910", "Tools": [{"type": "web_fetch_20250910"}], "source": {"type": "url"}}
    assert reach(content=[{"type": "tool_use", "name": "x", name: data}]) is None
    assert reach(content=[{"type": "tool_result", name: data}]) is not None
    assert reach(**{name: data}) is not None


@pytest.mark.parametrize("name", ["tools", "definition"])
def test_what_a_tool_says_of_itself_is_not_looked_at_but_its_type(name):
    itself = {"name": "x", "input_schema": {"Type": "object", "tools": ["x"]}}
    assert reach(**{name: [itself]}) is None
    assert reach(**{name: [itself | {"type": "web_fetch_20250910"}]}) == "The tool WEB_FETCH_20250910"


def test_a_schema_is_not_looked_at_and_what_stands_beside_it_is():
    looks_like_a_tool = {"type": "web_fetch_20250910", "source": {"type": "url"}}
    for name in ("input_schema", "output_schema", "input_examples"):
        assert reach(tools=[{"name": "x", name: looks_like_a_tool}]) is None
    assert reach(tools=[{"name": "x", "schema": looks_like_a_tool}]) == "The tool WEB_FETCH_20250910"
    assert reach(tools=[{"name": "x", "source": {"type": "url"}}]) == "A source of type URL"
    assert reach(tools=[{"name": "x", "tool": {"type": "custom"}}]) == "A change of tools of unknown type"
    # Within a fallback the request's own data stay data, also where one stands in a tool.
    assert reach(tools=[{"name": "x", "fallbacks": [{"model": "m", "metadata": {"type": "url", "Tools": 1}}]}]) is None


@pytest.mark.parametrize("kind", ["server_tool_use", "mcp_tool_use"])
def test_a_call_of_a_tool_of_the_models_servers_is_refused_and_what_it_is_given_is_data(kind):
    refused = "A call of a tool of the model's servers"
    assert reach(content=[{"type": kind, "name": "web_search", "input": {"Tools": 1}}]) == refused
    assert fee(content=[{"type": kind, "name": "web_search", "input": {"Tools": 1}}]) is None
    assert reach(content=[{"type": "server_tool_use", "name": "advisor"}]) is None
    assert reach(content=[{"type": "mcp_tool_use", "name": "advisor"}]) == refused


@pytest.mark.parametrize("shape", ["web_fetch_20250910", 7, True, [["x"]]])
@pytest.mark.parametrize("place", ["tool", "tools", "definition"])
def test_a_tool_of_another_shape_is_refused(place, shape):
    assert reach(**{place: shape}) == "A tool of unknown shape"
    assert reach(other=shape) is None
    assert reach(**{place: None}) is None


def test_a_type_of_another_shape_is_refused():
    for kind in (["custom"], {"a": 1}, 7, True, f"{WORD_AT_THE_BOUND}x"):
        assert reach(tools=tool(kind)) == "A tool of unknown type"
        assert reach(content={"source": {"type": kind}}) == "A source of unknown type"
    assert reach(tools=tool(WORD_AT_THE_BOUND)) == f"The tool {WORD_AT_THE_BOUND.upper()}"


@pytest.mark.parametrize("kind", ["tool_reference", "tool_definition"])
def test_a_change_of_tools_names_or_defines_one(kind):
    assert reach(content=[{"tool": {"type": kind, "name": "x"}}]) is None
    for other in (f"{kind}x", "", None, [kind], "custom"):
        assert reach(content=[{"tool": {"type": other}}]) == "A change of tools of unknown type"


@pytest.mark.parametrize("name", ["Tools", "toolS", "TYPE", "Source", "MCP_servers", "\u212a"])
def test_a_name_in_other_letters_is_refused_since_some_servers_read_it(name):
    assert reach(**{name: None}) == "A name that no field has"
    assert reach(content=[{"type": "text", name: 1}]) == "A name that no field has"
    assert reach(content=[{"type": "text", "text": name}]) is None


# What else reaches elsewhere


@pytest.mark.parametrize("key", ["mcp_servers", "container"])
def test_servers_and_containers_of_the_models_reach_elsewhere(key):
    for value in ([{"url": "x"}], {"id": "x"}, "x", 1):
        assert reach(**{key: value}) == f"'{key.upper()}'"
        assert reach(fallbacks=[{key: value}]) == f"'{key.upper()}'"
    for nothing in (None, [], {}, "", 0, False):
        assert reach(**{key: nothing}) is None


def test_a_file_of_the_models_servers_reaches_elsewhere():
    assert reach(content=[{"type": "container_upload", "file_id": "x"}]) == "A file of the model's servers"
    assert reach(content=[{"type": "container_uploads"}]) is None


@pytest.mark.parametrize("kind", ["base64", "content", "text"])
def test_a_source_in_place_reaches_nothing(kind):
    assert reach(content=[{"source": {"type": kind}}]) is None
    assert reach(content=[{"source": {"type": f"{kind}x"}}]) == f"A source of type {kind.upper()}X"


@pytest.mark.parametrize("kind", ["url", "file", ""])
def test_a_source_elsewhere_is_refused_where_it_is_a_source(kind):
    assert reach(content=[{"source": {"type": kind}}]) == f"A source of type {kind.upper()}"
    assert reach(content=[{"sources": {"type": kind}}]) is None
    assert reach(content=[{"source": "https://where.it.was.found"}]) is None
    assert reach(content=[{"source": {}}]) == "A source of unknown type"


def test_all_of_a_long_request_is_looked_at():
    last = {"source": {"type": "url"}}
    assert reach(messages=[{"content": [{"type": "text"}] * 50}] * 50 + [last]) == "A source of type URL"
    assert reach(messages=[last, *[{"content": [{"type": "text"}] * 50}] * 50]) == "A source of type URL"


# Which models may answer


def test_models_beside_the_one_that_is_named_are_those_of_advisors_and_fallbacks():
    document = {
        "model": "first",
        "fallbacks": [{"model": "second"}, {"model": ["x"]}, {}],
        "tools": [{"type": "advisor_20260301", "model": "third"}, {"type": "custom", "model": "nobody"}],
        "other": {"model": "nobody"},
    }
    assert sorted(additional_models(document)) == ["", "", "second", "third"]
    assert list(additional_models({"model": "first"})) == []
    assert list(additional_models({"fallbacks": [{"model": f"{WORD_AT_THE_BOUND}x"}]})) == [""]
    assert list(additional_models({"fallbacks": {"model": WORD_AT_THE_BOUND}})) == [WORD_AT_THE_BOUND]


def test_something_among_tools_that_is_no_object_names_no_model():
    assert list(additional_models({"tools": ["advisor_20260301", 7], "tool": "x"})) == []


# Reading


def test_a_request_is_an_object_whose_model_is_a_word():
    for body in (b"{}", b'{"model": ""}', json.dumps({"model": WORD_AT_THE_BOUND}).encode()):
        assert decode_body(body) == json.loads(body)
    for body in (b"[]", b'"x"', b"null", b"", b'{"model": 1}', b'{"model": null}', b'{"model": ["m"]}'):
        refused = decode_body(body)
        assert isinstance(refused, Rejected)
        assert (refused.status, refused.error_type) == (400, "invalid_request_error")
    assert isinstance(decode_body(json.dumps({"model": f"{WORD_AT_THE_BOUND}x"}).encode()), Rejected)
    assert decode_body(bytearray(b'{"a": 1}')) == {"a": 1}


def test_a_request_has_so_many_values_and_not_one_more(monkeypatch):
    monkeypatch.setattr(request_body, "REQUEST_JSON_VALUES_MAX", 10)
    # Of an object with one member: the brace and the colon, one bracket, the commas.
    for count, is_read in ((7, True), (8, False)):
        body = b'{"a":[%s]}' % b",".join([b"1"] * (count + 1))
        assert isinstance(decode_body(body), dict) is is_read
    for sign in (b",", b":", b"[", b"{"):
        refused = decode_body(b'{"a":"%s"}' % (sign * 9))
        assert isinstance(refused, Rejected)
        assert (refused.status, refused.error_type) == (413, "request_too_large")
        assert isinstance(decode_body(b'{"a":"%s"}' % (sign * 8)), dict)
    assert isinstance(decode_body(b'{"a":"%s"}' % (b"}]." * 100)), dict)
