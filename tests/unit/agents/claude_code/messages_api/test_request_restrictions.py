"""Requests can use tools that run in the client. Such tools are matched by their exact type, anywhere in the body."""

import time

import pytest

from sandbox.agents.claude_code.messages_api.request_restrictions import (
    additional_models,
    find_external_access,
    unknown_fee_reason,
)

CLIENT_TOOLS = [
    *("custom", "bash_20250124", "computer_20251124", "memory_20250818", "text_editor_20250728"),
    *("tool_search_tool_20251119", "tool_search_tool_regex_20251119", "tool_search_tool_bm25_20251119"),
    "advisor_20260301",
]
SERVER_TOOLS_WITH_FEE = ["web_search_20250305", "web_fetch_20250910", "mcp_toolset"]
LONGEST_STRING = "x" * 256


def access_reason(**fields) -> str | None:
    return find_external_access({"model": "m", **fields}, str.upper)


def unknown_fee(**fields) -> str | None:
    return unknown_fee_reason({"model": "m", **fields}, str.upper)


def tool(kind) -> list[dict]:
    return [{"name": "Bash"}, {"type": kind, "name": "x"}]


@pytest.mark.parametrize("kind", CLIENT_TOOLS)
def test_client_tool_has_no_external_access_and_no_fee(kind):
    assert (access_reason(tools=tool(kind)), unknown_fee(tools=tool(kind))) == (None, None)


@pytest.mark.parametrize("kind", CLIENT_TOOLS)
@pytest.mark.parametrize("suffix", ["x", "1", "-20250124", "\n", " ", "-evil", "_web_search"])
def test_known_type_with_a_suffix_is_unknown(kind, suffix):
    message = f"The tool {(kind + suffix).upper()}"
    assert (access_reason(tools=tool(kind + suffix)), unknown_fee(tools=tool(kind + suffix))) == (message, message)


@pytest.mark.parametrize("kind", CLIENT_TOOLS)
def test_known_type_with_a_prefix_is_unknown(kind):
    assert access_reason(tools=tool(f"x{kind}")) == f"The tool X{kind.upper()}"
    assert unknown_fee(tools=tool(f"web_{kind}")) == f"The tool WEB_{kind.upper()}"


@pytest.mark.parametrize(
    "kind", ["bash", "bash_2025012", "bash_202501240", "bash_2025012x", "tool_search_tool_REGEX_20251119"]
)
def test_tool_type_without_an_eight_digit_date_is_unknown(kind):
    assert access_reason(tools=tool(kind)) == f"The tool {kind.upper()}"


@pytest.mark.parametrize("kind", SERVER_TOOLS_WITH_FEE)
def test_server_tool_with_a_known_fee_has_external_access(kind):
    assert access_reason(tools=tool(kind)) == f"The tool {kind.upper()}"
    assert unknown_fee(tools=tool(kind)) is None
    assert unknown_fee(tools=tool(f"{kind}x")) == f"The tool {kind.upper()}X"


@pytest.mark.parametrize(
    "kind", ["mcp_toolset", "web_fetch_20250910", "web_fetch_20250910 ", "a\nb_20250910", "_20250910"]
)
@pytest.mark.parametrize("position", ["anything", "content", "system", "tool_choice"])
def test_server_tool_type_is_detected_at_any_position(kind, position):
    value = {"type": kind, "name": "x"}
    for nested in (value, [value], [[value]], {"deep": [{"deeper": value}]}):
        assert access_reason(**{position: nested}) == f"The tool {kind.upper()}"


@pytest.mark.parametrize("kind", ["mcp_toolset_x", "xmcp_toolset", "text", "web_fetch_2025091", 7, None])
def test_unknown_type_counts_as_external_access_only_among_tools(kind):
    assert access_reason(content=[{"type": kind, "name": "x"}]) is None
    assert (access_reason(tools=tool(kind)) is None) == (kind is None)


# Positions of tools


