"""Parsing of Claude Code's lines for the event printer."""

import json

import pytest

from sandbox.cli.output.agent_output import (
    SUMMARY_CHARACTERS_MAX,
    AgentMessage,
    AgentOutputParser,
    ApiRetry,
    TextOutput,
    ToolCall,
    ToolResult,
)


def read(line: object) -> list:
    return list(AgentOutputParser().feed(line if isinstance(line, str) else json.dumps(line), continued=False))


def assistant(*blocks: object) -> dict:
    return {"type": "assistant", "message": {"content": list(blocks)}}


def tool_use(**arguments: object) -> dict:
    return assistant({"type": "tool_use", "id": "t", "name": "Tool", "input": arguments})


def test_messages_and_tool_calls_are_parsed():
    events = read(assistant({"type": "text", "text": "Hello."}, {"type": "thinking", "thinking": "hm"}))
    assert events == [AgentMessage("Hello.")]
    assert read(tool_use(command="ls -l", description="List files")) == [ToolCall("t", "Tool", "ls -l")]


@pytest.mark.parametrize(
    ("arguments", "summary"),
    [
        ({"file_path": "/workspace/src/a.py", "content": "x"}, "src/a.py"),
        ({"file_path": "/etc/passwd"}, "/etc/passwd"),
        ({"pattern": "*.py", "path": "/workspace"}, "*.py"),
        ({"url": "https://example.com"}, "https://example.com"),
        ({"command": 5, "query": "q"}, "q"),
        ({"command": "c" * 1_000_000}, "c" * SUMMARY_CHARACTERS_MAX),
        ({}, ""),
    ],
)
def test_tool_call_is_summarized_by_its_main_field(arguments, summary):
    assert read(tool_use(**arguments)) == [ToolCall("t", "Tool", summary)]


@pytest.mark.parametrize("content", ["No such file", [{"type": "text", "text": "No such file"}]])
def test_error_of_a_failed_call_is_kept(content):
    block = {"type": "tool_result", "tool_use_id": "t", "content": content, "is_error": True}
    assert read({"type": "user", "message": {"content": [block]}}) == [ToolResult("t", "No such file", True)]


def test_result_of_a_successful_call_is_kept():
    block = {"type": "tool_result", "tool_use_id": "t", "content": "fine"}
    assert read({"type": "user", "message": {"content": [block]}}) == [ToolResult("t", "fine", False)]


def test_api_retry_is_parsed():
    event = {"type": "system", "subtype": "api_retry", "attempt": 2, "max_retries": 10, "error": "overloaded"}
    assert read(event) == [ApiRetry(2, 10, "overloaded")]


def test_parts_of_a_long_line_are_joined():
    line, parser = json.dumps(assistant({"type": "text", "text": "long"})), AgentOutputParser()
    assert list(parser.feed(line[:20], continued=True)) == []
    assert list(parser.feed(line[20:], continued=False)) == [AgentMessage("long")]
    assert list(parser.feed(line, continued=False)) == [AgentMessage("long")]


def test_endless_line_is_dropped_and_the_next_is_parsed():
    parser = AgentOutputParser()
    for _ in range(20):
        assert list(parser.feed("x" * 1024 * 1024, continued=True)) == []
    assert sum(map(len, parser._parts)) <= 8 * 1024 * 1024
    assert list(parser.feed("x", continued=False)) == []
    assert list(parser.feed(json.dumps(assistant({"type": "text", "text": "next"})), continued=False)) == [
        AgentMessage("next")
    ]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "\n",
        {"type": "assistant"},
        {"type": "assistant", "message": None},
        {"type": "assistant", "message": {"content": "text"}},
        assistant(None, 1, {"type": "text"}, {"type": "text", "text": 1}, {"type": "tool_use", "id": 1, "name": "x"}),
        {"type": "user", "message": {"content": [{"type": "tool_result", "tool_use_id": None}]}},
        {"type": "a_new_type"},
    ],
)
def test_malformed_lines_are_ignored(line):
    assert read(line) == []


@pytest.mark.parametrize("line", ["plain text", "[" * 100_000, "null", "[]", "{}"])
def test_non_event_line_is_text_output(line):
    assert read(line) == [TextOutput(line)]


def test_result_is_a_message_if_no_message_preceded_it():
    result = json.dumps({"type": "result", "subtype": "success", "result": "Fixed."})
    parser = AgentOutputParser()
    assert list(parser.feed(result, continued=False)) == [AgentMessage("Fixed.")]
    assert list(parser.feed(result, continued=False)) == []
