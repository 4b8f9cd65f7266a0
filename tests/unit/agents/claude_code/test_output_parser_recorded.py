"""Recorded output of Claude Code (see `script/record-conversations`)."""

import json
from pathlib import Path

import pytest

from sandbox.agents.claude_code.allowed_tools import ClaudeReady
from sandbox.agents.claude_code.output_parser import ClaudeOutputParser
from sandbox.interfaces.agent import ApiRetry, ParsedToolCallEnd, TurnStarted
from sandbox.interfaces.runtime import ExitStatus
from sandbox.model.events import AgentMessage, AgentResult, FileEdit, ToolCallStarted, ToolResult
from sandbox.model.failure import FailureCode

RECORDINGS = Path(__file__).parent / "recordings"
INDEX = json.loads((RECORDINGS / "index.json").read_text())
SESSION_ID = "00000000-0000-4000-8000-0000000000aa"


def replay(name, *, lines=None, exit_code=None):
    """Return the events and the outcome of a recording, or of some of its lines."""
    parser = ClaudeOutputParser(SESSION_ID)
    lines = recorded(name) if lines is None else lines
    events = [event for line in lines for event in parser.parse_line(line) or ()]
    code = INDEX[name]["exit_code"] if exit_code is None else exit_code
    return events, parser.outcome(ExitStatus(code), INDEX[name]["stderr"].encode())


def recorded(name):
    return (RECORDINGS / f"{name}.ndjson").read_bytes().splitlines(keepends=True)


def summarize(events):
    """Abbreviate the events after the first: `turn`, `Bash(`, `)` for success, `!)` for an error, `retry`."""
    symbols = {TurnStarted: lambda e: "turn", ApiRetry: lambda e: "retry", ToolCallStarted: lambda e: f"{e.tool}("}
    symbols[ParsedToolCallEnd] = lambda e: "!)" if e.is_error else ")"
    ready, *later = events
    assert isinstance(ready, ClaudeReady)
    return " ".join(symbols[type(event)](event) for event in later if type(event) in symbols)


@pytest.mark.parametrize(
    ("name", "summary"),
    [
        ("success_with_tools", "turn Read( ) turn Edit( ) turn Bash( Bash( ) !) turn NoSuchTool( !) turn"),
        ("background_command", "turn Bash( turn ) turn"),
        ("command_moved_to_background", "turn Bash( turn ) turn"),
        ("failed_background_command", "turn Bash( turn !) turn"),
        ("subagent_in_foreground", "turn Agent( Bash( ) ) turn"),
        ("subagent_in_background", "turn Agent( turn Bash( ) ) turn"),
        ("retried_500", "retry retry turn"),
        ("retried_cut_stream", "retry turn"),
    ],
)
def test_completed_run_is_a_success(name, summary):
    events, outcome = replay(name)
    assert summarize(events) == summary
    assert outcome.failure is None
    assert outcome.result["result"] == "All done."
    assert outcome.result["is_error"] is False


@pytest.mark.parametrize(("name", "init_count"), [("success_with_tools", 1), ("background_command", 2)])
def test_agent_readiness_is_reported_once(name, init_count):
    assert sum(b'"subtype":"init"' in line for line in recorded(name)) == init_count
    events, _ = replay(name)
    (ready,) = [event for event in events if isinstance(event, ClaudeReady)]
    assert {"Bash", "Read", "Task", "Write"} <= ready.tools
    assert ready.mcp_servers == {}


def test_finished_tools_match_started_tools():
    events, _ = replay("success_with_tools")
    started = {event.tool_use_id: event.tool for event in events if isinstance(event, ToolCallStarted)}
    finished = {event.tool_use_id: event.tool for event in events if isinstance(event, ParsedToolCallEnd)}
    assert finished == started
    assert len(started) == 5


def test_retry_message_has_count_and_reason():
    events, _ = replay("retried_500")
    first, second = (event.message for event in events if isinstance(event, ApiRetry))
    assert "status 500 (server_error)" in first
    assert "retry 1 of 10" in first
    assert "retry 2 of 10" in second


@pytest.mark.parametrize(
    ("name", "summary", "advice"),
    [
        ("max_turns", "turn Bash( )", "raise claude.max_turns"),
        ("overloaded_529", "turn Bash( )", "submit the task again later"),
        ("key_refused_401", "", "check the server's ANTHROPIC_API_KEY"),
        ("forbidden_403", "", "The account is closed"),
        ("unknown_model_404", "", "check claude.model"),
        ("refusal", "turn turn", "change claude.prompt"),
        ("ended_by_sigint", "turn Bash( !)", "interrupted"),
        ("ended_by_sigterm", "turn Bash( !)", "signal 15 (SIGTERM)"),
        ("ended_by_sigkill", "turn Bash(", "signal 9 (SIGKILL)"),
    ],
)
def test_unfinished_run_message_names_the_fix(name, summary, advice):
    events, outcome = replay(name)
    assert summarize(events) == summary
    assert outcome.failure.code is FailureCode.AGENT_FAILED
    assert advice in outcome.failure.message
    assert outcome.failure.message.isprintable()