@pytest.mark.parametrize("name", ["context_management", "metadata", "output_config", "output_format", "safeguards"])
def test_data_fields_are_not_inspected(name):
    data = {"type": "web_fetch_20250910", "Tools": [{"type": "web_fetch_20250910"}], "source": {"type": "url"}}
    assert access_reason(**{name: data}) is None
    assert access_reason(**{f"{name}s": data}) is not None


@pytest.mark.parametrize("name", ["caller", "input"])
def test_tool_call_input_is_not_inspected(name):
    data = {"type": "web_fetch_20250910", "Tools": [{"type": "web_fetch_20250910"}], "source": {"type": "url"}}
    assert access_reason(content=[{"type": "tool_use", "name": "x", name: data}]) is None
    assert access_reason(content=[{"type": "tool_result", name: data}]) is not None
    assert access_reason(**{name: data}) is not None


@pytest.mark.parametrize("name", ["tools", "definition"])
def test_tool_definition_is_inspected_only_for_its_type(name):
    definition = {"name": "x", "input_schema": {"Type": "object", "tools": ["x"]}}
    assert access_reason(**{name: [definition]}) is None
    assert access_reason(**{name: [definition | {"type": "web_fetch_20250910"}]}) == "The tool WEB_FETCH_20250910"


def test_data_of_a_toolset_is_not_inspected_but_its_other_fields_are():
    tool_shaped_value = {"type": "future_20260101"}
    for name in ("configs", "input_schema", "output_schema", "input_examples"):
        assert unknown_fee(tools=[{"type": "mcp_toolset", name: tool_shaped_value}]) is None
    assert unknown_fee(tools=[{"type": "mcp_toolset", "other": tool_shaped_value}]) == "The tool FUTURE_20260101"


def test_schema_is_not_inspected_but_other_tool_fields_are():
    tool_shaped_schema = {"type": "web_fetch_20250910", "source": {"type": "url"}}
    for name in ("input_schema", "output_schema", "input_examples"):
        assert access_reason(tools=[{"name": "x", name: tool_shaped_schema}]) is None
    assert access_reason(tools=[{"name": "x", "schema": tool_shaped_schema}]) == "The tool WEB_FETCH_20250910"
    assert access_reason(tools=[{"name": "x", "source": {"type": "url"}}]) == "A source of type URL"
    assert access_reason(tools=[{"name": "x", "tool": {"type": "custom"}}]) == "A tool change of unknown type"
    # Data fields of a fallback are treated as data even if the fallback is inside a tool.
    assert (
        access_reason(tools=[{"name": "x", "fallbacks": [{"model": "m", "metadata": {"type": "url", "Tools": 1}}]}])
        is None
    )


@pytest.mark.parametrize("kind", ["server_tool_use", "mcp_tool_use"])
def test_server_tool_call_counts_as_external_access_and_its_input_as_data(kind):
    message = "A call to a server tool"
    assert access_reason(content=[{"type": kind, "name": "web_search", "input": {"Tools": 1}}]) == message
    assert unknown_fee(content=[{"type": kind, "name": "web_search", "input": {"Tools": 1}}]) is None
    assert access_reason(content=[{"type": "server_tool_use", "name": "advisor"}]) is None
    assert access_reason(content=[{"type": "mcp_tool_use", "name": "advisor"}]) == message


@pytest.mark.parametrize("shape", ["web_fetch_20250910", 7, True, [["x"]]])
@pytest.mark.parametrize("position", ["tool", "tools", "definition"])
def test_tool_of_unknown_shape_counts_as_external_access(position, shape):
    assert access_reason(**{position: shape}) == "A tool of unknown shape"
    assert access_reason(other=shape) is None
    assert access_reason(**{position: None}) is None


