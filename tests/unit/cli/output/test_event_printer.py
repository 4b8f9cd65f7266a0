"""The story that people watch."""

import io
import json
from datetime import UTC, datetime

import pytest
from rich.console import Console

from doubles import recorded_task
from sandbox.cli.output.event_printer import (
    FULL,
    SHORT,
    STATES,
    STDOUT,
    Detail,
    EventPrinter,
    is_interactive,
    print_events,
)


def told(frames, *, width: int = 80, detail: Detail = SHORT, is_believed: bool = True) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False, markup=False, highlight=False)
    print_events(frames, console, detail, is_trusted=is_believed)
    return console.file.getvalue()


def without_times(text: str) -> list[str]:
    return [line[10:] for line in text.splitlines() if line != "2026-01-29"]


def output(text: str, stream: str = "stdout") -> dict:
    return {"type": "output", "seq": 1, "timestamp": "2026-01-29T10:10:01.000Z", "stream": stream, "data": text}


def saying(text: str) -> dict:
    return output(json.dumps({"type": "assistant", "message": {"content": [{"type": "text", "text": text}]}}))


def test_a_bug_fix_reads_from_top_to_bottom():
    assert without_times(told(recorded_task.frames())) == [
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
        "  27 s · 4 tool calls · 26,911 tokens in, 590 out · $0.0895",
    ]


def test_the_day_is_told_where_it_is_another():
    states = [
        {"type": "state_change", "new_state": "pending", "timestamp": f"2026-01-{day}T12:00:00Z"}
        for day in (29, 29, 30)
    ]
    assert [line for line in told(states).splitlines() if line.startswith("2026")] == ["2026-01-29", "2026-01-30"]
    now = {"type": "state_change", "new_state": "pending", "timestamp": datetime.now(UTC).isoformat()}
    assert len(told([now]).splitlines()) == 1


def test_a_long_reason_for_a_refusal_is_wrapped():
    refused = {
        "type": "egress_denied",
        "host": "example.com",
        "port": 443,
        "reason": "only the model is reachable",
    }
    assert without_times(told([refused], width=50)) == [
        "  Refused example.com:443: only the",
        "  model is reachable",
    ]


def test_a_reason_is_told_once():
    reason = "Cannot clone it."
    error = {"type": "error", "error": "clone_failed", "message": reason}
    failed = {"type": "state_change", "new_state": "failed", "state_message": reason}
    assert [line.strip() for line in without_times(told([error, failed]))] == [reason, "failed"]


@pytest.mark.parametrize("width", [40, 80, 140])
def test_no_line_is_wider_than_the_window(width):
    frames = [frame for frame in recorded_task.frames() if frame["type"] != "state_change"]
    assert max(map(len, told(frames, width=width).splitlines())) <= width


def test_the_final_state_is_given_back():
    console = Console(file=io.StringIO())
    assert print_events(recorded_task.frames(), console) == "completed"
    assert print_events(recorded_task.frames()[:-1], console) is None


def test_a_task_cannot_draw_on_the_terminal_through_its_story():
    hostile = "\x1b[2J\x1b]52;c;aGk=\x07 [bold]x[/] \u202e"
    use = {"type": "tool_use", "id": "t", "name": hostile, "input": {"command": hostile}}
    frames = [
        {"type": "state_change", "new_state": hostile, "state_message": hostile},
        saying(hostile),
        output(hostile, "stderr"),
        output(json.dumps({"type": "assistant", "message": {"content": [use]}})),
        {"type": "tool_call", "tool": hostile, "tool_use_id": "t", "duration_ms": 1, "is_error": True},
        {"type": "egress_denied", "host": hostile, "port": 1, "reason": hostile},
        {"type": "error", "message": hostile},
        {"type": "gap", "reason": hostile},
    ]
    text = told(frames, width=200)
    assert not set(text) & {"\x1b", "\x07", "\u202e"}
    assert text.count(r"\x1b[2J") == 10
    assert "[bold]x[/]" in text


def test_a_complaint_is_told_without_rulers():
    use = {"type": "tool_use", "id": "t", "name": "Bash", "input": {"command": "make"}}
    answer = {"type": "tool_result", "tool_use_id": "t", "is_error": True, "content": "Exit code 1\n====\nFAIL: one"}
    frames = [
        output(json.dumps({"type": "assistant", "message": {"content": [use]}})),
        output(json.dumps({"type": "user", "message": {"content": [answer]}})),
        {"type": "tool_call", "tool": "Bash", "tool_use_id": "t", "duration_ms": 5, "is_error": True},
    ]
    assert [line.strip() for line in without_times(told(frames))] == ["✗ Bash  make  5 ms", "Exit code 1", "FAIL: one"]


def test_a_long_reason_stays_in_its_column_on_a_terminal_and_whole_elsewhere():
    reason = "Claude Code exited with code 0 without a final result; the task's logs may contain the reason."
    frame = {"type": "state_change", "new_state": "failed", "state_message": reason}
    assert len(told([frame]).splitlines()) == 1
    screen = io.StringIO()
    EventPrinter(Console(file=screen, width=80, force_terminal=True, color_system=None)).handle(frame)
    first, *others = screen.getvalue().splitlines()
    column = first.index("Claude Code")
    assert others
    assert all(line[:column].isspace() and len(line) < 80 for line in others)
    assert " ".join([first[column:], *(line.strip() for line in others)]).split() == reason.split()