def test_run_truncated_after_any_line_fails():
    lines = recorded("success_with_tools")
    for line_count in range(len(lines)):
        assert _ends_without_result("success_with_tools", lines[:line_count]), line_count
    assert not _ends_without_result("success_with_tools", lines)


@pytest.mark.parametrize("name", ["success_with_tools", "background_command", "subagent_in_background"])
@pytest.mark.parametrize("missing_bytes", [2, 100, 1000])
def test_run_truncated_in_the_last_result_fails(name, missing_bytes):
    *lines, last = recorded(name)
    assert b'"type":"result"' in last
    assert _ends_without_result(name, [*lines, last[:-missing_bytes]])
    assert not _ends_without_result(name, [*lines, last[:-1]])


def _ends_without_result(name, lines):
    _, outcome = replay(name, lines=lines)
    return outcome.failure is not None and outcome.failure.code is FailureCode.AGENT_NO_RESULT


def test_bad_exit_overrides_the_result():
    _, outcome = replay("success_with_tools", exit_code=3)
    assert outcome.failure.code is FailureCode.AGENT_FAILED
    assert "code 3" in outcome.failure.message
    assert outcome.result is not None


def conversation(name):
    """Return the conversation events of a recording."""
    types = AgentMessage | ToolCallStarted | ToolResult | AgentResult
    return [event for event in replay(name)[0] if isinstance(event, types)]


def test_recorded_run_yields_its_conversation():
    read_id, edit_id, *_ = [event.tool_use_id for event in conversation("success_with_tools") if is_start(event)]
    events = conversation("success_with_tools")
    assert events[:4] == [
        AgentMessage("Claude Code 2.1.332 started with claude-sonnet-4-5-20250929", "notice"),
        AgentMessage("I read it."),
        ToolCallStarted("Read", read_id, "notes.txt", input={"file_path": "notes.txt"}),
        ToolResult(read_id, "1\thello\n2\t"),
    ]
    assert events[4] == ToolCallStarted(
        "Edit",
        edit_id,
        "notes.txt",
        edits=(FileEdit("notes.txt", "hello", "bye"),),
        input={"replace_all": "false"},
    )
    assert [event.command for event in events if is_start(event)] == [None, None, "echo one", "exit 3", None]
    failed = [event for event in events if isinstance(event, ToolResult) and event.is_error]
    assert [(event.output[:11], event.exit_code) for event in failed] == [("Exit code 3", 3), ("<tool_use_e", None)]
    assert events[-2:] == [
        AgentMessage("All done."),
        AgentResult("All done.", turns=6, duration_ms=436, cost_usd=0.01875),
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("success_with_tools", [False] * 5),
        ("background_command", [True]),
        ("command_moved_to_background", [True]),
        ("failed_background_command", [True]),
        ("subagent_in_foreground", [False, False]),
        ("subagent_in_background", [True, False]),
    ],
)
def test_result_of_a_background_call_is_preliminary(name, expected):
    results = [event for event in conversation(name) if isinstance(event, ToolResult)]
    assert [event.in_background for event in results] == expected


def test_background_call_ends_even_if_only_the_task_list_reports_the_end():
    lines = [line for line in recorded("background_command") if b'"task_notification"' not in line]
    assert summarize(replay("background_command", lines=lines)[0]) == "turn Bash( turn ) turn"


def is_start(event):
    return isinstance(event, ToolCallStarted)


def test_conversation_of_a_subagent_refers_to_its_tool_call():
    _, call, prompt, inner_call, *_ = conversation("subagent_in_foreground")
    assert (call.tool, call.parent_tool_use_id) == ("Agent", None)
    assert prompt == AgentMessage("SUBAGENT-BRANCH: look around", "prompt", call.tool_use_id)
    assert (inner_call.tool, inner_call.parent_tool_use_id) == ("Bash", call.tool_use_id)


def test_result_of_a_failed_run_has_a_reason():
    assert conversation("max_turns")[-1] == AgentResult(
        is_error=True, reason="error_max_turns", turns=1, duration_ms=192, cost_usd=0.00375
    )


@pytest.mark.parametrize("name", INDEX)
def test_parser_accepts_every_recorded_line_as_an_event(name):
    parser = ClaudeOutputParser(SESSION_ID)
    assert [line for line in recorded(name) if parser.parse_line(line) is None] == []