def test_type_of_unknown_shape_counts_as_external_access():
    for kind in (["custom"], {"a": 1}, 7, True):
        assert access_reason(tools=tool(kind)) == "A tool of unknown type"
        assert access_reason(content={"source": {"type": kind}}) == "A source of unknown type"
    assert access_reason(tools=tool(LONGEST_STRING)) == f"The tool {LONGEST_STRING.upper()}"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": tool(f"{LONGEST_STRING}x")},
        {"content": {"source": {"type": f"{LONGEST_STRING}x"}}},
        {"content": [{"type": f"{LONGEST_STRING}x"}]},
    ],
)
def test_overlong_type_counts_as_a_tool_of_unknown_type(fields):
    assert access_reason(**fields) == unknown_fee(**fields) == "A tool of unknown type"


def test_length_of_a_field_name_is_limited():
    assert access_reason(**{f"{LONGEST_STRING}x": 1}) == "An unknown field name"
    assert access_reason(content=[{"type": "text", f"{LONGEST_STRING}x": 1}]) == "An unknown field name"
    assert access_reason(content=[{"type": LONGEST_STRING, LONGEST_STRING: 1}]) is None


def test_check_time_is_similar_for_all_characters_in_names():
    """Checking a 32 MiB body would take a second if every underscore started a comparison with the reference names."""

    def cpu_seconds(character: str) -> float:
        item = {character * 250: 1, "type": character * 250}
        content = [item] * 10_000
        started_at = time.thread_time()
        assert access_reason(content=content) is None
        return time.thread_time() - started_at

    pairs = [(cpu_seconds("_"), cpu_seconds("a")) for _ in range(5)]
    assert min(underscores for underscores, _ in pairs) < 3 * min(letters for _, letters in pairs)


@pytest.mark.parametrize("kind", ["tool_reference", "tool_definition"])
def test_tool_change_must_reference_or_define_a_tool(kind):
    assert access_reason(content=[{"tool": {"type": kind, "name": "x"}}]) is None
    for other in (f"{kind}x", "", None, [kind], "custom"):
        assert access_reason(content=[{"tool": {"type": other}}]) == "A tool change of unknown type"


@pytest.mark.parametrize("name", ["Tools", "toolS", "TYPE", "Source", "MCP_servers", "\u212a"])
def test_field_name_with_different_capitalization_is_rejected(name):
    assert access_reason(**{name: None}) == "An unknown field name"
    assert access_reason(content=[{"type": "text", name: 1}]) == "An unknown field name"
    assert access_reason(content=[{"type": "text", "text": name}]) is None


# Other external access


@pytest.mark.parametrize("key", ["mcp_servers", "container"])
def test_mcp_servers_and_containers_count_as_external_access(key):
    for value in ([{"url": "x"}], {"id": "x"}, "x", 1):
        assert access_reason(**{key: value}) == f"'{key.upper()}'"
        assert access_reason(fallbacks=[{key: value}]) == f"'{key.upper()}'"
    for empty in (None, [], {}, "", 0, False):
        assert access_reason(**{key: empty}) is None


def test_container_upload_counts_as_external_access():
    assert access_reason(content=[{"type": "container_upload", "file_id": "x"}]) == "A file on the model's servers"
    assert access_reason(content=[{"type": "container_uploads"}]) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("thread", {"type": "continue", "previous_message_id": "msg_1"}),
        ("thread", {"previous_message_id": "msg_1"}),
        ("thread", "msg_1"),
        ("resumption", {"type": "enabled", "token": "x"}),
        ("resumption", "x"),
        ("previous_message_id", "msg_1"),
    ],
)
def test_reference_to_a_stored_conversation_counts_as_external_access(field, value):
    assert access_reason(**{field: value}) == f"'{field.upper()}'"
    assert access_reason(fallbacks=[{field: value}]) == f"'{field.upper()}'"


def test_thread_with_an_earlier_message_counts_as_external_access():
    thread = {"type": "create", "previous_message_id": "msg_1"}
    assert access_reason(thread=thread) == "'PREVIOUS_MESSAGE_ID'"


