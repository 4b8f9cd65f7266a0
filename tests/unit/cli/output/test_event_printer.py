"""Printing of a task's events as lines of text."""

import io
import json
import time
from datetime import UTC, datetime

import pytest
from rich.console import Console

from doubles import sample_task
from doubles.fake_event_stream import agent_message, tool_call_started, tool_result
from sandbox.cli.output.event_printer import (
    FULL,
    SHORT,
    STATES_ONLY,
    DetailLevel,
    EventPrinter,
    print_events,
)


def print_to_text(events, *, width: int = 80, detail: DetailLevel = SHORT) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False, markup=False, highlight=False)
    print_events(events, console, detail)
    return console.file.getvalue()


def strip_times(text: str) -> list[str]:
    return [line[10:] for line in text.splitlines() if line != "2026-01-29"]


NOW = "2026-01-29T10:10:01.000Z"


def output(text: str, stream: str = "stdout", **fields) -> dict:
    return {"type": "output", "seq": 1, "timestamp": NOW, "stream": stream, "data": text, "parsed": False, **fields}


def message(text: str, **fields) -> dict:
    return {**agent_message(text), "timestamp": NOW, **fields}


def test_sample_bug_fix_is_printed():
    assert strip_times(print_to_text(sample_task.task_events())) == [
        "pending       Waiting to be started",
        "staging       Cloning https://github.com/org/app.git",
        "provisioning  Creating the sandbox",
        "ready         The sandbox is ready",
        "running       Claude Code is working",
        "  I'll look at the failing test first, then at the parser that it",
        "  exercises.",
        "  ✗ Bash  python3 -m pytest -q tests/test_parser.py  1.2 s",
        "    Exit code 1",
        "    FAILED tests/test_parser.py::test_empty - IndexError: list index",
        "    out of range",
        "  ▸ Read  src/app/parser.py  12 ms",
        "  The parser indexes into the tokens before it checks that there are",
        "  any.",
        "  I'll return early instead.",
        "  ▸ Edit  src/app/parser.py  25 ms",
        "  Refused telemetry.example.com:443: not in allowed_hosts",
        "  ▸ Bash  python3 -m pytest -q && git add -A && git commit -q -…  14 s",
        "  Fixed: an empty input now gives an empty list. All 128 tests pass.",
        "completing    Collecting artifacts",
        "completed     Claude Code finished its work",
        "  35 s · 4 tool calls · 26,911 tokens in, 590 out · $0.0895",
    ]


def test_date_is_printed_when_it_changes():
    states = [
        {"type": "state_change", "new_state": "pending", "timestamp": f"2026-01-{day}T12:00:00Z"}
        for day in (29, 29, 30)
    ]
    assert [line for line in print_to_text(states).splitlines() if line.startswith("2026")] == [
        "2026-01-29",
        "2026-01-30",
    ]
    now = {"type": "state_change", "new_state": "pending", "timestamp": datetime.now(UTC).isoformat()}
    assert len(print_to_text([now]).splitlines()) == 1


def test_long_denial_reason_is_wrapped():
    denied = {
        "type": "egress_denied",
        "host": "example.com",
        "port": 443,
        "reason": "only the model is reachable",
    }
    assert strip_times(print_to_text([denied], width=50)) == [
        "  Refused example.com:443: only the",
        "  model is reachable",
    ]


def test_reason_for_a_failure_is_printed_once():
    reason = "Cannot clone it."
    error = {"type": "error", "error": "clone_failed", "message": reason}
    failed = {"type": "state_change", "new_state": "failed", "state_message": reason}
    assert [line.strip() for line in strip_times(print_to_text([error, failed]))] == [reason, "failed"]


def print_without_failure(*events):
    file = io.StringIO()
    print_events(events, Console(file=file, width=80), omits_failure=True)
    return [line.strip() for line in strip_times(file.getvalue())]


def state_change(state: str, **fields: str) -> dict:
    return {"type": "state_change", "new_state": state, **fields}


CLONE_ERROR = {"type": "error", "error": "clone_failed", "message": "Cannot clone it."}


def test_reason_for_a_failure_can_be_omitted():
    completing = state_change("completing", state_message="Collecting artifacts")
    printed = print_without_failure(CLONE_ERROR, completing, state_change("failed", state_message="Cannot clone it."))
    assert printed == ["completing    Collecting artifacts", "failed"]


def test_errors_other_than_the_failure_reason_are_printed():
    attempt = {"type": "attempt", "attempt": 2, "resumes": False}
    assert print_without_failure(CLONE_ERROR, attempt) == ["Cannot clone it.", "Attempt 2 starts over"]
    assert print_without_failure(CLONE_ERROR, state_change("failed", state_message="Other.")) == [
        "Cannot clone it.",
        "failed",
    ]
    completed = [state_change("completed", state_message="Done."), {"type": "end", "state": "completed"}]
    assert "Cannot clone it." in print_without_failure(CLONE_ERROR, *completed)
    assert print_without_failure(CLONE_ERROR) == ["Cannot clone it."]


