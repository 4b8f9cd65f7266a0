"""Reading Claude Code's lines for the story."""

import json

import pytest

from sandbox.cli.output.transcript import AgentMessage, ApiRetry, TextOutput, ToolCall, ToolResult, TranscriptParser


def read(line: object) -> list:
    return list(TranscriptParser().feed(line if isinstance(line, str) else json.dumps(line), continued=False))


def assistant(*blocks: object) -> dict:
    return {"type": "assistant", "message": {"content": list(blocks)}}


def tool_use(**given: object) -> dict:
    return assistant({"type": "tool_use", "id": "t", "name": "Tool", "input": given})


def test_what_the_agent_says_and_does():
    said = read(assistant({"type": "text", "text": "Hello."}, {"type": "thinking", "thinking": "hm"}))
    assert said == [AgentMessage("Hello.")]
    assert read(tool_use(command="ls -l", description="List files")) == [ToolCall("t", "Tool", "ls -l")]


@pytest.mark.parametrize(
    ("given", "summary"),
    [
        ({"file_path": "/workspace/src/a.py", "content": "x"}, "src/a.py"),
        ({"file_path": "/etc/passwd"}, "/etc/passwd"),
        ({"pattern": "*.py", "path": "/workspace"}, "*.py"),
        ({"url": "https://example.com"}, "https://example.com"),
        ({"command": 5, "query": "q"}, "q"),
        ({}, ""),
    ],
)
def test_a_tool_call_is_summed_up_by_its_telling_field(given, summary):
    assert read(tool_use(**given)) == [ToolCall("t", "Tool", summary)]


@pytest.mark.parametrize("content", ["No such file", [{"type": "text", "text": "No such file"}]])
def test_the_complaint_of_a_failed_call_is_kept(content):
    block = {"type": "tool_result", "tool_use_id": "t", "content": content, "is_error": True}
    assert read({"type": "user", "message": {"content": [block]}}) == [ToolResult("t", "No such file", True)]


def test_the_answer_of_a_call_that_went_well_is_kept_too():
    block = {"type": "tool_result", "tool_use_id": "t", "content": "fine"}
    assert read({"type": "user", "message": {"content": [block]}}) == [ToolResult("t", "fine", False)]


def test_a_model_that_does_not_answer_is_told():
    event = {"type": "system", "subtype": "api_retry", "attempt": 2, "max_retries": 10, "error": "overloaded"}
    assert read(event) == [ApiRetry(2, 10, "overloaded")]


def test_the_parts_of_a_long_line_are_read_together():
    line, transcript = json.dumps(assistant({"type": "text", "text": "long"})), TranscriptParser()
    assert list(transcript.feed(line[:20], continued=True)) == []
    assert list(transcript.feed(line[20:], continued=False)) == [AgentMessage("long")]
    assert list(transcript.feed(line, continued=False)) == [AgentMessage("long")]


def test_a_line_that_never_ends_is_not_collected_and_the_next_one_is_read():
    transcript = TranscriptParser()
    for _ in range(20):
        assert list(transcript.feed("x" * 1024 * 1024, continued=True)) == []
    assert sum(map(len, transcript._parts)) <= 8 * 1024 * 1024
    assert list(transcript.feed("x", continued=False)) == []
    assert list(transcript.feed(json.dumps(assistant({"type": "text", "text": "next"})), continued=False)) == [
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
def test_what_is_not_understood_is_passed_over(line):
    assert read(line) == []


@pytest.mark.parametrize("line", ["plain text", "[" * 100_000, "null", "[]", "{}"])
def test_a_line_that_is_no_event_was_printed(line):
    assert read(line) == [TextOutput(line)]


def test_a_result_is_told_where_it_is_all_there_is():
    result = json.dumps({"type": "result", "subtype": "success", "result": "Fixed."})
    transcript = TranscriptParser()
    assert list(transcript.feed(result, continued=False)) == [AgentMessage("Fixed.")]
    assert list(transcript.feed(result, continued=False)) == []