def test_request_without_a_stored_conversation_has_no_external_access():
    assert access_reason(thread={"type": "create"}, resumption={"type": "enabled"}) is None
    assert access_reason(thread=None, resumption=None, diagnostics={"previous_message_id": "msg_1"}) is None


@pytest.mark.parametrize("kind", ["base64", "content", "text"])
def test_inline_source_has_no_external_access(kind):
    assert access_reason(content=[{"source": {"type": kind}}]) is None
    assert access_reason(content=[{"source": {"type": f"{kind}x"}}]) == f"A source of type {kind.upper()}X"


@pytest.mark.parametrize("kind", ["document", "image"])
@pytest.mark.parametrize("source", ["https://example.org/x", ["url"], None, 7])
def test_source_of_unknown_shape_counts_as_external_access(kind, source):
    assert access_reason(content=[{"type": kind, "source": source}]) == "A source of unknown shape"
    assert access_reason(content=[{"type": "text", "source": "in words"}]) is None


@pytest.mark.parametrize("kind", ["url", "file", ""])
def test_remote_source_counts_as_external_access(kind):
    assert access_reason(content=[{"source": {"type": kind}}]) == f"A source of type {kind.upper()}"
    assert access_reason(content=[{"sources": {"type": kind}}]) is None
    assert access_reason(content=[{"source": "https://where.it.was.found"}]) is None
    assert access_reason(content=[{"source": {}}]) == "A source of unknown type"


def test_long_request_is_inspected_in_full():
    last = {"source": {"type": "url"}}
    assert access_reason(messages=[{"content": [{"type": "text"}] * 50}] * 50 + [last]) == "A source of type URL"
    assert access_reason(messages=[last, *[{"content": [{"type": "text"}] * 50}] * 50]) == "A source of type URL"


# Models that can respond


def model_names(document) -> list[str]:
    return [each.name for each in additional_models(document)]


def test_advisors_and_fallbacks_count_as_additional_models():
    document = {
        "model": "first",
        "fallbacks": [{"model": "second"}, {"model": ["x"]}, {}],
        "tools": [{"type": "advisor_20260301", "model": "third"}, {"type": "custom", "model": "nobody"}],
        "other": {"model": "nobody"},
    }
    assert sorted(model_names(document)) == ["", "", "second", "third"]
    assert model_names({"model": "first"}) == []
    assert model_names({"fallbacks": [{"model": f"{LONGEST_STRING}x"}]}) == [""]
    assert model_names({"fallbacks": {"model": LONGEST_STRING}}) == [LONGEST_STRING]


def test_advisor_calls_in_the_history_add_no_models():
    """Their blocks have no model. A request that repeats them is not one with an unknown model."""
    kinds = ("advisor_tool_result", "advisor_redacted_result", "advisor_tool_result_error", "advisor_2026030", ["x"])
    assert model_names({"messages": [{"content": [{"type": kind} for kind in kinds]}]}) == []


def test_tools_that_are_not_objects_add_no_models():
    assert model_names({"tools": ["advisor_20260301", 7], "tool": "x"}) == []


@pytest.mark.parametrize("field", ["url", "uri", "file_id", "file_ids"])
def test_field_that_ends_with_a_reference_word_counts_as_external_access(field):
    for name in (field, f"_{field}", f"source_{field}"):
        assert access_reason(content=[{"type": "text", name: "x"}]) == f"'{name.upper()}'"
    for name in (f"x{field}", f"{field}_x"):
        assert access_reason(content=[{"type": "text", name: "x"}]) is None


@pytest.mark.parametrize("name", ["tools", "definition"])
def test_nested_tool_is_checked_like_other_tools(name):
    assert access_reason(tools=[{"name": "x", "part": {"type": "ephemeral"}}]) is None
    assert access_reason(tools=[{"name": "x", name: {"type": "ephemeral"}}]) == "The tool EPHEMERAL"
    assert access_reason(tools=[{"name": "x", name: {"input_schema": {"type": "web_fetch_20250910"}}}]) is None