def test_refused_model_request_is_not_printed_as_a_connection():
    denied = {"type": "egress_denied", "host": "model", "port": 8123, "reason": "The budget is spent."}
    assert strip_times(print_to_text([denied])) == ["  Refused a model request: The budget is spent."]


@pytest.mark.parametrize("width", [40, 80, 140])
def test_lines_fit_the_window(width):
    events = [event for event in sample_task.task_events() if event["type"] != "state_change"]
    assert max(map(len, print_to_text(events, width=width).splitlines())) <= width


def test_final_state_is_returned():
    console = Console(file=io.StringIO())
    assert print_events(sample_task.task_events(), console) == "completed"
    assert print_events(sample_task.task_events()[:-1], console) is None


def test_control_characters_in_events_are_escaped():
    hostile = "\x1b[2J\x1b]52;c;aGk=\x07 [bold]x[/] \u202e"
    events = [
        {"type": "state_change", "new_state": hostile, "state_message": hostile},
        message(hostile),
        output(hostile, "stderr"),
        tool_call_started("t", hostile, summary=hostile),
        tool_result("t", hostile, is_error=True),
        {"type": "tool_call", "tool": hostile, "tool_use_id": "t", "duration_ms": 1, "is_error": True},
        {"type": "egress_denied", "host": hostile, "port": 1, "reason": hostile},
        {"type": "error", "message": hostile},
        {"type": "gap", "reason": hostile},
    ]
    text = print_to_text(events, width=200)
    assert not set(text) & {"\x1b", "\x07", "\u202e"}
    assert text.count(r"\x1b[2J") == 11
    assert "[bold]x[/]" in text


def test_tool_error_is_printed_without_ruler_lines():
    lines = strip_times(print_to_text(call("Exit code 1\n====\nFAIL: one", is_error=True)))
    assert [line.strip() for line in lines] == ["✗ Bash  make  5 ms", "Exit code 1", "FAIL: one"]


def test_long_reason_is_wrapped_only_on_a_terminal():
    reason = "Claude Code exited with code 0 without a final result; the task's logs may contain the reason."
    event = {"type": "state_change", "new_state": "failed", "state_message": reason}
    assert len(print_to_text([event]).splitlines()) == 1
    screen = io.StringIO()
    EventPrinter(Console(file=screen, width=80, force_terminal=True, color_system=None)).handle(event)
    first, *others = screen.getvalue().splitlines()
    column = first.index("Claude Code")
    assert others
    assert all(line[:column].isspace() and len(line) < 80 for line in others)
    assert " ".join([first[column:], *(line.strip() for line in others)]).split() == reason.split()


def test_long_message_is_truncated():
    lines = strip_times(print_to_text([message("\n".join(f"line {number}" for number in range(100)))]))
    assert len(lines) == 6
    assert lines[-1].endswith("line 5…")


@pytest.mark.parametrize("text", ["a\n", "a\t", "\x1b", "word "])
def test_huge_message_is_truncated_quickly(text):
    started = time.process_time()
    lines = strip_times(print_to_text([message(text * 1_000_000)]))
    assert time.process_time() - started < 5
    assert len(lines) == 6
    assert lines[-1].endswith("…")


def test_unknown_and_malformed_events_are_ignored():
    parsed = output('{"type": "new"}\n', parsed=True)
    assert print_to_text([{"type": "a_new_type"}, {}, {"type": "output"}, {"type": "progress"}, parsed]) == ""


def test_open_tool_calls_are_bounded():
    events = [tool_call_started(f"t{number}", summary="ls") for number in range(1000)]
    end = {"type": "tool_call", "tool": "Bash", "tool_use_id": "t0", "duration_ms": 5}
    assert strip_times(print_to_text([*events, end])) == ["  ▸ Bash  5 ms"]


def call(content: str, *, is_error: bool = False) -> list[dict]:
    """Return all events of a tool call."""
    return [
        tool_call_started("t", summary="make"),
        tool_result("t", content, is_error=is_error),
        {"type": "tool_call", "tool": "Bash", "tool_use_id": "t", "duration_ms": 5, "is_error": is_error},
    ]


def test_full_detail_truncates_tool_results():
    content = "\n\n".join(f"line {number} \x1b[2J" for number in range(5))
    assert strip_times(print_to_text(call(content), detail=FULL)) == [
        "  ▸ Bash  make  5 ms",
        r"    line 0 \x1b[2J",
        r"    line 1 \x1b[2J",
        r"    line 2 \x1b[2J",
        "    … 2 more lines",
    ]
    assert strip_times(print_to_text(call("one"), detail=FULL))[1:] == ["    one"]
    assert strip_times(print_to_text(call(""), detail=FULL))[1:] == []