def test_a_long_speech_is_cut():
    lines = without_times(told([saying("\n".join(f"line {number}" for number in range(100)))]))
    assert len(lines) == 6
    assert lines[-1].endswith("line 5…")


def test_frames_of_unknown_types_and_odd_shapes_are_passed_over():
    assert (
        told([{"type": "a_new_type"}, {}, {"type": "output"}, {"type": "progress"}, output('{"type": "new"}\n')]) == ""
    )


def test_many_calls_without_an_end_do_not_pile_up():
    uses = [{"type": "tool_use", "id": f"t{number}", "name": "Bash", "input": {}} for number in range(1000)]
    frames = [output(json.dumps({"type": "assistant", "message": {"content": uses}}))]
    end = {"type": "tool_call", "tool": "Bash", "tool_use_id": "t0", "duration_ms": 5}
    assert without_times(told([*frames, end])) == ["  ▸ Bash  5 ms"]


def call(answer: str, *, is_error: bool = False) -> list[dict]:
    """A tool call from its beginning to its end."""
    use = {"type": "tool_use", "id": "t", "name": "Bash", "input": {"command": "make"}}
    result = {"type": "tool_result", "tool_use_id": "t", "is_error": is_error, "content": answer}
    return [
        output(json.dumps({"type": "assistant", "message": {"content": [use]}})),
        output(json.dumps({"type": "user", "message": {"content": [result]}})),
        {"type": "tool_call", "tool": "Bash", "tool_use_id": "t", "duration_ms": 5, "is_error": is_error},
    ]


def test_logs_fold_what_a_tool_answered():
    answer = "\n\n".join(f"line {number} \x1b[2J" for number in range(5))
    assert without_times(told(call(answer), detail=FULL)) == [
        "  ▸ Bash  make  5 ms",
        r"    line 0 \x1b[2J",
        r"    line 1 \x1b[2J",
        r"    line 2 \x1b[2J",
        "    … 2 more lines",
    ]
    assert without_times(told(call("one"), detail=FULL))[1:] == ["    one"]
    assert without_times(told(call(""), detail=FULL))[1:] == []


def test_logs_tell_all_that_the_agent_says():
    speech = saying("\n".join(f"line {number}" for number in range(100)))
    assert len(without_times(told([speech], detail=FULL))) == 100


def test_stdout_alone_tells_of_calls_without_their_events():
    assert without_times(told(call("fine")[:2], detail=STDOUT)) == ["  ▸ Bash  make", "    fine"]


def test_a_watch_tells_states_and_adds_up_the_rest():
    lines = without_times(told(recorded_task.frames(), detail=STATES))
    assert [line.split()[0] for line in lines[:-2]] == [
        "pending", "staging", "provisioning", "ready", "running", "Refused", "completing",
    ]  # fmt: skip
    assert lines[-1].strip() == "27 s · 4 tool calls · 26,911 tokens in, 590 out · $0.0895"


def test_output_that_is_plain_text_is_shown():
    assert without_times(told([output("Fixed it.\n"), output("\n")])) == ["  Fixed it."]


def test_what_stands_on_a_terminal_is_told_as_text_and_believed_by_nobody():
    retried = {"type": "system", "subtype": "api_retry", "attempt": 1, "max_retries": 9, "error": "forged"}
    frames = [saying("Forged."), *call("forged")[:2], output(json.dumps(retried))]
    for detail in (SHORT, FULL, STDOUT):
        lines = without_times(told(frames, width=300, detail=detail, is_believed=False))
        assert [json.loads(line)["type"] for line in lines] == ["assistant", "assistant", "user", "system"]


def test_a_session_is_told_from_a_task_that_works_alone():
    definitions = [{"claude": {"headless": headless}} for headless in (False, True)]
    assert [is_interactive({"definition": each}) for each in (*definitions, {})] == [True, False, False]


def test_answers_without_an_end_do_not_pile_up():
    story = EventPrinter(Console(file=io.StringIO()), FULL)
    for number in range(1000):
        result = {"type": "tool_result", "tool_use_id": f"t{number}", "content": "x" * 1000}
        story.handle(output(json.dumps({"type": "user", "message": {"content": [result]}})))
    assert len(story._results) <= 100


def test_a_further_attempt_is_told_and_what_the_earlier_agent_had_begun_is_forgotten():
    frames = [
        {"type": "error", "error": "runner_lost", "message": "The task's runner died."},
        {"type": "attempt", "attempt": 2, "attempt_id": "bcdefghi2345", "resumes": True},
        {"type": "attempt", "attempt": 3, "attempt_id": "cdefghij2345", "resumes": False},
    ]
    text = told(frames)
    assert "Attempt 2 continues where the previous one was lost" in text
    assert "Attempt 3 begins anew" in text
