"""What the real Claude Code printed (see `script/record-conversations`), as a person following the task reads it."""

import json
from pathlib import Path

import pytest

from sandbox.agents.claude_code.output_parser import ClaudeOutputParser
from sandbox.interfaces.agent import AgentReady, ApiRetry, ToolFinished, ToolStarted, TurnStarted
from sandbox.interfaces.runtime import ExitStatus
from sandbox.model.errors import FailureCode

RECORDINGS = Path(__file__).parent / "recordings"
INDEX = json.loads((RECORDINGS / "index.json").read_text())
SESSION_ID = "00000000-0000-4000-8000-0000000000aa"


def replay(name, *, lines=None, exit_code=None):
    """Events and outcome of a recording, or of some of its lines."""
    conversation = ClaudeOutputParser(SESSION_ID)
    lines = recorded(name) if lines is None else lines
    events = [event for line in lines for event in conversation.parse_line(line)]
    code = INDEX[name]["exit_code"] if exit_code is None else exit_code
    return events, conversation.outcome(ExitStatus(code), INDEX[name]["stderr"].encode())


def recorded(name):
    return (RECORDINGS / f"{name}.ndjson").read_bytes().splitlines(keepends=True)


def story(events):
    """The events after the first one in short: `turn`, `Bash(`, `)` for a good answer, `!)` for a bad one, `retry`."""
    words = {TurnStarted: lambda e: "turn", ApiRetry: lambda e: "retry", ToolStarted: lambda e: f"{e.tool}("}
    words[ToolFinished] = lambda e: "!)" if e.is_error else ")"
    begun, *later = events
    assert isinstance(begun, AgentReady)
    return " ".join(words[type(event)](event) for event in later)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("success_with_tools", "turn Read( ) turn Edit( ) turn Bash( Bash( ) !) turn NoSuchTool( !) turn"),
        ("background_command", "turn Bash( ) turn turn"),
        ("subagent_in_foreground", "turn Agent( Bash( ) ) turn"),
        ("subagent_in_background", "turn Agent( ) turn Bash( ) turn"),
        ("retried_500", "retry retry turn"),
        ("retried_cut_stream", "retry turn"),
    ],
)
def test_a_run_that_finished_is_a_success(name, told):
    events, outcome = replay(name)
    assert story(events) == told
    assert outcome.failure is None
    assert outcome.result["result"] == "All done."
    assert outcome.result["is_error"] is False


@pytest.mark.parametrize(("name", "rounds"), [("success_with_tools", 1), ("background_command", 2)])
def test_the_agent_begins_once_however_many_rounds_there_are(name, rounds):
    assert sum(b'"subtype":"init"' in line for line in recorded(name)) == rounds
    events, _ = replay(name)
    (began,) = [event for event in events if isinstance(event, AgentReady)]
    assert {"Bash", "Read", "Task", "Write"} <= began.tools
    assert began.mcp_servers == {}


def test_every_tool_that_ended_had_begun_under_the_same_name():
    events, _ = replay("success_with_tools")
    begun = {event.tool_use_id: event.tool for event in events if isinstance(event, ToolStarted)}
    ended = {event.tool_use_id: event.tool for event in events if isinstance(event, ToolFinished)}
    assert ended == begun
    assert len(begun) == 5


def test_retries_say_which_and_why():
    events, _ = replay("retried_500")
    first, second = (event.message for event in events if isinstance(event, ApiRetry))
    assert "status 500 (server_error)" in first
    assert "retry 1 of 10" in first
    assert "retry 2 of 10" in second


@pytest.mark.parametrize(
    ("name", "told", "advice"),
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
def test_a_run_that_did_not_finish_says_what_to_do(name, told, advice):
    events, outcome = replay(name)
    assert story(events) == told
    assert outcome.failure.code is FailureCode.AGENT_FAILED
    assert advice in outcome.failure.message
    assert outcome.failure.message.isprintable()


def test_a_run_cut_off_after_any_line_is_no_success():
    lines = recorded("success_with_tools")
    for kept in range(len(lines)):
        assert _fails("success_with_tools", lines[:kept]), kept
    assert not _fails("success_with_tools", lines)


@pytest.mark.parametrize("name", ["success_with_tools", "background_command", "subagent_in_background"])
@pytest.mark.parametrize("missing_bytes", [2, 100, 1000])
def test_a_run_cut_off_within_its_last_result_is_no_success(name, missing_bytes):
    *lines, last = recorded(name)
    assert b'"type":"result"' in last
    assert _fails(name, [*lines, last[:-missing_bytes]])
    assert not _fails(name, [*lines, last[:-1]])


def _fails(name, lines):
    _, outcome = replay(name, lines=lines)
    return outcome.failure is not None and outcome.failure.code is FailureCode.AGENT_NO_RESULT


def test_a_result_does_not_make_up_for_a_bad_exit():
    _, outcome = replay("success_with_tools", exit_code=3)
    assert outcome.failure.code is FailureCode.AGENT_FAILED
    assert "code 3" in outcome.failure.message
    assert outcome.result is not None