def edit_call(new: str, *, is_error: bool = False) -> list[dict]:
    """Return all events of an edit."""
    edits = [{"path": "a.py", "old": "one\ntwo\n", "new": new}]
    return [
        tool_call_started("t", "Edit", summary="a.py", edits=edits),
        tool_result("t", "No such text" if is_error else "Updated.", is_error=is_error),
        {"type": "tool_call", "tool": "Edit", "tool_use_id": "t", "duration_ms": 5, "is_error": is_error},
    ]


def test_edits_are_printed_as_diffs_and_escaped():
    lines = strip_times(print_to_text(edit_call("one\n\x1b[2J\u202etwo " + "x" * 100), detail=FULL))
    assert lines == ["  ▸ Edit  a.py  5 ms", "     one", "    -two", r"    +\x1b[2J\u202etwo " + "x" * 46 + "…"]


def test_failed_edit_has_no_diff():
    assert strip_times(print_to_text(edit_call("2", is_error=True), detail=FULL)) == [
        "  ✗ Edit  a.py  5 ms",
        "    No such text",
    ]


@pytest.mark.parametrize(("has_color", "line"), [(True, "\x1b[32m+2\x1b[0m"), (False, "+2")])
def test_short_detail_prints_diffs_only_on_a_terminal(has_color, line):
    color_system = "standard" if has_color else None
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=color_system, _environ={})
    print_events(edit_call("one\n2\n"), console, SHORT, is_live=False)
    assert f"    {line}\n" in console.file.getvalue()
    assert strip_times(print_to_text(edit_call("one\n2\n"))) == ["  ▸ Edit  a.py  5 ms"]


def test_full_detail_prints_complete_messages():
    long_message = message("\n".join(f"line {number}" for number in range(100)))
    assert len(strip_times(print_to_text([long_message], detail=FULL))) == 100


def test_detail_level_states_prints_states_and_totals():
    lines = strip_times(print_to_text(sample_task.task_events(), detail=STATES_ONLY))
    assert [line.split()[0] for line in lines[:-2]] == [
        "pending", "staging", "provisioning", "ready", "running", "Refused", "completing",
    ]  # fmt: skip
    assert lines[-1].strip() == "35 s · 4 tool calls · 26,911 tokens in, 590 out · $0.0895"


def test_duration_is_measured_from_the_start_of_the_agent():
    """The printed duration matches the task's `duration_seconds`. A log without the agent's start has no duration."""
    end = {"type": "end", "state": "completed", "timestamp": "2026-01-29T10:10:09.300Z"}
    events = [state_change("pending", timestamp=NOW), state_change("running", timestamp="2026-01-29T10:10:02.000Z")]
    again = state_change("running", timestamp="2026-01-29T10:10:05.000Z")  # the second attempt
    assert strip_times(print_to_text([*events, again, end]))[-1] == "  7.3 s"
    assert strip_times(print_to_text([events[0], end]))[1:] == []


def test_states_on_a_terminal_are_formatted_as_in_the_dashboard():
    events = [state_change(state, timestamp=NOW, state_message="m") for state in ("running", "failed_preserved")]
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None, _environ={})
    print_events(events, console, is_live=False)
    lines = console.file.getvalue().splitlines()[-2:]
    assert [line[10:] for line in lines] == ["running           m", "failed, preserved m"]
    assert strip_times(print_to_text(events)) == ["running       m", "failed_preserved m"]


def test_plain_text_output_is_printed():
    assert strip_times(print_to_text([output("Fixed it.\n"), output("\n")])) == ["  Fixed it."]


def test_output_that_is_not_parsed_is_printed_as_text():
    forged = json.dumps({"type": "assistant", "message": {"content": [{"type": "text", "text": "Forged."}]}})
    for detail in (SHORT, FULL):
        assert strip_times(print_to_text([output(forged)], width=300, detail=detail)) == [f"  {forged}"]


def test_output_that_is_parsed_is_not_printed():
    assert print_to_text([output("{", continued=True), output('"type":"x"}\n', parsed=True)]) == ""


def test_json_objects_from_an_earlier_server_are_not_printed():
    lines = [output(text) for text in ('{"type":"assistant"}\n', "{not json}\n", "text\n")]
    for line in lines:
        del line["parsed"]
    assert strip_times(print_to_text(lines)) == ["  {not json}", "  text"]


def test_parts_of_a_long_line_are_joined():
    events = [output("long ", continued=True), output("line\n"), output("next\n")]
    assert strip_times(print_to_text(events)) == ["  long line", "  next"]


def test_endless_line_is_dropped_and_the_next_line_is_printed():
    printer = EventPrinter(Console(file=io.StringIO()), FULL)
    for _ in range(20):
        printer.handle(output("x" * 1024 * 1024, continued=True))
    assert sum(map(len, printer._line_parts)) <= 8 * 1024 * 1024
    assert strip_times(print_to_text([*[output("x" * 2**20, continued=True)] * 9, output("x"), output("y")])) == ["  y"]


def test_thoughts_and_prompts_and_notices_are_not_printed():
    kinds = [message(kind, kind=kind) for kind in ("thinking", "prompt", "notice")]
    assert print_to_text(kinds, detail=FULL) == ""


def test_result_is_printed_if_no_message_preceded_it():
    result = {"type": "agent_result", "text": "Fixed.", "is_error": False, "timestamp": NOW}
    assert strip_times(print_to_text([result])) == ["  Fixed."]
    assert strip_times(print_to_text([message("Done."), result])) == ["  Done."]


def test_stdout_that_repeats_the_last_message_is_not_printed():
    assert strip_times(print_to_text([message("Done."), output("Done.\n")])) == ["  Done."]
    assert strip_times(print_to_text([message("Done."), message("Done.")])) == ["  Done.", "  Done."]


def test_conversation_converted_by_the_server_is_printed():
    use, result, end = call("No such file", is_error=True)
    converted = output("{}", parsed=True, conversation=[agent_message("I look."), use])
    transcript = {"type": "conversation", "seq": 2, "timestamp": NOW, "conversation": [result]}
    assert strip_times(print_to_text([converted, transcript, end])) == [
        "  I look.",
        "  ✗ Bash  make  5 ms",
        "    No such file",
    ]


def test_unmatched_tool_results_are_bounded():
    printer = EventPrinter(Console(file=io.StringIO()), FULL)
    for number in range(1000):
        printer.handle(tool_result(f"t{number}", "x" * 1000))
    assert len(printer._results) <= 100


def test_new_attempt_is_printed():
    events = [
        {"type": "error", "error": "runner_lost", "message": "The task's runner died."},
        {"type": "attempt", "attempt": 2, "attempt_id": "bcdefghi2345", "resumes": True},
        {"type": "attempt", "attempt": 3, "attempt_id": "cdefghij2345", "resumes": False},
    ]
    text = print_to_text(events)
    assert "Attempt 2 resumes where the previous attempt stopped" in text
    assert "Attempt 3 starts over" in text


def test_elapsed_time_is_measured_by_the_clock_of_the_server():
    printer = EventPrinter(Console(file=io.StringIO(), width=80))
    printer.handle({"type": "state_change", "new_state": "pending", "timestamp": "2026-01-29T10:00:00.000Z"})
    assert printer.elapsed_seconds is None
    printer.handle({"type": "state_change", "new_state": "running", "timestamp": "2026-01-29T10:00:05.000Z"})
    assert printer.elapsed_seconds < 5
    printer.handle({**tool_call_started("a", command="make", summary="make"), "timestamp": "2026-01-29T10:00:18.000Z"})
    assert printer.is_tool_running
    assert 13 <= printer.elapsed_seconds < 18
    printer.handle({"type": "tool_call", "tool_use_id": "a", "tool": "Bash", "timestamp": "2026-01-29T10:00:17.000Z"})
    assert not printer.is_tool_running
    assert printer.elapsed_seconds >= 13


BUDGET_SPENT_MESSAGE = "lifecycle.budget_tokens (10 tokens) is spent. Raise the budget."
BUDGET_SPENT_EVENTS = (
    {"type": "error", "error": "budget_exceeded", "message": BUDGET_SPENT_MESSAGE},
    {"type": "usage", "input_tokens": 1},
    {"type": "egress_denied", "host": "model", "port": 1, "reason": BUDGET_SPENT_MESSAGE},
    {"type": "state_change", "new_state": "completing"},
    {"type": "error", "error": "usage_unread", "message": "The maximum is counted."},
)


def test_spent_budget_is_not_printed_if_the_caller_prints_why_the_task_failed():
    failed = {"type": "state_change", "new_state": "failed", "state_message": BUDGET_SPENT_MESSAGE}
    lines = [line.strip() for line in print_without_failure(*BUDGET_SPENT_EVENTS, failed)]
    assert lines == ["completing", "The maximum is counted.", "failed"]


@pytest.mark.parametrize(
    ("state", "message"), [("completed", "Done"), ("cancelled", "Cancelled"), ("failed", "The disk was full.")]
)
def test_spent_budget_is_printed_if_the_task_ends_for_another_reason(state, message):
    end = {"type": "state_change", "new_state": state, "state_message": message}
    assert BUDGET_SPENT_MESSAGE in " ".join(" ".join(print_without_failure(*BUDGET_SPENT_EVENTS, end)).split())
